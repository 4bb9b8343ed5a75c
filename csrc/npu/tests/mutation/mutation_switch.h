// SPDX-License-Identifier: Apache-2.0
// Selects the active mutant: all of them are compiled into one program.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace mutation {

inline int active = 0;  // 0: none

inline bool is(int mutant) { return active == mutant; }

// The id of a flag between cores, which some mutants share with another flag.
class Flag {
 public:
  Flag(uint16_t id, std::vector<std::pair<int, uint16_t>> shared) : id_(id), shared_(std::move(shared)) {}
  operator uint16_t() const {
    for (const auto& [mutant, id] : shared_) {
      if (is(mutant)) return id;
    }
    return id_;
  }

 private:
  uint16_t id_;
  std::vector<std::pair<int, uint16_t>> shared_;
};

}  // namespace mutation
