// SPDX-License-Identifier: Apache-2.0
// What the operators' bindings share: checks of torch tensors, and torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/linear.h"

namespace tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, found shape ", shape_text(tensor),
                  " with other strides; call .contiguous()");
}

inline void check_float32(const Tensor& tensor, const char* name) {
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
}

inline w4a4::Dtype float_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return w4a4::Dtype::kFloat32;
    case ScalarType::BFloat16:
      return w4a4::Dtype::kBFloat16;
    case ScalarType::Half:
      return w4a4::Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline const float* floats_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline w4a4::Pool torch_pool() {
  return {[](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
            torch::stable::parallel_for(0, count, grain, body);
          },
          static_cast<int64_t>(torch::stable::get_num_threads())};
}

}  // namespace tensors
