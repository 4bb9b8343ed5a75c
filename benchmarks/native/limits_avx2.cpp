// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 8
#include <immintrin.h>

#include "limits.h"

namespace w4a4 {
namespace {

// vpmaddubsw and an addition in 16 bits, the cheapest exact int4 product without VNNI. Both as instructions: GCC takes
// an intrinsic of unchanging operands out of the loop.
struct Step {
  using Vector = __m256i;
  static constexpr int64_t kProducts = 32;
  W4A4_INLINE static Vector add(Vector sum, Vector w, Vector a) {
    Vector pairs;
    asm volatile("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(w), "x"(a));
    asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(pairs));
    return sum;
  }
};

}  // namespace

uint64_t read_avx2(const uint64_t* words, int64_t count) { return read(words, count); }
int64_t fma_peak_avx2(int64_t steps) { return fma_peak(steps); }
int64_t dot_peak_avx2(int64_t steps) { return dot_peak<Step>(steps); }

}  // namespace w4a4
