// SPDX-License-Identifier: Apache-2.0
// Stands in for the compiler's header in builds with W4A4_SIMDE: the intrinsics beyond AVX2 that the kernels use are
// SIMDe's, which any CPU with AVX2 runs; those for tiles, which SIMDe lacks, are our own.
#pragma once

#include_next <immintrin.h>
#include <simde/x86/avx512.h>

#include "amx.h"

#define __m512i simde__m512i
#define _mm512_add_epi32 simde_mm512_add_epi32
#define _mm512_and_si512 simde_mm512_and_si512
#define _mm512_dpbusd_epi32 simde_mm512_dpbusd_epi32
#define _mm512_load_si512 simde_mm512_load_si512
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_set1_epi8 simde_mm512_set1_epi8
#define _mm512_setzero_si512 simde_mm512_setzero_si512
#define _mm512_srli_epi16 simde_mm512_srli_epi16
#define _mm512_store_si512 simde_mm512_store_si512
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#define _mm512_xor_si512 simde_mm512_xor_si512
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
