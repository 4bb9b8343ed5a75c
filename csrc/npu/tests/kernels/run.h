// SPDX-License-Identifier: Apache-2.0
// Runs a linear through the kernels.
#pragma once

#include "linear.h"
#include "reference.h"

struct Result {
  Quantized16 activations;  // as the kernel left them in workspace
  std::vector<uint16_t> y;
  std::string report;  // what the emulation found against the rules of the hardware; empty if nothing
};

// kTwo: the two phases launched after each other; kPipelined: one launch, in chunks of tokens whether or not that is
// faster.
enum class Launch { kFused, kTwo, kPipelined };

Result run_linear(const Linear16& linear, uint32_t cores, Launch launch = Launch::kFused);
