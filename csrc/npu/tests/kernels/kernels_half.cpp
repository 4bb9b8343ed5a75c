// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

namespace w4a4::npu {

void launch_half(const Tiling& tiling, uint32_t phases, const LinearAddresses& at) {
  launch_factors<half>(tiling, phases, at);
}

}  // namespace w4a4::npu
