// SPDX-License-Identifier: Apache-2.0
// The routed experts of one layer in llama.cpp's Q4_0: the graph that llama.cpp builds for a mixture of experts whose
// activation is SiLU, from the chosen experts and their weights on. Layouts are chosen as in linear.cpp.
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "ggml-alloc.h"
#include "ggml_setup.h"

namespace {

using w4a4_ggml::Backend;
using w4a4_ggml::NewContext;

constexpr int64_t kDistinctRows = 64;

// One matrix [out, in] of every expert. Row r of expert e is distinct row (r + e) % kDistinctRows.
struct Matrix {
  ggml_tensor* tensor;
  std::vector<float> rows;  // the distinct rows, dequantized

  // Products of all rows of an expert with x [in].
  std::vector<double> Multiply(int64_t expert, const std::vector<double>& x) const {
    const int64_t in = tensor->ne[0], out = tensor->ne[1];
    std::vector<double> distinct(kDistinctRows), y(out);
    for (int64_t row = 0; row < kDistinctRows; ++row) {
      for (int64_t k = 0; k < in; ++k) distinct[row] += double{rows[row * in + k]} * x[k];
    }
    for (int64_t row = 0; row < out; ++row) y[row] = distinct[(row + expert) % kDistinctRows];
    return y;
  }
};

struct Layer {
  ggml_context* inputs;
  ggml_backend_buffer_t buffer;
  ggml_tensor *x, *ids, *weights;
  ggml_context* context;
  ggml_gallocr_t allocator;
  ggml_cgraph* graph;
  ggml_tensor* y;
};

struct Experts {
  Backend backend;
  int64_t top_k;
  ggml_context* context;
  ggml_backend_buffer_t buffer;
  Matrix gate, up, down;
  std::map<int64_t, Layer> layers;  // by number of tokens

  explicit Experts(int threads) : backend(threads) {}
};

ggml_backend_buffer_type_t PreferredBuffer(ggml_tensor* weight) {
  ggml_context* context = NewContext();
  ggml_tensor* x = ggml_new_tensor_3d(context, GGML_TYPE_F32, weight->ne[0], 1, 1);
  ggml_tensor* ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, 1, 1);
  const ggml_backend_buffer_type_t chosen =
      w4a4_ggml::PreferredBuffer(weight, ggml_mul_mat_id(context, weight, x, ids));
  ggml_free(context);
  return chosen;
}

void Fill(Matrix& matrix, unsigned seed) {
  const int64_t in = matrix.tensor->ne[0], out = matrix.tensor->ne[1], experts = matrix.tensor->ne[2];
  const size_t row_bytes = ggml_row_size(GGML_TYPE_Q4_0, in);
  matrix.rows.resize(kDistinctRows * in);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(float(in)));
  for (float& value : matrix.rows) value = normal(random);
  std::vector<uint8_t> distinct(kDistinctRows * row_bytes), all;
  ggml_quantize_chunk(GGML_TYPE_Q4_0, matrix.rows.data(), distinct.data(), 0, kDistinctRows, in, nullptr);
  ggml_get_type_traits(GGML_TYPE_Q4_0)->to_float(distinct.data(), matrix.rows.data(), kDistinctRows * in);
  all.reserve(row_bytes * out * experts);
  for (int64_t expert = 0; expert < experts; ++expert) {
    for (int64_t row = 0; row < out; ++row) {
      const auto source = distinct.begin() + (row + expert) % kDistinctRows * row_bytes;
      all.insert(all.end(), source, source + row_bytes);
    }
  }
  ggml_backend_tensor_set(matrix.tensor, all.data(), 0, all.size());
}

Layer NewLayer(Experts& experts, int64_t tokens) {
  const int64_t hidden = experts.gate.tensor->ne[0], top_k = experts.top_k;
  Layer layer;
  layer.inputs = NewContext();
  layer.x = ggml_new_tensor_2d(layer.inputs, GGML_TYPE_F32, hidden, tokens);
  layer.ids = ggml_new_tensor_2d(layer.inputs, GGML_TYPE_I32, top_k, tokens);
  layer.weights = ggml_new_tensor_3d(layer.inputs, GGML_TYPE_F32, 1, top_k, tokens);
  layer.buffer = ggml_backend_alloc_ctx_tensors(layer.inputs, experts.backend.backend);
  std::vector<float> x(hidden * tokens);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);
  ggml_backend_tensor_set(layer.x, x.data(), 0, ggml_nbytes(layer.x));

  ggml_context* context = layer.context = NewContext();
  ggml_tensor* in = ggml_reshape_3d(context, layer.x, hidden, 1, tokens);
  ggml_tensor* up = ggml_mul_mat_id(context, experts.up.tensor, in, layer.ids);
  ggml_tensor* gate = ggml_mul_mat_id(context, experts.gate.tensor, in, layer.ids);
  ggml_tensor* act = ggml_swiglu_split(context, gate, up);
  ggml_tensor* products = ggml_mul_mat_id(context, experts.down.tensor, act, layer.ids);
  products = ggml_mul(context, products, layer.weights);
  layer.graph = ggml_new_graph(context);
  // In the order of llama.cpp: the parts of the sum before the first addition.
  std::vector<ggml_tensor*> parts;
  for (int64_t j = 0; j < top_k; ++j) {
    parts.push_back(ggml_view_2d(context, products, hidden, tokens, products->nb[2], j * products->nb[1]));
    ggml_build_forward_expand(layer.graph, parts.back());
  }
  layer.y = parts[0];
  for (int64_t j = 1; j < top_k; ++j) layer.y = ggml_add(context, layer.y, parts[j]);
  if (top_k == 1) layer.y = ggml_cont(context, layer.y);
  ggml_build_forward_expand(layer.graph, layer.y);
  layer.allocator = ggml_gallocr_new(ggml_backend_get_default_buffer_type(experts.backend.backend));
  ggml_gallocr_alloc_graph(layer.allocator, layer.graph);
  return layer;
}

}  // namespace

extern "C" {

// Experts with random weights, on `threads` threads.
void* w4a4_ggml_experts_create(int64_t hidden, int64_t intermediate, int64_t count, int64_t top_k, int threads) {
  auto* experts = new Experts(threads);
  experts->top_k = top_k;
  experts->context = NewContext();
  const auto matrix = [&](int64_t in, int64_t out) {
    return Matrix{ggml_new_tensor_3d(experts->context, GGML_TYPE_Q4_0, in, out, count), {}};
  };
  experts->gate = matrix(hidden, intermediate);
  experts->up = matrix(hidden, intermediate);
  experts->down = matrix(intermediate, hidden);
  experts->buffer = ggml_backend_alloc_ctx_tensors_from_buft(experts->context, PreferredBuffer(experts->gate.tensor));
  unsigned seed = 0;
  for (Matrix* each : {&experts->gate, &experts->up, &experts->down}) Fill(*each, seed++);
  return experts;
}

const char* w4a4_ggml_experts_layout(void* handle) {
  return ggml_backend_buffer_name(static_cast<Experts*>(handle)->buffer);
}

// The experts of `tokens` tokens, which are already in ggml's memory in float32; ids and weights [tokens, top_k].
int w4a4_ggml_experts_run(void* handle, int64_t tokens, const int32_t* ids, const float* weights) {
  auto& experts = *static_cast<Experts*>(handle);
  auto found = experts.layers.find(tokens);
  if (found == experts.layers.end()) found = experts.layers.emplace(tokens, NewLayer(experts, tokens)).first;
  const Layer& layer = found->second;
  ggml_backend_tensor_set(layer.ids, ids, 0, ggml_nbytes(layer.ids));
  ggml_backend_tensor_set(layer.weights, weights, 0, ggml_nbytes(layer.weights));
  return ggml_backend_graph_compute(experts.backend.backend, layer.graph);
}

// As w4a4_ggml_error, over the outputs of the last token.
float w4a4_ggml_experts_error(void* handle, int64_t tokens) {
  auto& experts = *static_cast<Experts*>(handle);
  const Layer& layer = experts.layers.at(tokens);
  const int64_t hidden = layer.x->ne[0], top_k = experts.top_k;
  std::vector<float> x(hidden), y(hidden), weights(top_k);
  std::vector<int32_t> ids(top_k);
  const auto last = [&](ggml_tensor* tensor, auto& values) {
    const size_t bytes = values.size() * sizeof(values[0]);
    ggml_backend_tensor_get(tensor, values.data(), (tokens - 1) * bytes, bytes);
  };
  last(layer.x, x);
  last(layer.y, y);
  last(layer.ids, ids);
  last(layer.weights, weights);
  std::vector<double> expected(hidden);
  for (int64_t j = 0; j < top_k; ++j) {
    const std::vector<double> input(x.begin(), x.end());
    std::vector<double> act = experts.gate.Multiply(ids[j], input);
    const std::vector<double> up = experts.up.Multiply(ids[j], input);
    for (size_t i = 0; i < act.size(); ++i) act[i] *= up[i] / (1 + std::exp(-act[i]));
    const std::vector<double> product = experts.down.Multiply(ids[j], act);
    for (int64_t i = 0; i < hidden; ++i) expected[i] += weights[j] * product[i];
  }
  double error = 0, largest = 0;
  for (int64_t i = 0; i < hidden; ++i) {
    error = std::fmax(error, std::fabs(expected[i] - y[i]));
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  return float(error / largest);
}

void w4a4_ggml_experts_free(void* handle) {
  auto* experts = static_cast<Experts*>(handle);
  for (auto& [tokens, layer] : experts->layers) {
    ggml_gallocr_free(layer.allocator);
    ggml_free(layer.context);
    ggml_backend_buffer_free(layer.buffer);
    ggml_free(layer.inputs);
  }
  ggml_backend_buffer_free(experts->buffer);
  ggml_free(experts->context);
  delete experts;
}

}  // extern "C"
