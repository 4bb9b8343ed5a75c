// SPDX-License-Identifier: Apache-2.0
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace c10_npu {
aclrtStream NPUStream::stream(const bool) const { return nullptr; }
NPUStream getCurrentNPUStream(signed char) { return {}; }
}  // namespace c10_npu

namespace at_npu::native {
void OpCommand::RunOpApiV2(const std::string&, const PROC_FUNC& func, bool) { func(); }
}  // namespace at_npu::native
