// SPDX-License-Identifier: Apache-2.0
// The device build's launches (kernels/flatquant_linear.cpp, whose `kernel<<<...>>>` becomes a launch of the emulator)
// on one stream and on several streams at a time.
//
//   streams_test batch     the kernels as they are: right in every order, whatever shares the device with them
//   streams_test normal    the kernels without __schedmode__(1): two streams must deadlock
#include <cstdio>
#include <memory>
#include <string>

#include "../../host/launch.h"
#include "check.h"
#include "device_linear.h"

using namespace w4a4::npu;
using ascendc_emulator::LaunchQueue;

namespace {

constexpr uint32_t kCores = 4;

// A linear, and where its launch puts the results.
struct Launched {
  Linear16 linear;
  Tiling tiling;
  std::unique_ptr<DeviceLinear> device;

  Launched(const LinearShape& shape, Dtype dtype, bool in_phases)
      : linear(random_linear(shape, dtype, Values::kSmallIntegers, 5)) {
    tiling = make_tiling(shape, kCores);
    if (in_phases) tiling = share_activations(tiling);
    device = std::make_unique<DeviceLinear>(linear, tiling);
  }

  void On(LaunchQueue::Stream& stream, bool in_phases) const {
    const LinearAddresses at = device->addresses();
    const LinearPointers pointers{at.x,    at.left, at.right,           at.weight, at.weight_scale,
                                  at.bias, at.y,    device->workspace()};
    if (!in_phases) {
      launch_flatquant_linear(&stream, tiling.cores, linear.dtype == Dtype::kHalf, tiling.factors, tiling.token_class,
                              tiling.data, pointers);
      return;
    }
    for (const uint32_t phase : {1, 2}) {
      check(launch_flatquant_phase(&stream, tiling.cores, phase, tiling.factors, tiling.token_class, tiling.data,
                                   pointers),
            "phase " + std::to_string(phase) + " is compiled");
    }
  }

  void Check(const std::string& what) const {
    const Quantized16 activations = reference_quantize(linear, reference_transform(linear));
    check(device->Read().y == reference_multiply(linear, activations), linear.text() + what + ": y");
  }
};

// Launches all of `shapes` on each of `streams` streams.
ascendc_emulator::Report run(const std::vector<LinearShape>& shapes, uint32_t streams, uint64_t order,
                             bool in_phases = false) {
  LaunchQueue queue;
  std::vector<LaunchQueue::Stream> all;
  for (uint32_t i = 0; i < streams; ++i) all.push_back({&queue, i});
  std::vector<Launched> launched;
  for (const LinearShape& shape : shapes) {
    for (LaunchQueue::Stream& stream : all) {
      const bool is_half = !in_phases && stream.index % 2 == 1;
      launched.emplace_back(shape, is_half ? Dtype::kHalf : Dtype::kBFloat16, in_phases);
      launched.back().On(stream, in_phases);
    }
  }
  ascendc_emulator::Options options;
  options.order = order;
  options.device_cores = kCores;
  const ascendc_emulator::Report report = queue.Synchronize(options);
  if (!report.clean()) return report;
  for (const Launched& one : launched) {
    one.Check(", " + std::to_string(streams) + " streams, order " + std::to_string(order));
  }
  return report;
}

// 40 tokens: the cores share them and wait for each other. 390: in chunks. 1: each core works for itself.
const LinearShape kBarrier{40, 384, 600, 16, 24, 1, true}, kChunks{390, 5120, 260, 64, 80}, kAlone{1, 384, 600, 16, 24};

void test_batch() {
  for (uint64_t order = 0; order <= 3; ++order) {
    const std::string what = ", order " + std::to_string(order) + ": ";
    for (const uint32_t streams : {1u, 2u, 3u}) {
      const auto report = run({kBarrier, kAlone, kBarrier}, streams, order);
      check(report.clean(), std::to_string(streams) + " streams" + what + report.text());
    }
    const auto phases = run({{200, 384, 600, 16, 24}, {200, 1024, 40, 0, 0}}, 2, order, true);
    check(phases.clean(), "phases on two streams" + what + phases.text());
  }
  const auto chunks = run({kChunks}, 2, 1);
  check(chunks.clean(), "chunks on two streams: " + chunks.text());
}

void test_normal() {
  check(run({kBarrier}, 1, 0).clean(), "one stream has all cores for its kernels");
  check(run({kAlone}, 2, 0).clean(), "kernels whose cores do not wait for each other need no batch scheduling");
  for (const LinearShape& shape : {kBarrier, kChunks}) {
    const auto report = run({shape}, 2, 0);
    check(report.has(ascendc_emulator::Detector::kDeadlock), "without __schedmode__(1) two streams must deadlock");
    std::printf("%s", report.text().c_str());
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "batch") {
    test_batch();
  } else if (mode == "normal") {
    test_normal();
  }
  return finish("streams_test");
}
