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

// `fused`: one launch; otherwise the two phases are launched after each other.
Result run_linear(const Linear16& linear, uint32_t cores, bool fused = true);
