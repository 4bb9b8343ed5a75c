// SPDX-License-Identifier: Apache-2.0
// torch.ops.vllm_w4a4_npu.flatquant_linear on the NPU (PrivateUse1), and its shape function for tracing (Meta).
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "launch.h"
#include "tiling.h"
#include "tiling/platform/platform_ascendc.h"
#include "tiling_cache.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace {

using w4a4::npu::LinearPointers;
using w4a4::npu::LinearShape;
using w4a4::npu::Tiling;
using OptionalTensor = std::optional<at::Tensor>;

int64_t factor_size(const OptionalTensor& factor, const at::Tensor& x, const char* name) {
  if (!factor) return 0;
  TORCH_CHECK(factor->dim() == 2 && factor->size(0) == factor->size(1) && factor->size(0) > 0, name,
              ": expected a square matrix, found ", factor->sizes());
  TORCH_CHECK(factor->scalar_type() == x.scalar_type() && factor->is_contiguous(), name, ": expected contiguous ",
              x.scalar_type(), " as x, found ", factor->scalar_type());
  return factor->size(0);
}

LinearShape check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                  const OptionalTensor& left_trans, const OptionalTensor& right_trans, double clip_ratio,
                  const OptionalTensor& bias) {
  TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "x: expected a contiguous tensor [..., in_features], found shape ",
              x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
              "x: expected float16 or bfloat16, found ", x.scalar_type());
  TORCH_CHECK(weight_scale.dim() == 2 && weight_scale.scalar_type() == at::kFloat && weight_scale.is_contiguous(),
              "weight_scale: expected contiguous float32 [groups, out], found ", weight_scale.scalar_type(), " ",
              weight_scale.sizes());
  LinearShape shape;
  shape.in_features = x.size(-1);
  shape.tokens = shape.in_features > 0 ? x.numel() / shape.in_features : 0;
  shape.out_features = weight_scale.size(1);
  shape.groups = weight_scale.size(0);
  shape.left = factor_size(left_trans, x, "left_trans");
  shape.right = factor_size(right_trans, x, "right_trans");
  shape.has_bias = bias.has_value();
  shape.clip_ratio = static_cast<float>(clip_ratio);
  const std::vector<int64_t> packed = {(shape.in_features + 63) / 64, (shape.out_features + 15) / 16, 16, 32};
  TORCH_CHECK(weight.scalar_type() == at::kByte && weight.is_contiguous() && weight.sizes() == packed,
              "weight: expected uint8 ", at::IntArrayRef(packed), " (vllm_w4a4_plugin.ops.npu.nz.pack_nz) for ",
              shape.out_features, " x ", shape.in_features, ", found ", weight.scalar_type(), " ", weight.sizes());
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == shape.out_features,
                "bias: expected contiguous float32 [", shape.out_features, "], found ", bias->scalar_type(), " ",
                bias->sizes());
  }
  return shape;
}

at::Tensor new_output(const at::Tensor& x, int64_t out_features) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out_features;
  return at::empty(sizes, x.options());
}

const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

at::Tensor flatquant_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const OptionalTensor& left_trans, const OptionalTensor& right_trans, double clip_ratio,
                            const OptionalTensor& bias) {
  const LinearShape shape = check(x, weight, weight_scale, left_trans, right_trans, clip_ratio, bias);
  at::Tensor y = new_output(x, shape.out_features);
  if (shape.tokens == 0) return y;
  static const uint32_t cores = platform_ascendc::PlatformAscendCManager::GetInstance()->GetCoreNumAic();
  static w4a4::npu::TilingCache tilings;
  const Tiling tiling = tilings.Get(shape, cores);
  TORCH_CHECK(tiling.ok(), "flatquant_linear: ", tiling.error);
  const at::Tensor workspace = at::empty({static_cast<int64_t>(tiling.workspace_bytes)}, x.options().dtype(at::kByte));
  const LinearPointers at{x.const_data_ptr(),      pointer(left_trans),           pointer(right_trans),
                          weight.const_data_ptr(), weight_scale.const_data_ptr(), pointer(bias),
                          y.mutable_data_ptr(),    workspace.mutable_data_ptr()};
  // The launch takes its turn in torch_npu's queue of tasks, like CANN's operators. stream() alone would first wait
  // until the queue is empty. The workspace may be freed before the launch: its memory is reused in the stream's order.
  void* stream = c10_npu::getCurrentNPUStream().stream(false);
  const bool is_half = x.scalar_type() == at::kHalf;
  at_npu::native::OpCommand::RunOpApiV2("w4a4_flatquant_linear", [stream, is_half, tiling, at]() -> int {
    w4a4::npu::launch_flatquant_linear(stream, cores, is_half, tiling.factors, tiling.token_class, tiling.data, at);
    return 0;
  });
  return y;
}

// The phases one by one, for the device check: (y, int4 activations [tokens, bytes], scales [tokens]). With `phases` 1
// only the first one runs, and y is zero.
std::tuple<at::Tensor, at::Tensor, at::Tensor> flatquant_linear_phases(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale, const OptionalTensor& left_trans,
    const OptionalTensor& right_trans, double clip_ratio, const OptionalTensor& bias, int64_t phases) {
  const LinearShape shape = check(x, weight, weight_scale, left_trans, right_trans, clip_ratio, bias);
  TORCH_CHECK(phases == 1 || phases == 3, "phases: expected 1 or 3, found ", phases);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x: the phases alone take bfloat16, found ", x.scalar_type());
  const uint32_t cores = platform_ascendc::PlatformAscendCManager::GetInstance()->GetCoreNumAic();
  const Tiling whole = w4a4::npu::make_tiling(shape, cores);
  TORCH_CHECK(whole.ok(), "flatquant_linear_phases: ", whole.error);
  const Tiling tiling = w4a4::npu::share_activations(whole);
  at::Tensor y = new_output(x, shape.out_features).zero_();
  const at::Tensor workspace = at::zeros({static_cast<int64_t>(tiling.workspace_bytes)}, x.options().dtype(at::kByte));
  const LinearPointers at{x.const_data_ptr(),      pointer(left_trans),           pointer(right_trans),
                          weight.const_data_ptr(), weight_scale.const_data_ptr(), pointer(bias),
                          y.mutable_data_ptr(),    workspace.mutable_data_ptr()};
  void* stream = c10_npu::getCurrentNPUStream().stream(true);  // waits until the queue is empty
  for (uint32_t phase = 1; phase <= (phases == 3 ? 2u : 1u); ++phase) {
    TORCH_CHECK(
        w4a4::npu::launch_flatquant_phase(stream, cores, phase, tiling.factors, tiling.token_class, tiling.data, at),
        "flatquant_linear_phases: not compiled for these factors and ", shape.tokens, " tokens");
  }
  const auto part = [&](uint64_t offset, uint64_t row_bytes) {
    const auto begin = static_cast<int64_t>(offset), bytes = static_cast<int64_t>(row_bytes);
    return workspace.narrow(0, begin, shape.tokens * bytes).view({shape.tokens, bytes});
  };
  const at::Tensor scales = part(tiling.data.scale_offset, w4a4::npu::kBlockBytes).view(at::kFloat);
  return {y, part(tiling.data.q_offset, tiling.data.q_row_bytes), scales.select(1, 0)};
}

at::Tensor flatquant_linear_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                                 const OptionalTensor& left_trans, const OptionalTensor& right_trans, double clip_ratio,
                                 const OptionalTensor& bias) {
  return new_output(x, weight_scale.size(1));
}

}  // namespace

// The Python side adds operators to the same namespace.
TORCH_LIBRARY_FRAGMENT(vllm_w4a4_npu, library) {
  library.def(
      "flatquant_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? left_trans, Tensor? right_trans, "
      "float clip_ratio, Tensor? bias=None) -> Tensor");
  library.def(
      "flatquant_linear_phases(Tensor x, Tensor weight, Tensor weight_scale, Tensor? left_trans, Tensor? right_trans, "
      "float clip_ratio, Tensor? bias, int phases) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vllm_w4a4_npu, PrivateUse1, library) {
  library.impl("flatquant_linear", flatquant_linear);
  library.impl("flatquant_linear_phases", flatquant_linear_phases);
}

TORCH_LIBRARY_IMPL(vllm_w4a4_npu, Meta, library) { library.impl("flatquant_linear", flatquant_linear_meta); }
