// SPDX-License-Identifier: Apache-2.0
// Collects violations, those of the same kind at the same place as one.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "ascendc_emulator/machine/location.h"
#include "ascendc_emulator/report.h"

namespace ascendc_emulator {

std::string text_of(const Location& at);  // file:line
std::string range_text(const std::string& where, uint64_t begin, uint64_t bytes);

class Violations {
 public:
  // `core`: as reports name it.
  void Add(Detector detector, const std::string& core, const std::string& what, const Location& at);
  std::vector<Violation> Take() { return std::move(all_); }

 private:
  std::vector<Violation> all_;
  std::map<std::tuple<Detector, uint64_t, std::string>, size_t> seen_;  // indices in all_
};

}  // namespace ascendc_emulator
