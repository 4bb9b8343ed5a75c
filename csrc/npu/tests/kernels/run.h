// SPDX-License-Identifier: Apache-2.0
// Runs a linear through the kernels.
#pragma once

#include <stdexcept>
#include <vector>

#include "../../kernels/flatquant_linear.h"
#include "launch.h"
#include "linear.h"
#include "reference.h"

struct Result {
  Quantized16 activations;  // as the kernel left them in workspace
  std::vector<uint16_t> y;
};

namespace run_detail {

using namespace w4a4::npu;

template <typename T, Factors kFactors, uint32_t kRows>
void launch_phases(uint32_t phases, uint32_t cores, const LinearAddresses& at, const TilingData& tiling) {
  if (phases == 1) launch(cores, [&] { FlatQuantLinear<T, kFactors, kRows, 1>(at, tiling); });
  if (phases == 2) launch(cores, [&] { FlatQuantLinear<T, kFactors, kRows, 2>(at, tiling); });
  if (phases == 3) launch(cores, [&] { FlatQuantLinear<T, kFactors, kRows, 3>(at, tiling); });
}

template <typename T, Factors kFactors>
void launch_rows(TokenClass rows, uint32_t phases, uint32_t cores, const LinearAddresses& at, const TilingData& t) {
  switch (rows) {
    case TokenClass::kRows16:
      return launch_phases<T, kFactors, 16>(phases, cores, at, t);
    case TokenClass::kRows32:
      return launch_phases<T, kFactors, 32>(phases, cores, at, t);
    case TokenClass::kRows64:
      return launch_phases<T, kFactors, 64>(phases, cores, at, t);
    case TokenClass::kRows128:
      return launch_phases<T, kFactors, 128>(phases, cores, at, t);
  }
}

template <typename T>
void launch_factors(const Tiling& tiling, uint32_t phases, const LinearAddresses& at) {
  const TilingData& t = tiling.data;
  switch (tiling.factors) {
    case Factors::kNone:
      return launch_rows<T, Factors::kNone>(tiling.token_class, phases, tiling.cores, at, t);
    case Factors::kLeft:
      return launch_rows<T, Factors::kLeft>(tiling.token_class, phases, tiling.cores, at, t);
    case Factors::kRight:
      return launch_rows<T, Factors::kRight>(tiling.token_class, phases, tiling.cores, at, t);
    case Factors::kBoth:
      return launch_rows<T, Factors::kBoth>(tiling.token_class, phases, tiling.cores, at, t);
  }
}

}  // namespace run_detail

// `fused`: one launch; otherwise the two phases are launched after each other.
inline Result run_linear(const Linear16& linear, uint32_t cores, bool fused = true) {
  using namespace w4a4::npu;
  Tiling tiling = make_tiling(linear.shape, cores);
  if (!tiling.ok()) throw std::runtime_error(tiling.error);
  // Only within one launch can every core have activations of its own.
  if (!fused) tiling = share_activations(tiling);
  const TilingData& t = tiling.data;

  DeviceMemory memory;
  const auto upload = [&memory](const auto& values) -> uint8_t* {
    return values.empty() ? nullptr : memory.copy(values.data(), values.size() * sizeof(values[0]));
  };
  uint8_t* y = memory.allocate(uint64_t{t.tokens} * t.out_features * 2);
  uint8_t* workspace = memory.allocate(tiling.workspace_bytes);
  LinearAddresses at{};
  at.x = upload(linear.x);
  at.left = upload(linear.left);
  at.right = upload(linear.right);
  at.weight = upload(pack_nz(linear.weight, t.out_features, t.in_features));
  at.weight_scale = upload(linear.weight_scale);
  at.bias = upload(linear.bias);
  at.y = y;
  at = AddWorkspace(at, workspace, t);
  for (const uint32_t phases : fused ? std::vector<uint32_t>{3} : std::vector<uint32_t>{1, 2}) {
    if (linear.dtype == Dtype::kHalf) {
      run_detail::launch_factors<half>(tiling, phases, at);
    } else {
      run_detail::launch_factors<bfloat16_t>(tiling, phases, at);
    }
  }

  Result result;
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
