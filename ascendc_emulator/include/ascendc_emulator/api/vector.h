// SPDX-License-Identifier: Apache-2.0
// The vector unit's instructions, by their documented names and signatures.
#pragma once

#include "vector/broadcast_reduce.h"
#include "vector/cast.h"
#include "vector/elementwise.h"

namespace AscendC {

// Each has two forms: over the first `count` elements, and over repeats of `mask` elements.
#define ASCENDC_EMULATOR_BINARY(NAME, EXPRESSION, IS_SUPPORTED)                                                      \
  template <typename T>                                                                                              \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1,                \
                   const int32_t& count, Location at = Location::current()) {                                        \
    static_assert(IS_SUPPORTED, #NAME " does not take this type");                                                   \
    ascendc_emulator::binary<T>(#NAME, dst.region(), src0.region(), src1.region(), {},                               \
                                {0, 0, static_cast<uint64_t>(count)}, at, [](T a, T b) -> T { return EXPRESSION; }); \
  }                                                                                                                  \
  template <typename T>                                                                                              \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, uint64_t mask, \
                   const uint8_t repeatTime, const BinaryRepeatParams& p, Location at = Location::current()) {       \
    static_assert(IS_SUPPORTED, #NAME " does not take this type");                                                   \
    ascendc_emulator::binary<T>(#NAME, dst.region(), src0.region(), src1.region(), p,                                \
                                {repeatTime, static_cast<uint32_t>(mask), 0}, at,                                    \
                                [](T a, T b) -> T { return EXPRESSION; });                                           \
  }

ASCENDC_EMULATOR_BINARY(Add, a + b, ascendc_emulator::kIsVectorNumber<T>)
ASCENDC_EMULATOR_BINARY(Sub, a - b, ascendc_emulator::kIsVectorNumber<T>)
ASCENDC_EMULATOR_BINARY(Mul, a* b, ascendc_emulator::kIsVectorNumber<T>)
ASCENDC_EMULATOR_BINARY(Div, ascendc_emulator::quotient(a, b), ascendc_emulator::kIsVectorFloat<T>)
ASCENDC_EMULATOR_BINARY(Max, a > b ? a : b, ascendc_emulator::kIsVectorNumber<T>)
ASCENDC_EMULATOR_BINARY(Min, a < b ? a : b, ascendc_emulator::kIsVectorNumber<T>)
#undef ASCENDC_EMULATOR_BINARY

#define ASCENDC_EMULATOR_SCALAR(NAME, EXPRESSION)                                                                   \
  template <typename T>                                                                                             \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count,     \
                   Location at = Location::current()) {                                                             \
    static_assert(ascendc_emulator::kIsVectorNumber<T>, #NAME " does not take this type");                          \
    ascendc_emulator::unary<T>(#NAME, dst.region(), {}, src.region(), {}, {0, 0, static_cast<uint64_t>(count)}, at, \
                               [scalar](T a) -> T { return EXPRESSION; });                                          \
  }                                                                                                                 \
  template <typename T>                                                                                             \
  inline void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, uint64_t mask,            \
                   const uint8_t repeatTime, const UnaryRepeatParams& p, Location at = Location::current()) {       \
    static_assert(ascendc_emulator::kIsVectorNumber<T>, #NAME " does not take this type");                          \
    ascendc_emulator::unary<T>(#NAME, dst.region(), {p.dstBlkStride, p.dstRepStride}, src.region(),                 \
                               {p.srcBlkStride, p.srcRepStride}, {repeatTime, static_cast<uint32_t>(mask), 0}, at,  \
                               [scalar](T a) -> T { return EXPRESSION; });                                          \
  }

ASCENDC_EMULATOR_SCALAR(Adds, a + scalar)
ASCENDC_EMULATOR_SCALAR(Muls, a* scalar)
ASCENDC_EMULATOR_SCALAR(Maxs, a > scalar ? a : scalar)
ASCENDC_EMULATOR_SCALAR(Mins, a < scalar ? a : scalar)
#undef ASCENDC_EMULATOR_SCALAR

template <typename T>
inline void Abs(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count,
                Location at = Location::current()) {
  static_assert(ascendc_emulator::kIsVectorFloat<T>, "Abs takes half and float");
  ascendc_emulator::unary<T>("Abs", dst.region(), {}, src.region(), {}, {0, 0, static_cast<uint64_t>(count)}, at,
                             [](T a) -> T { return std::fabs(a); });
}

template <typename T>
inline void Abs(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint64_t mask, const uint8_t repeatTime,
                const UnaryRepeatParams& p, Location at = Location::current()) {
  static_assert(ascendc_emulator::kIsVectorFloat<T>, "Abs takes half and float");
  ascendc_emulator::unary<T>("Abs", dst.region(), {p.dstBlkStride, p.dstRepStride}, src.region(),
                             {p.srcBlkStride, p.srcRepStride}, {repeatTime, static_cast<uint32_t>(mask), 0}, at,
                             [](T a) -> T { return std::fabs(a); });
}

template <typename T, typename U>
inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode, const uint32_t count,
                 Location at = Location::current()) {
  ascendc_emulator::cast<T, U>(dst.region(), src.region(), mode, {}, {0, 0, count}, at);
}

template <typename T, typename U>
inline void Cast(const LocalTensor<T>& dst, const LocalTensor<U>& src, const RoundMode& mode, const uint64_t mask,
                 const uint8_t repeatTime, const UnaryRepeatParams& p, Location at = Location::current()) {
  ascendc_emulator::cast<T, U>(dst.region(), src.region(), mode, p, {repeatTime, static_cast<uint32_t>(mask), 0}, at);
}

template <typename T>
inline void Duplicate(const LocalTensor<T>& dst, const T& scalar, const int32_t& count,
                      Location at = Location::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate takes 16- and 32-bit types");
  ascendc_emulator::duplicate<T>(dst.region(), scalar, static_cast<uint64_t>(count), at);
}

template <typename T>
inline void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask, const uint8_t repeatTime,
                      const uint16_t dstBlockStride, const uint8_t dstRepeatStride, Location at = Location::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Duplicate takes 16- and 32-bit types");
  ascendc_emulator::duplicate<T>(dst.region(), {dstBlockStride, dstRepeatStride}, scalar,
                                 {repeatTime, static_cast<uint32_t>(mask), 0}, at);
}

template <typename T>
inline void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t mask,
                           const int32_t repeatTime, const int32_t dstRepStride, const int32_t srcBlkStride,
                           const int32_t srcRepStride, ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX,
                           Location at = Location::current()) {
  static_assert(ascendc_emulator::kIsVectorFloat<T>, "WholeReduceMax takes half and float");
  ascendc_emulator::reduce_max<T>(dst.region(), static_cast<uint32_t>(dstRepStride), src.region(),
                                  {static_cast<uint32_t>(srcBlkStride), static_cast<uint32_t>(srcRepStride)},
                                  {static_cast<uint32_t>(repeatTime), static_cast<uint32_t>(mask), 0}, order, at);
}

template <typename T>
inline void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const uint8_t repeatTime,
                 const BrcbRepeatParams& p, Location at = Location::current()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "Brcb takes 16- and 32-bit types");
  ascendc_emulator::broadcast_to_blocks<T>(dst.region(), src0.region(), repeatTime, p, at);
}

}  // namespace AscendC
