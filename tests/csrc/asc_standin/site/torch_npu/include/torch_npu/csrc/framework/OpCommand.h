// SPDX-License-Identifier: Apache-2.0
// What the host code uses of torch_npu's queue of tasks.
#pragma once
#include <functional>
#include <string>

namespace at_npu::native {
using PROC_FUNC = std::function<int()>;
class OpCommand {
 public:
  static void RunOpApiV2(const std::string& op_name, const PROC_FUNC& func, bool sync = false);
};
}  // namespace at_npu::native
