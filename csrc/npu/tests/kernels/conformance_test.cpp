// SPDX-License-Identifier: Apache-2.0
// The kernels, run under the emulator, compared with the reference: bit for bit where float32 sums are exact in any
// order, and always from the int4 activations on.
//
//   conformance_test [SECTION...]    all sections by default: models full tokens tails factors pipelined groups
//                                  values realistic rounding
//
// Each linear runs in the order of the program, and once more (small ones three times) in a random order of everything
// that the hardware does not order (Options::order), flags between cores among it.
#include <cstdlib>
#include <functional>
#include <set>
#include <tuple>

#include "check.h"
#include "models.h"
#include "run.h"

using w4a4::npu::LinearShape;

namespace {

constexpr double kSmall = 1e7;  // products
uint64_t next_order = 1;        // each run in a random order has one of its own

std::string text_of(const Linear16& linear, uint32_t cores, Launch launch, uint64_t order) {
  return linear.text() + ", " + std::to_string(cores) + " cores" +
         (launch == Launch::kTwo         ? ", two launches"
          : launch == Launch::kPipelined ? ", pipelined"
                                         : "") +
         ", order " + std::to_string(order);
}

void check_equal(const Linear16& linear, uint32_t cores, Launch launch = Launch::kFused) {
  const Quantized16 activations = reference_quantize(linear, reference_transform(linear));
  const std::vector<uint16_t> y = reference_multiply(linear, activations);
  const double products = static_cast<double>(linear.weight.size() +
                                              linear.shape.in_features * (linear.left_size() + linear.right_size())) *
                          linear.shape.tokens;
  const int random_orders = products < kSmall ? 3 : 1;
  for (int i = 0; i <= random_orders; ++i) {
    ascendc_emulator::Options options;
    if (i > 0) options.order = next_order++;
    const std::string what = text_of(linear, cores, launch, options.order);
    const Result found = run_linear(linear, cores, launch, options);
    check(found.activations.scale == activations.scale, what + ": token scales");
    check(found.activations.q == activations.q, what + ": int4 activations");
    check(found.y == y, what + ": y");
    check(found.report.empty(), what + ": breaks rules of the hardware:\n" + found.report);
  }
}

Linear16 exact(const LinearShape& shape, Dtype dtype, uint32_t seed = 1) {
  return random_linear(shape, dtype, Values::kSmallIntegers, seed);
}

// Every transform of the models with its real factors. Outputs are cut to a few tiles, since no code path depends on
// more of them.
void test_models() {
  std::set<std::tuple<int64_t, int64_t, int64_t>> seen;
  for (const Model& model : models()) {
    for (const int64_t tp : {1, 2, 4, 8}) {
      for (const Linear& linear : linears(model, tp)) {
        if (!seen.emplace(linear.in, linear.left, linear.right).second) continue;
        const Dtype dtype = seen.size() % 2 ? Dtype::kBFloat16 : Dtype::kHalf;
        const int64_t tokens = seen.size() % 3 == 0 ? 1 : 3;
        check_equal(exact({tokens, linear.in, 56, linear.left, linear.right}, dtype), 2);
      }
    }
  }
  // The widest outputs and stages.
  check_equal(exact({2, 5120, 1030, 64, 80}, Dtype::kBFloat16), 2);
  check_equal(exact({130, 2112, 600, 0, 0}, Dtype::kHalf), 3);
}

// Whole linears of Qwen3-32B on all cores of a device.
void test_full() {
  check_equal(exact({1, 5120, 10240, 64, 80}, Dtype::kBFloat16), 24);
  check_equal(exact({40, 8192, 5120, 64, 0}, Dtype::kBFloat16), 24);
  check_equal(exact({1, 25600, 5120, 160, 160}, Dtype::kHalf), 24);
}

void test_tokens() {
  for (int64_t tokens = 1; tokens <= 300; tokens += tokens < 36        ? 1
                                                    : tokens % 16 == 0 ? 1
                                                    : tokens % 16 == 1 ? 14
                                                                       : 1) {
    const Dtype dtype = tokens % 2 ? Dtype::kBFloat16 : Dtype::kHalf;
    check_equal(exact({tokens, 192, 40, 12, 16}, dtype, static_cast<uint32_t>(tokens)), 3,
                tokens % 5 == 0 ? Launch::kTwo : Launch::kFused);
  }
}

void test_tails() {
  for (const auto& [left, right] : std::vector<std::pair<int64_t, int64_t>>{
           {2, 8}, {3, 8}, {7, 24}, {16, 40}, {17, 16}, {33, 8}, {5, 72}, {24, 24}, {15, 136}, {250, 16}, {16, 256}}) {
    check_equal(exact({5, left * right, 24, left, right}, Dtype::kBFloat16), 2);
  }
  for (const int64_t in : {8, 40, 64, 72, 1016, 1024, 1032, 1096, 2048, 2056, 4104}) {
    check_equal(exact({18, in, 33, 0, 0}, Dtype::kHalf), 2);
  }
  for (const int64_t out : {1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 270, 521}) {
    check_equal(exact({2, 128, out, 0, 0, 1, true}, Dtype::kBFloat16), 2);
    check_equal(exact({35, 128, out, 0, 0, 1, true}, Dtype::kBFloat16), 1);
  }
  // Resident activations: rows of tiles that end on a core, two stages, few rows.
  check_equal(exact({300, 2056, 150, 0, 0}, Dtype::kHalf), 3);
  check_equal(exact({112, 5200, 600, 0, 0}, Dtype::kBFloat16), 1);
  check_equal(exact({9, 4104, 520, 0, 0, 1, true}, Dtype::kHalf), 2);
  // The largest token that fits in UB, and a tile of a single row after full ones.
  check_equal(exact({2, 32768, 16, 256, 128}, Dtype::kHalf), 1);
  check_equal(exact({257, 64, 16, 0, 0}, Dtype::kHalf), 2);
  check_equal(exact({1153, 64, 16, 0, 0}, Dtype::kHalf), 2);
}

void test_factors() {
  for (const Dtype dtype : {Dtype::kHalf, Dtype::kBFloat16}) {
    for (const int64_t tokens : {1, 20, 40}) {
      for (const Launch launch : {Launch::kFused, Launch::kTwo}) {
        check_equal(exact({tokens, 384, 50, 16, 24, 1, true, 0.75f}, dtype), 2, launch);
        check_equal(exact({tokens, 384, 50, 16, 0, 1, true, 0.75f}, dtype), 2, launch);
        check_equal(exact({tokens, 384, 50, 0, 24, 1, true, 0.75f}, dtype), 2, launch);
        check_equal(exact({tokens, 384, 50, 0, 0, 1, true, 0.75f}, dtype), 2, launch);
      }
    }
  }
}

// The next chunk's tokens transformed between this chunk's tiles: both factors and one, several passes per slot and
// several blocks per pass, smaller last chunks and tiles, cores without tiles or without tokens in a chunk.
void test_pipelined() {
  const std::vector<std::tuple<LinearShape, uint32_t>> cases = {
      {{400, 2048, 512, 32, 64, 1, true, 0.9f}, 2},
      {{400, 2048, 512, 32, 0}, 2},
      {{409, 2048, 500, 0, 64, 1, true}, 3},
      {{300, 1536, 700, 48, 32}, 1},
      {{390, 1920, 130, 120, 16}, 24},
      {{1000, 1544, 260, 193, 8}, 5},
      {{200, 1024, 24, 16, 64}, 24},
      {{290, 1096, 260, 137, 8, 1, true}, 2},
  };
  for (const auto& [shape, cores] : cases) {
    for (const Dtype dtype : {Dtype::kHalf, Dtype::kBFloat16}) {
      check_equal(exact(shape, dtype), cores, Launch::kPipelined);
    }
  }
  // All of L1, on all cores of a device.
  check_equal(exact({300, 8192, 512, 64, 0}, Dtype::kHalf), 24, Launch::kPipelined);
  // Where it is chosen because it is faster.
  const LinearShape chosen{390, 5120, 500, 64, 80};
  check(w4a4::npu::make_tiling(chosen, 2).data.chunks > 1, "chunks of 390 tokens");
  check_equal(exact(chosen, Dtype::kBFloat16), 2);
}

void test_groups() {
  for (const auto& [in, groups] :
       std::vector<std::pair<int64_t, int64_t>>{{128, 2}, {1152, 3}, {2048, 8}, {4096, 2}, {1024, 16}, {2560, 5}}) {
    check_equal(exact({3, in, 300, 0, 0, groups, true}, Dtype::kBFloat16), 2);
    check_equal(exact({70, in, 300, 0, 0, groups, false, 0.5f}, Dtype::kHalf), 2);
  }
  check_equal(exact({20, 1024, 100, 32, 32, 4, true}, Dtype::kHalf), 2);
}

void test_values() {
  for (const int64_t tokens : {4, 40}) {
    // Some tokens all zeros, then all of them.
    Linear16 zeros = exact({tokens, 384, 40, 16, 24, 1, true}, Dtype::kBFloat16);
    std::fill(zeros.x.begin(), zeros.x.begin() + 384, 0);
    std::fill(zeros.x.end() - 384, zeros.x.end(), 0x8000);  // -0
    check_equal(zeros, 2);
    std::fill(zeros.x.begin(), zeros.x.end(), 0);
    check_equal(zeros, 2);

    // Everything at the ends of the ranges: |sum| = 64 in_features, saturated activations of both signs.
    Linear16 full = exact({tokens, 1024, 40, 0, 0, 1, false, 0.25f}, Dtype::kHalf);
    std::fill(full.weight.begin(), full.weight.end(), -8);
    for (size_t i = 0; i < full.x.size(); ++i) full.x[i] = to_bits(full.dtype, i / 1024 % 2 ? -100.0f : 100.0f);
    check_equal(full, 2);

    // clip_ratio < 1 saturates some activations.
    for (const float clip : {1.0f, 0.9791f, 0.5f, 0.03125f}) {
      check_equal(exact({tokens, 384, 40, 16, 24, 1, false, clip}, Dtype::kBFloat16), 2);
    }

    // Intermediate values too large for float16, and tokens too small for it.
    for (const float scale : {1e30f, 1e-20f}) {
      Linear16 scaled = exact({tokens, 384, 40, 16, 24}, Dtype::kBFloat16);
      const float power = std::ldexp(1.0f, std::ilogb(scale));
      for (auto& value : scaled.x) value = to_bits(scaled.dtype, from_bits(scaled.dtype, value) * power);
      check_equal(scaled, 2);
    }
  }
  // Halves round to even: z * inverse falls on k + 1/2 for every k.
  Linear16 halves = exact({1, 64, 16, 0, 0}, Dtype::kHalf);
  for (int i = 0; i < 64; ++i) halves.x[i] = to_bits(halves.dtype, i < 29 ? (i - 14) / 2.0f : 0.0f);
  check_equal(halves, 1);
}

double root_mean_square(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum / static_cast<double>(values.size()));
}

// Where sums are not exact the kernel rounds differently from the reference: its sums have another order, and X R has
// 16 bits. The quantization error of its activations must be at most 2 % above that of arithmetic without those
// roundings.
void test_realistic() {
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kHalf}) {
    for (const LinearShape& shape : {LinearShape{6, 5120, 64, 64, 80, 1, false, 0.95f},
                                     LinearShape{40, 1024, 64, 32, 32}, LinearShape{3, 8192, 64, 64, 0}}) {
      const Linear16 linear = random_linear(shape, dtype, Values::kRealistic, 3);
      const Result found = run_linear(linear, 2);
      // From the activations that the kernel made, the rest is exact.
      check(found.y == reference_multiply(linear, found.activations), linear.text() + ": y, realistic");
      check(found.report.empty(), linear.text() + ": breaks rules of the hardware:\n" + found.report);

      const std::vector<float> z = reference_transform(linear, ProductRounding::kNone);
      const Quantized16 unrounded = reference_quantize(linear, z);
      std::vector<double> found_error(z.size()), best_error(z.size());
      int64_t flips = 0;
      for (size_t i = 0; i < z.size(); ++i) {
        const size_t token = i / shape.in_features;
        found_error[i] = static_cast<double>(found.activations.q[i]) * found.activations.scale[token] - z[i];
        best_error[i] = static_cast<double>(unrounded.q[i]) * unrounded.scale[token] - z[i];
        flips += found.activations.q[i] != unrounded.q[i];
      }
      const double ratio = root_mean_square(found_error) / root_mean_square(best_error);
      std::printf("%s: quantization error x %.5f, %.3f %% of the activations differ by one step\n",
                  linear.text().c_str(), ratio, 100.0 * flips / z.size());
      check(ratio < 1.02, linear.text() + ": error of the activations");
    }
  }
}

// How Div rounds on A2 is not specified. If it misses the nearest quotient by one unit of the last place, the int4
// value next to a tie may be one step away, and nothing else: the scale has no division, and products are exact.
void check_division(const Linear16& linear, uint32_t cores, int ulps, int64_t& steps) {
  ascendc_emulator::Options options;
  options.division_ulps = ulps;
  const Result found = run_linear(linear, cores, Launch::kFused, options);
  const std::string what = linear.text() + ", Div off by " + std::to_string(ulps);
  const std::vector<float> z = reference_transform(linear);
  const Quantized16 nearest = reference_quantize(linear, z);
  check(found.report.empty(), what + ": breaks rules of the hardware:\n" + found.report);
  check(found.activations.scale == nearest.scale, what + ": token scales");
  for (size_t i = 0; i < z.size(); ++i) {
    const int difference = found.activations.q[i] - nearest.q[i];
    if (difference == 0) continue;
    ++steps;
    // Between the two values, in float64: z / scale is within two units of the last place of float32 of the tie.
    const size_t token = i / linear.shape.in_features;
    const double exact = static_cast<double>(z[i]) / (static_cast<double>(nearest.scale[token]));
    const double tie = (found.activations.q[i] + nearest.q[i]) / 2.0;
    const bool is_tie = std::abs(difference) == 1 && std::fabs(exact - tie) <= std::ldexp(std::fabs(tie), -21);
    if (!is_tie) check(false, what + ": int4 activation " + std::to_string(i) + " is not at a tie");
  }
  check(found.y == reference_multiply(linear, found.activations), what + ": y");
}

// What no document specifies: Div, and how Fixpipe rounds X R to 16 bits.
void test_rounding() {
  // Every tie, exactly: z * (7 / max) is k + 1/2.
  Linear16 halves = exact({1, 64, 16, 0, 0}, Dtype::kHalf);
  for (int i = 0; i < 64; ++i) halves.x[i] = to_bits(halves.dtype, i < 29 ? (i - 14) / 2.0f : 0.0f);
  for (const int ulps : {-1, 1}) {
    int64_t steps = 0;
    check_division(halves, 1, ulps, steps);
    // Of the 14 ties, +-1/2 to +-13/2, those whose even neighbour is on the side that Div moves away from.
    check(steps == (ulps > 0 ? 8 : 6),
          "Div off by " + std::to_string(ulps) + ": " + std::to_string(steps) + " of 14 ties move");
    int64_t more = 0;
    for (const Dtype dtype : {Dtype::kHalf, Dtype::kBFloat16}) {
      for (const LinearShape& shape :
           {LinearShape{1, 192, 40, 12, 16}, LinearShape{40, 384, 50, 16, 24, 1, true, 0.75f},
            LinearShape{12, 2048, 40, 16, 0}, LinearShape{20, 1024, 100, 32, 32, 4, true, 0.5f},
            LinearShape{300, 384, 24, 0, 0}}) {
        check_division(exact(shape, dtype), 2, ulps, more);
      }
    }
    std::printf("Div off by %d: %lld more activations one step away, all at ties\n", ulps,
                static_cast<long long>(more));
  }
  using ascendc_emulator::FixpipeRounding;
  for (const auto& [fixpipe, product] : {std::pair{FixpipeRounding::kNearestEven, ProductRounding::kNearestEven},
                                         std::pair{FixpipeRounding::kNearestAway, ProductRounding::kNearestAway},
                                         std::pair{FixpipeRounding::kTowardsZero, ProductRounding::kTowardsZero}}) {
    ascendc_emulator::Options options;
    options.fixpipe_rounding = fixpipe;
    for (const Dtype dtype : {Dtype::kHalf, Dtype::kBFloat16}) {
      const Linear16 linear = exact({5, 5120, 40, 64, 80}, dtype);
      const std::string what = linear.text() + ", Fixpipe rounding " + std::to_string(static_cast<int>(fixpipe));
      const Result found = run_linear(linear, 2, Launch::kFused, options);
      const Quantized16 activations = reference_quantize(linear, reference_transform(linear, product));
      check(found.activations.scale == activations.scale, what + ": token scales");
      check(found.activations.q == activations.q, what + ": int4 activations");
      check(found.y == reference_multiply(linear, activations), what + ": y");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::pair<std::string, std::function<void()>>> sections = {
      {"models", test_models},       {"full", test_full},           {"tokens", test_tokens}, {"tails", test_tails},
      {"factors", test_factors},     {"pipelined", test_pipelined}, {"groups", test_groups}, {"values", test_values},
      {"realistic", test_realistic}, {"rounding", test_rounding},
  };
  for (const auto& [name, run] : sections) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted = wanted || name == arguments[i];
    if (wanted) run();
  }
  return finish("conformance_test");
}
