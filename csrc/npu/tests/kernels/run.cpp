// SPDX-License-Identifier: Apache-2.0
#include "run.h"

#include <stdexcept>
#include <vector>

#include "kernel_launch.h"

using namespace w4a4::npu;

Result run_linear(const Linear16& linear, uint32_t cores, Launch launch, const ascendc_emulator::Options& options) {
  Tiling tiling =
      make_tiling(linear.shape, cores, launch == Launch::kPipelined ? Pipelining::kAlways : Pipelining::kIfFaster);
  if (!tiling.ok()) throw std::runtime_error(tiling.error);
  // Only within one launch can every core have activations of its own.
  const bool is_fused = launch != Launch::kTwo;
  if (!is_fused) tiling = share_activations(tiling);

  const DeviceLinear device(linear, tiling);
  std::string report;
  for (const uint32_t phases : is_fused ? std::vector<uint32_t>{3} : std::vector<uint32_t>{1, 2}) {
    const auto run = linear.dtype == Dtype::kHalf ? launch_half : launch_bfloat16;
    report += run(tiling, phases, device.addresses(), options).text();
  }
  Result result = device.Read();
  result.report = report;
  return result;
}
