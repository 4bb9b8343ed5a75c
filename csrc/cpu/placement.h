// SPDX-License-Identifier: Apache-2.0
// Where the memory of packed weights is, on machines with several NUMA nodes.
#pragma once

#include <cstdint>

#include "linear.h"

namespace w4a4 {

// Asks for the whole pages of a range to be placed where the thread runs that touches them first, also in a process
// whose memory is interleaved (as vLLM does it if its cores are those of several nodes), and to be huge ones, of which
// a weight needs so many fewer that both touching and reading it take less time. What the kernel or a container does
// not allow is left out.
void place_by_touch(void* begin, int64_t bytes);

// Zeroes the `tiles` tiles of a packed weight, each on the thread that multiplies it, so that fresh memory is placed
// where that thread runs. Packing then may use any threads.
void zero_tiles(void* packed, int64_t tiles, int64_t tile_bytes, const Pool& pool);

}  // namespace w4a4
