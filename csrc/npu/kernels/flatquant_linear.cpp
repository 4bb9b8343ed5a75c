// SPDX-License-Identifier: Apache-2.0
// The kernels by name, for a device build, and their launch on a stream.
#include "flatquant_linear.h"

#include "../host/launch.h"

using w4a4::npu::AddWorkspace;
using w4a4::npu::Factors;
using w4a4::npu::FlatQuantLinear;
using w4a4::npu::LinearAddresses;
using w4a4::npu::TilingData;
using w4a4::npu::TokenClass;

// Scheduling mode 1: the cores wait for each other, so a kernel must not start before there are free cores for all of
// its blocks. In mode 0, two partly scheduled kernels on different streams could wait for each other's cores forever.
#define W4A4_KERNEL_OF_PHASES(NAME, T, FACTORS, ROWS, PHASES)                                                         \
  extern "C" __schedmode__(1) __global__ __aicore__ void NAME(GM_ADDR x, GM_ADDR left, GM_ADDR right, GM_ADDR weight, \
                                                              GM_ADDR weight_scale, GM_ADDR bias, GM_ADDR y,          \
                                                              GM_ADDR workspace, TilingData tiling) {                 \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);                                                                \
    LinearAddresses at{x, left, right, weight, weight_scale, bias, y, nullptr, nullptr, nullptr, nullptr};            \
    FlatQuantLinear<T, Factors::FACTORS, ROWS, PHASES>(AddWorkspace(at, workspace, tiling), tiling);                  \
  }
#define W4A4_KERNEL(NAME, T, FACTORS, ROWS) W4A4_KERNEL_OF_PHASES(NAME, T, FACTORS, ROWS, 3)

// For each combination of dtype, factors and token class.
#define W4A4_FOR_ROWS(DO, NAME, T, FACTORS) \
  DO(NAME##_rows16, T, FACTORS, 16)         \
  DO(NAME##_rows32, T, FACTORS, 32)         \
  DO(NAME##_rows64, T, FACTORS, 64)         \
  DO(NAME##_rows128, T, FACTORS, 128)
#define W4A4_FOR_FACTORS(DO, NAME, T)        \
  W4A4_FOR_ROWS(DO, NAME##_none, T, kNone)   \
  W4A4_FOR_ROWS(DO, NAME##_left, T, kLeft)   \
  W4A4_FOR_ROWS(DO, NAME##_right, T, kRight) \
  W4A4_FOR_ROWS(DO, NAME##_both, T, kBoth)
#define W4A4_FOR_ALL(DO)                                 \
  W4A4_FOR_FACTORS(DO, w4a4_flatquant_linear_half, half) \
  W4A4_FOR_FACTORS(DO, w4a4_flatquant_linear_bf16, bfloat16_t)

W4A4_FOR_ALL(W4A4_KERNEL)

// Each phase in a launch of its own, for the device check: enough combinations to tell where a fault is.
#define W4A4_FOR_PHASES(DO, NAME, FACTORS, ROWS)               \
  DO(NAME##_quantize_rows##ROWS, bfloat16_t, FACTORS, ROWS, 1) \
  DO(NAME##_multiply_rows##ROWS, bfloat16_t, FACTORS, ROWS, 2)
#define W4A4_FOR_ALL_PHASES(DO)                                   \
  W4A4_FOR_PHASES(DO, w4a4_flatquant_phase_bf16_none, kNone, 16)  \
  W4A4_FOR_PHASES(DO, w4a4_flatquant_phase_bf16_none, kNone, 128) \
  W4A4_FOR_PHASES(DO, w4a4_flatquant_phase_bf16_both, kBoth, 16)  \
  W4A4_FOR_PHASES(DO, w4a4_flatquant_phase_bf16_both, kBoth, 128)

W4A4_FOR_ALL_PHASES(W4A4_KERNEL_OF_PHASES)

namespace w4a4::npu {

void launch_flatquant_linear(void* stream, uint32_t cores, bool is_half, Factors factors, TokenClass token_class,
                             const TilingData& tiling, const LinearPointers& at) {
  const auto gm = [](const void* pointer) { return static_cast<GM_ADDR>(const_cast<void*>(pointer)); };
#define W4A4_LAUNCH(NAME, T, FACTORS, ROWS)                                                                   \
  if (is_half == kIsHalf<T> && factors == Factors::FACTORS && token_class == TokenClass::kRows##ROWS) {       \
    NAME<<<cores, nullptr, stream>>>(gm(at.x), gm(at.left), gm(at.right), gm(at.weight), gm(at.weight_scale), \
                                     gm(at.bias), gm(at.y), gm(at.workspace), tiling);                        \
    return;                                                                                                   \
  }
  W4A4_FOR_ALL(W4A4_LAUNCH)
#undef W4A4_LAUNCH
}

bool launch_flatquant_phase(void* stream, uint32_t cores, uint32_t phase, Factors factors, TokenClass token_class,
                            const TilingData& tiling, const LinearPointers& at) {
  const auto gm = [](const void* pointer) { return static_cast<GM_ADDR>(const_cast<void*>(pointer)); };
#define W4A4_LAUNCH(NAME, T, FACTORS, ROWS, PHASE)                                                            \
  if (phase == PHASE && factors == Factors::FACTORS && token_class == TokenClass::kRows##ROWS) {              \
    NAME<<<cores, nullptr, stream>>>(gm(at.x), gm(at.left), gm(at.right), gm(at.weight), gm(at.weight_scale), \
                                     gm(at.bias), gm(at.y), gm(at.workspace), tiling);                        \
    return true;                                                                                              \
  }
  W4A4_FOR_ALL_PHASES(W4A4_LAUNCH)
#undef W4A4_LAUNCH
  return false;
}

}  // namespace w4a4::npu
