// SPDX-License-Identifier: Apache-2.0
// Tilings by shape: a tiling takes the host longer than a small launch takes the device.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>

#include "tiling.h"

namespace w4a4::npu {

class TilingCache {
 public:
  // What make_tiling returns. Layers that differ only in their clip ratio share an entry; errors are not kept.
  Tiling Get(const LinearShape& shape, uint32_t cores);

  size_t size() const { return tilings_.size(); }

  // Prompts have many lengths, so a full cache starts again.
  static constexpr size_t kMaxEntries = 4096;

 private:
  using Key = std::array<int64_t, 8>;
  std::mutex mutex_;
  std::map<Key, Tiling> tilings_;
};

}  // namespace w4a4::npu
