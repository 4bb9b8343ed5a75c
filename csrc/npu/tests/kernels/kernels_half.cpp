// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

namespace w4a4::npu {

emulation::Report launch_half(const Tiling& tiling, uint32_t phases, const LinearAddresses& at,
                              const emulation::Options& options) {
  return launch_factors<half>({tiling, phases, at, options});
}

}  // namespace w4a4::npu
