// SPDX-License-Identifier: Apache-2.0
// Kronecker transform and per-token quantization, written with GCC vector types so that one text serves every
// instruction set. Include it in one source file per set, which defines W4A4_VECTOR_FLOATS and is compiled with that
// set's flags; everything here has internal linkage.
#pragma once

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
void multiply_block(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row, int64_t depth, float* c,
                    int64_t c_row) {
  FloatVector sum[R][V];
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < V; ++v) sum[i][v] = FloatVector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    FloatVector row[V];
    for (int v = 0; v < V; ++v) row[v] = load(b + k * b_row + v * kVector);
    for (int i = 0; i < R; ++i) {
      const FloatVector factor = broadcast(a[i * a_row + k * a_k]);
      for (int v = 0; v < V; ++v) sum[i][v] += factor * row[v];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < V; ++v) store(c + i * c_row + v * kVector, sum[i][v]);
  }
}

template <int V>
void multiply_columns(const float* a, int64_t a_row, int64_t a_k, int64_t rows, const float* b, int64_t b_row,
                      int64_t depth, float* c, int64_t c_row) {
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) multiply_block<6, V>(a + i * a_row, a_row, a_k, b, b_row, depth, c + i * c_row, c_row);
  for (; i + 2 <= rows; i += 2) multiply_block<2, V>(a + i * a_row, a_row, a_k, b, b_row, depth, c + i * c_row, c_row);
  for (; i < rows; ++i) multiply_block<1, V>(a + i * a_row, a_row, a_k, b, b_row, depth, c + i * c_row, c_row);
}

// C = A B; `columns` is a multiple of kVector.
void multiply(const float* a, int64_t a_row, int64_t a_k, int64_t rows, const float* b, int64_t b_row, int64_t depth,
              int64_t columns, float* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + 2 * kVector <= columns; j += 2 * kVector) {
    multiply_columns<2>(a, a_row, a_k, rows, b + j, b_row, depth, c + j, c_row);
  }
  for (; j < columns; j += kVector) multiply_columns<1>(a, a_row, a_k, rows, b + j, b_row, depth, c + j, c_row);
}

// One token as [left, padded_right] floats, zero beyond `right`.
void load_token(const QuantizeArgs& args, int64_t token, float* target) {
  const char* x = static_cast<const char*>(args.x) + token * args.features * dtype_size(args.dtype);
  for (int64_t m = 0; m < args.left; ++m) {
    float* row = target + m * args.padded_right;
    load_floats(x + m * args.right * dtype_size(args.dtype), args.dtype, args.right, row);
    for (int64_t n = args.right; n < args.padded_right; ++n) row[n] = 0.0f;
  }
}

// Quantizes the [left, right] part of z (row stride padded_right).
void quantize_token(const QuantizeArgs& args, const float* z, int64_t token) {
  float largest = 0.0f;
  for (int64_t m = 0; m < args.left; ++m) {
    largest = std::fmax(largest, max_abs(z + m * args.padded_right, args.padded_right));
  }
  const float scale = args.clip * largest / args.q_max;
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
  float* x = scratch;
  float* other = scratch + args.left * args.padded_right;
  for (int64_t token = begin; token < end; ++token) {
    load_token(args, token, x);
    float* z = x;
    if (args.right_trans != nullptr) {
      multiply(x, args.padded_right, 1, args.left, args.right_trans, args.padded_right, args.right, args.padded_right,
               other, args.padded_right);
      z = other;
    }
    if (args.left_trans != nullptr) {
      float* result = z == x ? other : x;
      multiply(args.left_trans, 1, args.left, args.left, z, args.padded_right, args.left, args.padded_right, result,
               args.padded_right);
      z = result;
    }
    quantize_token(args, z, token);
  }
}

}  // namespace
}  // namespace w4a4
