// SPDX-License-Identifier: Apache-2.0
// Launches the kernel that a tiling selects, under the emulator.
#pragma once

#include "../../host/tiling.h"
#include "../../kernels/flatquant_linear.h"
#include "ascendc_emulator/launch.h"

namespace w4a4::npu {

// phases: 1 transform and quantize, 2 multiply, 3 both in one launch.
ascendc_emulator::Report launch_half(const Tiling& tiling, uint32_t phases, const LinearAddresses& at,
                                     const ascendc_emulator::Options& options = {});
ascendc_emulator::Report launch_bfloat16(const Tiling& tiling, uint32_t phases, const LinearAddresses& at,
                                         const ascendc_emulator::Options& options = {});

}  // namespace w4a4::npu
