// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 16
#include "transform_impl.h"

namespace w4a4 {

void quantize_avx512vnni(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch) {
  quantize(args, begin, end, scratch);
}

}  // namespace w4a4
