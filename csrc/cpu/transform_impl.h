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

// Rows and vectors of columns in a register block: 6 x 2 sums fill the 16 registers of AVX, 6 x 4 the 32 of NEON.
constexpr int kBlockRows = 6;
#if defined(__aarch64__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif

template <int V>
void multiply_columns(const float* a, int64_t a_row, int64_t a_k, int64_t rows, const float* b, int64_t b_row,
                      int64_t depth, float* c, int64_t c_row) {
  // Blocks of nearly equal height: a low one at the end would have too few sums to hide the latency of FMA.
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t i = block * rows / blocks, height = (block + 1) * rows / blocks - i;
    with_constant<kBlockRows>(height, [&](auto r) {
      multiply_block<r, V>(a + i * a_row, a_row, a_k, b, b_row, depth, c + i * c_row, c_row);
    });
  }
}

// C = A B; `columns` is a multiple of kVector.
void multiply(const float* a, int64_t a_row, int64_t a_k, int64_t rows, const float* b, int64_t b_row, int64_t depth,
              int64_t columns, float* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + kBlockVectors * kVector <= columns; j += kBlockVectors * kVector) {
    multiply_columns<kBlockVectors>(a, a_row, a_k, rows, b + j, b_row, depth, c + j, c_row);
  }
  for (; j < columns; j += kVector) multiply_columns<1>(a, a_row, a_k, rows, b + j, b_row, depth, c + j, c_row);
}

// The two matrices of a token's scratch. X R is in the second; L^T (X R), if there is an L, in the first.
const float* transformed(const QuantizeArgs& args, const float* scratch) {
  return args.left_trans != nullptr ? scratch : scratch + args.left * args.padded_right;
}

// Rows of one token as floats, zero beyond `right`.
void load_rows(const QuantizeArgs& args, int64_t token, int64_t row_begin, int64_t row_end, float* target) {
  const char* x = static_cast<const char*>(args.x) + token * args.features * dtype_size(args.dtype);
  for (int64_t m = row_begin; m < row_end; ++m) {
    float* row = target + m * args.padded_right;
    load_floats(x + m * args.right * dtype_size(args.dtype), args.dtype, args.right, row);
    for (int64_t n = args.right; n < args.padded_right; ++n) row[n] = 0.0f;
  }
}

void transform_right(const QuantizeArgs& args, int64_t token, int64_t row_begin, int64_t row_end, float* scratch) {
  const int64_t stride = args.padded_right;
  float* product = scratch + args.left * stride;
  if (args.right_trans == nullptr) return load_rows(args, token, row_begin, row_end, product);
  load_rows(args, token, row_begin, row_end, scratch);
  multiply(scratch + row_begin * stride, stride, 1, row_end - row_begin, args.right_trans, stride, args.right, stride,
           product + row_begin * stride, stride);
}

void transform_left(const QuantizeArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
  if (args.left_trans == nullptr) return;
  const int64_t stride = args.padded_right;
  multiply(args.left_trans + row_begin, 1, args.left, row_end - row_begin, scratch + args.left * stride, stride,
           args.left, stride, scratch + row_begin * stride, stride);
}

void quantize_transformed(const QuantizeArgs& args, int64_t token, const float* scratch) {
  const float* z = transformed(args, scratch);
  int32_t largest = args.token_maximum != nullptr ? magnitude_bits(args.token_maximum[token]) : 0;
  for (int64_t m = 0; m < args.left; ++m) {
    largest = std::max(largest, max_magnitude_bits(z + m * args.padded_right, args.padded_right));
  }
  const bool is_finite = largest < kInfinityBits;
  const float scale = is_finite ? args.clip * bits_to_float(largest) / args.q_max : NAN;
  int8_t* q = args.q + token * args.q_stride;
  args.scale[token] = scale;
  if (scale > 0.0f) {
    for (int64_t m = 0; m < args.left; ++m) {
      quantize_floats(z + m * args.padded_right, args.right, scale, args.q_min, args.q_max, q + m * args.right);
    }
    std::memset(q + args.features, 0, args.q_stride - args.features);
  } else {
    std::memset(q, 0, args.q_stride);
  }
  if (args.q_sums != nullptr) {
    const int64_t size = args.features / args.groups;
    for (int64_t g = 0; g < args.groups; ++g) args.q_sums[token * args.groups + g] = sum_bytes(q + g * size, size);
  }
}

void quantize(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch) {
  for (int64_t token = begin; token < end; ++token) {
    transform_right(args, token, 0, args.left, scratch);
    transform_left(args, 0, args.left, scratch);
    quantize_transformed(args, token, scratch);
  }
}

}  // namespace

// Defines the four functions of `Kernels` for one instruction set.
#define W4A4_DEFINE_QUANTIZE(isa)                                                                                   \
  void quantize_##isa(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch) {                       \
    quantize(args, begin, end, scratch);                                                                            \
  }                                                                                                                 \
  void transform_right_##isa(const QuantizeArgs& args, int64_t token, int64_t begin, int64_t end, float* scratch) { \
    transform_right(args, token, begin, end, scratch);                                                              \
  }                                                                                                                 \
  void transform_left_##isa(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch) {                 \
    transform_left(args, begin, end, scratch);                                                                      \
  }                                                                                                                 \
  void quantize_transformed_##isa(const QuantizeArgs& args, int64_t token, const float* scratch) {                  \
    quantize_transformed(args, token, scratch);                                                                     \
  }

}  // namespace w4a4
