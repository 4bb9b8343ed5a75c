// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 16
#include <immintrin.h>

#include "limits.h"

namespace w4a4 {
namespace {

struct Step {
  using Vector = __m512i;
  static constexpr int64_t kProducts = 64;
  W4A4_INLINE static Vector add(Vector sum, Vector w, Vector a) { return pinned(_mm512_dpbusd_epi32(sum, w, a)); }
};

}  // namespace

uint64_t read_avx512vnni(const uint64_t* words, int64_t count) { return read(words, count); }
int64_t fma_peak_avx512vnni(int64_t steps) { return fma_peak(steps); }
int64_t dot_peak_avx512vnni(int64_t steps) { return dot_peak<Step>(steps); }

}  // namespace w4a4
