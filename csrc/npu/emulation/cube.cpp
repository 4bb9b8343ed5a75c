// SPDX-License-Identifier: Apache-2.0
#include "cube.h"

#include <cstdlib>

// The product is compiled twice; the loader picks what the processor can run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define W4A4_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define W4A4_CLONES
#endif

namespace emulation {
namespace {

constexpr uint32_t kFractal = 512;
constexpr uint32_t kRows = 16;
constexpr uint32_t kMaxSize = 4095;
constexpr uint32_t kOverlappingFractals = 10;  // products of fewer result fractals need a barrier to be in order

uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Elements of a fractal's 32-byte row.
uint32_t row_elements(Number number) {
  switch (number) {
    case Number::kInt4:
      return 64;
    case Number::kInt8:
      return 32;
    case Number::kHalf:
    case Number::kBFloat16:
      return 16;
    default:
      return 8;
  }
}

void unpack_row(float* values, const uint8_t* row, Number number, uint32_t count) {
  switch (number) {
    case Number::kInt4:
      for (uint32_t i = 0; i < count; ++i) {
        values[i] = static_cast<float>(static_cast<int8_t>(row[i / 2] << (i % 2 ? 0 : 4)) >> 4);
      }
      break;
    case Number::kInt8:
      for (uint32_t i = 0; i < count; ++i) values[i] = static_cast<int8_t>(row[i]);
      break;
    case Number::kHalf:
    case Number::kBFloat16:
      for (uint32_t i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, row + 2 * i, 2);
        values[i] = number == Number::kHalf ? half_value(bits) : bfloat16_value(bits);
      }
      break;
    default:
      std::memcpy(values, row, count * sizeof(float));
  }
}

// A as [m rounded up to 4][k], B as [n / 16][k][16], C as [n / 16][m rounded up to 4][16].
W4A4_CLONES void multiply_floats(const float* a, const float* b, float* c, uint32_t m, uint32_t column_blocks,
                                 uint32_t k) {
  for (uint32_t block = 0; block < column_blocks; ++block) {
    const float* columns = b + size_t{block} * k * 16;
    for (uint32_t row = 0; row < m; row += 4) {
      float sums[4][16] = {};
      const float* a0 = a + size_t{row} * k;
      for (uint32_t i = 0; i < k; ++i) {
        for (uint32_t r = 0; r < 4; ++r) {
          const float value = a0[size_t{r} * k + i];
          for (uint32_t j = 0; j < 16; ++j) sums[r][j] += value * columns[size_t{i} * 16 + j];
        }
      }
      std::memcpy(c + (size_t{block} * m + row) * 16, sums, sizeof(sums));
    }
  }
}

// Bytes [0, count) of each of `rows` 32-byte rows.
bool all_written(const uint8_t* valid, uint32_t rows, uint32_t count) {
  for (uint32_t row = 0; row < rows; ++row) {
    if (std::memchr(valid + size_t{row} * 32, 0, count)) return false;
  }
  return true;
}

uint32_t bytes_for(Number number, uint32_t elements) {
  return number == Number::kInt4 ? (elements + 1) / 2 : elements * 32 / row_elements(number);
}

uint32_t size_of(Number number) {
  switch (number) {
    case Number::kInt4:
    case Number::kInt8:
      return 1;
    case Number::kHalf:
    case Number::kBFloat16:
      return 2;
    default:
      return 4;
  }
}

// The scale as the hardware holds it: a float32 with 10 fraction bits.
float scale_of(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) & 0xffffe000u); }

}  // namespace

void load_2d(const Place& target, const Place& source, const AscendC::LoadData2DParams& p, Number number,
             const Location& at) {
  Instruction load(Pipe::kMte1, "LoadData", at);
  load.Check(source.memory == Memory::kL1 && (target.memory == Memory::kL0a || target.memory == Memory::kL0b),
             Detector::kParameter, "L1 -> L0A or L0B only");
  load.Check(!p.ifTranspose || size_of(number) == 2, Detector::kParameter, "ifTranspose takes 16-bit types only");
  load.Check(p.addrMode == 0, Detector::kParameter, "addrMode must be 0");
  load.Check(target.begin % kFractal == 0, Detector::kAlignment, "the target must be 512-byte aligned");
  load.Check(source.begin % 32 == 0, Detector::kAlignment, "the source must be 32-byte aligned");
  const uint32_t repeats = p.repeatTimes;
  const uint64_t source_stride = uint64_t{p.srcStride} * kFractal, target_stride = (uint64_t{p.dstGap} + 1) * kFractal;
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    const uint64_t from = source.begin + uint64_t{p.startIndex} * kFractal + repeat * source_stride;
    const uint64_t to = target.begin + repeat * target_stride;
    const uint8_t* values = load.Read(source.memory, from, kFractal, source.end, false);
    uint8_t* written = load.Write(target.memory, to, kFractal, target.end, false);
    const uint8_t* valid_from = load.Validity(source.memory, from, kFractal);
    uint8_t* valid_to = load.Validity(target.memory, to, kFractal);
    if (!load.is_full() || !valid_from || !valid_to) continue;
    if (!p.ifTranspose) {
      std::memcpy(written, values, kFractal);
      std::memcpy(valid_to, valid_from, kFractal);
      continue;
    }
    for (uint32_t i = 0; i < 16; ++i) {
      for (uint32_t j = 0; j < 16; ++j) {
        std::memcpy(written + (j * 16 + i) * 2, values + (i * 16 + j) * 2, 2);
        std::memcpy(valid_to + (j * 16 + i) * 2, valid_from + (i * 16 + j) * 2, 2);
      }
    }
  }
  load.Transfer(target.memory == Memory::kL0a ? Path::kL1ToL0a : Path::kL1ToL0b, uint64_t{repeats} * kFractal);
}

void multiply(const Place& c, const Place& a, const Place& b, Number number, const AscendC::MmadParams& p,
              const Location& at) {
  Instruction product(Pipe::kM, "Mmad", at);
  const uint32_t m = p.m, n = p.n, k = p.k;
  product.Check(c.memory == Memory::kL0c && a.memory == Memory::kL0a && b.memory == Memory::kL0b, Detector::kParameter,
                "C must be in L0C, A in L0A, B in L0B");
  product.Check(a.begin % kFractal == 0 && b.begin % kFractal == 0, Detector::kAlignment,
                "A and B must be 512-byte aligned");
  product.Check(c.begin % 1024 == 0, Detector::kAlignment, "C must be 1024-byte aligned");
  product.Check(m <= kMaxSize && n <= kMaxSize && k <= kMaxSize, Detector::kParameter, "m, n, k must be at most 4095");
  product.Check(number != Number::kInt4 || k % 2 == 0, Detector::kParameter, "k must be even for int4b_t");
  product.Check(p.unitFlag == 0 && !p.cmatrixSource && !p.kDirectionAlign, Detector::kParameter,
                "unitFlag, cmatrixSource and kDirectionAlign are not emulated");
  if (m == 0 || n == 0 || k == 0) return;
  if (!product.Check(m != 1, Detector::kParameter, "m == 1 reads A in another layout (GEMV), which is not emulated")) {
    return;
  }

  const uint32_t depth = row_elements(number);
  const uint32_t row_fractals = ceil_div(m, kRows), column_fractals = ceil_div(n, kRows),
                 depth_fractals = ceil_div(k, depth);
  if (row_fractals * column_fractals >= kOverlappingFractals) product.AllowOverlap();
  const uint64_t a_bytes = uint64_t{row_fractals} * depth_fractals * kFractal;
  const uint64_t b_bytes = uint64_t{column_fractals} * depth_fractals * kFractal;
  const uint8_t* a_values = product.Read(a.memory, a.begin, a_bytes, a.end, false);
  const uint8_t* b_values = product.Read(b.memory, b.begin, b_bytes, b.end, false);
  const uint64_t column_bytes = uint64_t{row_fractals} * kRows * kRows * 4;
  const uint8_t* c_values = nullptr;
  if (!p.cmatrixInitVal) c_values = product.Read(c.memory, c.begin, column_fractals * column_bytes, c.end, false);
  uint8_t* c_written = product.Write(c.memory, c.begin, column_fractals * column_bytes, c.end, false);
  product.Compute(uint64_t{row_fractals} * column_fractals * depth_fractals);
  const uint8_t* a_valid = product.Validity(a.memory, a.begin, a_bytes);
  const uint8_t* b_valid = product.Validity(b.memory, b.begin, b_bytes);
  uint8_t* c_valid = product.Validity(c.memory, c.begin, column_fractals * column_bytes);
  if (!product.is_full() || !a_valid || !b_valid || !c_valid) return;

  const uint32_t padded_rows = ceil_div(m, 4) * 4;
  static std::vector<float> left, right, sums;
  left.assign(size_t{padded_rows} * k, 0.0f);
  right.assign(size_t{column_fractals} * k * 16, 0.0f);
  sums.resize(size_t{column_fractals} * padded_rows * 16);
  bool is_valid = true;
  for (uint32_t depth_fractal = 0; depth_fractal < depth_fractals; ++depth_fractal) {
    const uint32_t first = depth_fractal * depth, count = std::min(depth, k - first);
    for (uint32_t row = 0; row < m; ++row) {
      const size_t at_byte = (size_t{row / kRows} * depth_fractals + depth_fractal) * kFractal + row % kRows * 32;
      is_valid = is_valid && all_written(a_valid + at_byte, 1, bytes_for(number, count));
      unpack_row(&left[size_t{row} * k + first], a_values + at_byte, number, count);
    }
    for (uint32_t column = 0; column < n; ++column) {
      const size_t at_byte =
          (size_t{depth_fractal} * column_fractals + column / kRows) * kFractal + column % kRows * 32;
      is_valid = is_valid && all_written(b_valid + at_byte, 1, bytes_for(number, count));
      float row[64];
      unpack_row(row, b_values + at_byte, number, count);
      float* to = &right[(size_t{column / kRows} * k + first) * 16 + column % kRows];
      for (uint32_t i = 0; i < count; ++i) to[size_t{i} * 16] = row[i];
    }
  }
  product.Check(is_valid, Detector::kUninitialised, "operands that nothing has written");
  const bool is_integer = number == Number::kInt4 || number == Number::kInt8;
  // Products of int4 sum up to less than 2^24: exact in float32. Those of int8 do not.
  if (number == Number::kInt8) {
    for (uint32_t column = 0; column < column_fractals * 16; ++column) {
      for (uint32_t row = 0; row < m; ++row) {
        int32_t sum = 0;
        for (uint32_t i = 0; i < k; ++i) {
          sum += static_cast<int32_t>(left[size_t{row} * k + i]) *
                 static_cast<int32_t>(right[(size_t{column / 16} * k + i) * 16 + column % 16]);
        }
        std::memcpy(&sums[(size_t{column / 16} * padded_rows + row) * 16 + column % 16], &sum, 4);
      }
    }
  } else {
    multiply_floats(left.data(), right.data(), sums.data(), padded_rows, column_fractals, k);
  }
  bool is_c_valid = true;
  for (uint32_t block = 0; block < column_fractals; ++block) {
    const uint32_t columns = std::min(kRows, n - block * kRows);
    for (uint32_t row = 0; row < m; ++row) {
      const size_t at_byte = block * column_bytes + size_t{row} * 64;
      const float* sum = &sums[(size_t{block} * padded_rows + row) * 16];
      for (uint32_t j = 0; j < columns; ++j) {
        if (is_integer) {
          int32_t before = 0, added;
          if (c_values) std::memcpy(&before, c_values + at_byte + 4 * j, 4);
          if (number == Number::kInt8) {
            std::memcpy(&added, &sum[j], 4);
          } else {
            added = static_cast<int32_t>(sum[j]);
          }
          // Wraps as the hardware's adder is not documented to do otherwise; the shapes here stay far below.
          const int32_t total = static_cast<int32_t>(static_cast<uint32_t>(before) + static_cast<uint32_t>(added));
          std::memcpy(c_written + at_byte + 4 * j, &total, 4);
        } else {
          float total = sum[j];
          if (c_values) {
            float before;
            std::memcpy(&before, c_values + at_byte + 4 * j, 4);
            total += before;
          }
          std::memcpy(c_written + at_byte + 4 * j, &total, 4);
        }
      }
      if (c_values) is_c_valid = is_c_valid && !std::memchr(c_valid + at_byte, 0, columns * 4);
      std::memset(c_valid + at_byte, 1, columns * 4);
    }
  }
  product.Check(is_c_valid, Detector::kUninitialised, "adds to sums that nothing has written");
}

void store_result(const FixpipeTarget& target, Number to, const Place& source, Number from, bool is_row_major,
                  const AscendC::FixpipeParamsV220& p, const Place* scales, const Location& at) {
  Instruction store(Pipe::kFix, "Fixpipe", at);
  const uint32_t n = p.nSize, m = p.mSize;
  if (n == 0 || m == 0) return;
  store.Check(source.memory == Memory::kL0c, Detector::kParameter, "the source must be in L0C");
  store.Check(source.begin % 64 == 0, Detector::kAlignment, "the source must be 64-byte aligned");
  store.Check(n <= kMaxSize && (!is_row_major || m <= 8192), Detector::kParameter,
              "nSize must be at most 4095, mSize at most 8192");
  store.Check(is_row_major || n % kRows == 0, Detector::kParameter, "nSize must be a multiple of 16 in the NZ layout");
  store.Check(p.srcStride >= m, Detector::kParameter, "srcStride must be at least mSize");
  store.Check(p.dstStride != 0, Detector::kParameter, "dstStride must not be 0");
  store.Check(p.ndNum == 1, Detector::kParameter, "ndNum other than 1 is not emulated");
  store.Check(p.unitFlag == 0 && !p.isChannelSplit, Detector::kParameter,
              "unitFlag and channel split are not emulated");
  const bool is_global = target.global != nullptr || target.local.end == 0;
  store.Check(is_global || (target.local.memory == Memory::kL1 && target.local.begin % 32 == 0), Detector::kAlignment,
              "the target must be in L1 and 32-byte aligned");
  const bool is_plain = p.quantPre == NoQuant && to == from;
  const bool is_rounding = (p.quantPre == F322F16 && from == Number::kFloat && to == Number::kHalf) ||
                           (p.quantPre == F322BF16 && from == Number::kFloat && to == Number::kBFloat16);
  const bool is_scaling =
      (p.quantPre == DEQF16 || p.quantPre == VDEQF16) && from == Number::kInt32 && to == Number::kHalf;
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
  const uint32_t blocks = ceil_div(n, kRows), size = size_of(to);
  static std::vector<uint8_t> rows;
  rows.resize(size_t{m} * n * size);
  for (uint32_t block = 0; block < blocks; ++block) {
    const uint64_t column = source.begin + uint64_t{block} * p.srcStride * 64;
    const uint32_t count = std::min(kRows, n - block * kRows);
    const uint8_t* values = store.Read(source.memory, column, uint64_t{m} * 64, source.end, count == kRows);
    if (!store.is_full()) continue;
    const uint8_t* valid = store.Validity(source.memory, column, uint64_t{m} * 64);
    for (uint32_t row = 0; valid && count < kRows && row < m; ++row) {
      store.Check(!std::memchr(valid + size_t{row} * 64, 0, size_t{count} * 4), Detector::kUninitialised,
                  "reads what nothing has written: a column at the end of L0C's rows");
    }
    for (uint32_t row = 0; row < m; ++row) {
      for (uint32_t j = 0; j < count; ++j) {
        uint32_t bits;
        std::memcpy(&bits, values + size_t{row} * 64 + 4 * j, 4);
        uint8_t* out = &rows[(size_t{row} * n + block * kRows + j) * size];
        if (is_plain) {
          if (p.reluEn && static_cast<int32_t>(bits) < 0) bits = 0;
          std::memcpy(out, &bits, 4);
          continue;
        }
        float value = is_rounding ? std::bit_cast<float>(bits) : static_cast<float>(static_cast<int32_t>(bits));
        if (is_scaling) {
          uint64_t scale = p.deqScalar;
          if (scale_values) std::memcpy(&scale, scale_values + size_t{block * kRows + j} * 8, 8);
          value *= scale_of(scale);
        }
        if (p.reluEn) value = std::max(value, 0.0f);
        const uint16_t narrowed = to == Number::kBFloat16 ? bfloat16_bits(value) : half_bits(value, is_scaling);
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
      const uint64_t offset = uint64_t{block} * p.dstStride * 32, column_row = uint64_t{kRows} * size;
      uint8_t* written =
          is_global ? store.WriteGlobal(target.global + offset, m * column_row)
                    : store.Write(target.local.memory, target.local.begin + offset, m * column_row, target.local.end);
      if (!store.is_full()) continue;
      for (uint32_t row = 0; row < m; ++row) {
        std::memcpy(written + row * column_row, &rows[(size_t{row} * n + block * kRows) * size], column_row);
      }
    }
  }
  // The rates are taken as of the bytes that arrive, after the conversion.
  store.Transfer(is_global ? Path::kL0cToGm : Path::kL0cToL1, uint64_t{m} * n * size);
}

}  // namespace emulation
