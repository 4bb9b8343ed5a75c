// SPDX-License-Identifier: Apache-2.0
// Every instruction set against the oracle, without torch: for cross-compiled, emulated and sanitized builds.
//
//   conformance_test [NAME...]    the instruction sets to test, whatever this CPU says of itself; by default those
//                                 that it has. Exit status 1 after any failure.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "experts_test.h"
#include "float16_test.h"
#include "harness.h"
#include "nonfinite_test.h"
#include "oracle.h"
#include "placement_test.h"
#include "random.h"
#include "steps_test.h"
#include "wide_test.h"

namespace {

struct Shape {
  int64_t left, right, out, tokens, groups;
  std::string text() const {
    char buffer[96];
    std::snprintf(buffer, sizeof buffer, "%lldx%lld -> %lld, %lld tokens, %lld groups", (long long)left,
                  (long long)right, (long long)out, (long long)tokens, (long long)groups);
    return buffer;
  }
};

void test_pack() {
  Random random(1);
  for (int64_t out : {1, 15, 16, 17, 40}) {
    for (int64_t features : {1, 7, 8, 9, 64, 77}) {
      const auto weight = random.bytes(out * features, -8, 7);
      std::vector<int8_t> back(weight.size());
      w4a4::unpack_rows(pack(weight, out, features).data(), out, features, back.data());
      check(back == weight, "pack and unpack " + std::to_string(out) + " x " + std::to_string(features));
    }
  }
  auto values = random.bytes(10000, -8, 7);
  check(w4a4::find_outside_int4(values.data(), 10000) == -1, "no value outside int4");
  values[9001] = 8;
  check(w4a4::find_outside_int4(values.data(), 10000) == 9001, "place of the value outside int4");
}

// Scales of 1 make the outputs the integer sums themselves, which must be exact.
void test_integers(const w4a4::Kernels& kernels, const Shape& shape, int64_t threads) {
  Random random(static_cast<uint32_t>(shape.out * 31 + shape.tokens));
  const int64_t features = shape.left * shape.right;
  const auto q = random.bytes(shape.tokens * features, -8, 7), w = random.bytes(shape.out * features, -8, 7);
  const auto packed = pack(w, shape.out, features);
  const std::vector<float> scale(shape.tokens, 1.0f), weight_scale(shape.out * shape.groups, 1.0f);
  std::vector<float> y(shape.tokens * shape.out);
  const w4a4::Weight weight{packed.data(),         weight_scale.data(), nullptr,  nullptr,
                            w4a4::Dtype::kFloat32, shape.out,           features, shape.groups};
  w4a4::int4_linear(q.data(), scale.data(), shape.tokens, w4a4::kInt4Range, weight, y.data(), w4a4::Dtype::kFloat32,
                    kernels, make_pool(threads));
  bool is_right = true;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    for (int64_t o = 0; o < shape.out; ++o) {
      is_right &= y[t * shape.out + o] == static_cast<float>(dot(q, w, t, o, features, 0, 1));
    }
  }
  check(is_right, std::string(kernels.name) + " integers, " + shape.text());
}

enum class Factors { kBoth, kLeft, kRight, kNone };

void test_linear(const w4a4::Kernels& kernels, const Shape& shape, w4a4::Dtype dtype, Factors factors,
                 int64_t threads) {
  Random random(static_cast<uint32_t>(shape.left * 7 + shape.tokens));
  const int64_t features = shape.left * shape.right;
  // Multiples of 1/16 up to 4 have the same value in every dtype.
  std::vector<float> x(shape.tokens * features);
  for (auto& value : x) value = static_cast<float>(random.integer(-64, 64)) / 16.0f;
  if (shape.tokens > 2) std::fill_n(x.begin() + features, features, 0.0f);
  std::vector<float> l, r;
  if (factors == Factors::kBoth || factors == Factors::kLeft) l = random.reals(shape.left * shape.left, -1, 1);
  if (factors == Factors::kBoth || factors == Factors::kRight) r = random.reals(shape.right * shape.right, -1, 1);
  const auto w = random.bytes(shape.out * features, -8, 7);
  const auto packed = pack(w, shape.out, features);
  const auto weight_scale = random.reals(shape.out * shape.groups, 0.01f, 0.1f);
  const auto offset = random.reals(shape.out * shape.groups, -1, 1), bias = random.reals(shape.out, -1, 1);

  const std::vector<uint8_t> input = to_dtype(x, dtype);
  const w4a4::Transform transform_args{shape.left, shape.right, l.empty() ? nullptr : l.data(),
                                       r.empty() ? nullptr : r.data(), 0.9f};
  const w4a4::Pool pool = make_pool(threads);
  const std::string what = std::string(kernels.name) + " linear, " + shape.text();

  Quantized mine{std::vector<int8_t>(x.size()), {}};
  std::vector<float> scale(shape.tokens);
  w4a4::kronecker_quant(input.data(), dtype, shape.tokens, features, transform_args, nullptr, w4a4::kInt4Range,
                        mine.q.data(), scale.data(), kernels, pool);
  const Quantized exact =
      quantize(transform(x, shape.tokens, shape.left, shape.right, l, r), shape.tokens, 0.9f, -8, 7);
  int64_t steps = 0, largest = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t step = std::abs(mine.q[i] - exact.q[i]);
    steps += step;
    largest = std::max(largest, step);
  }
  check(largest <= 1 && steps <= std::max<int64_t>(1, static_cast<int64_t>(x.size()) / 5000), what + ": activations");
  for (int64_t t = 0; t < shape.tokens; ++t) {
    check(std::fabs(scale[t] - exact.scale[t]) <= 1e-5 * exact.scale[t], what + ": scale");
  }

  std::vector<uint8_t> output(shape.tokens * shape.out * w4a4::dtype_size(dtype));
  const w4a4::Weight weight{packed.data(),         weight_scale.data(), offset.data(), bias.data(),
                            w4a4::Dtype::kFloat32, shape.out,           features,      shape.groups};
  w4a4::flatquant_linear(input.data(), dtype, shape.tokens, transform_args, w4a4::kInt4Range, weight, output.data(),
                         kernels, pool);
  const std::vector<float> y = from_dtype(output, dtype);
  const double rounding = dtype == w4a4::Dtype::kFloat32 ? 0 : dtype == w4a4::Dtype::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
  bool is_right = true;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    for (int64_t o = 0; o < shape.out; ++o) {
      double sum = 0, magnitude = std::fabs(bias[o]);
      for (int64_t g = 0; g < shape.groups; ++g) {
        double q_sum = 0, q_magnitude = 0;
        const int64_t size = features / shape.groups;
        for (int64_t k = g * size; k < (g + 1) * size; ++k) {
          q_sum += mine.q[t * features + k];
          q_magnitude += 8.0 * std::abs(mine.q[t * features + k]);
        }
        const int64_t i = o * shape.groups + g;
        sum += weight_scale[i] *
               (static_cast<double>(dot(mine.q, w, t, o, features, g, shape.groups)) - offset[i] * q_sum);
        magnitude += scale[t] * weight_scale[i] * q_magnitude;
      }
      const double expected = scale[t] * sum + bias[o];
      is_right &= std::fabs(y[t * shape.out + o] - expected) <= rounding * std::fabs(expected) + 1e-6 * magnitude;
    }
  }
  check(is_right, what + ": outputs");
}

// A token's bits do not depend on the tokens beside it, whose number chooses among micro-kernels, nor on the threads.
void test_batches(const w4a4::Kernels& kernels, const Shape& shape, bool is_int4) {
  Random random(static_cast<uint32_t>(shape.tokens + shape.groups));
  const int64_t features = shape.left * shape.right;
  const auto x = random.reals(shape.tokens * features, -3, 3);
  const auto l = random.reals(shape.left * shape.left, -1, 1), r = random.reals(shape.right * shape.right, -1, 1);
  const auto w = random.bytes(shape.out * features, is_int4 ? -8 : -128, is_int4 ? 7 : 127);
  const std::vector<uint8_t> nibbles = is_int4 ? pack(w, shape.out, features) : std::vector<uint8_t>{};
  const std::vector<int8_t> bytes = is_int4 ? std::vector<int8_t>{} : pack_int8(w, shape.out, features);
  const auto scale = random.reals(shape.out * shape.groups, 0.01f, 0.1f);
  const auto offset = random.reals(shape.out * shape.groups, -1, 1), bias = random.reals(shape.out, -1, 1);
  const w4a4::Transform transform{shape.left, shape.right, l.data(), r.data(), 0.9f};
  const w4a4::Weight weight{is_int4 ? static_cast<const void*>(nibbles.data()) : bytes.data(),
                            scale.data(),
                            offset.data(),
                            bias.data(),
                            w4a4::Dtype::kFloat32,
                            shape.out,
                            features,
                            shape.groups};
  const auto run = [&](const float* tokens, int64_t count, float* y, int64_t threads) {
    const w4a4::Pool pool = make_pool(threads);
    if (is_int4) {
      w4a4::flatquant_linear(tokens, w4a4::Dtype::kFloat32, count, transform, w4a4::kInt4Range, weight, y, kernels,
                             pool);
    } else {
      w4a4::w8a8_linear(tokens, w4a4::Dtype::kFloat32, count, transform, weight, y, kernels, pool);
    }
  };
  std::vector<float> together(shape.tokens * shape.out), alone(together.size());
  run(x.data(), shape.tokens, together.data(), 3);
  for (int64_t t = 0; t < shape.tokens; ++t) run(&x[t * features], 1, &alone[t * shape.out], 1);
  const bool is_same = std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)) == 0;
  check(is_same, std::string(kernels.name) + (is_int4 ? " int4" : " int8") + " one by one, " + shape.text());
}

void test_w8a8(const w4a4::Kernels& kernels, int64_t features, int64_t out, int64_t tokens) {
  Random random(static_cast<uint32_t>(features + tokens));
  const auto w = random.bytes(out * features, -128, 127);
  const auto packed = pack_int8(w, out, features);
  const auto x = random.reals(tokens * features, -3, 3);
  const std::vector<float> weight_scale(out, 1.0f);
  std::vector<float> y(tokens * out);
  const w4a4::Weight weight{
      packed.data(), weight_scale.data(), nullptr, nullptr, w4a4::Dtype::kFloat32, out, features, 1};
  const w4a4::Transform none{1, features, nullptr, nullptr, 1.0f};
  w4a4::w8a8_linear(x.data(), w4a4::Dtype::kFloat32, tokens, none, weight, y.data(), kernels, make_pool(2));
  const Quantized exact = quantize(std::vector<double>(x.begin(), x.end()), tokens, 1.0, -127, 127);
  bool is_right = true;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t o = 0; o < out; ++o) {
      // Two activations may round differently in float32.
      const double sum = static_cast<double>(dot(exact.q, w, t, o, features, 0, 1));
      is_right &= std::fabs(y[t * out + o] / exact.scale[t] - sum) <= 2 * 128 + 1e-5 * std::fabs(sum);
    }
  }
  check(is_right, std::string(kernels.name) + " w8a8, " + std::to_string(features) + " -> " + std::to_string(out));
}

// Parts of tokens, quantized with the largest magnitudes of the whole ones, are to the bit what they are in these.
void test_parts(const w4a4::Kernels& kernels, w4a4::ActivationRange range, w4a4::Dtype dtype, float clip) {
  constexpr int64_t kTokens = 30, kFeatures = 192, kParts = 3, kPart = kFeatures / kParts;
  Random random(3);
  std::vector<float> x = from_dtype(to_dtype(random.reals(kTokens * kFeatures, -3, 3), dtype), dtype);
  std::fill_n(x.begin() + kFeatures, kFeatures, 0.0f);
  std::vector<float> maxima(kTokens);
  for (int64_t i = 0; i < kTokens * kFeatures; ++i) {
    maxima[i / kFeatures] = std::max(maxima[i / kFeatures], std::fabs(x[i]));
  }
  maxima[5] = -NAN;
  std::vector<int8_t> whole(x.size());
  std::vector<float> whole_scale(kTokens), scale(kTokens);
  const w4a4::Pool pool = make_pool(2);
  w4a4::kronecker_quant(to_dtype(x, dtype).data(), dtype, kTokens, kFeatures, {1, kFeatures, nullptr, nullptr, clip},
                        nullptr, range, whole.data(), whole_scale.data(), kernels, pool);
  bool is_same = true;
  for (int64_t part = 0; part < kParts; ++part) {
    std::vector<float> values;
    std::vector<int8_t> expected;
    for (int64_t t = 0; t < kTokens; ++t) {
      const int64_t first = t * kFeatures + part * kPart;
      values.insert(values.end(), x.begin() + first, x.begin() + first + kPart);
      expected.insert(expected.end(), whole.begin() + first, whole.begin() + first + kPart);
    }
    std::fill_n(expected.begin() + 5 * kPart, kPart, int8_t{0});
    const auto input = to_dtype(values, dtype);
    const w4a4::Transform transform{1, kPart, nullptr, nullptr, clip};
    std::vector<int8_t> q(expected.size());
    w4a4::kronecker_quant(input.data(), dtype, kTokens, kPart, transform, maxima.data(), range, q.data(), scale.data(),
                          kernels, pool);
    is_same &= q == expected && std::isnan(scale[5]);
    for (int64_t t = 0; t < kTokens; ++t) is_same &= t == 5 || scale[t] == whole_scale[t];
  }
  check(is_same, std::string(kernels.name) + " parts of tokens, " + std::to_string(int(range.max)));
}

// Any rows of the weight alone, multiplied with tokens that are quantized already, give to the bit what the whole
// linear gives for them. So many tokens that a linear takes several chunks of them.
void test_rows(const w4a4::Kernels& kernels, bool is_int8, w4a4::ActivationRange range, int64_t tokens,
               w4a4::Dtype dtype, int64_t groups) {
  constexpr int64_t kFeatures = 192, kOut = 83, kFirst = 37, kCount = 29;
  Random random(4);
  const auto x = to_dtype(random.reals(tokens * kFeatures, -3, 3), dtype);
  const std::vector<int8_t> values = random.bytes(kOut * kFeatures, is_int8 ? -127 : -8, is_int8 ? 127 : 7);
  const std::vector<float> scale = random.reals(kOut * groups, 0.01f, 0.1f), bias = random.reals(kOut, -1, 1);
  const auto weight_of = [&](int64_t first, int64_t count, std::vector<uint8_t>& packed) {
    const std::vector<int8_t> rows(values.begin() + first * kFeatures, values.begin() + (first + count) * kFeatures);
    if (is_int8) {
      const std::vector<int8_t> bytes = pack_int8(rows, count, kFeatures);
      packed.assign(bytes.begin(), bytes.end());
    } else {
      packed = pack(rows, count, kFeatures);
    }
    return w4a4::Weight{packed.data(),
                        scale.data() + first * groups,
                        nullptr,
                        bias.data() + first,
                        w4a4::Dtype::kFloat32,
                        count,
                        kFeatures,
                        groups};
  };
  const w4a4::Transform none{1, kFeatures, nullptr, nullptr, 1};
  const int64_t size = w4a4::dtype_size(dtype);
  std::vector<uint8_t> packed, y(tokens * kOut * size), part(tokens * kCount * size);
  const w4a4::Weight whole = weight_of(0, kOut, packed);
  if (is_int8) {
    w4a4::w8a8_linear(x.data(), dtype, tokens, none, whole, y.data(), kernels, make_pool(2));
  } else {
    w4a4::flatquant_linear(x.data(), dtype, tokens, none, range, whole, y.data(), kernels, make_pool(2));
  }
  std::vector<int8_t> q(tokens * kFeatures);
  std::vector<float> token_scale(tokens);
  const w4a4::Pool pool = make_pool(3);
  w4a4::kronecker_quant(x.data(), dtype, tokens, kFeatures, none, nullptr, range, q.data(), token_scale.data(), kernels,
                        pool);
  const w4a4::Weight rows = weight_of(kFirst, kCount, packed);
  if (is_int8) {
    w4a4::int8_linear(q.data(), token_scale.data(), tokens, rows, part.data(), dtype, kernels, pool);
  } else {
    w4a4::int4_linear(q.data(), token_scale.data(), tokens, range, rows, part.data(), dtype, kernels, pool);
  }
  bool is_same = true;
  for (int64_t t = 0; t < tokens; ++t) {
    is_same &= std::equal(part.begin() + t * kCount * size, part.begin() + (t + 1) * kCount * size,
                          y.begin() + (t * kOut + kFirst) * size);
  }
  check(is_same, std::string(kernels.name) + " rows, " + (is_int8 ? "int8, " : "int4, ") +
                     std::to_string(int(range.max)) + ", " + std::to_string(tokens) + " tokens, " +
                     std::to_string(groups) + " groups, " + std::to_string(int(dtype)));
}

// The largest sums there can be; accumulators of 16 bits must be widened in time.
void test_extremes(const w4a4::Kernels& kernels) {
  constexpr int64_t kFeatures = 25600, kOut = 17, kTokens = 13;
  for (const int weight_value : {-8, 7}) {
    for (const int q_value : {-8, 7}) {
      const auto packed =
          pack(std::vector<int8_t>(kOut * kFeatures, static_cast<int8_t>(weight_value)), kOut, kFeatures);
      const std::vector<int8_t> q(kTokens * kFeatures, static_cast<int8_t>(q_value));
      const std::vector<float> ones(kOut + kTokens, 1.0f);
      for (int64_t tokens : {int64_t{1}, kTokens}) {
        std::vector<float> y(tokens * kOut);
        const w4a4::Weight weight{packed.data(),         ones.data(), nullptr,   nullptr,
                                  w4a4::Dtype::kFloat32, kOut,        kFeatures, 1};
        w4a4::int4_linear(q.data(), ones.data(), tokens, w4a4::kInt4Range, weight, y.data(), w4a4::Dtype::kFloat32,
                          kernels, make_pool(1));
        const auto expected = static_cast<float>(weight_value * q_value * kFeatures);
        check(y == std::vector<float>(y.size(), expected), std::string(kernels.name) + " extremes");
      }
    }
  }
}

void test(const w4a4::Kernels& kernels) {
  std::vector<int64_t> token_counts;
  for (int64_t tokens = 0; tokens <= 26; ++tokens) token_counts.push_back(tokens);
  token_counts.insert(token_counts.end(), {49, 64, 257});
  for (const int64_t tokens : token_counts) {
    test_integers(kernels, {12, 16, 50, tokens, 1}, 3);
    test_integers(kernels, {7, 11, 1, tokens, 1}, 1);
    test_integers(kernels, {2, 560, 209, tokens, 1}, 2);
    test_integers(kernels, {12, 16, 33, tokens, 8}, 2);
  }
  for (const auto dtype : {w4a4::Dtype::kFloat32, w4a4::Dtype::kBFloat16, w4a4::Dtype::kFloat16}) {
    for (const int64_t tokens : {0, 1, 3, 4, 7, 13, 30}) {
      for (const auto factors : {Factors::kBoth, Factors::kLeft, Factors::kRight, Factors::kNone}) {
        test_linear(kernels, {12, 16, 50, tokens, 1}, dtype, factors, 2);
        test_linear(kernels, {12, 16, 33, tokens, 4}, dtype, factors, 3);
        test_linear(kernels, {7, 11, 19, tokens, 1}, dtype, factors, 4);
      }
    }
  }
  for (const int64_t tokens : {2, 8, 17, 33, 47}) {
    for (const bool is_int4 : {true, false}) {
      test_batches(kernels, {12, 16, 50, tokens, 1}, is_int4);
      test_batches(kernels, {7, 11, 17, tokens, 1}, is_int4);
      test_batches(kernels, {16, 20, 33, tokens, 5}, is_int4);
      test_batches(kernels, {24, 48, 40, tokens, 1}, is_int4);
    }
  }
  // More activations than the second-level cache holds, and more rows than are multiplied at once.
  test_batches(kernels, {64, 72, 560, 180, 1}, true);
  // Large enough that the threads share one token's transform.
  test_linear(kernels, {48, 50, 16, 1, 1}, w4a4::Dtype::kFloat32, Factors::kBoth, 3);
  test_linear(kernels, {72, 80, 16, 2, 1}, w4a4::Dtype::kFloat32, Factors::kBoth, 3);
  test_linear(kernels, {72, 80, 16, 1, 1}, w4a4::Dtype::kFloat32, Factors::kLeft, 5);
  test_linear(kernels, {72, 80, 16, 1, 1}, w4a4::Dtype::kFloat32, Factors::kRight, 5);
  for (const int64_t tokens : {1, 4, 9, 30}) {
    test_w8a8(kernels, 192, 50, tokens);
    test_w8a8(kernels, 77, 1, tokens);
  }
  test_parts(kernels, w4a4::kInt4Range, w4a4::Dtype::kFloat32, 1.0f);
  test_parts(kernels, w4a4::kInt4Range, w4a4::Dtype::kBFloat16, 0.9f);
  test_parts(kernels, w4a4::kInt8Range, w4a4::Dtype::kFloat16, 1.0f);
  for (const int64_t tokens : {1, 2, 30, 1100}) {
    test_rows(kernels, false, w4a4::kInt4Range, tokens, w4a4::Dtype::kFloat32, 1);
    test_rows(kernels, false, w4a4::kInt4Range, tokens, w4a4::Dtype::kBFloat16, 4);
    test_rows(kernels, false, w4a4::kInt8Range, tokens, w4a4::Dtype::kFloat32, 4);
    test_rows(kernels, true, w4a4::kInt8Range, tokens, w4a4::Dtype::kFloat32, 1);
    test_rows(kernels, true, w4a4::kInt8Range, tokens, w4a4::Dtype::kFloat16, 1);
  }
  test_extremes(kernels);
  test_wide(kernels);
}

}  // namespace

int main(int count, char** names) {
  test_float16();
  test_pack();
  test_placement();
  for (const w4a4::Kernels* kernels : w4a4::all_kernels()) {
    bool is_wanted = count == 1 && kernels->is_available();
    for (int i = 1; i < count; ++i) is_wanted |= std::strcmp(names[i], kernels->name) == 0;
    if (!is_wanted) continue;
    std::printf("testing %s\n", kernels->name);
    test(*kernels);
    test_experts(*kernels);
    test_steps(*kernels);
    test_nonfinite(*kernels);
  }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
