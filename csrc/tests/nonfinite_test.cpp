// SPDX-License-Identifier: Apache-2.0
// A value that is not finite must stay visible: in the outputs of its own token only, or of its own output feature.
#include "nonfinite_test.h"

#include <cmath>
#include <limits>

#include "harness.h"
#include "oracle.h"
#include "random.h"

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr w4a4::Dtype kDtypes[] = {w4a4::Dtype::kFloat32, w4a4::Dtype::kBFloat16, w4a4::Dtype::kFloat16};

// Finite values for tokens that also hold a NaN or an infinity.
float largest_of(w4a4::Dtype dtype) {
  return dtype == w4a4::Dtype::kFloat32    ? std::numeric_limits<float>::max()
         : dtype == w4a4::Dtype::kBFloat16 ? 0x1.FEp127f
                                           : 65504.0f;
}
float smallest_of(w4a4::Dtype dtype) {
  return dtype == w4a4::Dtype::kFloat32 ? 0x1p-149f : dtype == w4a4::Dtype::kBFloat16 ? 0x1p-133f : 0x1p-24f;
}

enum class Operator { kFlatquantLinear, kInt4Linear, kW8a8Linear };

// The operands of one operator call, all of them in the open.
struct Case {
  int64_t left, right, out, tokens, groups;
  w4a4::Dtype dtype;
  std::vector<float> x, left_trans, right_trans, weight_scale, weight_offset, bias;
  std::vector<int8_t> weight;

  Case(int64_t left, int64_t right, int64_t out, int64_t tokens, int64_t groups, w4a4::Dtype dtype, bool has_transform)
      : left(left), right(right), out(out), tokens(tokens), groups(groups), dtype(dtype) {
    Random random(static_cast<uint32_t>(left * 131 + right * 17 + tokens));
    for (int64_t i = 0; i < tokens * features(); ++i) x.push_back(static_cast<float>(random.integer(-64, 64)) / 16.0f);
    if (has_transform) {
      left_trans = random.reals(left * left, -1, 1);
      right_trans = random.reals(right * right, -1, 1);
    }
    weight_scale = random.reals(out * groups, 0.01f, 0.1f);
    weight_offset = random.reals(out * groups, -1, 1);
    bias = random.reals(out, -1, 1);
    weight = random.bytes(out * features(), -8, 7);
  }

  int64_t features() const { return left * right; }
  std::string text() const {
    return std::to_string(tokens) + " x " + std::to_string(left) + "x" + std::to_string(right) + " -> " +
           std::to_string(out) + " " + name_of(dtype);
  }
};

struct Result {
  std::vector<float> y;      // [tokens, out]
  std::vector<int8_t> q;     // [tokens, features]; of kInt4Linear
  std::vector<float> scale;  // [tokens]; of kInt4Linear
};

// kInt4Linear is kronecker_quant followed by int4_linear; w8a8_linear takes the same operands but the transform.
Result run(const Case& c, Operator op, const w4a4::Kernels& kernels, int64_t threads) {
  Result result;
  const auto packed = pack(c.weight, c.out, c.features());
  const auto packed_int8 = pack_int8(c.weight, c.out, c.features());
  const auto floats_or_null = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
  w4a4::Weight weight{packed.data(),
                      c.weight_scale.data(),
                      floats_or_null(c.weight_offset),
                      floats_or_null(c.bias),
                      w4a4::Dtype::kFloat32,
                      c.out,
                      c.features(),
                      c.groups};
  const w4a4::Transform transform{c.left, c.right, floats_or_null(c.left_trans), floats_or_null(c.right_trans), 1.0f};
  const auto input = to_dtype(c.x, c.dtype);
  const w4a4::Pool pool = make_pool(threads);
  // Outputs that a kernel does not write are found out.
  std::vector<uint8_t> output(c.tokens * c.out * w4a4::dtype_size(c.dtype), 0x55);
  if (op == Operator::kFlatquantLinear) {
    w4a4::flatquant_linear(input.data(), c.dtype, c.tokens, transform, w4a4::kInt4Range, weight, output.data(), kernels,
                           pool);
  } else if (op == Operator::kInt4Linear) {
    result.q.resize(c.x.size());
    result.scale.resize(c.tokens);
    w4a4::kronecker_quant(input.data(), c.dtype, c.tokens, c.features(), transform, nullptr, w4a4::kInt4Range,
                          result.q.data(), result.scale.data(), kernels, pool);
    w4a4::int4_linear(result.q.data(), result.scale.data(), c.tokens, w4a4::kInt4Range, weight, output.data(), c.dtype,
                      kernels, pool);
  } else {
    weight.packed = packed_int8.data();
    weight.offset = nullptr;
    const w4a4::Transform none{1, c.features(), nullptr, nullptr, 1.0f};
    w4a4::w8a8_linear(input.data(), c.dtype, c.tokens, none, weight, output.data(), kernels, pool);
  }
  result.y = from_dtype(output, c.dtype);
  return result;
}

// Whether `count` values from `begin` on are all NaN, or the same in both.
bool all_nan(const std::vector<float>& values, int64_t begin, int64_t count) {
  return std::all_of(&values[begin], &values[begin] + count, [](float v) { return std::isnan(v); });
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b, int64_t begin, int64_t count) {
  return std::memcmp(&a[begin], &b[begin], count * sizeof(T)) == 0;
}

// Puts `values` into some tokens at changing places; only these tokens may become NaN, whatever else changes nowhere.
void test_tokens(const w4a4::Kernels& kernels, Case c, Operator op, const std::vector<float>& values,
                 int64_t threads = 1) {
  const Result clean = run(c, op, kernels, threads);
  // Token 0 stays as it is if there are more; places move through all lanes of a vector and the tail.
  for (int64_t t = c.tokens > 1 ? 1 : 0; t < c.tokens; t += 2) {
    for (size_t i = 0; i < values.size(); ++i) {
      const int64_t place = (t * 5 + static_cast<int64_t>(i) * 3) % c.features();
      c.x[t * c.features() + (t % 4 == 3 ? c.features() - 1 - place : place)] = values[i];
    }
  }
  const Result poisoned = run(c, op, kernels, threads);
  const std::string what = std::string(kernels.name) + " not finite, operator " + std::to_string(static_cast<int>(op)) +
                           ", " + c.text() + ", first " + std::to_string(values[0]);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const bool is_poisoned = t % 2 == 1 || c.tokens == 1;
    check(is_poisoned ? all_nan(poisoned.y, t * c.out, c.out) : same(poisoned.y, clean.y, t * c.out, c.out),
          what + ": outputs of token " + std::to_string(t));
    if (op != Operator::kInt4Linear) continue;
    check(is_poisoned ? std::isnan(poisoned.scale[t]) : same(poisoned.scale, clean.scale, t, 1), what + ": scale");
    check(is_poisoned || same(poisoned.q, clean.q, t * c.features(), c.features()), what + ": q");
  }
}

// Finite tokens that the transform takes beyond float32: to infinity, or to infinity - infinity.
void test_overflow(const w4a4::Kernels& kernels, w4a4::Dtype dtype, bool has_opposites) {
  Case c(12, 16, 20, 3, 1, dtype, true);
  std::fill(c.x.begin(), c.x.end(), 0.0f);
  std::fill_n(c.x.begin() + c.features(), c.features(), largest_of(dtype));
  for (size_t i = 0; i < c.right_trans.size(); ++i) c.right_trans[i] = 1e35f;
  for (size_t i = 0; i < c.left_trans.size(); ++i) c.left_trans[i] = has_opposites && i / c.left % 2 ? -1.0f : 1.0f;
  for (const Operator op : {Operator::kFlatquantLinear, Operator::kInt4Linear}) {
    const Result result = run(c, op, kernels, 1);
    const std::string what = std::string(kernels.name) + " overflow of the transform, " + c.text();
    check(all_nan(result.y, c.out, c.out), what);
    for (const int64_t t : {0, 2}) {
      const auto bias = from_dtype(to_dtype(c.bias, dtype), dtype);
      for (int64_t o = 0; o < c.out; ++o) {
        check(std::fabs(result.y[t * c.out + o] - bias[o]) <= std::fabs(bias[o]) / 128, what + ": all-zero token");
      }
    }
  }
}

// One output feature's scale, offset or bias is not finite: what the formula gives there, and nothing new elsewhere.
void test_features(const w4a4::Kernels& kernels, w4a4::Dtype dtype) {
  for (const float value : {kNan, kInfinity, -kInfinity}) {
    for (const int operand : {0, 1, 2}) {
      for (const Operator op : {Operator::kFlatquantLinear, Operator::kInt4Linear, Operator::kW8a8Linear}) {
        if (op == Operator::kW8a8Linear && operand == 1) continue;
        Case c(7, 11, 35, 6, 1, dtype, op != Operator::kW8a8Linear);
        std::fill_n(c.x.begin() + c.features(), c.features(), 0.0f);
        const Result clean = run(c, op, kernels, 1);
        (operand == 0 ? c.weight_scale : operand == 1 ? c.weight_offset : c.bias)[17] = value;
        const Result found = run(c, op, kernels, 1);
        const std::string what = std::string(kernels.name) + " operand " + std::to_string(operand) + " is " +
                                 std::to_string(value) + ", operator " + std::to_string(static_cast<int>(op));
        for (int64_t t = 0; t < c.tokens; ++t) {
          for (int64_t o = 0; o < c.out; ++o) {
            const float y = found.y[t * c.out + o];
            if (o != 17) {
              check(same(found.y, clean.y, t * c.out + o, 1), what + ": other features");
            } else if (operand == 2 && !std::isnan(value)) {
              check(y == value, what + ": infinite bias");
            } else {
              // Token 1 is zeros: 0 * infinity.
              check(std::isnan(value) || t == 1 ? std::isnan(y) : !std::isfinite(y), what);
            }
          }
        }
      }
    }
  }
}

// A factor of the transform that is not finite reaches every token, zeros included.
void test_factors(const w4a4::Kernels& kernels) {
  for (const float value : {kNan, kInfinity}) {
    for (const bool is_left : {false, true}) {
      Case c(7, 11, 18, 5, 1, w4a4::Dtype::kFloat32, true);
      std::fill_n(c.x.begin(), c.features(), 0.0f);
      (is_left ? c.left_trans : c.right_trans)[is_left ? 48 : 120] = value;
      for (const int64_t threads : {1, 3}) {
        const Result result = run(c, Operator::kFlatquantLinear, kernels, threads);
        check(all_nan(result.y, 0, c.tokens * c.out), std::string(kernels.name) + " factor is not finite");
      }
    }
  }
}

// int4_linear with scales from elsewhere.
void test_given_scales(const w4a4::Kernels& kernels, w4a4::Dtype dtype) {
  const Case c(4, 12, 33, 7, 1, dtype, false);
  Random random(3);
  const auto q = random.bytes(c.tokens * c.features(), -8, 7);
  const std::vector<float> scale{1.0f, kNan, 0.5f, kInfinity, 0.0f, -kNan, 2.0f};
  const auto packed = pack(c.weight, c.out, c.features());
  const w4a4::Weight weight{packed.data(), c.weight_scale.data(), nullptr, c.bias.data(), w4a4::Dtype::kFloat32,
                            c.out,         c.features(),          1};
  std::vector<uint8_t> output(c.tokens * c.out * w4a4::dtype_size(dtype));
  w4a4::int4_linear(q.data(), scale.data(), c.tokens, w4a4::kInt4Range, weight, output.data(), dtype, kernels,
                    make_pool(1));
  const auto y = from_dtype(output, dtype);
  bool is_right = true;
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t o = 0; o < c.out; ++o) {
      const double sum = static_cast<double>(dot(q, c.weight, t, o, c.features(), 0, 1)) * c.weight_scale[o];
      const double expected = scale[t] * sum + c.bias[o];
      const float found = y[t * c.out + o];
      is_right &= std::isnan(expected)   ? std::isnan(found)
                  : std::isinf(expected) ? found == expected
                                         : std::fabs(found - expected) <= 0.01 * std::fabs(expected) + 1e-4;
    }
  }
  check(is_right, std::string(kernels.name) + " given scales, " + name_of(dtype));
}

// Tokens at the ends of the dtype's range, without transform: q, scale and outputs as the formula gives them in
// float32.
void test_range(const w4a4::Kernels& kernels, w4a4::Dtype dtype, float weight_scale) {
  const float largest = largest_of(dtype), smallest = smallest_of(dtype);
  Case c(1, 77, 20, 8, 1, dtype, false);
  c.bias.clear();
  c.weight_offset.clear();
  std::fill(c.weight_scale.begin(), c.weight_scale.end(), weight_scale);
  Random random(11);
  for (int64_t k = 0; k < c.features(); ++k) {
    const float sign = random.integer(0, 1) != 0 ? 1.0f : -1.0f;
    const auto steps = static_cast<float>(random.integer(0, 7));
    const float token[] = {sign * largest,                      // only the largest
                           sign * (largest / 8.0f) * steps,     // up to 7/8 of it
                           k == 3 ? largest : sign * smallest,  // both ends
                           sign * smallest,                     // the scale may round to 0
                           sign * smallest * steps,             // denormal
                           sign * smallest * steps * 16.0f,     // denormal
                           sign * 0.0f,
                           -0.0f};
    for (int64_t t = 0; t < c.tokens; ++t) c.x[t * c.features() + k] = token[t];
  }
  c.x = from_dtype(to_dtype(c.x, dtype), dtype);
  for (const bool is_int8 : {false, true}) {
    const Result found = run(c, is_int8 ? Operator::kW8a8Linear : Operator::kInt4Linear, kernels, 1);
    const Quantized exact = quantize_float32(c.x, c.tokens, is_int8 ? -127 : -8, is_int8 ? 127 : 7);
    const std::string what = std::string(kernels.name) + (is_int8 ? " int8" : " int4") + " range of " + name_of(dtype);
    if (!is_int8) {
      check(found.q == exact.q, what + ": q");
      for (int64_t t = 0; t < c.tokens; ++t) check(found.scale[t] == exact.scale[t], what + ": scale");
    }
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t o = 0; o < c.out; ++o) {
        const double sum = static_cast<double>(dot(exact.q, c.weight, t, o, c.features(), 0, 1)) * weight_scale;
        const double expected = exact.scale[t] * sum;
        const float y = found.y[t * c.out + o];
        // bfloat16 keeps 8 bits; denormal products are off by their own spacing.
        const bool is_near = std::fabs(y - expected) <= std::fabs(expected) / 128 + 2.0 * smallest;
        const bool is_beyond = std::fabs(expected) > 1.01 * largest;
        check(is_beyond ? y == std::copysign(kInfinity, static_cast<float>(sum)) : is_near || std::isinf(y), what);
        check(!std::isinf(y) || std::fabs(expected) > 0.99 * largest, what + ": infinite too early");
        check(t < c.tokens - 2 || y == 0.0f, what + ": zeros");
      }
    }
  }
}

}  // namespace

void test_nonfinite(const w4a4::Kernels& kernels) {
  const std::vector<float> poisons[] = {
      {kNan}, {-kNan}, {kInfinity}, {-kInfinity}, {kInfinity, -kInfinity}, {kNan, kInfinity, -kInfinity, kNan}};
  for (const auto dtype : kDtypes) {
    for (const auto& values : poisons) {
      for (const auto op : {Operator::kFlatquantLinear, Operator::kInt4Linear, Operator::kW8a8Linear}) {
        for (const bool has_transform : {false, true}) {
          if (has_transform && op == Operator::kW8a8Linear) continue;
          for (const int64_t tokens : {1, 2, 5, 14}) {
            test_tokens(kernels, Case(7, 11, 35, tokens, 1, dtype, has_transform), op, values);
            if (op != Operator::kW8a8Linear) {
              test_tokens(kernels, Case(12, 16, 20, tokens, 2, dtype, has_transform), op, values);
            }
          }
        }
      }
    }
    test_overflow(kernels, dtype, false);
    test_overflow(kernels, dtype, true);
    test_features(kernels, dtype);
    test_given_scales(kernels, dtype);
    for (const float weight_scale : {1.0f, 0x1p-20f}) test_range(kernels, dtype, weight_scale);
  }
  test_factors(kernels);
  // The threads share a token's transform.
  for (const int64_t tokens : {1, 2}) {
    test_tokens(kernels, Case(72, 80, 16, tokens, 1, w4a4::Dtype::kFloat32, true), Operator::kFlatquantLinear, {kNan},
                3);
  }
  // More tokens than are quantized at once.
  test_tokens(kernels, Case(4, 4, 17, 530, 1, w4a4::Dtype::kBFloat16, true), Operator::kFlatquantLinear, {kInfinity},
              2);
}
