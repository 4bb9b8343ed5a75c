// SPDX-License-Identifier: Apache-2.0
// A linear that begins with a norm or with SiLU must give the bits of the two operators, and the norm must be right.
#include "steps_test.h"

#include <cmath>
#include <string>

#include "harness.h"
#include "random.h"
#include "silu.h"

namespace {

using w4a4::Dtype;
using w4a4::Step;

constexpr float kEpsilon = 1e-5f;
constexpr int64_t kOut = 20;

struct Case {
  int64_t left, right, tokens, features;
  Dtype dtype;
  std::vector<uint8_t> x, residual, norm_weight;
  std::vector<float> left_trans, right_trans, scale;
  std::vector<uint8_t> packed;

  Case(Random& random, int64_t left, int64_t right, int64_t tokens, Dtype dtype)
      : left(left), right(right), tokens(tokens), features(left * right), dtype(dtype) {
    x = to_dtype(random.reals(tokens * 2 * features, -3, 3), dtype);
    residual = to_dtype(random.reals(tokens * features, -3, 3), dtype);
    norm_weight = to_dtype(random.reals(features, 0.5f, 2), dtype);
    left_trans = random.reals(left * left, -1, 1);
    right_trans = random.reals(right * right, -1, 1);
    scale = random.reals(kOut, 0.01f, 0.1f);
    packed = pack(random.bytes(kOut * features, -8, 7), kOut, features);
  }

  // The first half of x, as tokens of `features`.
  w4a4::NormArgs norm(void* residual) const {
    return {x.data(), residual, norm_weight.data(), dtype, features, kEpsilon};
  }

  std::vector<uint8_t> linear(const void* input, const Step& step, const w4a4::Kernels& kernels,
                              int64_t threads) const {
    std::vector<uint8_t> y(tokens * kOut * w4a4::dtype_size(dtype));
    const w4a4::Transform transform{left, right, left_trans.data(), right_trans.data(), 0.9f};
    const w4a4::Weight weight{packed.data(), scale.data(), nullptr, nullptr, Dtype::kFloat32, kOut, features, 1};
    w4a4::flatquant_linear(input, dtype, tokens, transform, w4a4::kInt4Range, weight, y.data(), kernels,
                           make_pool(threads), step);
    return y;
  }
};

void test_norm_values(const Case& c, const std::vector<uint8_t>& found, const std::vector<uint8_t>& new_residual,
                      bool has_residual, const std::string& what) {
  const auto x = from_dtype(c.x, c.dtype), residual = from_dtype(c.residual, c.dtype);
  const auto weight = from_dtype(c.norm_weight, c.dtype), y = from_dtype(found, c.dtype);
  const auto updated = from_dtype(new_residual, c.dtype);
  const double rounding = c.dtype == Dtype::kFloat32 ? 2e-6 : c.dtype == Dtype::kBFloat16 ? 0x1p-8 : 0x1p-11;
  bool is_right = true;
  for (int64_t t = 0; t < c.tokens; ++t) {
    std::vector<double> sum(c.features);
    double squares = 0;
    for (int64_t i = 0; i < c.features; ++i) {
      const int64_t place = t * c.features + i;
      sum[i] = double{x[place]} + (has_residual ? double{residual[place]} : 0.0);
      squares += sum[i] * sum[i];
      if (has_residual) is_right &= std::fabs(updated[place] - sum[i]) <= rounding * std::fabs(sum[i]);
    }
    const double factor = 1 / std::sqrt(squares / static_cast<double>(c.features) + kEpsilon);
    for (int64_t i = 0; i < c.features; ++i) {
      const double exact = sum[i] * factor * weight[i];
      is_right &= std::fabs(y[t * c.features + i] - exact) <= 1.01 * rounding * std::fabs(exact) + 1e-7;
    }
  }
  check(is_right, what + ": norm");
}

void test_case(const Case& c, const w4a4::Kernels& kernels, const std::string& what) {
  std::vector<uint8_t> between(c.residual.size());
  for (const bool has_residual : {false, true}) {
    auto separate = c.residual;
    w4a4::rms_norm(c.norm(has_residual ? separate.data() : nullptr), c.tokens, between.data(), kernels, make_pool(3));
    test_norm_values(c, between, separate, has_residual, what);
    const auto expected = c.linear(between.data(), {}, kernels, 1);
    for (const int64_t threads : {1, 3}) {
      auto together = c.residual;
      const Step step{Step::Kind::kNorm, c.norm(has_residual ? together.data() : nullptr)};
      check(c.linear(c.x.data(), step, kernels, threads) == expected, what + ": norm and linear");
      check(together == separate, what + ": residual");
    }
  }
  w4a4::silu_and_mul(c.x.data(), c.dtype, c.tokens, c.features, between.data(), kernels, make_pool(3));
  const auto expected = c.linear(between.data(), {}, kernels, 1);
  for (const int64_t threads : {1, 3}) {
    check(c.linear(c.x.data(), {Step::Kind::kSilu, {}}, kernels, threads) == expected, what + ": silu and linear");
  }
}

}  // namespace

void test_steps(const w4a4::Kernels& kernels) {
  Random random(23);
  // The last is split over threads within a token.
  const int64_t factors[][2] = {{3, 5}, {12, 16}, {7, 11}, {64, 80}};
  for (const auto& [left, right] : factors) {
    for (const int64_t tokens : {1, 2, 13, 70}) {
      for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
        if (left * right > 1000 && tokens > 13) continue;
        test_case(Case(random, left, right, tokens, dtype), kernels,
                  std::string(kernels.name) + " steps, " + std::to_string(left) + " x " + std::to_string(right) + ", " +
                      std::to_string(tokens) + " tokens, " + name_of(dtype));
      }
    }
  }
}
