// SPDX-License-Identifier: Apache-2.0
#include "tiling_cache.h"

namespace w4a4::npu {

Tiling TilingCache::Get(const LinearShape& shape, uint32_t cores) {
  const Key key{shape.tokens, shape.in_features, shape.out_features, shape.left,
                shape.right,  shape.groups,      shape.has_bias,     cores};
  const std::lock_guard<std::mutex> lock(mutex_);
  auto found = tilings_.find(key);
  if (found == tilings_.end() || !is_clip_ratio(shape.clip_ratio)) {
    Tiling tiling = make_tiling(shape, cores);
    if (!tiling.ok()) return tiling;
    if (tilings_.size() == kMaxEntries) tilings_.clear();
    found = tilings_.emplace(key, tiling).first;
  }
  Tiling tiling = found->second;
  set_clip_ratio(shape.clip_ratio, tiling.data);
  return tiling;
}

}  // namespace w4a4::npu
