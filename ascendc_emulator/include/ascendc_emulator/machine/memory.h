// SPDX-License-Identifier: Apache-2.0
// The on-chip memories of a core of an Atlas A2 or A3.
#pragma once

#include <cstdint>

namespace ascendc_emulator {

enum class Memory : uint8_t { kUb, kL1, kL0a, kL0b, kL0c };
inline constexpr uint32_t kMemories = 5;
inline constexpr uint32_t kMemoryBytes[kMemories] = {196608, 524288, 65536, 65536, 131072};
const char* name_of(Memory memory);

// Bytes [begin, end) of an on-chip memory.
struct Region {
  Memory memory = Memory::kUb;
  uint64_t begin = 0;
  uint64_t end = 0;
};

}  // namespace ascendc_emulator
