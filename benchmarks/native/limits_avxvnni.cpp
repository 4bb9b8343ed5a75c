// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 8
#include <immintrin.h>

#include "limits.h"

namespace w4a4 {
namespace {

struct Step {
  using Vector = __m256i;
  static constexpr int64_t kProducts = 32;
  W4A4_INLINE static Vector add(Vector sum, Vector w, Vector a) { return pinned(_mm256_dpbusd_avx_epi32(sum, w, a)); }
};

}  // namespace

int64_t dot_peak_avxvnni(int64_t steps) { return dot_peak<Step>(steps); }

}  // namespace w4a4
