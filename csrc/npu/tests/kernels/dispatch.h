// SPDX-License-Identifier: Apache-2.0
// From a tiling to the kernel that it asks for. Instantiated for one dtype in a file of its own: each compiles 48
// kernels.
#pragma once

#include "../../host/tiling.h"
#include "../../kernels/flatquant_linear.h"
#include "emulation.h"

namespace w4a4::npu {

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

}  // namespace w4a4::npu
