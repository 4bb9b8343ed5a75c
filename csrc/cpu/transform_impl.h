// SPDX-License-Identifier: Apache-2.0
// Kronecker transform and per-token quantization, written with GCC vector types so that one text serves every
// instruction set. Include it in one source file per set, which defines W4A4_VECTOR_FLOATS and is compiled with that
// set's flags; everything here has internal linkage.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "vector.h"

namespace w4a4 {
namespace {

// C[rows, columns] = A B for a register block of R rows and V vectors of columns.
// A(i, k) = a[i * a_row + k * a_k]; B and C are row-major with the strides given.
template <int R, int V>
W4A4_NOINLINE void multiply_block(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                                  int64_t depth, float* c, int64_t c_row) {
  FloatVector sum[R][V];
  unrolled<R>([&](auto i) W4A4_INLINE { unrolled<V>([&](auto v) W4A4_INLINE { sum[i][v] = FloatVector{}; }); });
  for (int64_t k = 0; k < depth; ++k) {
    FloatVector row[V];
    unrolled<V>([&](auto v) W4A4_INLINE { row[v] = load(b + k * b_row + v * kVector); });
    unrolled<R>([&](auto i) W4A4_INLINE {
      const FloatVector factor = broadcast(a[i * a_row + k * a_k]);
      unrolled<V>([&](auto v) W4A4_INLINE { sum[i][v] = pinned(sum[i][v] + factor * row[v]); });
    });
  }
  unrolled<R>([&](auto i) W4A4_INLINE {
    unrolled<V>([&](auto v) W4A4_INLINE { store(c + i * c_row + v * kVector, sum[i][v]); });
  });
}

// Vectors of columns in a register block, and rows for each number of them: 12 sums fill the 16 registers of AVX, 24
// the 32 of AVX-512 and NEON.
#if defined(__aarch64__)
constexpr int kBlockVectors = 4, kBlockSums = 24;
#else
constexpr int kBlockVectors = kVector == 16 ? 4 : 2, kBlockSums = kVector == 16 ? 24 : 12;
#endif
template <int V>
constexpr int kBlockRows = kBlockSums / (V == 1 ? 2 : V);

template <int V>
void multiply_columns(const float* a, int64_t a_row, int64_t a_k, int64_t rows, const float* b, int64_t b_row,
                      int64_t depth, float* c, int64_t c_row) {
  // Blocks of nearly equal height: a low one at the end would have too few sums to hide the latency of FMA.
  const int64_t blocks = (rows + kBlockRows<V> - 1) / kBlockRows<V>;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t i = block * rows / blocks, height = (block + 1) * rows / blocks - i;
    with_constant<kBlockRows<V>>(height, [&](auto r) {
      multiply_block<r, V>(a + i * a_row, a_row, a_k, b, b_row, depth, c + i * c_row, c_row);
    });
  }
}

// C = A B; `columns` is a multiple of kVector.
void multiply(const float* a, int64_t a_row, int64_t a_k, int64_t rows, const float* b, int64_t b_row, int64_t depth,
              int64_t columns, float* c, int64_t c_row) {
  for (int64_t j = 0; j < columns; j += kBlockVectors * kVector) {
    with_constant<kBlockVectors>(std::min<int64_t>(kBlockVectors, (columns - j) / kVector), [&](auto v) {
      multiply_columns<v>(a, a_row, a_k, rows, b + j, b_row, depth, c + j, c_row);
    });
  }
}

// A token as floats, zero beyond `right`.
void load_rows(const QuantizeArgs& args, int64_t token, float* target) {
  const char* x = static_cast<const char*>(args.x) + token * args.features * dtype_size(args.dtype);
  for (int64_t m = 0; m < args.left; ++m) {
    float* row = target + m * args.padded_right;
    load_floats(x + m * args.right * dtype_size(args.dtype), args.dtype, args.right, row);
    for (int64_t n = args.right; n < args.padded_right; ++n) row[n] = 0.0f;
  }
}

// Columns [begin, end) of X', both multiples of kTransformPadding. Returns the bits of their largest magnitude.
int32_t transform_columns(const QuantizeArgs& args, int64_t token, int64_t begin, int64_t end, float* scratch,
                          float* z) {
  const int64_t stride = args.padded_right, columns = end - begin;
  float* product = args.left_trans != nullptr ? scratch + args.left * stride : z;
  if (args.right_trans == nullptr) {
    load_rows(args, token, product);
  } else {
    load_rows(args, token, scratch);
    multiply(scratch, stride, 1, args.left, args.right_trans + begin, stride, args.right, columns, product + begin,
             stride);
  }
  if (args.left_trans != nullptr) {
    multiply(args.left_trans, 1, args.left, args.left, product + begin, stride, args.left, columns, z + begin, stride);
  }
  if (columns == stride) return max_magnitude_bits(z, args.left * stride);
  int32_t largest = 0;
  for (int64_t m = 0; m < args.left; ++m) {
    largest = std::max(largest, max_magnitude_bits(z + m * stride + begin, columns));
  }
  return largest;
}

// Rows [begin, end) of q, and with the first one the scale.
void quantize_rows(const QuantizeArgs& args, int64_t token, int64_t begin, int64_t end, int32_t largest,
                   const float* z) {
  if (args.token_maximum != nullptr) largest = std::max(largest, magnitude_bits(args.token_maximum[token]));
  const bool is_finite = largest < kInfinityBits;
  const float scale = is_finite ? args.clip * bits_to_float(largest) / args.q_max : NAN;
  if (begin == 0) args.scale[token] = scale;
  int8_t* q = args.q + token * args.q_stride;
  const int64_t q_end = end == args.left ? args.q_stride : end * args.right;
  if (!(scale > 0.0f)) {
    std::memset(q + begin * args.right, 0, q_end - begin * args.right);
    return;
  }
  for (int64_t m = begin; m < end; ++m) {
    // The padding too where there is room: the next row takes its place, and whole vectors are faster.
    const int64_t count = m * args.right + args.padded_right <= q_end ? args.padded_right : args.right;
    quantize_floats(z + m * args.padded_right, count, scale, args.q_min, args.q_max, q + m * args.right);
  }
  if (end == args.left) std::memset(q + args.features, 0, args.q_stride - args.features);
}

void sum_groups(const QuantizeArgs& args, int64_t token) {
  if (args.q_sums == nullptr) return;
  const int64_t size = args.features / args.groups;
  const int8_t* q = args.q + token * args.q_stride;
  for (int64_t g = 0; g < args.groups; ++g) args.q_sums[token * args.groups + g] = sum_bytes(q + g * size, size);
}

void quantize(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch) {
  // In place of X, which the second product does not need.
  float* z = args.left_trans != nullptr ? scratch : scratch + args.left * args.padded_right;
  for (int64_t token = begin; token < end; ++token) {
    const int32_t largest = transform_columns(args, token, 0, args.padded_right, scratch, z);
    quantize_rows(args, token, 0, args.left, largest, z);
    sum_groups(args, token);
  }
}

}  // namespace

// Defines the four functions of `Kernels` for one instruction set.
#define W4A4_DEFINE_QUANTIZE(isa)                                                                                      \
  void quantize_##isa(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch) {                          \
    quantize(args, begin, end, scratch);                                                                               \
  }                                                                                                                    \
  int32_t transform_columns_##isa(const QuantizeArgs& args, int64_t token, int64_t begin, int64_t end, float* scratch, \
                                  float* z) {                                                                          \
    return transform_columns(args, token, begin, end, scratch, z);                                                     \
  }                                                                                                                    \
  void quantize_rows_##isa(const QuantizeArgs& args, int64_t token, int64_t begin, int64_t end, int32_t largest,       \
                           const float* z) {                                                                           \
    quantize_rows(args, token, begin, end, largest, z);                                                                \
  }                                                                                                                    \
  void sum_groups_##isa(const QuantizeArgs& args, int64_t token) { sum_groups(args, token); }

}  // namespace w4a4
