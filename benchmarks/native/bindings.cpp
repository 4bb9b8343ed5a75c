// SPDX-License-Identifier: Apache-2.0
// torch.ops.vllm_w4a4_limits.*: the machine's limits, on the same threads as the operators.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <string>

namespace w4a4 {
uint64_t read_portable(const uint64_t* words, int64_t count);
uint64_t read_avx2(const uint64_t* words, int64_t count);
uint64_t read_avx512vnni(const uint64_t* words, int64_t count);
int64_t fma_peak_avx2(int64_t steps);
int64_t dot_peak_avx2(int64_t steps);
int64_t dot_peak_avxvnni(int64_t steps);
int64_t fma_peak_avx512vnni(int64_t steps);
int64_t dot_peak_avx512vnni(int64_t steps);
int64_t dot_peak_avx512amx(int64_t steps);
}  // namespace w4a4

namespace {

using torch::stable::Tensor;

// Reads all of a tensor once, in one contiguous part per thread as the operators do.
int64_t read_all(const Tensor& tensor, std::string isa) {
  const auto* words = static_cast<const uint64_t*>(tensor.const_data_ptr());
  auto read = w4a4::read_portable;
#if defined(__x86_64__)
  if (isa == "avx2" || isa == "avxvnni") read = w4a4::read_avx2;
  if (isa == "avx512vnni" || isa == "avx512amx") read = w4a4::read_avx512vnni;
#endif
  std::atomic<uint64_t> sum{0};
  torch::stable::parallel_for(0, tensor.numel() * tensor.element_size() / 8, 1,
                              [&](int64_t begin, int64_t end) { sum += read(words + begin, end - begin); });
  return static_cast<int64_t>(sum.load());
}

int64_t on_all_threads(int64_t (*peak)(int64_t), int64_t steps) {
  std::atomic<int64_t> done{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) done += peak(steps);
  });
  return done.load();
}

// Multiply-adds done; 0 for an instruction set whose peak is not known.
int64_t dot_peak(std::string isa, int64_t steps) {
#if defined(__x86_64__)
  if (isa == "avx512amx") return on_all_threads(w4a4::dot_peak_avx512amx, steps / 8);
  if (isa == "avx512vnni") return on_all_threads(w4a4::dot_peak_avx512vnni, steps);
  if (isa == "avxvnni") return on_all_threads(w4a4::dot_peak_avxvnni, steps);
  if (isa == "avx2") return on_all_threads(w4a4::dot_peak_avx2, steps);
#endif
  return 0;
}

int64_t fma_peak(std::string isa, int64_t steps) {
#if defined(__x86_64__)
  if (isa == "avx512vnni" || isa == "avx512amx") return on_all_threads(w4a4::fma_peak_avx512vnni, steps);
  if (isa == "avx2" || isa == "avxvnni") return on_all_threads(w4a4::fma_peak_avx2, steps);
#endif
  return 0;
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_w4a4_limits, m) {
  m.def("read(Tensor tensor, str isa) -> int");
  m.def("dot_peak(str isa, int steps) -> int");
  m.def("fma_peak(str isa, int steps) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_w4a4_limits, CPU, m) { m.impl("read", TORCH_BOX(&read_all)); }

STABLE_TORCH_LIBRARY_IMPL(vllm_w4a4_limits, CompositeExplicitAutograd, m) {
  m.impl("dot_peak", TORCH_BOX(&dot_peak));
  m.impl("fma_peak", TORCH_BOX(&fma_peak));
}
