// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

namespace w4a4::npu {

ascendc_emulator::Report launch_bfloat16(const Tiling& tiling, uint32_t phases, const LinearAddresses& at,
                                         const ascendc_emulator::Options& options) {
  return launch_factors<bfloat16_t>({tiling, phases, at, options});
}

}  // namespace w4a4::npu
