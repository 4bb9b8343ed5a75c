// SPDX-License-Identifier: Apache-2.0
// What the host code uses of torch_npu's streams.
#pragma once

using aclrtStream = void*;

namespace c10_npu {
class NPUStream {
 public:
  // false: without waiting for the queue of tasks to become empty.
  aclrtStream stream(const bool need_empty) const;
};
NPUStream getCurrentNPUStream(signed char device_index = -1);
}  // namespace c10_npu
