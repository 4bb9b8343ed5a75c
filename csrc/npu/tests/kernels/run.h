// SPDX-License-Identifier: Apache-2.0
// Runs a linear through the kernels.
#pragma once

#include "linear.h"
#include "reference.h"

struct Result {
  Quantized16 activations;  // as the kernel left them in workspace
  std::vector<uint16_t> y;
  std::string report;  // the emulator's, of violations of the hardware's rules; empty if there are none
};

// kTwo: two launches, one for each phase; kPipelined: one launch, in chunks of tokens whether or not that is faster.
enum class Launch { kFused, kTwo, kPipelined };

Result run_linear(const Linear16& linear, uint32_t cores, Launch launch = Launch::kFused);
