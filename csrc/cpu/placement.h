// SPDX-License-Identifier: Apache-2.0
// Where the memory of packed weights is, on machines with several NUMA nodes.
#pragma once

#include <cstdint>

#include "linear.h"

namespace w4a4 {

// Zeroes the `tiles` tiles of a packed weight, each on the thread that multiplies it, so that fresh memory is placed
// where that thread runs, also in a process whose memory is interleaved (as vLLM does it if its cores are those of
// several nodes). Packing then may use any threads. The memory has huge pages where the kernel gives them on request.
void zero_tiles(void* packed, int64_t tiles, int64_t tile_bytes, const Pool& pool);

}  // namespace w4a4
