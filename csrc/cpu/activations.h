// SPDX-License-Identifier: Apache-2.0
// Activations on their way into a product: transformed and quantized on all threads, then laid out in panels.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "linear.h"

namespace w4a4 {

// Work, in multiplications, from which on waking another thread pays: some ten microseconds.
inline constexpr int64_t kQuantizeGrain = 300'000;

// What one token of a transform needs; the caller adds q, q_stride, scale and, if it wants them, q_sums. The arguments
// refer to memory of the calling thread that its next call overwrites.
QuantizeArgs quantize_args(const void* x, Dtype dtype, int64_t features, const Transform& transform,
                           ActivationRange range, int64_t groups);

// Tokens [0, tokens), each after `step`.
void quantize_tokens(const QuantizeArgs& args, int64_t tokens, const Kernels& kernels, const Pool& pool,
                     const Step& step = {});

// Tokens [begin, end) on the calling thread.
void quantize_here(const QuantizeArgs& args, int64_t begin, int64_t end, const Kernels& kernels, const Step& step = {});

// Writes panel `panel` of `panels` for `gemm` to its place in `target`, [panels.tokens, stride].
//
// Token t of the panels is row rows[t] of q [..., stride], or row t if `rows` is null.
void make_panel(const int8_t* q, int64_t stride, const int32_t* rows, const Panels& panels, int64_t panel,
                const Gemm& gemm, int8_t* target);

}  // namespace w4a4
