// Chosen at run time on x86-64 processors that have: avx2,fma,f16c,bmi,bmi2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define SG_AVX2 1
#define SG_ISA avx2
#define VECTOR_BYTES 32
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
