// SPDX-License-Identifier: Apache-2.0
#include "silu.h"

#include <algorithm>

#include "layout.h"

namespace w4a4 {
namespace {

// Features of a token that one thread computes, and how many of such pieces are worth another thread.
constexpr int64_t kPiece = 1024;
constexpr int64_t kGrain = 8;

}  // namespace

void silu_and_mul(const void* x, Dtype dtype, int64_t tokens, int64_t features, void* y, const Kernels& kernels,
                  const Pool& pool) {
  const int64_t size = dtype_size(dtype), pieces = ceil_div(features, kPiece);
  pool.parallel_for(tokens * pieces, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t token = item / pieces, begin = item % pieces * kPiece;
      const char* gate = static_cast<const char*>(x) + (2 * token * features + begin) * size;
      char* target = static_cast<char*>(y) + (token * features + begin) * size;
      kernels.silu_and_mul_of(gate, gate + features * size, dtype, std::min(kPiece, features - begin), target);
    }
  });
}

}  // namespace w4a4
