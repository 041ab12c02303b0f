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
  auto u = (Vec<uint32_t, N>)v;
  auto rounded = u + 0x7fffu + ((u >> 16) & 1u);  // to nearest, ties to even
  auto nan = (Vec<uint32_t, N>)(v != v);
  u = (nan & 0x7fc00000u) | (~nan & rounded);
  auto h = __builtin_convertvector(u >> 16, Vec<uint16_t, N>);
  __builtin_memcpy(p, &h, sizeof(h));
}

template <class A, int N>
SG_INLINE Vec<A, N> splat(A a) {
  return Vec<A, N>{} + a;
}

template <class A, int N>
SG_INLINE double sum_lanes(Vec<A, N> v) {
  double s = 0;
  for (int i = 0; i < N; ++i) s += v[i];
  return s;
}

// e^x: x = n ln 2 + r with |r| <= ln(2)/2; 2^n goes into the exponent, e^r is a polynomial fitted to 2e-9. Saturates at
// e^+-87.3, where SiLU is flat or linear to the last bit; NaN stays NaN.
template <int N>
SG_INLINE Vec<float, N> exp_of(Vec<float, N> x) {
  using V = Vec<float, N>;
  using I = Vec<int32_t, N>;
  const V top = splat<float, N>(87.3f);
  x = x > top ? top : x;
  x = x < -top ? -top : x;
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
