// SPDX-License-Identifier: Apache-2.0
// What both products need of ggml's backend interface: threads, contexts and the layout that llama.cpp would choose.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace w4a4_ggml {

constexpr size_t kTensorOverheads = 64;

// Descriptions of tensors and one graph; their values lie in buffers.
inline ggml_context* NewContext() {
  return ggml_init({ggml_tensor_overhead() * kTensorOverheads + ggml_graph_overhead(), nullptr, true});
}

// The CPU backend on threads that sleep between graphs.
struct Backend {
  ggml_backend_t backend;
  ggml_threadpool* threads;

  explicit Backend(int count) : backend(ggml_backend_cpu_init()) {
    ggml_threadpool_params parameters = ggml_threadpool_params_default(count);
    parameters.poll = 0;
    threads = ggml_threadpool_new(&parameters);
    ggml_backend_cpu_set_n_threads(backend, count);
    ggml_backend_cpu_set_threadpool(backend, threads);
  }
  ~Backend() {
    ggml_backend_free(backend);
    ggml_threadpool_free(threads);
  }
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
};

// The first buffer type among the CPU backend's extra ones (repacked layouts) in which `weight` can be multiplied as in
// `product`.
inline ggml_backend_buffer_type_t PreferredBuffer(ggml_tensor* weight, ggml_tensor* product) {
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  ggml_backend_buffer_type_t chosen = ggml_backend_dev_buffer_type(device);
  for (auto* types = extra ? extra(device) : nullptr; types && *types; ++types) {
    ggml_backend_buffer_t probe = ggml_backend_buft_alloc_buffer(*types, 0);
    weight->buffer = probe;
    const bool supported = ggml_backend_dev_supports_op(device, product);
    weight->buffer = nullptr;
    ggml_backend_buffer_free(probe);
    if (supported) {
      chosen = *types;
      break;
    }
  }
  return chosen;
}

}  // namespace w4a4_ggml
