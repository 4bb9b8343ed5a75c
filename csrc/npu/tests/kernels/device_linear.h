// SPDX-License-Identifier: Apache-2.0
// A linear's operands and results in the emulated device's memory.
#pragma once

#include <cstring>
#include <vector>

#include "../../kernels/flatquant_linear.h"
#include "ascendc_emulator/launch.h"
#include "reference.h"

struct Result {
  Quantized16 activations;  // as the kernel left them in workspace
  std::vector<uint16_t> y;
  std::string report;  // the emulator's, of violations of the hardware's rules; empty if there are none
};

class DeviceLinear {
 public:
  DeviceLinear(const Linear16& linear, const w4a4::npu::Tiling& tiling) : tiling_(tiling.data) {
    at_.x = Upload(linear.x, "x");
    at_.left = Upload(linear.left, "left");
    at_.right = Upload(linear.right, "right");
    at_.weight = Upload(pack_nz(linear.weight, tiling_.out_features, tiling_.in_features), "weight");
    at_.weight_scale = Upload(linear.weight_scale, "weight_scale");
    at_.bias = Upload(linear.bias, "bias");
    at_.y = memory_.allocate(uint64_t{tiling_.tokens} * tiling_.out_features * 2, "y");
    workspace_ = memory_.allocate(tiling.workspace_bytes, "workspace");
  }

  w4a4::npu::LinearAddresses addresses() const { return w4a4::npu::AddWorkspace(at_, workspace_, tiling_); }
  uint8_t* workspace() const { return workspace_; }

  // What the kernels have computed.
  Result Read() const {
    const w4a4::npu::LinearAddresses at = addresses();
    Result result;
    result.y.resize(uint64_t{tiling_.tokens} * tiling_.out_features);
    std::memcpy(result.y.data(), at.y, result.y.size() * 2);
    result.activations.q.resize(uint64_t{tiling_.tokens} * tiling_.in_features);
    result.activations.scale.resize(tiling_.tokens);
    for (uint64_t token = 0; token < tiling_.tokens; ++token) {
      std::memcpy(&result.activations.scale[token], at.scale + token * w4a4::npu::kBlockBytes, sizeof(float));
      for (uint64_t k = 0; k < tiling_.in_features; ++k) {
        const int nibble = at.q[token * tiling_.q_row_bytes + k / 2] >> (k % 2 * 4) & 15;
        result.activations.q[token * tiling_.in_features + k] = static_cast<int8_t>(nibble > 7 ? nibble - 16 : nibble);
      }
    }
    return result;
  }

 private:
  template <typename T>
  uint8_t* Upload(const std::vector<T>& values, const char* name) {
    return values.empty() ? nullptr : memory_.copy(values.data(), values.size() * sizeof(T), name);
  }

  ascendc_emulator::DeviceMemory memory_;
  w4a4::npu::TilingData tiling_;
  w4a4::npu::LinearAddresses at_{};
  uint8_t* workspace_;
};
