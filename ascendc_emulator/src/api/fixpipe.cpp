// SPDX-License-Identifier: Apache-2.0
// Results out of L0C.
#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "fractal.h"

namespace ascendc_emulator {
namespace {

// The scale as the hardware holds it: a float32 with 10 fraction bits.
float scale_of(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) & 0xffffe000u); }

// What increments the bits that are kept, by Options::fixpipe_rounding.
struct Rounding {
  FixpipeRounding mode;
  bool operator()(uint64_t kept, uint64_t lost, uint64_t half, bool is_negative) const {
    if (mode == FixpipeRounding::kTowardsZero) return false;
    if (mode == FixpipeRounding::kNearestAway) return half != 0 && lost >= half;
    return NearestEven{}(kept, lost, half, is_negative);
  }
};

}  // namespace

void store_result(const FixpipeTarget& target, ElementType to, const Region& source, ElementType from,
                  bool is_row_major, const AscendC::FixpipeParamsV220& p, const Region* scales, const Location& at) {
  Instruction store(Pipe::kFix, "Fixpipe", at);
  const uint32_t n = p.nSize, m = p.mSize;
  if (n == 0 || m == 0) return;
  store.Check(source.memory == Memory::kL0c, Detector::kParameter, "the source must be in L0C");
  store.Check(source.begin % 64 == 0, Detector::kAlignment, "the source must be 64-byte aligned");
  store.Check(n <= kMaxMatrixSize && (!is_row_major || m <= 8192), Detector::kParameter,
              "nSize must be at most 4095, mSize at most 8192");
  store.Check(is_row_major || n % kFractalRows == 0, Detector::kParameter,
              "nSize must be a multiple of 16 in the NZ layout");
  store.Check(p.srcStride >= m, Detector::kParameter, "srcStride must be at least mSize");
  store.Check(p.dstStride != 0, Detector::kParameter, "dstStride must not be 0");
  store.Check(p.ndNum == 1, Detector::kParameter, "ndNum other than 1 is not emulated");
  store.Check(p.unitFlag == 0 && !p.isChannelSplit, Detector::kParameter,
              "unitFlag and channel split are not emulated");
  const bool is_global = target.global != nullptr || target.local.end == 0;
  store.Check(is_global || (target.local.memory == Memory::kL1 && target.local.begin % 32 == 0), Detector::kAlignment,
              "the target must be in L1 and 32-byte aligned");
  const bool is_plain = p.quantPre == NoQuant && to == from;
  const bool is_rounding = (p.quantPre == F322F16 && from == ElementType::kFloat && to == ElementType::kHalf) ||
                           (p.quantPre == F322BF16 && from == ElementType::kFloat && to == ElementType::kBFloat16);
  const bool is_scaling =
      (p.quantPre == DEQF16 || p.quantPre == VDEQF16) && from == ElementType::kInt32 && to == ElementType::kHalf;
  if (!store.Check(is_plain || is_rounding || is_scaling, Detector::kParameter,
                   "quantPre does not fit the types of source and target") ||
      !store.Check((p.quantPre == VDEQF16) == (scales != nullptr), Detector::kParameter,
                   "a tensor of scales goes with VDEQF16 alone")) {
    return;
  }
  const uint8_t* scale_values = nullptr;
  if (scales) {
    store.Check(scales->memory == Memory::kL1, Detector::kParameter, "the scales must be in L1");
    scale_values = store.Read(scales->memory, scales->begin, uint64_t{n} * 8, scales->end);
  }
  const Rounding rounding{fixpipe_rounding()};
  const uint32_t blocks = ceil_div(n, kFractalRows), size = size_of(to);
  static std::vector<uint8_t> rows;
  rows.resize(size_t{m} * n * size);
  for (uint32_t block = 0; block < blocks; ++block) {
    const uint64_t column = source.begin + uint64_t{block} * p.srcStride * 64;
    const uint32_t count = std::min(kFractalRows, n - block * kFractalRows);
    const uint8_t* values = store.Read(source.memory, column, uint64_t{m} * 64, source.end, count == kFractalRows);
    if (!store.is_full()) continue;
    const uint8_t* valid = store.Validity(source.memory, column, uint64_t{m} * 64);
    for (uint32_t row = 0; valid && count < kFractalRows && row < m; ++row) {
      store.Check(!std::memchr(valid + size_t{row} * 64, 0, size_t{count} * 4), Detector::kUninitialised,
                  "reads what nothing has written: a column at the end of L0C's rows");
    }
    for (uint32_t row = 0; row < m; ++row) {
      for (uint32_t j = 0; j < count; ++j) {
        uint32_t bits;
        std::memcpy(&bits, values + size_t{row} * 64 + 4 * j, 4);
        uint8_t* out = &rows[(size_t{row} * n + block * kFractalRows + j) * size];
        if (is_plain) {
          if (p.reluEn && static_cast<int32_t>(bits) < 0) bits = 0;
          std::memcpy(out, &bits, 4);
          continue;
        }
        float value = is_rounding ? std::bit_cast<float>(bits) : static_cast<float>(static_cast<int32_t>(bits));
        if (is_scaling) {
          uint64_t scale = p.deqScalar;
          if (scale_values) std::memcpy(&scale, scale_values + size_t{block * kFractalRows + j} * 8, 8);
          value *= scale_of(scale);
        }
        if (p.reluEn) value = std::max(value, 0.0f);
        const uint16_t narrowed = to == ElementType::kBFloat16 ? narrow<7, 8>(value, false, rounding)
                                                               : narrow<10, 5>(value, is_scaling, rounding);
        std::memcpy(out, &narrowed, 2);
      }
    }
  }
  if (is_row_major) {
    for (uint32_t row = 0; row < m; ++row) {
      uint8_t* written = store.WriteGlobal(target.global + uint64_t{row} * p.dstStride * size, uint64_t{n} * size);
      if (store.is_full()) std::memcpy(written, &rows[size_t{row} * n * size], size_t{n} * size);
    }
  } else {
    for (uint32_t block = 0; block < blocks; ++block) {
      const uint64_t offset = uint64_t{block} * p.dstStride * 32, column_row = uint64_t{kFractalRows} * size;
      uint8_t* written =
          is_global ? store.WriteGlobal(target.global + offset, m * column_row)
                    : store.Write(target.local.memory, target.local.begin + offset, m * column_row, target.local.end);
      if (!store.is_full()) continue;
      for (uint32_t row = 0; row < m; ++row) {
        std::memcpy(written + row * column_row, &rows[(size_t{row} * n + block * kFractalRows) * size], column_row);
      }
    }
  }
  // The rates are taken as of the bytes that arrive, after the conversion.
  store.Transfer(is_global ? Path::kL0cToGm : Path::kL0cToL1, uint64_t{m} * n * size);
}

}  // namespace ascendc_emulator
