// SPDX-License-Identifier: Apache-2.0
// From a tiling to its kernel. Each dtype is instantiated in a file of its own, which compiles 48 kernels.
#pragma once

#include <stdexcept>

#include "kernel_launch.h"

namespace w4a4::npu {

struct Call {
  const Tiling& tiling;
  uint32_t phases;
  const LinearAddresses& at;
  const ascendc_emulator::Options& options;
};

template <typename T, Factors kFactors, uint32_t kRows, uint32_t kPhases>
ascendc_emulator::Report launch_kernel(const Call& call) {
  const auto kernel = [&call] { FlatQuantLinear<T, kFactors, kRows, kPhases>(call.at, call.tiling.data); };
  return ascendc_emulator::Launch(call.tiling.cores, kernel, call.options);
}

template <typename T, Factors kFactors, uint32_t kRows>
ascendc_emulator::Report launch_phases(const Call& call) {
  switch (call.phases) {
    case 1:
      return launch_kernel<T, kFactors, kRows, 1>(call);
    case 2:
      return launch_kernel<T, kFactors, kRows, 2>(call);
    case 3:
      return launch_kernel<T, kFactors, kRows, 3>(call);
  }
  throw std::invalid_argument("phases: expected 1, 2 or 3");
}

template <typename T, Factors kFactors>
ascendc_emulator::Report launch_rows(const Call& call) {
  switch (call.tiling.token_class) {
    case TokenClass::kRows16:
      return launch_phases<T, kFactors, 16>(call);
    case TokenClass::kRows32:
      return launch_phases<T, kFactors, 32>(call);
    case TokenClass::kRows64:
      return launch_phases<T, kFactors, 64>(call);
    case TokenClass::kRows128:
      return launch_phases<T, kFactors, 128>(call);
  }
  throw std::invalid_argument("unknown token class");
}

template <typename T>
ascendc_emulator::Report launch_factors(const Call& call) {
  switch (call.tiling.factors) {
    case Factors::kNone:
      return launch_rows<T, Factors::kNone>(call);
    case Factors::kLeft:
      return launch_rows<T, Factors::kLeft>(call);
    case Factors::kRight:
      return launch_rows<T, Factors::kRight>(call);
    case Factors::kBoth:
      return launch_rows<T, Factors::kBoth>(call);
  }
  throw std::invalid_argument("unknown factors");
}

}  // namespace w4a4::npu
