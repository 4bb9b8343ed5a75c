// SPDX-License-Identifier: Apache-2.0
// Products with int8 weights that are nearly exact in the activations, for output heads.
#pragma once

#include <cstdint>

#include "linear.h"

namespace w4a4 {

// x [tokens, in_features] -> y = x (weight * scale)^T + bias, both of type `dtype`. A token is rounded to 15 bits,
// scale = max|x| / 16256, and enters the integer product as two tokens of int8: x = scale * (128 * high + low). Reading
// the weights is what costs, so the second token is nearly free. A token that is not finite has outputs of NaN.
// `weight` has no groups, offset or quant_bias.
void split_linear(const void* x, Dtype dtype, int64_t tokens, const Weight& weight, void* y, const Kernels& kernels,
                  const Pool& pool);

}  // namespace w4a4
