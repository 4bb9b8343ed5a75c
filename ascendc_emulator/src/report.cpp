// SPDX-License-Identifier: Apache-2.0
#include "ascendc_emulator/report.h"

#include <algorithm>
#include <sstream>

#include "ascendc_emulator/machine/memory.h"

namespace ascendc_emulator {

const char* name_of(Detector detector) {
  constexpr const char* kNames[] = {"capacity",      "bounds", "alignment",  "parameter", "core",
                                    "uninitialised", "flag",   "cross-core", "hazard",    "deadlock"};
  return kNames[static_cast<uint32_t>(detector)];
}

const char* name_of(Pipe pipe) {
  constexpr const char* kNames[] = {"S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX"};
  return kNames[static_cast<uint32_t>(pipe)];
}

const char* name_of(Path path) {
  constexpr const char* kNames[] = {"GM->L1", "GM->UB", "UB->GM", "L0C->GM", "L0C->L1", "L1->L0A", "L1->L0B"};
  return kNames[static_cast<uint32_t>(path)];
}

const char* name_of(Memory memory) {
  constexpr const char* kNames[] = {"UB", "L1", "L0A", "L0B", "L0C"};
  return kNames[static_cast<uint32_t>(memory)];
}

bool Report::has(Detector detector) const {
  return std::any_of(violations.begin(), violations.end(), [&](const Violation& v) { return v.detector == detector; });
}

std::string Report::text() const {
  std::ostringstream out;
  for (const Violation& violation : violations) {
    out << name_of(violation.detector) << ": " << violation.text;
    if (violation.count > 1) out << " (" << violation.count << " times)";
    out << '\n';
  }
  return out.str();
}

}  // namespace ascendc_emulator
