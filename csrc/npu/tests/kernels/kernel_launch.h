// SPDX-License-Identifier: Apache-2.0
// Launches, under the emulation, the kernel that a tiling asks for.
#pragma once

#include "../../host/tiling.h"
#include "../../kernels/flatquant_linear.h"
#include "launch.h"

namespace w4a4::npu {

// phases: 1 transform and quantize, 2 multiply, 3 both in one launch.
emulation::Report launch_half(const Tiling& tiling, uint32_t phases, const LinearAddresses& at,
                              const emulation::Options& options = {});
emulation::Report launch_bfloat16(const Tiling& tiling, uint32_t phases, const LinearAddresses& at,
                                  const emulation::Options& options = {});

}  // namespace w4a4::npu
