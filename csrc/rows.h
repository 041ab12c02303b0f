// Rows of images in cache: normalise + SiLU, depthwise 3x3, statistics. Included once per instruction set (see simd.h).
//
// A row buffer holds one input row of a tile as floats: pixels of `pitch` floats each, of which the first row_channels(C) are
// used and those beyond C are zero. Its first pixel is the one left of the tile's first output, so that outputs have their
// neighbours at fixed places; pixels and rows outside the image are zeros, which the caller writes.

// Channels of a row buffer and of a panel row made of it: whole vectors, and whole depths of a product.
template <class P>
constexpr int64_t row_channels(int64_t C) {
  constexpr int64_t step = kDepth<P> > kLanes ? kDepth<P> : kLanes;
  return (C + step - 1) / step * step;
}
// Elements between pixels of `n` elements of `size` bytes: not a multiple of 1 KB, so that a column of pixels does not fall
// into a few sets of the first cache. Used for row buffers and panels.
constexpr int64_t spaced(int64_t n, int64_t size) { return n * size % 1024 ? n : n + 64 / size; }

// ---- normalise + SiLU -------------------------------------------------------------------------------------------------

// The sigmoid as accurate as a T needs before it is summed up and rounded. e^-z = 2^n 2^r with |r| <= 1/2: n goes into the exponent,
// 2^r is a polynomial, fitted to 7.5e-8 (float) and to 7.5e-5 (bf16, whose own rounding is 2e-3). Beyond |z| = 87 SiLU is flat
// or linear to the last bit; NaN stays NaN.
template <class T, int N>
SG_INLINE Vec<float, N> row_sigmoid(Vec<float, N> z) {
  using V = Vec<float, N>;
  using I = Vec<int32_t, N>;
  constexpr float per_log2 = -1.44269504f, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  V m;
#if SG_AVX512
  if constexpr (N == 16) m = (V)_mm512_range_ps((__m512)z, _mm512_set1_ps(87.0f), 2);  // the smaller magnitude, z's sign
  else
#endif
    m = within<N>(z, 87.0f);
  const V t = m * per_log2 + magic, r = m * per_log2 - (t - magic);
  V p;
  if constexpr (sizeof(T) == 4) {
    p = r * 0.0013276414f + 0.009675599f;
    p = p * r + 0.05550714f;
    p = p * r + 0.24022119f;
    p = p * r + 0.69314694f;
    p = p * r + 1.0000001f;
  } else {
    p = r * 0.055171333f + 0.2426135f;
    p = p * r + 0.6932612f;
    p = p * r + 0.99992794f;
  }
  const V d = (V)((I)p + ((I)t << 23)) + 1.0f;
#if SG_AVX512
  if constexpr (N == 16 && sizeof(T) == 2) return (V)_mm512_rcp14_ps((__m512)d);
#endif
  return reciprocal<float, N>(d);
}
template <class T, int N>
SG_INLINE Vec<float, N> row_silu(Vec<float, N> z) {
  return z * row_sigmoid<T, N>(z);
}

// out[p * pitch + c] = SiLU((x[p * C + c] - mean[c]) * scale[c] + bias[c]), with scale = rstd * weight.
template <class T>
void normalise_pixels(const T* x, int64_t pixels, int64_t C, const float* mean, const float* scale, const float* bias,
                      float* out, int64_t pitch) {
  for (int64_t p = 0; p < pixels; ++p, x += C, out += pitch) {
    SG_OVER_LANES(T, C, {
      const auto z = (load<N>(x + c) - load<N>(mean + c)) * load<N>(scale + c) + load<N>(bias + c);
      store<N>(out + c, row_silu<T, N>(z));
    })
  }
}

// out[p * pitch + c] = x[p * C + c].
template <class T>
void copy_pixels(const T* x, int64_t pixels, int64_t C, float* out, int64_t pitch) {
  for (int64_t p = 0; p < pixels; ++p, x += C, out += pitch) {
    SG_OVER_LANES(T, C, { store<N>(out + c, load<N>(x + c)); })
  }
}

// mean, scale and bias [C] of a sample for normalise_pixels, from the group's mean and rstd and the channel's weight and bias.
SG_INLINE void norm_of_sample(int64_t C, int64_t groups, const float* mean, const float* rstd, const float* weight,
                              const float* bias, float* out_mean, float* out_scale, float* out_bias) {
  const int64_t per_group = C / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
      out_mean[c] = mean[g];
      out_scale[c] = rstd[g] * weight[c];
      out_bias[c] = bias[c];
    }
}

// Two vectors that lie one after the other.
template <int N>
SG_INLINE void store_pair(float* p, Vec<float, N> a, Vec<float, N> b) {
  store<N>(p, a), store<N>(p + N, b);
}
template <int N>
SG_INLINE void store_pair(bf16* p, Vec<float, N> a, Vec<float, N> b) {
#if SG_BF16
  if constexpr (N == 16) {  // half the instructions of two single ones
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    return;
  }
#endif
  store<N>(p, a), store<N>(p + N, b);
}

// ---- depthwise 3x3 ----------------------------------------------------------------------------------------------------

// Vectors of channels that are worked on together: their taps and sums fit the registers.
#if VECTOR_BYTES == 64
constexpr int kTogether = 2;
#else
constexpr int kTogether = 1;
#endif

// weight[c * 9 + t] -> out[t * n + c] with n = row_channels(C), zeros beyond C.
SG_INLINE void spread_taps(const float* weight, int64_t C, int64_t n, float* out) {
  for (int t = 0; t < 9; ++t)
    for (int64_t c = 0; c < n; ++c) out[t * n + c] = c < C ? weight[c * 9 + t] : 0.0f;
}

template <int V, int stride, class P, class S>
SG_INLINE void depthwise_channels(const S* const* rows, int64_t pitch, const float* taps, int64_t n, const float* bias,
                                  int64_t pixels, P* out, int64_t lda) {
  using F = Vec<float, kLanes>;
  F w[9][V], left[V], middle[V];  // sums that begin with the left and with the middle column
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[t][v] = load<kLanes>(taps + t * n + v * kLanes);
  const S *r0 = rows[0], *r1 = rows[1], *r2 = rows[2];
  const auto add = [&](F sum, int v, int column, F a0, F a1, F a2) __attribute__((always_inline)) {
    sum = sum + a0 * w[column][v];
    sum = sum + a1 * w[3 + column][v];
    return sum + a2 * w[6 + column][v];
  };
  const auto start = [&](int v) __attribute__((always_inline)) {
    return bias ? load<kLanes>(bias + v * kLanes) : F{};
  };
#define SG_COLUMN(v)                                                                              \
  const F a0 = load<kLanes>(r0 + v * kLanes), a1 = load<kLanes>(r1 + v * kLanes), a2 = load<kLanes>(r2 + v * kLanes);
#define SG_NEXT() r0 += pitch, r1 += pitch, r2 += pitch;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    SG_COLUMN(v)
    left[v] = add(start(v), v, 0, a0, a1, a2);
  }
  SG_NEXT()
  if constexpr (stride == 1) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      SG_COLUMN(v)
      middle[v] = add(left[v], v, 1, a0, a1, a2);
      left[v] = add(start(v), v, 0, a0, a1, a2);
    }
    SG_NEXT()
    for (int64_t p = 0; p < pixels; ++p, out += lda) {
      F right[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        SG_COLUMN(v)
        right[v] = add(middle[v], v, 2, a0, a1, a2);
        middle[v] = add(left[v], v, 1, a0, a1, a2);
        left[v] = add(start(v), v, 0, a0, a1, a2);
      }
      if constexpr (V == 2) store_pair<kLanes>(out, right[0], right[1]);
      else to_panel(right[0], out);
      SG_NEXT()
    }
  } else {
    for (int64_t p = 0; p < pixels; ++p, out += lda) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        SG_COLUMN(v)
        middle[v] = add(left[v], v, 1, a0, a1, a2);
      }
      SG_NEXT()
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        SG_COLUMN(v)
        to_panel(add(middle[v], v, 2, a0, a1, a2), out + v * kLanes);
        left[v] = add(start(v), v, 0, a0, a1, a2);
      }
      SG_NEXT()
    }
  }
#undef SG_COLUMN
#undef SG_NEXT
}

// out[p * lda + c] = bias[c] + sum over r, t of taps[(3 r + t) * n + c] * rows[r][(p * stride + t) * pitch + c], for
// p < pixels and c < n = row_channels(C). bias: n floats, or null. Every vector of a row is loaded once (stride 1). S: float, or
// bf16 for rows of an image that is read as it is.
template <int stride, class P, class S = float>
__attribute__((noinline)) void depthwise_row(const S* const* rows, int64_t pitch, const float* taps, int64_t n, const float* bias, int64_t pixels,
                   P* out, int64_t lda) {
  int64_t c = 0;
  for (; c + kTogether * kLanes <= n; c += kTogether * kLanes) {
    const S* const at[3] = {rows[0] + c, rows[1] + c, rows[2] + c};
    depthwise_channels<kTogether, stride, P, S>(at, pitch, taps + c, n, bias ? bias + c : nullptr, pixels, out + c, lda);
  }
  for (; c < n; c += kLanes) {
    const S* const at[3] = {rows[0] + c, rows[1] + c, rows[2] + c};
    depthwise_channels<1, stride, P, S>(at, pitch, taps + c, n, bias ? bias + c : nullptr, pixels, out + c, lda);
  }
}

// Of a nearest-2x upsampled image, an output sees two rows and two columns: taps on the same input are added beforehand.
// weight[c * 9 + t] -> out[((2 i + r) * 4 + 2 j + t) * n + c]: of outputs in even (i = 0) and odd rows, even (j = 0) and odd
// columns, the tap on row r and column t of the two.
SG_INLINE void fold_taps(const float* weight, int64_t C, int64_t n, float* out) {
  for (int i = 0; i < 2; ++i)
    for (int r = 0; r < 2; ++r)
      for (int j = 0; j < 2; ++j)
        for (int t = 0; t < 2; ++t)
          for (int64_t c = 0; c < n; ++c) {
            // Even: taps {0} and {1, 2}. Odd: {0, 1} and {2}.
            const int r0 = r == 0 ? 0 : 1 + i, r1 = r == 0 ? i : 2, t0 = t == 0 ? 0 : 1 + j, t1 = t == 0 ? j : 2;
            float sum = 0;
            if (c < C)
              for (int a = r0; a <= r1; ++a)
                for (int b = t0; b <= t1; ++b) sum += weight[c * 9 + 3 * a + b];
            out[((2 * i + r) * 4 + 2 * j + t) * n + c] = sum;
          }
}

// One row of outputs of the upsampled image. rows: the two input rows, from the pixel left of the first output's; taps: those
// of fold_taps for the parity of the row (8 * n floats). `outputs` is 2 (even and odd columns in turn, `pixels` even, the
// first output even) or 1 (even columns alone: stride 2).
template <int outputs, class P>
void depthwise_upsampled_row(const float* const* rows, int64_t pitch, const float* taps, int64_t n, const float* bias,
                             int64_t pixels, P* out, int64_t lda) {
  using F = Vec<float, kLanes>;
  for (int64_t c = 0; c < n; c += kLanes) {
    F w[8];
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t) w[t] = load<kLanes>(taps + t * n + c);
    const F start = bias ? load<kLanes>(bias + c) : F{};
    const float *r0 = rows[0] + c, *r1 = rows[1] + c;
    F a0 = load<kLanes>(r0), a1 = load<kLanes>(r1), b0 = load<kLanes>(r0 + pitch), b1 = load<kLanes>(r1 + pitch);
    P* to = out + c;
    for (int64_t p = 0; p < pixels; p += outputs) {
      F even = start + a0 * w[0];
      even = even + a1 * w[4];
      even = even + b0 * w[1];
      even = even + b1 * w[5];
      to_panel(even, to);
      to += lda;
      a0 = b0, a1 = b1;
      if (outputs == 1 && p + 1 >= pixels) break;  // there is no further pixel to read
      r0 += pitch, r1 += pitch;
      b0 = load<kLanes>(r0 + pitch), b1 = load<kLanes>(r1 + pitch);
      if constexpr (outputs == 2) {
        F odd = start + a0 * w[2];
        odd = odd + a1 * w[6];
        odd = odd + b0 * w[3];
        odd = odd + b1 * w[7];
        to_panel(odd, to);
        to += lda;
      }
    }
  }
}

// ---- statistics -------------------------------------------------------------------------------------------------------

// v as a T holds it.
template <class T, int N>
SG_INLINE Vec<float, N> rounded(Vec<float, N> v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
#if SG_BF16
    if constexpr (N == 16)
      return (Vec<float, N>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)), 16);
#endif
    T narrow[N];
    store<N>(narrow, v);
    return load<N>(narrow);
  }
}

// Statistics of channels while their values pass by: sums of deviations from `center`, which is near the values, and of
// their squares. No E[x^2] - E[x]^2: the centre is the mean of a few of the values themselves.
struct ChannelSums {
  float *center, *sum, *square;  // [channels]
};

// moments[2 g], moments[2 g + 1] = mean and sum of squared deviations of group g, over `pixels` values of each channel.
SG_INLINE void group_moments(const ChannelSums& s, int64_t pixels, int64_t C, int64_t groups, double* moments) {
  const int64_t per_group = C / groups;
  const double n = double(pixels), each = 1.0 / n;
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0, squares = 0;
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) mean += double(s.center[c]) + double(s.sum[c]) * each;
    mean /= double(per_group);
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
      const double off = double(s.sum[c]) * each, delta = double(s.center[c]) + off - mean;
      squares += double(s.square[c]) - n * off * off + n * delta * delta;
    }
    moments[2 * g] = mean;
    moments[2 * g + 1] = squares;
  }
}
