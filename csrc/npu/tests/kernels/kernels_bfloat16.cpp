// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

namespace w4a4::npu {

void launch_bfloat16(const Tiling& tiling, uint32_t phases, const LinearAddresses& at) {
  launch_factors<bfloat16_t>(tiling, phases, at);
}

}  // namespace w4a4::npu
