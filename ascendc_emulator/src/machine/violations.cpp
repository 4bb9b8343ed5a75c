// SPDX-License-Identifier: Apache-2.0
#include "violations.h"

#include <string_view>
#include <utility>

namespace ascendc_emulator {
namespace {

constexpr size_t kMaxReported = 200;

}  // namespace

std::string text_of(const Location& at) {
  const std::string_view path = at.file_name();
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(at.line());
}

std::string range_text(const std::string& where, uint64_t begin, uint64_t bytes) {
  return where + " [" + std::to_string(begin) + ", " + std::to_string(begin + bytes) + ")";
}

void Violations::Add(Detector detector, const std::string& core, const std::string& what, const Location& at) {
  std::string text;
  if (at.line() > 0) text = text_of(at) + ": ";
  text += core + ": " + what;
  // The same violation on another core or in a later iteration is counted, not listed again.
  const auto key = std::make_tuple(detector, (uint64_t{at.line()} << 32) | at.column(),
                                   std::string(at.file_name()) + what.substr(0, what.find('[')));
  const auto [seen, is_new] = seen_.emplace(key, all_.size());
  if (!is_new) {
    ++all_[seen->second].count;
  } else if (all_.size() < kMaxReported) {
    all_.push_back({detector, std::move(text)});
  } else {
    seen_.erase(seen);
  }
}

}  // namespace ascendc_emulator
