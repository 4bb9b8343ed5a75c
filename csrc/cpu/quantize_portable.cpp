// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "norm_impl.h"
#include "silu_impl.h"
#include "transform_impl.h"
#include "weight_only_impl.h"

namespace w4a4 {

W4A4_DEFINE_QUANTIZE(portable)
W4A4_DEFINE_NORM(portable)
W4A4_DEFINE_SILU(portable)

void weight_only_portable(const WeightOnlyArgs& args, int64_t begin, int64_t end) { weight_only(args, begin, end); }

}  // namespace w4a4
