// SPDX-License-Identifier: Apache-2.0
#include "tiling/platform/platform_ascendc.h"

namespace platform_ascendc {
uint32_t PlatformAscendC::GetCoreNumAic() const { return 24; }
PlatformAscendC* PlatformAscendCManager::GetInstance() {
  static PlatformAscendC platform;
  return &platform;
}
}  // namespace platform_ascendc
