// SPDX-License-Identifier: Apache-2.0
#include "run.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernel_launch.h"

using namespace w4a4::npu;

Result run_linear(const Linear16& linear, uint32_t cores, Launch launch) {
  Tiling tiling =
      make_tiling(linear.shape, cores, launch == Launch::kPipelined ? Pipelining::kAlways : Pipelining::kIfFaster);
  if (!tiling.ok()) throw std::runtime_error(tiling.error);
  // Only within one launch can every core have activations of its own.
  const bool is_fused = launch != Launch::kTwo;
  if (!is_fused) tiling = share_activations(tiling);
  const TilingData& t = tiling.data;

  ascendc_emulator::DeviceMemory memory;
  const auto upload = [&memory](const auto& values, const char* name) -> uint8_t* {
    return values.empty() ? nullptr : memory.copy(values.data(), values.size() * sizeof(values[0]), name);
  };
  uint8_t* y = memory.allocate(uint64_t{t.tokens} * t.out_features * 2, "y");
  uint8_t* workspace = memory.allocate(tiling.workspace_bytes, "workspace");
  LinearAddresses at{};
  at.x = upload(linear.x, "x");
  at.left = upload(linear.left, "left");
  at.right = upload(linear.right, "right");
  at.weight = upload(pack_nz(linear.weight, t.out_features, t.in_features), "weight");
  at.weight_scale = upload(linear.weight_scale, "weight_scale");
  at.bias = upload(linear.bias, "bias");
  at.y = y;
  at = AddWorkspace(at, workspace, t);
  Result result;
  for (const uint32_t phases : is_fused ? std::vector<uint32_t>{3} : std::vector<uint32_t>{1, 2}) {
    const auto run = linear.dtype == Dtype::kHalf ? launch_half : launch_bfloat16;
    result.report += run(tiling, phases, at, {}).text();
  }

  result.y.resize(uint64_t{t.tokens} * t.out_features);
  std::memcpy(result.y.data(), y, result.y.size() * 2);
  result.activations.q.resize(uint64_t{t.tokens} * t.in_features);
  result.activations.scale.resize(t.tokens);
  for (uint64_t token = 0; token < t.tokens; ++token) {
    std::memcpy(&result.activations.scale[token], at.scale + token * kBlockBytes, sizeof(float));
    for (uint64_t k = 0; k < t.in_features; ++k) {
      const int nibble = at.q[token * t.q_row_bytes + k / 2] >> (k % 2 * 4) & 15;
      result.activations.q[token * t.in_features + k] = static_cast<int8_t>(nibble > 7 ? nibble - 16 : nibble);
    }
  }
  return result;
}
