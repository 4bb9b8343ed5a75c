// SPDX-License-Identifier: Apache-2.0
// The activation between gate_up and down.
#pragma once

#include <cstdint>

#include "linear.h"

namespace w4a4 {

// x [tokens, 2 * features], gate beside up -> y [tokens, features] = silu(gate) * up, both of type `dtype`, computed in
// float32. What is not finite stays not finite.
void silu_and_mul(const void* x, Dtype dtype, int64_t tokens, int64_t features, void* y, const Kernels& kernels,
                  const Pool& pool);

}  // namespace w4a4
