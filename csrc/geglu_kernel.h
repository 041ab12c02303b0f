// value * gelu(gate) in the epilogue of its product, its gradient, and sums of outer products. Included once per
// instruction set.

template <int N>
SG_INLINE Vec<float, N> quotient(Vec<float, N> a, Vec<float, N> b) {
#if SG_AVX512
  if constexpr (N == 16) {  // an estimate and one step of Newton's: division takes four times as long
    const Vec<float, N> r = (Vec<float, N>)_mm512_rcp14_ps((__m512)b);
    return a * (r + r * (1.0f - b * r));
  }
#endif
  return a / b;
}

// The error function by a rational approximation; 1 to the last bit from 4 on. NaN stays NaN.
template <int N>
SG_INLINE Vec<float, N> erf_of(Vec<float, N> x) {
  using V = Vec<float, N>;
  const V t = within<N>(x, 4.0f), s = t * t;
  V p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  V q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  V e = quotient<N>(t * p, q);
  const V one = splat<float, N>(1.0f);
  e = x >= 4.0f ? one : e;
  return x <= -4.0f ? -one : e;
}

// P(g): the normal distribution up to g. gelu(g) = g P(g).
template <int N>
SG_INLINE Vec<float, N> normal_below(Vec<float, N> g) {
  return erf_of<N>(g * 0.707106781f) * 0.5f + 0.5f;
}
// Its density; zero, rather than the smallest that exp_of gives, where it would be lost.
template <int N>
SG_INLINE Vec<float, N> normal_at(Vec<float, N> g) {
  const Vec<float, N> s = g * g * 0.5f, density = exp_of<N>(-s) * 0.398942280f;
  return s > 87.0f ? Vec<float, N>{} : density;
}

constexpr int64_t kPairs = kColumns >= 32 ? 1 : 2;  // pairs of blocks of a C buffer, which the epilogue finds in L1

template <class T>
int64_t geglu_panel_bytes(const Geglu& a) {
  return (a.tile_rows * padded<Panel<T>>(a.channels) * int64_t(sizeof(Panel<T>)) + 63) / 64 * 64;
}
template <class T>
int64_t geglu_scratch(const Geglu& a) {
  return geglu_panel_bytes<T>(a) + a.tile_rows * 2 * kPairs * kColumns * 4;
}

// A store past the caches, of what only the backward reads: fetching its lines first would cost as much as writing them.
template <int N, class T>
SG_INLINE void store_past(T* p, Vec<float, N> v) {
#if SG_AVX512
  if constexpr (N == 16 && sizeof(T) == 4) return _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
  if constexpr (N == 16 && sizeof(T) == 2) {
    alignas(32) bf16 half[16];
    store<N>(half, v);
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(half));
  }
#endif
  store<N>(p, v);
}

template <bool kPast, int N, class T>
SG_INLINE void geglu_lanes(const float* value, const float* gate, const T* bias, T* h, T* y, int64_t features) {
  auto v = load<N>(value), g = load<N>(gate);
  if (bias) v += load<N>(bias), g += load<N>(bias + features);
  if constexpr (kPast) store_past<N>(h, v), store_past<N>(h + features, g);
  else if (h) store<N>(h, v), store<N>(h + features, g);
  store<N>(y, v * (g * normal_below<N>(g)));
}

template <class T>
void geglu_forward(const Geglu& a, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  P* panel = static_cast<P*>(scratch);
  float* c = reinterpret_cast<float*>(static_cast<char*>(scratch) + geglu_panel_bytes<T>(a));
  constexpr int64_t ldc = 2 * kPairs * kColumns;
  const bool in_place = sizeof(P) == sizeof(T) && a.channels % kDepth<P> == 0;
  const int64_t pairs = blocks_of(a.features), F = a.features;
  const T* x = static_cast<const T*>(a.x);
  const bool past = a.h && (uint64_t(a.h) | uint64_t(F) * sizeof(T)) % 64 == 0;
  int64_t there = -1;  // the tile in the panel
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile = task / a.groups, group = task % a.groups, first = tile * a.tile_rows;
    const int64_t rows = a.tokens - first < a.tile_rows ? a.tokens - first : a.tile_rows;
    const P* rows_of_x = panel;
    int64_t lda = padded<P>(a.channels);
    if (in_place) {
      rows_of_x = reinterpret_cast<const P*>(x + first * a.stride), lda = a.stride;
    } else if (tile != there) {
      pack_a<P, T>(x + first * a.stride, a.stride, 1, rows, a.channels, panel, lda), there = tile;
    }
    const int64_t last = (group + 1) * pairs / a.groups;
    for (int64_t j = group * pairs / a.groups; j < last; j += kPairs) {
      const int64_t some = last - j < kPairs ? last - j : kPairs;
      gemm<P>(rows, 2 * some, a.channels, rows_of_x, lda,
              static_cast<const P*>(a.weight) + 2 * j * block_stride<P>(a.channels), c, ldc, false);
      for (int64_t p = 0; p < some; ++p) {
        const int64_t f0 = (j + p) * kColumns, width = F - f0 < kColumns ? F - f0 : kColumns;
        const T* bias = a.bias ? static_cast<const T*>(a.bias) + f0 : nullptr;
        for (int64_t m = 0; m < rows; ++m) {
          const float* value = c + m * ldc + 2 * p * kColumns;
          T* y = static_cast<T*>(a.y) + (first + m) * F + f0;
          T* h = a.h ? static_cast<T*>(a.h) + (first + m) * 2 * F + f0 : nullptr;
          int64_t n = 0;
          if (past)
            for (; n + kLanes <= width; n += kLanes)
              geglu_lanes<true, kLanes, T>(value + n, value + kColumns + n, bias ? bias + n : nullptr, h + n, y + n, F);
          for (; n + kLanes <= width; n += kLanes)
            geglu_lanes<false, kLanes, T>(value + n, value + kColumns + n, bias ? bias + n : nullptr, h ? h + n : nullptr, y + n, F);
          for (; n < width; ++n)
            geglu_lanes<false, 1, T>(value + n, value + kColumns + n, bias ? bias + n : nullptr, h ? h + n : nullptr, y + n, F);
        }
      }
    }
  }
#if SG_AVX512
  _mm_sfence();
#endif
  tiles_end();
}

template <int N, class T>
SG_INLINE void geglu_gradient_lanes(const T* h, const T* dy, T* dh, float* sums, int64_t features) {
  const auto v = load<N>(h), g = load<N>(h + features), d = load<N>(dy);
  const auto below = normal_below<N>(g);
  const auto dv = d * (g * below), dg = d * v * (below + g * normal_at<N>(g));
  store<N>(dh, dv), store<N>(dh + features, dg);
  if (sums) {
    store<N>(sums, load<N>(sums) + dv);
    store<N>(sums + features, load<N>(sums + features) + dg);
  }
}

template <class T>
void geglu_gradient(const GegluGradient& a, int64_t begin, int64_t end) {
  const int64_t F = a.features;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = a.partials ? a.partials + chunk * 2 * F : nullptr;
    if (sums) __builtin_memset(sums, 0, size_t(2 * F) * 4);
    const int64_t first = chunk * a.chunk, last = a.tokens - first < a.chunk ? a.tokens : first + a.chunk;
    for (int64_t t = first; t < last; ++t) {
      const T *h = static_cast<const T*>(a.h) + t * 2 * F, *dy = static_cast<const T*>(a.dy) + t * F;
      T* dh = static_cast<T*>(a.dh) + t * 2 * F;
      int64_t n = 0;
      for (; n + kLanes <= F; n += kLanes)
        geglu_gradient_lanes<kLanes, T>(h + n, dy + n, dh + n, sums ? sums + n : nullptr, F);
      for (; n < F; ++n) geglu_gradient_lanes<1, T>(h + n, dy + n, dh + n, sums ? sums + n : nullptr, F);
    }
  }
}

template <class T>
constexpr GegluTable geglu_table() {
  return {blocks_of, [](int64_t channels, int64_t features) {
            return 2 * packed_elements<Panel<T>>(channels, features);
          },
          geglu_scratch<T>, geglu_forward<T>, geglu_gradient<T>};
}

// ---- sums of outer products -------------------------------------------------------------------------------------------

template <class T>
int64_t outer_packed_bytes(const Outer& o) {
  return (o.rows + o.slice - 1) / o.slice * packed_elements<Panel<T>>(o.slice, o.N) * int64_t(sizeof(Panel<T>));
}
// Elements of a row of the panel. A power of two would send the rows of a transpose to the same few sets of the cache.
template <class T>
int64_t outer_stride(const Outer& o) {
  return padded<Panel<T>>(o.slice) + 32;
}
template <class T>
int64_t outer_panel_bytes(const Outer& o) {
  return o.tile * outer_stride<T>(o) * int64_t(sizeof(Panel<T>));
}
template <class T>
int64_t outer_scratch(const Outer& o) {
  return outer_panel_bytes<T>(o) + o.tile * o.group_columns * 4;
}

template <class T>
void outer_pack(const Outer& o, int64_t begin, int64_t end) {
  using P = Panel<T>;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = s * o.slice, rows = o.rows - first < o.slice ? o.rows - first : o.slice;
    pack_b<P, T>(static_cast<const T*>(o.b) + first * o.stride_b, o.stride_b, 1, rows, o.N,
                 static_cast<P*>(o.packed) + s * packed_elements<P>(o.slice, o.N));
  }
}

template <class T>
void outer_product(const Outer& o, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  P* panel = static_cast<P*>(scratch);
  float* c = reinterpret_cast<float*>(static_cast<char*>(scratch) + outer_panel_bytes<T>(o));
  const int64_t groups = (o.N + o.group_columns - 1) / o.group_columns, lda = outer_stride<T>(o), ldc = o.group_columns;
  constexpr int64_t kSome = 4;  // blocks of a product: they and the panel stay in L2
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t m0 = task / groups * o.tile, n0 = task % groups * o.group_columns;
    const int64_t m_count = o.M - m0 < o.tile ? o.M - m0 : o.tile;
    const int64_t n_count = o.N - n0 < o.group_columns ? o.N - n0 : o.group_columns, blocks = blocks_of(n_count);
    for (int64_t s = 0; s * o.slice < o.rows; ++s) {
      const int64_t first = s * o.slice, rows = o.rows - first < o.slice ? o.rows - first : o.slice;
      const T* a = static_cast<const T*>(o.a) + first * o.stride_a + m0;
      // A few rows at a time: whole columns of a would touch a page for each row, again and again.
      for (int64_t r = 0; r < rows; r += 32)
        pack_a<P, T>(a + r * o.stride_a, 1, o.stride_a, m_count, rows - r < 32 ? rows - r : 32, panel + r, lda);
      const P* b = static_cast<const P*>(o.packed) + s * packed_elements<P>(o.slice, o.N) + n0 / kColumns * block_stride<P>(rows);
      for (int64_t j = 0; j < blocks; j += kSome)
        gemm<P>(m_count, blocks - j < kSome ? blocks - j : kSome, rows, panel, lda, b + j * block_stride<P>(rows),
                c + j * kColumns, ldc, s > 0);
    }
    store_rows<T>(c, ldc, m_count, n_count, static_cast<T*>(o.out) + m0 * o.N + n0, o.N);
  }
  tiles_end();
}

template <class T>
constexpr OuterTable outer_table() {
  return {outer_packed_bytes<T>, outer_scratch<T>, outer_pack<T>, outer_product<T>};
}
