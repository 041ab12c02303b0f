// Vectors of N lanes by the compiler's vector extension: one source for SSE2, NEON, AVX2 and AVX-512.
// Included once per instruction set, inside that set's namespace; VECTOR_BYTES is the width of a register.

template <class A, int N>
struct VecOf {
  typedef A type __attribute__((vector_size(sizeof(A) * N)));
};
template <class A, int N>
using Vec = typename VecOf<A, N>::type;

template <class T>
struct Accumulate {
  using type = float;
  static constexpr int lanes = VECTOR_BYTES / 4;
};
template <>
struct Accumulate<double> {
  using type = double;
  static constexpr int lanes = 1;  // double is there for gradient checks, not for speed
};
template <class T>
using Acc = typename Accumulate<T>::type;

template <int N>
SG_INLINE Vec<float, N> load(const float* p) {
  Vec<float, N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <int N>
SG_INLINE Vec<double, N> load(const double* p) {
  Vec<double, N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <int N>
SG_INLINE Vec<float, N> load(const bf16* p) {
#if SG_AVX512
  if constexpr (N == 16)
    return (Vec<float, N>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#endif
#if SG_AVX2
  if constexpr (N == 8) {  // the compiler's own conversion takes twice the instructions
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec<float, N>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
  }
#endif
#if SG_AVX512
  if constexpr (N == 16)
    return (Vec<float, N>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#endif
  Vec<uint16_t, N> h;
  __builtin_memcpy(&h, p, sizeof(h));
  return (Vec<float, N>)(__builtin_convertvector(h, Vec<uint32_t, N>) << 16);
}

template <int N>
SG_INLINE void store(float* p, Vec<float, N> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <int N>
SG_INLINE void store(double* p, Vec<double, N> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <int N>
SG_INLINE void store(bf16* p, Vec<float, N> v) {
#if SG_BF16
  if constexpr (N == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
    return;
  }
#endif
  auto u = (Vec<uint32_t, N>)v;
  auto rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to nearest, ties to even
  u = rounded | (Vec<uint32_t, N>)(v != v);  // all ones is a NaN
#if SG_AVX2
  if constexpr (N == 8) {
    const __m256i high = _mm256_srli_epi32((__m256i)u, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    return;
  }
#endif
#if SG_AVX512
  if constexpr (N == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)u, 16)));
    return;
  }
#endif
  auto h = __builtin_convertvector(u >> 16, Vec<uint16_t, N>);
  __builtin_memcpy(p, &h, sizeof(h));
}

template <class A, int N>
SG_INLINE Vec<A, N> splat(A a) {
  return a - Vec<A, N>{};  // a - 0 is a, whatever its sign; a + 0 is not, and the compiler would have to add
}

template <class A, int N>
SG_INLINE double sum_lanes(Vec<A, N> v) {
  double s = 0;
  for (int i = 0; i < N; ++i) s += v[i];
  return s;
}

// x limited to [-top, top]; NaN stays NaN.
template <int N>
SG_INLINE Vec<float, N> within(Vec<float, N> x, float top) {
#if SG_AVX512
  if constexpr (N == 16)
    return (Vec<float, N>)_mm512_max_ps(_mm512_set1_ps(-top), _mm512_min_ps(_mm512_set1_ps(top), (__m512)x));
#endif
#if SG_AVX2
  if constexpr (N == 8)  // min and max return their second operand where one is NaN
    return (Vec<float, N>)_mm256_max_ps(_mm256_set1_ps(-top), _mm256_min_ps(_mm256_set1_ps(top), (__m256)x));
#endif
  const Vec<float, N> high = splat<float, N>(top);
  x = x > high ? high : x;
  return x < -high ? -high : x;
}

// e^x: x = n ln 2 + r with |r| <= ln(2)/2; 2^n goes into the exponent, e^r is a polynomial fitted to 2e-9. Saturates at
// e^+-87.3, where SiLU is flat or linear to the last bit; NaN stays NaN.
template <int N>
SG_INLINE Vec<float, N> exp_of(Vec<float, N> x) {
  using V = Vec<float, N>;
  using I = Vec<int32_t, N>;
  x = within<N>(x, 87.3f);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  V t = x * 1.44269504f + magic;
  V n = t - magic;
  V r = x - n * 0.693145752f;  // ln 2 in two parts: the first has few enough bits that n times it is exact
  r = r - n * 1.42860677e-6f;
  V p = r * 0.00138368353f + 0.00837482419f;
  p = p * r + 0.0416682251f;
  p = p * r + 0.166664198f;
  p = p * r + 0.49999991f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I scale = ((I)t - 0x4b400000 + 127) << 23;
  return p * (V)scale;
}
template <int N>
SG_INLINE Vec<double, N> exp_of(Vec<double, N> x) {
  Vec<double, N> e;
  for (int i = 0; i < N; ++i) e[i] = __builtin_exp(x[i]);
  return e;
}

// 1 / x for x >= 1. AVX-512 divides at a quarter of the speed of its 14-bit estimate with one step of Newton's, which ends
// within an ulp.
template <class A, int N>
SG_INLINE Vec<A, N> reciprocal(Vec<A, N> x) {
#if SG_AVX512
  if constexpr (N == 16) {
    const Vec<A, N> r = (Vec<A, N>)_mm512_rcp14_ps((__m512)x);
    return r + r * (A(1) - x * r);
  }
#endif
  return A(1) / x;
}

// Runs body<N>(c) over [0, n): whole vectors, then single lanes.
#define SG_OVER_LANES(T, n, ...)                 \
  {                                              \
    constexpr int kLanes = Accumulate<T>::lanes; \
    int64_t c = 0;                               \
    for (; c + kLanes <= (n); c += kLanes) {     \
      constexpr int N = kLanes;                  \
      __VA_ARGS__                                \
    }                                            \
    for (; c < (n); ++c) {                       \
      constexpr int N = 1;                       \
      __VA_ARGS__                                \
    }                                            \
  }
