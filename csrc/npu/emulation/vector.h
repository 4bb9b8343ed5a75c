// SPDX-License-Identifier: Apache-2.0
// The vector unit. An instruction's repeat takes 256 bytes of its wider type: 8 blocks of 32 bytes, whose distances are
// the block strides; the repeat strides lead from one repeat to the next.
#pragma once

#include "tensor.h"

namespace emulation {

inline constexpr uint32_t kRepeatBytes = 256;
inline constexpr uint32_t kMaxRepeats = 255;

// One operand of an instruction in its strided form; strides in 32 bytes.
struct Strides {
  uint32_t block = 1;
  uint32_t repeat = 8;
};

// `count` elements of a repeat, as they follow each other, in a buffer if their blocks do not.
template <typename T>
class Operand {
 public:
#if defined(W4A4_PASS_AIC)
  static_assert(sizeof(T) == 0, "a vector instruction in the AIC's pass");
#endif
  Operand(Instruction& instruction, const Place& place, const Strides& strides)
      : instruction_(instruction), place_(place), strides_(strides) {
    instruction_.Check(place.memory == Memory::kUb, Detector::kParameter, "operands must be in UB");
  }
  void CheckAlignment(uint64_t bytes = 32) {
    instruction_.Check(place_.begin % bytes == 0, Detector::kAlignment, "an operand's address is not aligned");
  }

  const T* Read(uint32_t repeat, uint32_t count) {
    const uint64_t begin = place_.begin + uint64_t{repeat} * strides_.repeat * 32;
    if (strides_.block == 1 || count <= kBlock) {
      return reinterpret_cast<const T*>(instruction_.Read(place_.memory, begin, bytes_of<T>(count), place_.end));
    }
    for (uint32_t i = 0; i < count; i += kBlock) {
      const uint32_t part = std::min(kBlock, count - i);
      const uint64_t from = begin + uint64_t{i / kBlock} * strides_.block * 32;
      std::memcpy(buffer_ + bytes_of<T>(i), instruction_.Read(place_.memory, from, bytes_of<T>(part), place_.end),
                  bytes_of<T>(part));
    }
    return reinterpret_cast<const T*>(buffer_);
  }

  // Where to put the results; Commit() then.
  T* Results(uint32_t repeat, uint32_t count) {
    const uint64_t begin = place_.begin + uint64_t{repeat} * strides_.repeat * 32;
    if (strides_.block == 1 || count <= kBlock) {
      return reinterpret_cast<T*>(instruction_.Write(place_.memory, begin, bytes_of<T>(count), place_.end));
    }
    return reinterpret_cast<T*>(buffer_);
  }
  void Commit(uint32_t repeat, uint32_t count) {
    if (strides_.block == 1 || count <= kBlock) return;
    const uint64_t begin = place_.begin + uint64_t{repeat} * strides_.repeat * 32;
    for (uint32_t i = 0; i < count; i += kBlock) {
      const uint32_t part = std::min(kBlock, count - i);
      const uint64_t to = begin + uint64_t{i / kBlock} * strides_.block * 32;
      std::memcpy(instruction_.Write(place_.memory, to, bytes_of<T>(part), place_.end), buffer_ + bytes_of<T>(i),
                  bytes_of<T>(part));
    }
  }

  // The bytes between the first and the last block of a repeat.
  uint64_t begin(uint32_t repeat) const { return place_.begin + uint64_t{repeat} * strides_.repeat * 32; }

 private:
  static constexpr uint32_t kBlock = kBlockElements<T>;
  Instruction& instruction_;
  const Place place_;
  const Strides strides_;
  alignas(32) uint8_t buffer_[kRepeatBytes];
};

// How a call is cut into repeats.
struct Repeats {
  uint32_t repeats;
  uint32_t mask;   // elements of a repeat
  uint64_t count;  // elements of the whole, for the form without a mask; 0 with one
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

inline constexpr Strides kConsecutive{1, 8};

template <typename T, typename Operation>
void unary(const char* name, const Place& dst, const Strides& dst_strides, const Place& src, const Strides& src_strides,
           const Repeats& r, const Location& at, Operation operation) {
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
void binary(const char* name, const Place& dst, const Place& src0, const Place& src1,
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

// --- Cast ---

template <typename T, typename U>
constexpr bool can_cast() {
  using std::is_same_v;
  if constexpr (is_same_v<U, half>) {
    return is_same_v<T, float> || is_same_v<T, int32_t> || is_same_v<T, int16_t> || is_same_v<T, int8_t> ||
           is_same_v<T, uint8_t> || kIsInt4<T>;
  } else if constexpr (is_same_v<U, float>) {
    return is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat16_t> || is_same_v<T, int32_t> ||
           is_same_v<T, int64_t> || is_same_v<T, int16_t>;
  } else if constexpr (is_same_v<U, bfloat16_t>) {
    return is_same_v<T, float> || is_same_v<T, int32_t>;
  } else if constexpr (is_same_v<U, int32_t>) {
    return is_same_v<T, float> || is_same_v<T, int64_t> || is_same_v<T, int16_t>;
  } else if constexpr (is_same_v<U, int16_t>) {
    return is_same_v<T, half> || is_same_v<T, float>;
  } else {
    return (is_same_v<U, int8_t> || is_same_v<U, uint8_t> || kIsInt4<U>) && is_same_v<T, half>;
  }
}

// Whether the documents list the mode for this pair.
template <typename T, typename U>
constexpr bool takes_mode(AscendC::RoundMode mode) {
  using AscendC::RoundMode;
  constexpr bool kIsExact = (sizeof(T) > sizeof(U) && !std::is_same_v<T, int32_t>) || std::is_same_v<U, int8_t> ||
                            std::is_same_v<U, uint8_t> || kIsInt4<U>;
  if (std::is_same_v<U, bfloat16_t> && std::is_same_v<T, int32_t>) {
    return mode != RoundMode::CAST_NONE && mode != RoundMode::CAST_ODD;
  }
  if (kIsExact || (std::is_same_v<U, int32_t> && !std::is_same_v<T, float>)) return mode == RoundMode::CAST_NONE;
  if (mode == RoundMode::CAST_ODD) return std::is_same_v<U, float> && std::is_same_v<T, half>;
  if (mode == RoundMode::CAST_NONE) {
    return (std::is_same_v<U, float> && std::is_same_v<T, half>) || (std::is_same_v<U, half> && (sizeof(T) == 1)) ||
           std::is_same_v<U, int16_t> || (std::is_same_v<U, int32_t> && std::is_same_v<T, float>);
  }
  return true;
}

inline bool increments(AscendC::RoundMode mode, uint64_t kept, uint64_t lost, uint64_t half, bool is_negative) {
  using AscendC::RoundMode;
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return is_negative && lost != 0;
    case RoundMode::CAST_CEIL:
      return !is_negative && lost != 0;
    case RoundMode::CAST_ROUND:
      return half != 0 && lost >= half;
    case RoundMode::CAST_TRUNC:
      return false;
    case RoundMode::CAST_ODD:
      return lost != 0 && !(kept & 1);
    default:
      return NearestEven{}(kept, lost, half, is_negative);
  }
}

inline double round_to_integer(double value, AscendC::RoundMode mode) {
  using AscendC::RoundMode;
  switch (mode) {
    case RoundMode::CAST_FLOOR:
      return std::floor(value);
    case RoundMode::CAST_CEIL:
      return std::ceil(value);
    case RoundMode::CAST_ROUND:
      return std::round(value);
    case RoundMode::CAST_TRUNC:
      return std::trunc(value);
    default:
      return std::nearbyint(value);
  }
}

// Saturates, as the documents give for the default mode.
template <typename T>
T saturated(double value, double lowest, double highest) {
  if (std::isnan(value)) return 0;
  return static_cast<T>(std::clamp(value, lowest, highest));
}

template <typename T, typename U>
T cast_number(U value, AscendC::RoundMode mode) {
  if constexpr (std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>) {
    const auto rounding = [mode](uint64_t kept, uint64_t lost, uint64_t half_unit, bool is_negative) {
      return increments(mode, kept, lost, half_unit, is_negative);
    };
    T result;
    if constexpr (std::is_same_v<T, half>) {
      result.bits = narrow<10, 5>(static_cast<float>(value), true, rounding);
    } else {
      result.bits = narrow<7, 8>(static_cast<float>(value), true, rounding);
    }
    return result;
  } else if constexpr (std::is_same_v<T, float>) {
    if constexpr (std::is_same_v<U, float>) {
      return static_cast<float>(round_to_integer(value, mode));
    } else if constexpr (std::is_same_v<U, int32_t>) {
      const float nearest = static_cast<float>(value);
      const double error = static_cast<double>(nearest) - static_cast<double>(value);
      using AscendC::RoundMode;
      const bool towards_zero = mode == RoundMode::CAST_TRUNC;
      const bool down = mode == RoundMode::CAST_FLOOR || (towards_zero && value > 0);
      const bool up = mode == RoundMode::CAST_CEIL || (towards_zero && value < 0);
      if (down && error > 0) return std::nextafter(nearest, -INFINITY);
      if (up && error < 0) return std::nextafter(nearest, INFINITY);
      if (mode == RoundMode::CAST_ROUND && error != 0) {
        // Halves go away from zero: the neighbour away from zero is taken where it is as near.
        const float away = std::nextafter(nearest, value < 0 ? -INFINITY : INFINITY);
        if (std::abs(away - static_cast<double>(value)) == std::abs(error)) return away;
      }
      return nearest;
    } else {
      return static_cast<float>(value);
    }
  } else {
    constexpr double kHighest = static_cast<double>(std::numeric_limits<T>::max());
    const double rounded = round_to_integer(static_cast<double>(value), mode);
    if constexpr (std::is_same_v<T, int64_t>) {
      if (rounded >= kHighest) return std::numeric_limits<T>::max();
    }
    return saturated<T>(rounded, static_cast<double>(std::numeric_limits<T>::min()), kHighest);
  }
}

template <typename T, typename U>
void cast_row(void* to, const void* from, uint32_t count, AscendC::RoundMode mode) {
  if constexpr (kIsInt4<T>) {
    uint8_t* bytes = static_cast<uint8_t*>(to);
    const half* values = static_cast<const half*>(from);
    for (uint32_t i = 0; i < count; i += 2) {
      const auto nibble = [&](uint32_t at) {
        return static_cast<int>(saturated<int32_t>(round_to_integer(static_cast<float>(values[at]), mode), -8, 7)) & 15;
      };
      bytes[i / 2] = static_cast<uint8_t>(nibble(i) | nibble(i + 1) << 4);
    }
  } else if constexpr (kIsInt4<U>) {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    T* values = static_cast<T*>(to);
    for (uint32_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(static_cast<int8_t>(bytes[i / 2] << (i % 2 ? 0 : 4)) >> 4);
    }
  } else {
    const U* values = static_cast<const U*>(from);
    T* results = static_cast<T*>(to);
    for (uint32_t i = 0; i < count; ++i) results[i] = cast_number<T, U>(values[i], mode);
  }
}

template <typename T, typename U>
void cast(const Place& dst, const Place& src, AscendC::RoundMode mode, const AscendC::UnaryRepeatParams& p,
          const Repeats& r, const Location& at) {
  static_assert(can_cast<T, U>(), "the vector unit has no such conversion");
  Instruction instruction(Pipe::kV, "Cast", at);
  instruction.Check(takes_mode<T, U>(mode), Detector::kParameter, "the conversion does not take this rounding mode");
  Operand<T> target(instruction, dst, {p.dstBlkStride, p.dstRepStride});
  Operand<U> source(instruction, src, {p.srcBlkStride, p.srcRepStride});
  target.CheckAlignment();
  source.CheckAlignment();
  constexpr uint32_t kWider = sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U);
  check_repeats(instruction, r, kWider);
  check_overlap(instruction, target, source, r);
  const uint32_t repeats = r.count ? 1 : r.repeats, count = r.count ? static_cast<uint32_t>(r.count) : r.mask;
  instruction.Check(!(kIsInt4<T> || kIsInt4<U>) || count % 2 == 0, Detector::kParameter,
                    "counts of int4b_t must be even");
  instruction.Compute(cycles_of(r, kWider));
  if (!instruction.is_full()) return;
  for (uint32_t i = 0; i < repeats; ++i) {
    const U* from = source.Read(i, count);
    T* to = target.Results(i, count);
    cast_row<T, U>(to, from, count, mode);
    target.Commit(i, count);
  }
}

template <typename T>
constexpr bool kIsVectorNumber =
    std::is_same_v<T, float> || std::is_same_v<T, half> || std::is_same_v<T, int32_t> || std::is_same_v<T, int16_t>;
template <typename T>
constexpr bool kIsVectorFloat = std::is_same_v<T, float> || std::is_same_v<T, half>;

}  // namespace emulation

namespace AscendC {

// Each in the form over the first `count` elements and in the form of repeats under a mask.
#define W4A4_BINARY(NAME, EXPRESSION, IS_SUPPORTED)                                                                    \
  template <typename T>                                                                                                \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,                  \
                   const int32_t& count, Location at = Location::current()) {                                          \
    static_assert(IS_SUPPORTED, #NAME " does not take this type");                                                     \
    emulation::binary<T>(#NAME, dst.place(), src0.place(), src1.place(), {}, {0, 0, static_cast<uint64_t>(count)}, at, \
                         [](T a, T b) -> T { return EXPRESSION; });                                                    \
  }                                                                                                                    \
  template <typename T>                                                                                                \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask,   \
                   const uint8_t repeatTime, const BinaryRepeatParams& p, Location at = Location::current()) {         \
    static_assert(IS_SUPPORTED, #NAME " does not take this type");                                                     \
    emulation::binary<T>(#NAME, dst.place(), src0.place(), src1.place(), p,                                            \
                         {repeatTime, static_cast<uint32_t>(mask), 0}, at, [](T a, T b) -> T { return EXPRESSION; });  \
  }

W4A4_BINARY(Add, a + b, emulation::kIsVectorNumber<T>)
W4A4_BINARY(Sub, a - b, emulation::kIsVectorNumber<T>)
W4A4_BINARY(Mul, a* b, emulation::kIsVectorNumber<T>)
W4A4_BINARY(Div, a / b, emulation::kIsVectorFloat<T>)
W4A4_BINARY(Max, a > b ? a : b, emulation::kIsVectorNumber<T>)
W4A4_BINARY(Min, a < b ? a : b, emulation::kIsVectorNumber<T>)
#undef W4A4_BINARY

#define W4A4_SCALAR(NAME, EXPRESSION)                                                                           \
  template <typename T>                                                                                         \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count, \
                   Location at = Location::current()) {                                                         \
    static_assert(emulation::kIsVectorNumber<T>, #NAME " does not take this type");                             \
    emulation::unary<T>(#NAME, dst.place(), {}, src.place(), {}, {0, 0, static_cast<uint64_t>(count)}, at,      \
                        [scalar](T a) -> T { return EXPRESSION; });                                             \
  }                                                                                                             \
  template <typename T>                                                                                         \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, uint64_t mask,        \
                   const uint8_t repeatTime, const UnaryRepeatParams& p, Location at = Location::current()) {   \
    static_assert(emulation::kIsVectorNumber<T>, #NAME " does not take this type");                             \
    emulation::unary<T>(#NAME, dst.place(), {p.dstBlkStride, p.dstRepStride}, src.place(),                      \
                        {p.srcBlkStride, p.srcRepStride}, {repeatTime, static_cast<uint32_t>(mask), 0}, at,     \
                        [scalar](T a) -> T { return EXPRESSION; });                                             \
  }

W4A4_SCALAR(Adds, a + scalar)
W4A4_SCALAR(Muls, a* scalar)
W4A4_SCALAR(Maxs, a > scalar ? a : scalar)
W4A4_SCALAR(Mins, a < scalar ? a : scalar)
#undef W4A4_SCALAR

template <typename T>
inline void Abs(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count,
                Location at = Location::current()) {
  static_assert(emulation::kIsVectorFloat<T>, "Abs takes half and float");
  emulation::unary<T>("Abs", dst.place(), {}, src.place(), {}, {0, 0, static_cast<uint64_t>(count)}, at,
                      [](T a) -> T { return std::fabs(a); });
}

template <typename T>
inline void Abs(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask, const uint8_t repeatTime,
                const UnaryRepeatParams& p, Location at = Location::current()) {
  static_assert(emulation::kIsVectorFloat<T>, "Abs takes half and float");
  emulation::unary<T>("Abs", dst.place(), {p.dstBlkStride, p.dstRepStride}, src.place(),
                      {p.srcBlkStride, p.srcRepStride}, {repeatTime, static_cast<uint32_t>(mask), 0}, at,
                      [](T a) -> T { return std::fabs(a); });
}

template <typename T, typename U>
inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode, const uint32_t count,
                 Location at = Location::current()) {
  emulation::cast<T, U>(dst.place(), src.place(), mode, {}, {0, 0, count}, at);
}

template <typename T, typename U>
inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode, const uint64_t mask,
                 const uint8_t repeatTime, const UnaryRepeatParams& p, Location at = Location::current()) {
  emulation::cast<T, U>(dst.place(), src.place(), mode, p, {repeatTime, static_cast<uint32_t>(mask), 0}, at);
}

template <typename T>
inline void Duplicate(const LocalTensor<T>& dst, const T& scalar, const int32_t& count,
                      Location at = Location::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate takes 16- and 32-bit types");
  emulation::Instruction instruction(emulation::Pipe::kV, "Duplicate", at);
  emulation::Operand<T> target(instruction, dst.place(), {});
  target.CheckAlignment();
  instruction.Compute((static_cast<uint64_t>(count) * sizeof(T) + 255) / 256);
  T* to = target.Results(0, static_cast<uint32_t>(count));
  if (instruction.is_full()) std::fill(to, to + count, scalar);
}

template <typename T>
inline void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask, const uint8_t repeatTime,
                      const uint16_t dstBlockStride, const uint8_t dstRepeatStride, Location at = Location::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate takes 16- and 32-bit types");
  emulation::Instruction instruction(emulation::Pipe::kV, "Duplicate", at);
  emulation::Operand<T> target(instruction, dst.place(), {dstBlockStride, dstRepeatStride});
  target.CheckAlignment();
  const emulation::Repeats r{repeatTime, static_cast<uint32_t>(mask), 0};
  emulation::check_repeats(instruction, r, sizeof(T));
  instruction.Compute(repeatTime);
  for (uint32_t i = 0; instruction.is_full() && i < repeatTime; ++i) {
    T* to = target.Results(i, r.mask);
    std::fill(to, to + mask, scalar);
    target.Commit(i, r.mask);
  }
}

// The largest of each repeat; `dstRepStride` in results.
template <typename T>
inline void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                           const int32_t repeatTime, const int32_t dstRepStride, const int32_t srcBlkStride,
                           const int32_t srcRepStride, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX,
                           Location at = Location::current()) {
  static_assert(emulation::kIsVectorFloat<T>, "WholeReduceMax takes half and float");
  emulation::Instruction instruction(emulation::Pipe::kV, "WholeReduceMax", at);
  emulation::Operand<T> source(instruction, src.place(),
                               {static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)});
  source.CheckAlignment();
  instruction.Check(order == ReduceOrder::ORDER_ONLY_VALUE, emulation::Detector::kParameter,
                    "only ORDER_ONLY_VALUE is emulated");
  instruction.Check(dst.place().begin % (2 * sizeof(T)) == 0, emulation::Detector::kAlignment,
                    "the target must be aligned to two elements");
  const emulation::Repeats r{static_cast<uint32_t>(repeatTime), static_cast<uint32_t>(mask), 0};
  emulation::check_repeats(instruction, r, sizeof(T));
  instruction.Compute(r.repeats);
  for (uint32_t i = 0; instruction.is_full() && i < r.repeats; ++i) {
    const T* from = source.Read(i, r.mask);
    T largest = from[0];
    for (uint32_t j = 1; j < r.mask; ++j) largest = from[j] > largest ? from[j] : largest;
    const uint64_t to = dst.place().begin + uint64_t{i} * static_cast<uint32_t>(dstRepStride) * sizeof(T);
    std::memcpy(instruction.Write(dst.place().memory, to, sizeof(T), dst.place().end), &largest, sizeof(T));
  }
}

// Eight elements a repeat, each into all of a block.
template <typename T>
inline void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const uint8_t repeatTime,
                 const BrcbRepeatParams& p, Location at = Location::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Brcb takes 16- and 32-bit types");
  emulation::Instruction instruction(emulation::Pipe::kV, "Brcb", at);
  emulation::Operand<T> source(instruction, src0.place(), {});
  emulation::Operand<T> target(instruction, dst.place(), {});
  source.CheckAlignment();
  target.CheckAlignment();
  const emulation::Place& from = src0.place();
  const emulation::Place& to = dst.place();
  instruction.Check(from.begin != to.begin, emulation::Detector::kParameter, "source and target must differ");
  instruction.Compute(repeatTime);
  const uint64_t block_stride = std::max<uint64_t>(p.dstBlkStride, 1);
  for (uint32_t i = 0; instruction.is_full() && i < repeatTime; ++i) {
    T values[8];
    std::memcpy(values, instruction.Read(from.memory, from.begin + i * sizeof(values), sizeof(values), from.end),
                sizeof(values));
    for (uint32_t j = 0; j < 8; ++j) {
      const uint64_t at_byte = to.begin + (uint64_t{i} * p.dstRepStride + j * block_stride) * 32;
      T* block = reinterpret_cast<T*>(instruction.Write(to.memory, at_byte, 32, to.end));
      std::fill(block, block + 32 / sizeof(T), values[j]);
    }
  }
}

}  // namespace AscendC
