// SPDX-License-Identifier: Apache-2.0
#include "wide_test.h"

#include <cmath>
#include <string>
#include <vector>

#include "harness.h"
#include "oracle.h"
#include "random.h"
#include "weight_only.h"

namespace {

struct Sizes {
  int64_t features, out, tokens, groups;
  std::string text() const {
    return std::to_string(features) + " -> " + std::to_string(out) + ", " + std::to_string(tokens) + " tokens, " +
           std::to_string(groups) + " groups";
  }
};

// Scales of 1 make the outputs the integer sums themselves, which must be exact. `extreme` takes the ends of the
// ranges.
void test_sums(const w4a4::Kernels& kernels, const Sizes& s, bool is_int4, bool extreme) {
  Random random(static_cast<uint32_t>(s.features + s.tokens));
  const int low = is_int4 ? -8 : -128, high = is_int4 ? 7 : 127;
  auto q = random.bytes(s.tokens * s.features, -128, 127), w = random.bytes(s.out * s.features, low, high);
  if (extreme) {
    for (auto& value : q) value = -128;
    for (auto& value : w) value = static_cast<int8_t>(low);
  }
  const std::vector<uint8_t> nibbles = is_int4 ? pack(w, s.out, s.features) : std::vector<uint8_t>{};
  const std::vector<int8_t> bytes = is_int4 ? std::vector<int8_t>{} : pack_int8(w, s.out, s.features);
  const std::vector<float> scale(s.tokens, 1.0f), weight_scale(s.out * s.groups, 1.0f);
  std::vector<int32_t> quant_bias(s.out);
  for (auto& value : quant_bias) value = random.integer(-1'000'000, 1'000'000);
  std::vector<float> y(s.tokens * s.out);
  w4a4::Weight weight{};
  weight.scale = weight_scale.data();
  weight.in_features = s.features, weight.out_features = s.out, weight.groups = s.groups;
  if (is_int4) {
    weight.packed = nibbles.data();
    w4a4::int4_linear(q.data(), scale.data(), s.tokens, w4a4::kInt8Range, weight, y.data(), w4a4::Dtype::kFloat32,
                      kernels, make_pool(2));
  } else {
    weight.packed = bytes.data();
    weight.quant_bias = quant_bias.data();
    w4a4::int8_linear(q.data(), scale.data(), s.tokens, weight, y.data(), w4a4::Dtype::kFloat32, kernels, make_pool(2));
  }
  bool is_right = true;
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int64_t o = 0; o < s.out; ++o) {
      float expected = 0;
      for (int64_t g = 0; g < s.groups; ++g) {
        expected += static_cast<float>(dot(q, w, t, o, s.features, g, s.groups) + (is_int4 ? 0 : quant_bias[o]));
      }
      is_right &= y[t * s.out + o] == expected;
    }
  }
  check(is_right, std::string(kernels.name) + (is_int4 ? " wide int4, " : " wide int8, ") + s.text());
}

void test_weight_only(const w4a4::Kernels& kernels, const Sizes& s, bool is_int4, w4a4::Dtype dtype) {
  Random random(static_cast<uint32_t>(s.features * 3 + s.tokens));
  const auto w = random.bytes(s.out * s.features, is_int4 ? -8 : -128, is_int4 ? 7 : 127);
  const std::vector<uint8_t> nibbles = is_int4 ? pack(w, s.out, s.features) : std::vector<uint8_t>{};
  const std::vector<int8_t> bytes = is_int4 ? std::vector<int8_t>{} : pack_int8(w, s.out, s.features);
  std::vector<float> x(s.tokens * s.features);
  for (auto& value : x) value = static_cast<float>(random.integer(-64, 64)) / 16.0f;  // the same in every dtype
  const auto scale = random.reals(s.out * s.groups, 0.01f, 0.1f), offset = random.reals(s.out * s.groups, -9, 9);
  const auto bias = random.reals(s.out, -1, 1);
  const std::vector<uint8_t> input = to_dtype(x, dtype);
  std::vector<uint8_t> output(s.tokens * s.out * w4a4::dtype_size(dtype));
  const w4a4::Weight weight{is_int4 ? static_cast<const void*>(nibbles.data()) : bytes.data(),
                            scale.data(),
                            offset.data(),
                            bias.data(),
                            w4a4::Dtype::kFloat32,
                            s.out,
                            s.features,
                            s.groups};
  w4a4::weight_only_linear(input.data(), dtype, s.tokens, weight, is_int4, output.data(), kernels, make_pool(3));
  const std::vector<float> y = from_dtype(output, dtype);
  const double rounding = dtype == w4a4::Dtype::kFloat32 ? 0 : dtype == w4a4::Dtype::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
  bool is_right = true;
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int64_t o = 0; o < s.out; ++o) {
      double sum = bias[o], magnitude = std::fabs(sum);
      for (int64_t k = 0; k < s.features; ++k) {
        const int64_t i = o * s.groups + k / (s.features / s.groups);
        const double term = double{x[t * s.features + k]} * scale[i] * (w[o * s.features + k] - double{offset[i]});
        sum += term;
        magnitude += std::fabs(term);
      }
      is_right &= std::fabs(y[t * s.out + o] - sum) <= rounding * std::fabs(sum) + 1e-6 * magnitude;
    }
  }
  check(is_right, std::string(kernels.name) + (is_int4 ? " float x int4, " : " float x int8, ") + s.text());
}

}  // namespace

void test_wide(const w4a4::Kernels& kernels) {
  for (const int64_t tokens : {0, 1, 2, 3, 4, 5, 7, 13, 30, 65}) {
    for (const bool is_int4 : {true, false}) {
      test_sums(kernels, {192, 50, tokens, 1}, is_int4, false);
      test_sums(kernels, {77, 1, tokens, 1}, is_int4, false);
      test_sums(kernels, {1120, 33, tokens, 1}, is_int4, true);
      for (const auto dtype : {w4a4::Dtype::kFloat32, w4a4::Dtype::kBFloat16, w4a4::Dtype::kFloat16}) {
        test_weight_only(kernels, {192, 50, tokens, 1}, is_int4, dtype);
        test_weight_only(kernels, {77, 1, tokens, 1}, is_int4, dtype);
        test_weight_only(kernels, {600, 33, tokens, 1}, is_int4, dtype);
        test_weight_only(kernels, {192, 33, tokens, 8}, is_int4, dtype);
      }
    }
    test_sums(kernels, {192, 33, tokens, 8}, true, false);
  }
}
