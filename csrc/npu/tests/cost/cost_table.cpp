// SPDX-License-Identifier: Apache-2.0
// Predicts how long the linears of Qwen3-32B take on a 910B2, from the instructions that the kernels really issue, and
// prints it as Markdown, next to the lower bound and to a chain of separate launches.
//
//   npu_cost [--quick] [--detail] [--launch MICROSECONDS]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../kernels/kernel_launch.h"

using namespace w4a4::npu;

namespace {

constexpr uint32_t kCores = 24;  // AICs of a 910B2
// The overhead of a launch. Assumed, not published; --launch sets it.
double launch_microseconds = 3.0;

struct Linear {
  const char* name;
  int64_t in, out, left, right;
};
constexpr Linear kLinears[] = {
    {"qkv", 5120, 10240, 64, 80},
    {"o", 8192, 5120, 64, 0},
    {"gate_up", 5120, 51200, 64, 80},
    {"down", 25600, 5120, 160, 160},
};

// Weights, scales, x and y once over the HBM, or the int4 products on the cubes, in microseconds.
double lower_bound(const LinearShape& shape, const ascendc_emulator::Rates& rates) {
  const double in = static_cast<double>(shape.in_features), out = static_cast<double>(shape.out_features);
  const double tokens = static_cast<double>(shape.tokens);
  const double bytes = in * out / 2 + out * 4 + tokens * (in + out) * 2;
  const double cycles = tokens / 16 * out / 16 * in / 64 / kCores;
  return std::max(bytes / rates.hbm_bytes_per_us, cycles / rates.clock_mhz);
}

struct Prediction {
  double bound, fused, fused_assumed, transform, multiply;
  ascendc_emulator::Cost cost;  // of the one launch
  double chain() const { return transform + multiply + 2 * launch_microseconds; }
  double one() const { return fused + launch_microseconds; }
};

ascendc_emulator::Cost run(const Tiling& tiling, uint32_t phases, const LinearAddresses& at,
                           const ascendc_emulator::Rates& rates, bool is_l2_warm = false) {
  ascendc_emulator::Options options;
  options.mode = ascendc_emulator::Mode::kCostOnly;
  options.rates = rates;
  options.is_l2_warm = is_l2_warm;
  options.device_cores = kCores;
  const ascendc_emulator::Report report = launch_bfloat16(tiling, phases, at, options);
  if (!report.clean()) {
    std::fprintf(stderr, "the kernel breaks rules:\n%s", report.text().c_str());
    std::exit(1);
  }
  return report.cost;
}

Prediction predict(const Linear& linear, int64_t tokens) {
  LinearShape shape;
  shape.tokens = tokens, shape.in_features = linear.in, shape.out_features = linear.out;
  shape.left = linear.left, shape.right = linear.right;
  const Tiling tiling = make_tiling(shape, kCores);
  if (!tiling.ok()) {
    std::fprintf(stderr, "%s: %s\n", linear.name, tiling.error.c_str());
    std::exit(1);
  }
  // Two launches, each with the tiling that is best for it alone.
  const Tiling shared = share_activations(tiling);
  LinearShape untransformed = shape;
  untransformed.left = untransformed.right = 0;
  const Tiling plain = share_activations(make_tiling(untransformed, kCores));
  ascendc_emulator::DeviceMemory memory;
  const TilingData& t = tiling.data;
  const auto reserve = [&](uint64_t bytes, const char* name) { return memory.reserve(bytes, name); };
  LinearAddresses at{};
  at.x = reserve(uint64_t{t.tokens} * t.in_features * 2, "x");
  at.left = linear.left ? reserve(linear.left * linear.left * 2, "left") : nullptr;
  at.right = linear.right ? reserve(linear.right * linear.right * 2, "right") : nullptr;
  at.weight = reserve((uint64_t{t.in_features} + 63) / 64 * 64 * ((t.out_features + 15) / 16 * 16) / 2, "weight");
  at.weight_scale = reserve(uint64_t{t.out_features} * 4, "weight_scale");
  at.y = reserve(uint64_t{t.tokens} * t.out_features * 2, "y");
  uint8_t* workspace =
      reserve(std::max({tiling.workspace_bytes, shared.workspace_bytes, plain.workspace_bytes}), "workspace");

  Prediction prediction;
  const ascendc_emulator::Rates published;
  prediction.bound = lower_bound(shape, published);
  const LinearAddresses one = AddWorkspace(at, workspace, t);
  prediction.cost = run(tiling, 3, one, published);
  prediction.fused = prediction.cost.microseconds();
  prediction.fused_assumed = run(tiling, 3, one, ascendc_emulator::with_assumed_latencies()).microseconds();
  // What the first launch wrote is still in L2; the weights are not, since the first launch reads none.
  prediction.transform = run(shared, 1, AddWorkspace(at, workspace, shared.data), published).microseconds();
  prediction.multiply = run(plain, 2, AddWorkspace(at, workspace, plain.data), published, true).microseconds();
  return prediction;
}

void print_detail(const Linear& linear, int64_t tokens, const Prediction& prediction) {
  const ascendc_emulator::Cost& cost = prediction.cost;
  std::printf("%s, %lld tokens: %.1f us\n  busiest core:", linear.name, static_cast<long long>(tokens),
              prediction.fused);
  for (uint32_t pipe = 1; pipe < ascendc_emulator::kPipes; ++pipe) {
    std::printf(" %s %.1f us", ascendc_emulator::name_of(static_cast<ascendc_emulator::Pipe>(pipe)),
                cost.busiest[pipe]);
  }
  std::printf("\n  MB:");
  for (uint32_t path = 0; path < ascendc_emulator::kPaths; ++path) {
    std::printf(" %s %.1f", ascendc_emulator::name_of(static_cast<ascendc_emulator::Path>(path)),
                static_cast<double>(cost.bytes[path]) / 1e6);
  }
  std::printf(" HBM %.1f\n  cube %.1f us of all cores, HBM %.1f us, %llu instructions\n", cost.memory_bytes / 1e6,
              cost.cube_bound, cost.memory_bound, static_cast<unsigned long long>(cost.instructions));
}

}  // namespace

int main(int count, char** arguments) {
  bool is_quick = false, has_detail = false;
  for (int i = 1; i < count; ++i) {
    if (!std::strcmp(arguments[i], "--quick")) {
      is_quick = true;
    } else if (!std::strcmp(arguments[i], "--detail")) {
      has_detail = true;
    } else if (!std::strcmp(arguments[i], "--launch") && i + 1 < count) {
      launch_microseconds = std::atof(arguments[++i]);
    } else {
      std::fprintf(stderr, "usage: npu_cost [--quick] [--detail] [--launch MICROSECONDS]\n");
      return 2;
    }
  }
  std::printf("PREDICTED, not measured: Qwen3-32B linears on a 910B2 with 24 cube cores, bfloat16, microseconds.\n\n");
  std::printf(
      "| linear layer | tokens | lower bound | one launch | lower bound / one launch | one launch with assumed "
      "latencies | added by transform | one launch + %.0f us | two launches + %.0f us "
      "|\n|---|---|---|---|---|---|---|---|---|\n",
      launch_microseconds, 2 * launch_microseconds);
  const std::vector<int64_t> all_tokens =
      is_quick ? std::vector<int64_t>{1, 64} : std::vector<int64_t>{1, 64, 256, 1024, 4096};
  for (const Linear& linear : kLinears) {
    for (const int64_t tokens : all_tokens) {
      const Prediction p = predict(linear, tokens);
      std::printf("| %s | %lld | %.1f | %.1f | %.0f %% | %.1f | %.0f %% | %.1f | %.1f |\n", linear.name,
                  static_cast<long long>(tokens), p.bound, p.fused, 100 * p.bound / p.fused, p.fused_assumed,
                  100 * (p.fused / p.multiply - 1), p.one(), p.chain());
      if (p.fused < p.bound * 0.999) {
        std::fprintf(stderr, "%s, %lld tokens: predicted below the lower bound\n", linear.name,
                     static_cast<long long>(tokens));
        return 1;
      }
      if (has_detail) print_detail(linear, tokens, p);
    }
  }
  const ascendc_emulator::Rates r = ascendc_emulator::with_assumed_latencies();
  std::printf(
      "\nlower bound: the longer of two times, for transferring weights, scales, x and y once at 1.6 TB/s, and for "
      "the int4 products at 16 x 16 x 64 per cycle and 1.8 GHz.\n"
      "one launch: the critical path of the instructions that the kernel issues, at the published rates of each path "
      "(counting the bytes that arrive) and pipe, and at least the time for its bytes at 1.6 TB/s.\n"
      "assumed latencies, not published: %.1f us per global transfer, %.1f us per flag between cores, %.0f cycles to "
      "start an instruction, %.0f to issue one.\n"
      "added by transform: one launch compared with the multiplication alone.\n"
      "two launches: our own two phases one after the other.\n",
      r.gm_latency_us, r.cross_core_us, r.start_cycles, r.issue_cycles);
  return 0;
}
