// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace w4a4 {

#define W4A4_DECLARE_QUANTIZE(isa)                                                                                 \
  void quantize_##isa(const QuantizeArgs&, int64_t begin, int64_t end, float* scratch);                            \
  int32_t transform_columns_##isa(const QuantizeArgs&, int64_t token, int64_t begin, int64_t end, float*, float*); \
  void quantize_rows_##isa(const QuantizeArgs&, int64_t token, int64_t begin, int64_t end, int32_t, const float*); \
  void sum_groups_##isa(const QuantizeArgs&, int64_t token);                                                       \
  void silu_and_mul_##isa(const float* gate, const float* up, int64_t count, float* y);                            \
  void silu_and_mul_of_##isa(const void* gate, const void* up, Dtype dtype, int64_t count, void* y);               \
  void rms_norm_##isa(const NormArgs&, int64_t token, float* scratch, void* y);                                    \
  void weight_only_##isa(const WeightOnlyArgs&, int64_t begin, int64_t end)
#define W4A4_QUANTIZE(isa)                                                                            \
  quantize_##isa, transform_columns_##isa, quantize_rows_##isa, sum_groups_##isa, silu_and_mul_##isa, \
      silu_and_mul_of_##isa, rms_norm_##isa

W4A4_DECLARE_QUANTIZE(portable);
extern const Gemm gemm_portable, gemm_int8_portable;
#if defined(__x86_64__)
W4A4_DECLARE_QUANTIZE(avx2);
W4A4_DECLARE_QUANTIZE(avx512vnni);
extern const Gemm gemm_avx2, gemm_avxvnni, gemm_avx512vnni, gemm_avx512amx, gemm_int8_avx2, gemm_int8_avx512vnni,
    gemm_int8_avx512amx, gemm_wide_int4_avx2, gemm_wide_int8_avx2;
#elif defined(__aarch64__)
extern const Gemm gemm_neon_dotprod, gemm_neon_i8mm;
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// Clang 15 has no name for it: CPUID leaf 1, ECX bit 29.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
// GCC 12 has no name for it: CPUID leaf 7, subleaf 1, EAX bit 4. AVX2 tells that the system saves the registers.
bool has_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
// CPUID leaf 7, EDX bits 24 (tiles) and 25 (int8 products); the kernel then lets the process use the tiles' data, which
// it must be asked for once (Documentation/arch/x86/xstate.rst). It refuses where it does not know them, or where a
// thread's alternate signal stack is too small for them.
bool has_avx512amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool is_permitted = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return has_avx512vnni() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 3) == 3 &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return is_permitted;
}

// From how many tokens on a product with tiles is faster than one with vpdpbusd.
constexpr int64_t kTileTokens = 8;

constexpr Gemm with_tiles(Gemm gemm, const Gemm& tiles) {
  gemm.for_many = &tiles;
  gemm.many_tokens = kTileTokens;
  return gemm;
}
#elif defined(__aarch64__)
bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }
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
  static const Kernels portable{"portable",         always,        W4A4_QUANTIZE(portable), gemm_portable,
                                gemm_int8_portable, gemm_portable, gemm_int8_portable,      weight_only_portable};
#if defined(__x86_64__)
  static const Kernels avx2{"avx2",
                            has_avx2,
                            W4A4_QUANTIZE(avx2),
                            gemm_avx2,
                            gemm_int8_avx2,
                            gemm_wide_int4_avx2,
                            gemm_wide_int8_avx2,
                            weight_only_avx2};
  static const Kernels avxvnni{"avxvnni",      has_avxvnni,  W4A4_QUANTIZE(avx2), gemm_avxvnni,
                               gemm_int8_avx2, gemm_avxvnni, gemm_wide_int8_avx2, weight_only_avx2};
  static const Kernels avx512vnni{"avx512vnni",         has_avx512vnni,        W4A4_QUANTIZE(avx512vnni),
                                  gemm_avx512vnni,      gemm_int8_avx512vnni,  gemm_avx512vnni,
                                  gemm_int8_avx512vnni, weight_only_avx512vnni};
  static const Gemm int4_tiles = with_tiles(gemm_avx512vnni, gemm_avx512amx);
  static const Gemm int8_tiles = with_tiles(gemm_int8_avx512vnni, gemm_int8_avx512amx);
  static const Kernels avx512amx{"avx512amx", has_avx512amx, W4A4_QUANTIZE(avx512vnni), int4_tiles, int8_tiles,
                                 int4_tiles,  int8_tiles,    weight_only_avx512vnni};
  static const std::vector<const Kernels*> all{&avx512amx, &avx512vnni, &avxvnni, &avx2, &portable};
#elif defined(__aarch64__)
  // NEON is part of the architecture, so the portable transform is compiled to it.
  static const Kernels dotprod{"neon_dotprod",     has_dotprod,       W4A4_QUANTIZE(portable), gemm_neon_dotprod,
                               gemm_int8_portable, gemm_neon_dotprod, gemm_int8_portable,      weight_only_portable};
  static const Kernels i8mm{"neon_i8mm",        has_i8mm,       W4A4_QUANTIZE(portable), gemm_neon_i8mm,
                            gemm_int8_portable, gemm_neon_i8mm, gemm_int8_portable,      weight_only_portable};
  static const std::vector<const Kernels*> all{&i8mm, &dotprod, &portable};
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
