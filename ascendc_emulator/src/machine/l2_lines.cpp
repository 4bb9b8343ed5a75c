// SPDX-License-Identifier: Apache-2.0
#include "l2_lines.h"

#include <algorithm>
#include <bit>

namespace ascendc_emulator {
namespace {

constexpr uint64_t kLineBytes = 512;

}  // namespace

void L2Lines::Begin(Pass pass, uint64_t allocation_bytes, bool is_warm) {
  pass_ = pass;
  if (pass != Pass::kCharge) {
    in_l2_.resize(allocation_bytes / kLineBytes + 1);
    for (size_t line = 0; line < in_l2_.size(); ++line) {
      const bool was_accessed = line < sharers_.size() && sharers_[line];
      in_l2_[line] = is_warm && (in_l2_[line] || was_accessed);
    }
    sharers_.assign(in_l2_.size(), 0);
  }
  charged_.assign(sharers_.size(), 0);
}

double L2Lines::Access(uint64_t offset, uint64_t bytes, uint64_t allocation_bytes, uint32_t block) {
  const uint64_t bit = uint64_t{1} << block % 64;
  double from_hbm = 0;
  for (uint64_t line = offset / kLineBytes; line <= (offset + bytes - 1) / kLineBytes; ++line) {
    if (pass_ == Pass::kOnly ? sharers_[line] != 0 : (charged_[line] & bit) != 0) continue;
    if (pass_ != Pass::kCharge) sharers_[line] |= bit;
    charged_[line] |= bit;
    if (in_l2_[line]) continue;
    const uint64_t end = std::min((line + 1) * kLineBytes, allocation_bytes);
    from_hbm += static_cast<double>(end - line * kLineBytes) / std::popcount(sharers_[line]);
  }
  return from_hbm;
}

}  // namespace ascendc_emulator
