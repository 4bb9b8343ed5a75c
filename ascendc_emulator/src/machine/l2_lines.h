// SPDX-License-Identifier: Apache-2.0
// Which bytes of an allocation have to come from the HBM, and which are in the L2 since a core already accessed them.
#pragma once

#include <cstdint>
#include <vector>

namespace ascendc_emulator {

// What several blocks access moves from or to the HBM once, and each of them is charged an equal part. A prediction
// therefore runs a kernel twice: first to count who accesses which lines, then to charge.
class L2Lines {
 public:
  enum class Pass : uint8_t {
    kOnly,   // the first to access a line is charged for all of it
    kCount,  // of two
    kCharge  // of two
  };

  // A launch begins. `is_warm`: what earlier launches accessed is in the L2.
  void Begin(Pass pass, uint64_t allocation_bytes, bool is_warm);
  // The bytes from or to the HBM that `block` is charged for an access to [offset, offset + bytes).
  double Access(uint64_t offset, uint64_t bytes, uint64_t allocation_bytes, uint32_t block);

 private:
  Pass pass_ = Pass::kOnly;
  std::vector<uint64_t> sharers_, charged_;  // for each line, one bit for each block
  std::vector<bool> in_l2_;                  // for each line, from an earlier launch
};

}  // namespace ascendc_emulator
