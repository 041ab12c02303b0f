// Chosen at run time on x86-64 processors that have: avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,avx512bf16,amx-tile,amx-bf16.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,avx512bf16,amx-tile,amx-bf16")
#endif

#define SG_AVX512 1
#define SG_BF16 1
#define SG_AMX 1
#define SG_ISA amx
#define VECTOR_BYTES 64
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
