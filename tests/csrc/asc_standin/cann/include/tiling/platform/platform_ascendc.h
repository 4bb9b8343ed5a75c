// SPDX-License-Identifier: Apache-2.0
// What the host code uses of CANN's platform library.
#pragma once
#include <cstdint>

namespace platform_ascendc {
class PlatformAscendC {
 public:
  uint32_t GetCoreNumAic() const;
};
class PlatformAscendCManager {
 public:
  static PlatformAscendC* GetInstance();
};
}  // namespace platform_ascendc
