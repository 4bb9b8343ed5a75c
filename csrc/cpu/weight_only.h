// SPDX-License-Identifier: Apache-2.0
// Linear layers whose activations stay floats (W8A16, W4A16).
#pragma once

#include "linear.h"

namespace w4a4 {

// x [tokens, in_features] -> y [tokens, out_features], both of type `dtype`; see WeightOnlyArgs for the arithmetic.
void weight_only_linear(const void* x, Dtype dtype, int64_t tokens, const Weight& weight, bool is_int4, void* y,
                        const Kernels& kernels, const Pool& pool);

}  // namespace w4a4
