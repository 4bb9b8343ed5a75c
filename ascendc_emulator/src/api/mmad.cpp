// SPDX-License-Identifier: Apache-2.0
// Matrix products.
#include <algorithm>
#include <cstring>
#include <vector>

#include "fractal.h"

// The product is compiled twice; the loader picks what the processor can run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ASCENDC_EMULATOR_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define ASCENDC_EMULATOR_CLONES
#endif

namespace ascendc_emulator {
namespace {

constexpr uint32_t kOverlappingFractals = 10;  // products with fewer result fractals need a barrier to be in order

void unpack_row(float* values, const uint8_t* row, ElementType type, uint32_t count) {
  switch (type) {
    case ElementType::kInt4:
      for (uint32_t i = 0; i < count; ++i) {
        values[i] = static_cast<float>(static_cast<int8_t>(row[i / 2] << (i % 2 ? 0 : 4)) >> 4);
      }
      break;
    case ElementType::kInt8:
      for (uint32_t i = 0; i < count; ++i) values[i] = static_cast<int8_t>(row[i]);
      break;
    case ElementType::kHalf:
    case ElementType::kBFloat16:
      for (uint32_t i = 0; i < count; ++i) {
        uint16_t bits;
        std::memcpy(&bits, row + 2 * i, 2);
        values[i] = type == ElementType::kHalf ? half_value(bits) : bfloat16_value(bits);
      }
      break;
    default:
      std::memcpy(values, row, count * sizeof(float));
  }
}

// Sums of products in float32 in the order of k. A as [m][k], B as [column_blocks][k][16], C as [column_blocks][m][16];
// m is a multiple of 4.
ASCENDC_EMULATOR_CLONES void multiply_floats(const float* a, const float* b, float* c, uint32_t m,
                                             uint32_t column_blocks, uint32_t k) {
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

uint32_t bytes_for(ElementType type, uint32_t elements) {
  return type == ElementType::kInt4 ? (elements + 1) / 2 : elements * 32 / row_elements(type);
}

// The same in int32, whose bits are stored in C.
void multiply_int8(const float* a, const float* b, float* c, uint32_t m, uint32_t column_blocks, uint32_t k) {
  for (uint32_t column = 0; column < column_blocks * 16; ++column) {
    for (uint32_t row = 0; row < m; ++row) {
      int32_t sum = 0;
      for (uint32_t i = 0; i < k; ++i) {
        sum += static_cast<int32_t>(a[size_t{row} * k + i]) *
               static_cast<int32_t>(b[(size_t{column / 16} * k + i) * 16 + column % 16]);
      }
      std::memcpy(&c[(size_t{column / 16} * m + row) * 16 + column % 16], &sum, 4);
    }
  }
}

// An element of L0C: `sum`, added to the element at `before` unless that is null.
void accumulate(uint8_t* to, const uint8_t* before, const float& sum, ElementType type) {
  if (type == ElementType::kInt4 || type == ElementType::kInt8) {
    int32_t old = 0, added;
    if (before) std::memcpy(&old, before, 4);
    if (type == ElementType::kInt8) {
      std::memcpy(&added, &sum, 4);
    } else {
      added = static_cast<int32_t>(sum);
    }
    // No document says that the hardware's adder does anything but wrap around.
    const int32_t total = static_cast<int32_t>(static_cast<uint32_t>(old) + static_cast<uint32_t>(added));
    std::memcpy(to, &total, 4);
  } else {
    float total = sum;
    if (before) {
      float old;
      std::memcpy(&old, before, 4);
      total += old;
    }
    std::memcpy(to, &total, 4);
  }
}

}  // namespace

void multiply(const Region& c, const Region& a, const Region& b, ElementType type, const AscendC::MmadParams& p,
              const Location& at) {
  Instruction product(Pipe::kM, "Mmad", at);
  const uint32_t m = p.m, n = p.n, k = p.k;
  product.Check(c.memory == Memory::kL0c && a.memory == Memory::kL0a && b.memory == Memory::kL0b, Detector::kParameter,
                "C must be in L0C, A in L0A, B in L0B");
  product.Check(a.begin % kFractalBytes == 0 && b.begin % kFractalBytes == 0, Detector::kAlignment,
                "A and B must be 512-byte aligned");
  product.Check(c.begin % 1024 == 0, Detector::kAlignment, "C must be 1024-byte aligned");
  product.Check(m <= kMaxMatrixSize && n <= kMaxMatrixSize && k <= kMaxMatrixSize, Detector::kParameter,
                "m, n, k must be at most 4095");
  product.Check(type != ElementType::kInt4 || k % 2 == 0, Detector::kParameter, "k must be even for int4b_t");
  product.Check(p.unitFlag == 0 && !p.cmatrixSource && !p.kDirectionAlign, Detector::kParameter,
                "unitFlag, cmatrixSource and kDirectionAlign are not emulated");
  if (m == 0 || n == 0 || k == 0) return;
  if (!product.Check(m != 1, Detector::kParameter, "m == 1 reads A in another layout (GEMV), which is not emulated")) {
    return;
  }

  const uint32_t depth = row_elements(type);
  const uint32_t row_fractals = ceil_div(m, kFractalRows), column_fractals = ceil_div(n, kFractalRows),
                 depth_fractals = ceil_div(k, depth);
  if (row_fractals * column_fractals >= kOverlappingFractals) product.AllowOverlap();
  const uint64_t a_bytes = uint64_t{row_fractals} * depth_fractals * kFractalBytes;
  const uint64_t b_bytes = uint64_t{column_fractals} * depth_fractals * kFractalBytes;
  const uint8_t* a_values = product.Read(a.memory, a.begin, a_bytes, a.end, false);
  const uint8_t* b_values = product.Read(b.memory, b.begin, b_bytes, b.end, false);
  const uint64_t column_bytes = uint64_t{row_fractals} * kFractalRows * kFractalRows * 4;
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
      const size_t at_byte =
          (size_t{row / kFractalRows} * depth_fractals + depth_fractal) * kFractalBytes + row % kFractalRows * 32;
      is_valid = is_valid && !std::memchr(a_valid + at_byte, 0, bytes_for(type, count));
      unpack_row(&left[size_t{row} * k + first], a_values + at_byte, type, count);
    }
    for (uint32_t column = 0; column < n; ++column) {
      const size_t at_byte = (size_t{depth_fractal} * column_fractals + column / kFractalRows) * kFractalBytes +
                             column % kFractalRows * 32;
      is_valid = is_valid && !std::memchr(b_valid + at_byte, 0, bytes_for(type, count));
      float row[64];
      unpack_row(row, b_values + at_byte, type, count);
      float* to = &right[(size_t{column / kFractalRows} * k + first) * 16 + column % kFractalRows];
      for (uint32_t i = 0; i < count; ++i) to[size_t{i} * 16] = row[i];
    }
  }
  product.Check(is_valid, Detector::kUninitialised, "operands that nothing has written");
  // Sums of int4 products stay below 2^24, where float32 is exact; those of int8 products do not.
  const auto product_of = type == ElementType::kInt8 ? multiply_int8 : multiply_floats;
  product_of(left.data(), right.data(), sums.data(), padded_rows, column_fractals, k);
  bool is_c_valid = true;
  for (uint32_t block = 0; block < column_fractals; ++block) {
    const uint32_t columns = std::min(kFractalRows, n - block * kFractalRows);
    for (uint32_t row = 0; row < m; ++row) {
      const size_t at_byte = block * column_bytes + size_t{row} * 64;
      const float* sum = &sums[(size_t{block} * padded_rows + row) * 16];
      for (uint32_t j = 0; j < columns; ++j) {
        const size_t element = at_byte + size_t{4} * j;
        accumulate(c_written + element, c_values ? c_values + element : nullptr, sum[j], type);
      }
      if (c_values) is_c_valid = is_c_valid && !std::memchr(c_valid + at_byte, 0, columns * 4);
      std::memset(c_valid + at_byte, 1, columns * 4);
    }
  }
  product.Check(is_c_valid, Detector::kUninitialised, "adds to sums that nothing has written");
}

}  // namespace ascendc_emulator
