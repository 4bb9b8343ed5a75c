// SPDX-License-Identifier: Apache-2.0
#define W4A4_VECTOR_FLOATS 4
#include "transform_impl.h"

namespace w4a4 {

W4A4_DEFINE_QUANTIZE(portable)

}  // namespace w4a4
