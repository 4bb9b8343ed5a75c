// SPDX-License-Identifier: Apache-2.0
// The operands of vector instructions. A repeat takes 256 bytes of the instruction's wider type: 8 blocks of 32 bytes,
// which lie a block stride apart; from one repeat to the next it is a repeat stride.
#pragma once

#include <algorithm>
#include <cstring>

#include "../tensor.h"

namespace ascendc_emulator {

inline constexpr uint32_t kRepeatBytes = 256;
inline constexpr uint32_t kMaxRepeats = 255;

// One operand of an instruction in its strided form; strides in 32 bytes.
struct Strides {
  uint32_t block = 1;
  uint32_t repeat = 8;
};

// Reads and writes a repeat's elements as one array; they are copied if their blocks are apart.
template <typename T>
class Operand {
 public:
#if defined(ASCENDC_EMULATOR_PASS_AIC)
  static_assert(sizeof(T) == 0, "a vector instruction in the AIC's pass");
#endif
  Operand(Instruction& instruction, const Region& region, const Strides& strides)
      : instruction_(instruction), region_(region), strides_(strides) {
    instruction_.Check(region.memory == Memory::kUb, Detector::kParameter, "operands must be in UB");
  }
  void CheckAlignment(uint64_t bytes = 32) {
    instruction_.Check(region_.begin % bytes == 0, Detector::kAlignment, "an operand's address is not aligned");
  }

  const T* Read(uint32_t repeat, uint32_t count) {
    const uint64_t begin = this->begin(repeat);
    if (strides_.block == 1 || count <= kBlock) {
      return reinterpret_cast<const T*>(instruction_.Read(region_.memory, begin, bytes_of<T>(count), region_.end));
    }
    for (uint32_t i = 0; i < count; i += kBlock) {
      const uint32_t part = std::min(kBlock, count - i);
      const uint64_t from = begin + uint64_t{i / kBlock} * strides_.block * 32;
      std::memcpy(buffer_ + bytes_of<T>(i), instruction_.Read(region_.memory, from, bytes_of<T>(part), region_.end),
                  bytes_of<T>(part));
    }
    return reinterpret_cast<const T*>(buffer_);
  }

  // Where to put the results; call Commit() afterwards.
  T* Results(uint32_t repeat, uint32_t count) {
    const uint64_t begin = this->begin(repeat);
    if (strides_.block == 1 || count <= kBlock) {
      return reinterpret_cast<T*>(instruction_.Write(region_.memory, begin, bytes_of<T>(count), region_.end));
    }
    return reinterpret_cast<T*>(buffer_);
  }
  void Commit(uint32_t repeat, uint32_t count) {
    if (strides_.block == 1 || count <= kBlock) return;
    const uint64_t begin = this->begin(repeat);
    for (uint32_t i = 0; i < count; i += kBlock) {
      const uint32_t part = std::min(kBlock, count - i);
      const uint64_t to = begin + uint64_t{i / kBlock} * strides_.block * 32;
      std::memcpy(instruction_.Write(region_.memory, to, bytes_of<T>(part), region_.end), buffer_ + bytes_of<T>(i),
                  bytes_of<T>(part));
    }
  }

  // The first byte of a repeat.
  uint64_t begin(uint32_t repeat) const { return region_.begin + uint64_t{repeat} * strides_.repeat * 32; }

 private:
  static constexpr uint32_t kBlock = kBlockElements<T>;
  Instruction& instruction_;
  const Region region_;
  const Strides strides_;
  alignas(32) uint8_t buffer_[kRepeatBytes];
};

// How a call is divided into repeats.
struct Repeats {
  uint32_t repeats;
  uint32_t mask;   // elements in a repeat
  uint64_t count;  // elements of the whole call, for the form without a mask; 0 with one
};

inline void check_repeats(Instruction& instruction, const Repeats& repeats, uint32_t largest_element) {
  if (repeats.count || repeats.repeats == 0) return;
  instruction.Check(repeats.repeats <= kMaxRepeats, Detector::kParameter, "repeatTime must be at most 255");
  instruction.Check(repeats.mask >= 1 && repeats.mask <= kRepeatBytes / largest_element, Detector::kParameter,
                    "mask must be between 1 and the elements of 256 bytes");
}

// Source and target of a repeat must be the same bytes or have none in common, and no repeat may write what the next
// one reads.
template <typename T, typename U>
inline void check_overlap(Instruction& instruction, const Operand<T>& target, const Operand<U>& source,
                          const Repeats& r) {
  if (r.count) {
    const uint64_t to = target.begin(0), from = source.begin(0);
    const bool apart = to + bytes_of<T>(r.count) <= from || from + bytes_of<U>(r.count) <= to;
    instruction.Check(apart || (to == from && sizeof(T) == sizeof(U)), Detector::kParameter,
                      "source and target overlap in part");
    return;
  }
  for (uint32_t i = 0; i < r.repeats; ++i) {
    const uint64_t to = target.begin(i), to_end = to + bytes_of<T>(r.mask);
    const uint64_t from = source.begin(i), from_end = from + bytes_of<U>(r.mask);
    const bool apart = to_end <= from || from_end <= to;
    if (!instruction.Check(apart || (to == from && sizeof(T) == sizeof(U)), Detector::kParameter,
                           "source and target overlap in part")) {
      return;
    }
    if (i + 1 >= r.repeats) continue;
    const uint64_t next = source.begin(i + 1), next_end = next + bytes_of<U>(r.mask);
    if (!instruction.Check(to_end <= next || next_end <= to || from == next, Detector::kParameter,
                           "a repeat writes what the next one reads")) {
      return;
    }
  }
}

inline uint64_t cycles_of(const Repeats& r, uint32_t largest_element) {
  return r.count ? (r.count * largest_element + kRepeatBytes - 1) / kRepeatBytes : r.repeats;
}

}  // namespace ascendc_emulator
