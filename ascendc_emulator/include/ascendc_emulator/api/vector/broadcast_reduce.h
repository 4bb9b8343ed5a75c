// SPDX-License-Identifier: Apache-2.0
// Vector instructions that spread one value over many elements, or reduce many to one.
#pragma once

#include "operand.h"

namespace ascendc_emulator {

template <typename T>
void duplicate(const Region& dst, const T& scalar, uint64_t count, const Location& at) {
  Instruction instruction(Pipe::kV, "Duplicate", at);
  Operand<T> target(instruction, dst, {});
  target.CheckAlignment();
  instruction.Compute((count * sizeof(T) + kRepeatBytes - 1) / kRepeatBytes);
  T* to = target.Results(0, static_cast<uint32_t>(count));
  if (instruction.is_full()) std::fill(to, to + count, scalar);
}

template <typename T>
void duplicate(const Region& dst, const Strides& strides, const T& scalar, const Repeats& r, const Location& at) {
  Instruction instruction(Pipe::kV, "Duplicate", at);
  Operand<T> target(instruction, dst, strides);
  target.CheckAlignment();
  check_repeats(instruction, r, sizeof(T));
  instruction.Compute(r.repeats);
  for (uint32_t i = 0; instruction.is_full() && i < r.repeats; ++i) {
    T* to = target.Results(i, r.mask);
    std::fill(to, to + r.mask, scalar);
    target.Commit(i, r.mask);
  }
}

// The largest element of each repeat; `dst_stride` in elements.
template <typename T>
void reduce_max(const Region& dst, uint32_t dst_stride, const Region& src, const Strides& src_strides, const Repeats& r,
                AscendC::ReduceOrder order, const Location& at) {
  Instruction instruction(Pipe::kV, "WholeReduceMax", at);
  Operand<T> source(instruction, src, src_strides);
  source.CheckAlignment();
  instruction.Check(order == AscendC::ReduceOrder::ORDER_ONLY_VALUE, Detector::kParameter,
                    "only ORDER_ONLY_VALUE is emulated");
  instruction.Check(dst.begin % (2 * sizeof(T)) == 0, Detector::kAlignment,
                    "the target must be aligned to two elements");
  check_repeats(instruction, r, sizeof(T));
  instruction.Compute(r.repeats);
  for (uint32_t i = 0; instruction.is_full() && i < r.repeats; ++i) {
    const T* from = source.Read(i, r.mask);
    T largest = from[0];
    for (uint32_t j = 1; j < r.mask; ++j) largest = from[j] > largest ? from[j] : largest;
    const uint64_t to = dst.begin + uint64_t{i} * dst_stride * sizeof(T);
    std::memcpy(instruction.Write(dst.memory, to, sizeof(T), dst.end), &largest, sizeof(T));
  }
}

// Eight elements of the source per repeat, each of which fills a block of the target.
template <typename T>
void broadcast_to_blocks(const Region& dst, const Region& src, uint32_t repeats, const AscendC::BrcbRepeatParams& p,
                         const Location& at) {
  Instruction instruction(Pipe::kV, "Brcb", at);
  Operand<T> source(instruction, src, {});
  Operand<T> target(instruction, dst, {});
  source.CheckAlignment();
  target.CheckAlignment();
  instruction.Check(src.begin != dst.begin, Detector::kParameter, "source and target must differ");
  instruction.Compute(repeats);
  const uint64_t block_stride = std::max<uint64_t>(p.dstBlkStride, 1);
  for (uint32_t i = 0; instruction.is_full() && i < repeats; ++i) {
    T values[8];
    std::memcpy(values, instruction.Read(src.memory, src.begin + i * sizeof(values), sizeof(values), src.end),
                sizeof(values));
    for (uint32_t j = 0; j < 8; ++j) {
      const uint64_t to = dst.begin + (uint64_t{i} * p.dstRepStride + j * block_stride) * 32;
      T* block = reinterpret_cast<T*>(instruction.Write(dst.memory, to, 32, dst.end));
      std::fill(block, block + 32 / sizeof(T), values[j]);
    }
  }
}

}  // namespace ascendc_emulator
