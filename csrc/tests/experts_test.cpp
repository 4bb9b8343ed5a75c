// SPDX-License-Identifier: Apache-2.0
// The experts of a layer against the same arithmetic in double precision. An activation that the oracle rounds the
// other way changes all outputs of its token, so a few tokens may differ by more than rounding.
#include "experts_test.h"

#include <cmath>
#include <limits>

#include "experts.h"
#include "harness.h"
#include "oracle.h"
#include "random.h"

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Matrix {
  int64_t experts, out, features, groups;
  bool is_int8, is_wide = false;  // wide: int4 weights with int8 activations
  std::vector<int8_t> weight;     // [experts, out, features]
  std::vector<uint8_t> packed;
  std::vector<float> scale, offset, bias;

  Matrix(Random& random, int64_t experts, int64_t out, int64_t features, int64_t groups, bool is_int8)
      : experts(experts), out(out), features(features), groups(groups), is_int8(is_int8) {
    for (int64_t e = 0; e < experts; ++e) {
      const auto w = is_int8 ? random.bytes(out * features, -128, 127) : random.bytes(out * features, -8, 7);
      weight.insert(weight.end(), w.begin(), w.end());
      if (is_int8) {
        const auto bytes = pack_int8(w, out, features);
        packed.insert(packed.end(), bytes.begin(), bytes.end());
      } else {
        const auto bytes = pack(w, out, features);
        packed.insert(packed.end(), bytes.begin(), bytes.end());
      }
    }
    scale = random.reals(experts * out * groups, 0.001f, 0.01f);
    if (!is_int8) offset = random.reals(experts * out * groups, -1, 1);
    bias = random.reals(experts * out, -0.1f, 0.1f);
  }

  w4a4::ExpertWeights view() const {
    return {packed.data(),
            is_int8 ? w4a4::kInt8BlockBytes : w4a4::kBlockBytes,
            scale.data(),
            offset.empty() ? nullptr : offset.data(),
            bias.empty() ? nullptr : bias.data(),
            experts,
            out,
            features,
            groups,
            is_wide};
  }

  // One token's product with expert e, the token already transformed.
  std::vector<double> multiply(const std::vector<double>& x, double clip, int64_t e) const {
    const Quantized token = is_int8 || is_wide ? quantize(x, 1, clip, -127, 127) : quantize(x, 1, clip, -8, 7);
    std::vector<double> y(out);
    const int64_t size = features / groups;
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t index = (e * out + o) * groups + g;
        double sum = 0;
        for (int64_t k = g * size; k < (g + 1) * size; ++k) {
          sum += token.q[k] * (weight[(e * out + o) * features + k] - (offset.empty() ? 0.0 : double{offset[index]}));
        }
        y[o] += scale[index] * sum;
      }
      y[o] = token.scale[0] * y[o] + (bias.empty() ? 0.0 : double{bias[e * out + o]});
    }
    return y;
  }
};

struct Factors {
  int64_t left, right, count;
  std::vector<float> l, r, clip;

  Factors(Random& random, int64_t left, int64_t right, int64_t count, bool is_identity)
      : left(left), right(right), count(count) {
    if (!is_identity) {
      l = random.reals(count * left * left, -0.5f, 0.5f);
      r = random.reals(count * right * right, -0.5f, 0.5f);
    }
    clip = is_identity ? std::vector<float>(count, 1.0f) : random.reals(count, 0.7f, 1.0f);
  }

  w4a4::ExpertTransform view() const {
    return {left,  right, l.empty() ? nullptr : l.data(), r.empty() ? nullptr : r.data(), clip.data(), count,
            count, count};
  }
  int64_t place(int64_t expert) const { return count == 1 ? 0 : expert; }
  std::vector<double> apply(const std::vector<float>& token, int64_t expert) const {
    const auto part = [&](const std::vector<float>& all, int64_t size) {
      const auto first = all.begin() + place(expert) * size;
      return all.empty() ? all : std::vector<float>(first, first + size);
    };
    return transform(token, 1, left, right, part(l, left * left), part(r, right * right));
  }
};

struct Case {
  int64_t tokens, top_k, experts;
  Matrix gate_up, down;
  Factors gate_up_factors, down_factors;
  std::vector<float> x, weights;
  std::vector<int32_t> ids;

  Case(Random& random, int64_t tokens, int64_t top_k, int64_t experts, int64_t groups, bool is_int8, int64_t transforms)
      : tokens(tokens),
        top_k(top_k),
        experts(experts),
        gate_up(random, experts, 2 * kIntermediate, kHidden, groups, is_int8),
        down(random, experts, kHidden, kIntermediate, groups, is_int8),
        gate_up_factors(random, 8, 12, 1, transforms == 0),
        down_factors(random, 6, 8, std::max<int64_t>(1, transforms), transforms == 0) {
    x = random.reals(tokens * kHidden, -2, 2);
    weights = random.reals(tokens * top_k, 0, 1);
    for (int64_t t = 0; t < tokens; ++t) {
      // Distinct experts, never the last one; every fifth pair is of another rank.
      const int64_t first = random.integer(0, experts - 2);
      for (int64_t j = 0; j < top_k; ++j) {
        const auto id = static_cast<int32_t>((first + j) % (experts - 1));
        ids.push_back((t * top_k + j) % 5 == 4 ? -1 : id);
      }
    }
  }

  std::vector<float> run(const w4a4::Kernels& kernels, int64_t threads) const {
    return run<float>(kernels, threads, ids);
  }

  // The sums over the experts `chosen`, in float or double.
  template <class Value>
  std::vector<Value> run(const w4a4::Kernels& kernels, int64_t threads, const std::vector<int32_t>& chosen) const {
    std::vector<Value> y(x.size());
    const w4a4::Routing routing{weights.data(), chosen.data(), top_k};
    w4a4::experts_mlp(x.data(), w4a4::Dtype::kFloat32, tokens, routing, gate_up_factors.view(), gate_up.view(),
                      down_factors.view(), down.view(), y.data(), sizeof(Value) == sizeof(double), kernels,
                      make_pool(threads));
    return y;
  }

  std::vector<double> expected(int64_t t) const {
    std::vector<double> y(kHidden);
    const std::vector<float> token(x.begin() + t * kHidden, x.begin() + (t + 1) * kHidden);
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t e = ids[t * top_k + j];
      if (e < 0) continue;
      const auto product = gate_up.multiply(gate_up_factors.apply(token, 0), gate_up_factors.clip[0], e);
      std::vector<float> hidden(kIntermediate);
      for (int64_t i = 0; i < kIntermediate; ++i) {
        hidden[i] = static_cast<float>(product[i] / (1 + std::exp(-product[i])) * product[kIntermediate + i]);
      }
      const auto result = down.multiply(down_factors.apply(hidden, e), down_factors.clip[down_factors.place(e)], e);
      for (int64_t o = 0; o < kHidden; ++o) y[o] += weights[t * top_k + j] * result[o];
    }
    return y;
  }

  static constexpr int64_t kHidden = 96, kIntermediate = 48;
};

void test_outputs(const w4a4::Kernels& kernels, const Case& c, const std::string& what) {
  const std::vector<float> y = c.run(kernels, 3);
  int64_t far = 0, very_far = 0;
  for (int64_t t = 0; t < c.tokens; ++t) {
    const auto expected = c.expected(t);
    double error = 0, norm = 0;
    for (int64_t o = 0; o < Case::kHidden; ++o) {
      const double difference = y[t * Case::kHidden + o] - expected[o];
      error += difference * difference;
      norm += expected[o] * expected[o];
    }
    far += error > 1e-10 * norm;
    very_far += !(error <= 0.04 * norm);
  }
  check(very_far == 0 && far <= std::max<int64_t>(1, c.tokens / 10), what);
  check(c.run(kernels, 1) == y, what + ": the number of threads changes nothing");
}

// Two ranks with half of the experts each, whose sums are added before they are rounded, give what one rank gives.
void test_ranks(const w4a4::Kernels& kernels, const Case& c, const std::string& what) {
  std::vector<double> sum(c.x.size());
  for (const int rank : {0, 1}) {
    std::vector<int32_t> here = c.ids;
    for (int32_t& id : here) id = id % 2 == rank ? id : -1;
    const std::vector<double> part = c.run<double>(kernels, 2, here);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
  }
  check(std::vector<float>(sum.begin(), sum.end()) == c.run(kernels, 2), what + ": two ranks");
}

void test_nan(const w4a4::Kernels& kernels, Case c, const std::string& what) {
  const std::vector<float> good = c.run(kernels, 2);
  const int64_t bad = c.tokens / 2;
  c.x[bad * Case::kHidden + 5] = kNan;
  const std::vector<float> y = c.run(kernels, 2);
  bool is_right = true;
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = t * Case::kHidden; i < (t + 1) * Case::kHidden; ++i) {
      is_right &= t == bad ? std::isnan(y[i]) : y[i] == good[i];
    }
  }
  check(is_right, what + ": NaN");
}

void test_silu(const w4a4::Kernels& kernels) {
  std::vector<float> gate, up;
  for (int i = -1200; i <= 1200; ++i) {
    gate.push_back(static_cast<float>(i) / 10.0f + 0.003f);
    up.push_back(i % 3 - 1.25f);
  }
  std::vector<float> y(gate.size());
  kernels.silu_and_mul(gate.data(), up.data(), static_cast<int64_t>(gate.size()), y.data());
  bool is_right = true;
  for (size_t i = 0; i < gate.size(); ++i) {
    const double exact = gate[i] / (1 + std::exp(-double{gate[i]})) * up[i];
    is_right &= std::fabs(y[i] - exact) <= 1e-6 * std::fabs(exact) + 3e-36;
  }
  check(is_right, std::string(kernels.name) + " silu");
  for (const float bad : {kNan, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    const float ones[2] = {1, 1}, gates[2] = {1, bad};
    float pair[2];
    kernels.silu_and_mul(gates, ones, 2, pair);
    check(std::isfinite(pair[0]) && !std::isfinite(pair[1]), std::string(kernels.name) + " silu of what is not finite");
    kernels.silu_and_mul(ones, gates, 2, pair);
    check(std::isfinite(pair[0]) && !std::isfinite(pair[1]), std::string(kernels.name) + " up that is not finite");
  }
}

}  // namespace

void test_experts(const w4a4::Kernels& kernels) {
  test_silu(kernels);
  Random random(11);
  for (const int64_t tokens : {0, 1, 2, 13, 70, 300}) {
    for (const int64_t top_k : {1, 2, 8}) {
      for (const bool is_int8 : {false, true}) {
        for (const int64_t transforms : {0, 1, 10}) {
          if (tokens == 300 && top_k == 8 && (is_int8 || transforms < 10)) continue;  // one of them is enough
          const int64_t groups = is_int8 || transforms == 1 ? 1 : 2;
          Case c(random, tokens, top_k, 10, groups, is_int8, transforms);
          const std::string what = std::string(kernels.name) + " experts, " + std::to_string(tokens) + " tokens, top " +
                                   std::to_string(top_k) + (is_int8 ? ", int8, " : ", int4, ") +
                                   std::to_string(transforms) + " transforms";
          test_outputs(kernels, c, what);
          test_ranks(kernels, c, what);
          if (tokens > 0 && c.ids[tokens / 2 * top_k] >= 0) test_nan(kernels, c, what);
          if (is_int8 || top_k != 2) continue;
          c.gate_up.is_wide = c.down.is_wide = true;
          test_outputs(kernels, c, what + ", int8 activations");
          for (Matrix* matrix : {&c.gate_up, &c.down}) {
            matrix->is_wide = false;
            matrix->bias.clear();
            matrix->offset.clear();
          }
          test_outputs(kernels, c, what + ", without biases and offsets");
        }
      }
    }
  }
  // More pairs than are computed at once.
  test_outputs(kernels, Case(random, 700, 8, 10, 1, false, 0), std::string(kernels.name) + " experts in two parts");
}
