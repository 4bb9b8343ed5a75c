// SPDX-License-Identifier: Apache-2.0
// Runs a linear through the kernels.
#pragma once

#include "device_linear.h"

// kTwo: two launches, one for each phase; kPipelined: one launch, in chunks of tokens whether or not that is faster.
enum class Launch { kFused, kTwo, kPipelined };

Result run_linear(const Linear16& linear, uint32_t cores, Launch launch = Launch::kFused,
                  const ascendc_emulator::Options& options = {});
