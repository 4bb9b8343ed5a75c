// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 16
#include "norm_impl.h"
#include "silu_impl.h"
#include "transform_impl.h"
#include "weight_only_impl.h"

namespace w4a4 {

W4A4_DEFINE_QUANTIZE(avx512vnni)
W4A4_DEFINE_NORM(avx512vnni)
W4A4_DEFINE_SILU(avx512vnni)

void weight_only_avx512vnni(const WeightOnlyArgs& args, int64_t begin, int64_t end) { weight_only(args, begin, end); }

}  // namespace w4a4
