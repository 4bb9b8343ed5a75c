// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace w4a4 {

#define W4A4_DECLARE(isa)                                                                                  \
  void quantize_##isa(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch);               \
  void gemm_##isa(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t begin, int64_t end); \
  void gemm_int8_##isa(const GemmArgs& args, int64_t tile_begin, int64_t tile_end, int64_t begin, int64_t end)

W4A4_DECLARE(portable);
#if defined(__x86_64__)
W4A4_DECLARE(avx2);
W4A4_DECLARE(avx512vnni);
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

std::string names(bool only_available) {
  std::string text;
  for (const Kernels* candidate : all_kernels()) {
    if (only_available && !candidate->is_available()) continue;
    text += (text.empty() ? "" : ", ") + std::string(candidate->name);
  }
  return text;
}

}  // namespace

const std::vector<const Kernels*>& all_kernels() {
  static const Kernels portable{"portable", always, quantize_portable, gemm_portable, gemm_int8_portable};
#if defined(__x86_64__)
  static const Kernels avx2{"avx2", has_avx2, quantize_avx2, gemm_avx2, gemm_int8_avx2};
  static const Kernels avx512vnni{"avx512vnni", has_avx512vnni, quantize_avx512vnni, gemm_avx512vnni, gemm_int8_avx2};
  static const std::vector<const Kernels*> all{&avx512vnni, &avx2, &portable};
#else
  static const std::vector<const Kernels*> all{&portable};
#endif
  return all;
}

const Kernels& find_kernels(const std::string& name) {
  for (const Kernels* candidate : all_kernels()) {
    if (!name.empty() && name != candidate->name) continue;
    if (candidate->is_available()) return *candidate;
    if (!name.empty()) {
      throw std::runtime_error("VLLM_W4A4_ISA=" + name + ": this CPU does not have it. It has: " + names(true));
    }
  }
  throw std::runtime_error("VLLM_W4A4_ISA=" + name + ": unknown instruction set. Known: " + names(false) +
                           ". This CPU has: " + names(true));
}

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* forced = std::getenv("VLLM_W4A4_ISA");
    return find_kernels(forced != nullptr ? forced : "");
  }();
  return chosen;
}

}  // namespace w4a4
