// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "silu.h"

#include <algorithm>

#include "activations.h"
#include "layout.h"
#include "vector.h"

namespace w4a4 {
namespace {

// Features that are computed at a time: their floats stay in the first-level cache.
constexpr int64_t kPiece = 1024;
// Pieces that are worth another thread.
constexpr int64_t kGrain = 8;

}  // namespace

void silu_and_mul(const void* x, Dtype dtype, int64_t tokens, int64_t features, void* y, const Kernels& kernels,
                  const Pool& pool) {
  const int64_t size = dtype_size(dtype), pieces = ceil_div(features, kPiece);
  pool.parallel_for(tokens * pieces, kGrain, [&](int64_t first, int64_t last) {
    float gate[kPiece], up[kPiece];
    for (int64_t item = first; item < last; ++item) {
      const int64_t token = item / pieces, begin = item % pieces * kPiece;
      const int64_t count = std::min(kPiece, features - begin);
      const char* source = static_cast<const char*>(x) + (2 * token * features + begin) * size;
      char* target = static_cast<char*>(y) + (token * features + begin) * size;
      load_floats(source, dtype, count, gate);
      load_floats(source + features * size, dtype, count, up);
      kernels.silu_and_mul(gate, up, count, gate);
      store_floats(gate, count, dtype, target);
    }
  });
}

}  // namespace w4a4
