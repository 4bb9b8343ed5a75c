// SPDX-License-Identifier: Apache-2.0
// The cube's side: L1 -> L0 (MTE1), matrix products (M), results out of L0C (FIX).
#pragma once

#include "tensor.h"

namespace ascendc_emulator {

enum class ElementType : uint8_t { kInt4, kInt8, kInt32, kHalf, kBFloat16, kFloat };

template <typename T>
constexpr ElementType element_type_of() {
#if defined(ASCENDC_EMULATOR_PASS_AIV)
  static_assert(sizeof(T) == 0, "an instruction of the cube in the AIV's pass");
#endif
  if constexpr (kIsInt4<T>) {
    return ElementType::kInt4;
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return ElementType::kInt8;
  } else if constexpr (std::is_same_v<T, int32_t>) {
    return ElementType::kInt32;
  } else if constexpr (std::is_same_v<T, half>) {
    return ElementType::kHalf;
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    return ElementType::kBFloat16;
  } else {
    static_assert(std::is_same_v<T, float>, "not an element type of the cube");
    return ElementType::kFloat;
  }
}

void load_2d(const Region& target, const Region& source, const AscendC::LoadData2DParams& p, ElementType type,
             const Location& at);
void multiply(const Region& c, const Region& a, const Region& b, ElementType type, const AscendC::MmadParams& p,
              const Location& at);

// Where Fixpipe writes: global memory or L1.
struct FixpipeTarget {
  uint8_t* global = nullptr;
  Region local;
};
void store_result(const FixpipeTarget& target, ElementType to, const Region& source, ElementType from,
                  bool is_row_major, const AscendC::FixpipeParamsV220& p, const Region* scales, const Location& at);

}  // namespace ascendc_emulator

namespace AscendC {

template <typename T>
inline void LoadData(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LoadData2DParams& p,
                     Location at = Location::current()) {
  ascendc_emulator::load_2d(dst.region(), src.region(), p, ascendc_emulator::element_type_of<T>(), at);
}

// c[m, n] (+)= a[m, k] b[k, n]: A as rows of row-major fractals, B as rows of column-major ones, C as columns of
// row-major 16 x 16.
template <typename C, typename A, typename B>
inline void Mmad(const LocalTensor<C>& dst, const LocalTensor<A>& fm, const LocalTensor<B>& filter, const MmadParams& p,
                 Location at = Location::current()) {
  constexpr bool kIsInteger = ascendc_emulator::kIsInt4<A> || std::is_same_v<A, int8_t>;
  static_assert(std::is_same_v<A, B>, "A and B must be of one type");
  static_assert(std::is_same_v<C, std::conditional_t<kIsInteger, int32_t, float>>,
                "int4b_t and int8_t give int32_t; half, bfloat16_t and float give float");
  ascendc_emulator::multiply(dst.region(), fm.region(), filter.region(), ascendc_emulator::element_type_of<A>(), p, at);
}

namespace fixpipe {

template <typename T, typename U>
constexpr void check_types() {
  static_assert(std::is_same_v<U, int32_t> || std::is_same_v<U, float>, "L0C holds int32_t or float");
  static_assert(!(std::is_same_v<U, int32_t> && std::is_same_v<T, bfloat16_t>), "there is no int32_t -> bfloat16_t");
  static_assert(!(std::is_same_v<U, int32_t> && std::is_same_v<T, float>), "there is no int32_t -> float");
  static_assert(!(std::is_same_v<U, float> && std::is_same_v<T, int32_t>), "there is no float -> int32_t");
}

}  // namespace fixpipe

template <typename T, typename U, const FixpipeConfig& kConfig = CFG_ROW_MAJOR>
inline void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& p,
                    Location at = Location::current()) {
  fixpipe::check_types<T, U>();
  ascendc_emulator::store_result({dst.address(), {}}, ascendc_emulator::element_type_of<T>(), src.region(),
                                 ascendc_emulator::element_type_of<U>(), kConfig.format == CO2Layout::ROW_MAJOR, p,
                                 nullptr, at);
}

// With one scale per column, in L1, as the float32's bits in the low half of a uint64_t.
template <typename T, typename U, const FixpipeConfig& kConfig = CFG_ROW_MAJOR>
inline void Fixpipe(const GlobalTensor<T>& dst, const LocalTensor<U>& src, const LocalTensor<uint64_t>& scales,
                    const FixpipeParamsV220& p, Location at = Location::current()) {
  fixpipe::check_types<T, U>();
  ascendc_emulator::store_result({dst.address(), {}}, ascendc_emulator::element_type_of<T>(), src.region(),
                                 ascendc_emulator::element_type_of<U>(), kConfig.format == CO2Layout::ROW_MAJOR, p,
                                 &scales.region(), at);
}

// To L1: 16-bit results in the NZ layout only.
template <typename T, typename U, const FixpipeConfig& kConfig = CFG_ROW_MAJOR>
inline void Fixpipe(const LocalTensor<T>& dst, const LocalTensor<U>& src, const FixpipeParamsV220& p,
                    Location at = Location::current()) {
  fixpipe::check_types<T, U>();
  static_assert(kConfig.format == CO2Layout::NZ, "L0C -> L1 keeps the NZ layout");
  static_assert(sizeof(T) == 2, "L0C -> L1 takes no NoQuant");
  ascendc_emulator::store_result({nullptr, dst.region()}, ascendc_emulator::element_type_of<T>(), src.region(),
                                 ascendc_emulator::element_type_of<U>(), false, p, nullptr, at);
}

}  // namespace AscendC
