// SPDX-License-Identifier: Apache-2.0
// An allocation of global memory and what the machine knows about its bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "hazards.h"
#include "l2_lines.h"

namespace ascendc_emulator {

struct Allocation {
  uint8_t* begin;
  uint64_t bytes;
  bool is_input;  // only the host writes it
  std::string name;
  std::vector<uint8_t> valid;  // for each byte whether it has been written; empty for inputs
  GlobalShadow shadow;
  L2Lines lines;
};

using Allocations = std::map<const uint8_t*, Allocation>;  // by first address

}  // namespace ascendc_emulator
