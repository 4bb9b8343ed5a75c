// SPDX-License-Identifier: Apache-2.0
// One linear layer in llama.cpp's Q4_0, run through ggml's backend interface as llama.cpp does: weights in the
// interleaved layout that ggml's CPU backend prefers, if it has one for this CPU, and activations in float32, which the
// product itself quantizes to Q8_0.
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

struct Product {
  ggml_context* context;
  ggml_backend_buffer_t buffer;
  ggml_cgraph* graph;
  ggml_tensor* x;
  ggml_tensor* y;
};

struct Linear {
  Backend backend;
  ggml_context* context;
  ggml_backend_buffer_t buffer;
  ggml_tensor* weight;
  std::vector<float> rows;  // the first kDistinctRows rows of the weight, dequantized
  std::map<int64_t, Product> products;

  explicit Linear(int threads) : backend(threads) {}
};

// The layout of `weight` that llama.cpp would choose.
ggml_backend_buffer_type_t PreferredBuffer(ggml_tensor* weight, int64_t in) {
  ggml_context* context = NewContext();
  ggml_tensor* product = ggml_mul_mat(context, weight, ggml_new_tensor_2d(context, GGML_TYPE_F32, in, 1));
  const ggml_backend_buffer_type_t chosen = w4a4_ggml::PreferredBuffer(weight, product);
  ggml_free(context);
  return chosen;
}

Product NewProduct(Linear& linear, int64_t tokens) {
  Product product;
  product.context = NewContext();
  product.x = ggml_new_tensor_2d(product.context, GGML_TYPE_F32, linear.weight->ne[0], tokens);
  product.y = ggml_mul_mat(product.context, linear.weight, product.x);
  product.graph = ggml_new_graph(product.context);
  ggml_build_forward_expand(product.graph, product.y);
  product.buffer = ggml_backend_alloc_ctx_tensors(product.context, linear.backend.backend);
  std::vector<float> x(ggml_nelements(product.x));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);
  ggml_backend_tensor_set(product.x, x.data(), 0, ggml_nbytes(product.x));
  return product;
}

}  // namespace

extern "C" {

// A linear layer with random weights, on `threads` threads.
void* w4a4_ggml_create(int64_t in, int64_t out, int threads) {
  auto* linear = new Linear(threads);
  linear->context = NewContext();
  linear->weight = ggml_new_tensor_2d(linear->context, GGML_TYPE_Q4_0, in, out);
  linear->buffer = ggml_backend_alloc_ctx_tensors_from_buft(linear->context, PreferredBuffer(linear->weight, in));

  const size_t row_bytes = ggml_row_size(GGML_TYPE_Q4_0, in);
  std::vector<float> rows(kDistinctRows * in);
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (float& value : rows) value = normal(random);
  std::vector<uint8_t> quantized(row_bytes * out);
  ggml_quantize_chunk(GGML_TYPE_Q4_0, rows.data(), quantized.data(), 0, kDistinctRows, in, nullptr);
  for (size_t at = kDistinctRows * row_bytes; at < quantized.size(); ++at) {
    quantized[at] = quantized[at - kDistinctRows * row_bytes];
  }
  ggml_get_type_traits(GGML_TYPE_Q4_0)->to_float(quantized.data(), rows.data(), kDistinctRows * in);
  linear->rows = std::move(rows);
  ggml_backend_tensor_set(linear->weight, quantized.data(), 0, quantized.size());
  return linear;
}

const char* w4a4_ggml_layout(void* handle) { return ggml_backend_buffer_name(static_cast<Linear*>(handle)->buffer); }

// One product of `tokens` tokens, which are already in ggml's memory in float32.
int w4a4_ggml_run(void* handle, int64_t tokens) {
  auto& linear = *static_cast<Linear*>(handle);
  auto found = linear.products.find(tokens);
  if (found == linear.products.end()) found = linear.products.emplace(tokens, NewProduct(linear, tokens)).first;
  return ggml_backend_graph_compute(linear.backend.backend, found->second.graph);
}

// Largest difference between the last product of `tokens` tokens and float arithmetic on the dequantized weights, over
// the first rows of the last token, relative to the largest value there. Its only cause is the rounding of x to Q8_0.
float w4a4_ggml_error(void* handle, int64_t tokens) {
  auto& linear = *static_cast<Linear*>(handle);
  const Product& product = linear.products.at(tokens);
  const int64_t in = linear.weight->ne[0], out = linear.weight->ne[1];
  std::vector<float> x(in), y(kDistinctRows);
  ggml_backend_tensor_get(product.x, x.data(), (tokens - 1) * in * sizeof(float), in * sizeof(float));
  ggml_backend_tensor_get(product.y, y.data(), (tokens - 1) * out * sizeof(float), kDistinctRows * sizeof(float));
  float error = 0, largest = 0;
  for (int64_t row = 0; row < kDistinctRows; ++row) {
    double sum = 0;
    for (int64_t k = 0; k < in; ++k) sum += double{linear.rows[row * in + k]} * x[k];
    error = std::fmax(error, std::fabs(float(sum) - y[row]));
    largest = std::fmax(largest, std::fabs(float(sum)));
  }
  return error / largest;
}

void w4a4_ggml_free(void* handle) {
  auto* linear = static_cast<Linear*>(handle);
  for (auto& [tokens, product] : linear->products) {
    ggml_backend_buffer_free(product.buffer);
    ggml_free(product.context);
  }
  ggml_backend_buffer_free(linear->buffer);
  ggml_free(linear->context);
  delete linear;
}

}  // extern "C"
