// SPDX-License-Identifier: Apache-2.0
// Vector instructions that compute each element of the result from one element of each operand.
#pragma once

#include "operand.h"

namespace ascendc_emulator {

template <typename T>
constexpr bool kIsVectorNumber =
    std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, int32_t> || std::is_same_v<T, int16_t>;
template <typename T>
constexpr bool kIsVectorFloat = std::is_same_v<T, float> || std::is_same_v<T, half>;

// a / b as the vector unit computes it: Options::division_ulps away from the correctly rounded quotient.
template <typename T>
T quotient(T a, T b) {
  T result = a / b;
  const float value = result;
  if (value == 0 || !std::isfinite(value)) return result;
  // Neighbours of one sign have neighbouring bits.
  if constexpr (std::is_same_v<T, half>) {
    result.bits = static_cast<uint16_t>(result.bits + division_ulps());
    return result;
  } else {
    return std::bit_cast<float>(static_cast<uint32_t>(std::bit_cast<int32_t>(result) + division_ulps()));
  }
}

template <typename T, typename Operation>
void unary(const char* name, const Region& dst, const Strides& dst_strides, const Region& src,
           const Strides& src_strides, const Repeats& r, const Location& at, Operation operation) {
  Instruction instruction(Pipe::kV, name, at);
  Operand<T> target(instruction, dst, dst_strides), source(instruction, src, src_strides);
  target.CheckAlignment();
  source.CheckAlignment();
  check_repeats(instruction, r, sizeof(T));
  check_overlap(instruction, target, source, r);
  instruction.Compute(cycles_of(r, sizeof(T)));
  if (!instruction.is_full()) return;
  const uint32_t repeats = r.count ? 1 : r.repeats, count = r.count ? static_cast<uint32_t>(r.count) : r.mask;
  for (uint32_t i = 0; i < repeats; ++i) {
    const T* from = source.Read(i, count);
    T* to = target.Results(i, count);
    for (uint32_t j = 0; j < count; ++j) to[j] = operation(from[j]);
    target.Commit(i, count);
  }
}

template <typename T, typename Operation>
void binary(const char* name, const Region& dst, const Region& src0, const Region& src1,
            const AscendC::BinaryRepeatParams& p, const Repeats& r, const Location& at, Operation operation) {
  Instruction instruction(Pipe::kV, name, at);
  Operand<T> target(instruction, dst, {p.dstBlkStride, p.dstRepStride});
  Operand<T> first(instruction, src0, {p.src0BlkStride, p.src0RepStride});
  Operand<T> second(instruction, src1, {p.src1BlkStride, p.src1RepStride});
  target.CheckAlignment();
  first.CheckAlignment();
  second.CheckAlignment();
  check_repeats(instruction, r, sizeof(T));
  check_overlap(instruction, target, first, r);
  check_overlap(instruction, target, second, r);
  instruction.Compute(cycles_of(r, sizeof(T)));
  if (!instruction.is_full()) return;
  const uint32_t repeats = r.count ? 1 : r.repeats, count = r.count ? static_cast<uint32_t>(r.count) : r.mask;
  for (uint32_t i = 0; i < repeats; ++i) {
    const T* a = first.Read(i, count);
    const T* b = second.Read(i, count);
    T* to = target.Results(i, count);
    for (uint32_t j = 0; j < count; ++j) to[j] = operation(a[j], b[j]);
    target.Commit(i, count);
  }
}

}  // namespace ascendc_emulator
