// Matrix products of cache-resident operands, on which every op with a product rests. Included once per instruction set.
//
// A is a row-major panel, B is packed in blocks of kColumns columns, C is fp32 and row-major. Where the set multiplies bf16
// pairs (SG_BF16), panels of bf16 tensors are bf16; elsewhere they are float. Sums over K run in an order that depends on K
// alone, so that results do not depend on how rows or columns are shared among threads.

template <class T>
struct PanelOf {
  using type = float;
};
#if SG_BF16
template <>
struct PanelOf<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Panel = typename PanelOf<T>::type;

constexpr int kLanes = VECTOR_BYTES / 4;
constexpr int64_t kColumns = 2 * kLanes;
// Rows of a tile: as many as leave room for two vectors of B and one of A.
#if VECTOR_BYTES == 64
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif

template <class P>
struct DepthOf {
  static constexpr int64_t value = 1;
};
#if SG_BF16
template <>
struct DepthOf<bf16> {
#if SG_AMX
  static constexpr int64_t value = 32;
#else
  static constexpr int64_t value = 2;
#endif
};
#endif
// K is padded with zeros to a multiple of this.
template <class P>
constexpr int64_t kDepth = DepthOf<P>::value;

template <class P>
constexpr int64_t padded(int64_t K) {
  return (K + kDepth<P> - 1) / kDepth<P> * kDepth<P>;
}
constexpr int64_t blocks_of(int64_t N) { return (N + kColumns - 1) / kColumns; }
// Distance between packed blocks, and size of a packed B, both in elements of P.
template <class P>
constexpr int64_t block_stride(int64_t K) {
  return kColumns * padded<P>(K);
}
template <class P>
constexpr int64_t packed_elements(int64_t K, int64_t N) {
  return blocks_of(N) * block_stride<P>(K);
}

// ---- packing ----------------------------------------------------------------------------------------------------------

// An element as the upper half of nothing: bf16 bits in an integer.
SG_INLINE uint32_t bits_of(bf16 value) { return value.bits; }
SG_INLINE uint32_t bits_of(float value) {
  uint32_t u;
  __builtin_memcpy(&u, &value, 4);
  if (value != value) return 0x7fc0;
  return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
SG_INLINE float wide(float value) { return value; }
SG_INLINE float wide(bf16 value) {
  const uint32_t u = uint32_t(value.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
// kLanes elements as bf16 bits in 32-bit lanes.
SG_INLINE Vec<uint32_t, kLanes> bits_of_lanes(const bf16* p) { return (Vec<uint32_t, kLanes>)load<kLanes>(p) >> 16; }
SG_INLINE Vec<uint32_t, kLanes> bits_of_lanes(const float* p) {
  const auto v = load<kLanes>(p);
  const auto u = (Vec<uint32_t, kLanes>)v;
  return ((u + 0x7fffu + ((u >> 16) & 1u)) | (Vec<uint32_t, kLanes>)(v != v)) >> 16;
}

// One 32-bit unit of a panel: a float, or the bf16 pair of elements k and k + 1 (the second zero beyond K).
template <class P, class S>
SG_INLINE uint32_t unit_at(const S* src, int64_t sk, int64_t k, int64_t K) {
  if constexpr (sizeof(P) == 4) {
    const float f = wide(src[k * sk]);
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    return u;
  } else {
    return bits_of(src[k * sk]) | (k + 1 < K ? bits_of(src[(k + 1) * sk]) << 16 : 0u);
  }
}

// One stage of a transpose in registers: swaps the halves of blocks of 2 kHalf. A template, so that the indices are
// constants.
template <int kHalf>
SG_INLINE void transpose_stage(Vec<uint32_t, kLanes> (&v)[kLanes]) {
  using U = Vec<uint32_t, kLanes>;
  U low{}, high{};  // indices into the pair (a, b)
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = uint32_t(i & kHalf ? kLanes + i - kHalf : i);
    high[i] = uint32_t(i & kHalf ? kLanes + i : i + kHalf);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const U a = v[i], b = v[i + kHalf];
#if defined(__clang__)
    U x, y;
    for (int j = 0; j < kLanes; ++j) {
      x[j] = low[j] < uint32_t(kLanes) ? a[low[j]] : b[low[j] - kLanes];
      y[j] = high[j] < uint32_t(kLanes) ? a[high[j]] : b[high[j] - kLanes];
    }
    v[i] = x, v[i + kHalf] = y;
#else
    v[i] = __builtin_shuffle(a, b, low), v[i + kHalf] = __builtin_shuffle(a, b, high);
#endif
  }
  if constexpr (2 * kHalf < kLanes) transpose_stage<2 * kHalf>(v);
}

// kLanes x kLanes units, transposed in registers.
SG_INLINE void transpose_units(const uint32_t* src, int64_t ss, uint32_t* out, int64_t so) {
  using U = Vec<uint32_t, kLanes>;
  U v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(&v[i], src + i * ss, sizeof(U));
  transpose_stage<1>(v);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) __builtin_memcpy(out + i * so, &v[i], sizeof(U));
}

// B[k][n] = src[k * sk + n * sn] -> blocks of kColumns columns, zero padded.
template <class P, class S>
void pack_b(const S* src, int64_t sk, int64_t sn, int64_t K, int64_t N, P* out) {
  constexpr int64_t step = 4 / sizeof(P);  // elements of K in a unit
  const int64_t units = padded<P>(K) / step, filled = (K + step - 1) / step;
  for (int64_t n0 = 0; n0 < N; n0 += kColumns, out += block_stride<P>(K)) {
    const int64_t columns = N - n0 < kColumns ? N - n0 : kColumns;
    uint32_t* block = reinterpret_cast<uint32_t*>(out);
    const S* from = src + n0 * sn;
    if (columns < kColumns || filled < units) __builtin_memset(block, 0, size_t(units * kColumns * 4));
    int64_t k = 0;  // in units
    if (sn == 1 && columns == kColumns) {
      for (; (k + 1) * step <= K; ++k)
        for (int64_t c = 0; c < kColumns; c += kLanes) {
          const S* p = from + k * step * sk + c;
          if constexpr (sizeof(P) == 4) {
            store<kLanes>(reinterpret_cast<float*>(block + k * kColumns + c), load<kLanes>(p));
          } else {
            const auto pair = bits_of_lanes(p) | (bits_of_lanes(p + sk) << 16);
            __builtin_memcpy(block + k * kColumns + c, &pair, sizeof(pair));
          }
        }
    } else if (sk == 1 && sizeof(S) == sizeof(P)) {  // the units are there already: transpose them
      const int64_t whole = K / step / kLanes * kLanes, wide_columns = columns / kLanes * kLanes;
      for (int64_t c = 0; c < wide_columns; c += kLanes)
        for (int64_t u = 0; u < whole; u += kLanes) {
          uint32_t square[kLanes * kLanes];
          for (int64_t i = 0; i < kLanes; ++i)
            __builtin_memcpy(square + i * kLanes, from + (c + i) * sn + u * step, kLanes * 4);
          transpose_units(square, kLanes, block + u * kColumns + c, kColumns);
        }
      for (int64_t c = wide_columns; c < columns; ++c)
        for (int64_t u = 0; u < whole; ++u) block[u * kColumns + c] = unit_at<P>(from + c * sn, sk, u * step, K);
      k = whole;
    }
    for (; k < filled; ++k)
      for (int64_t c = 0; c < columns; ++c) block[k * kColumns + c] = unit_at<P>(from + c * sn, sk, k * step, K);
  }
}

// kLanes elements of a row into a panel.
SG_INLINE void to_panel(Vec<float, kLanes> v, float* out) { store<kLanes>(out, v); }
SG_INLINE void to_panel(Vec<float, kLanes> v, bf16* out) { store<kLanes>(out, v); }
SG_INLINE void to_panel(float v, float* out) { *out = v; }
SG_INLINE void to_panel(float v, bf16* out) { out->bits = uint16_t(bits_of(v)); }

// A[m][k] = src[m * sm + k * sk] -> rows of lda >= padded<P>(K) elements, zeros behind K.
template <class P, class S>
void pack_a(const S* src, int64_t sm, int64_t sk, int64_t M, int64_t K, P* out, int64_t lda) {
  constexpr int64_t step = 4 / sizeof(P);
  const int64_t whole_k = K / step / kLanes * kLanes;  // in units
  int64_t m = 0;
  if (sm == 1 && lda * int64_t(sizeof(P)) % 4 == 0) {
    m = M / kLanes * kLanes;
    // Rows of the source from end to end: a column of squares would meet a new line of memory in every row.
    for (int64_t u = 0; u < whole_k; u += kLanes)
      for (int64_t i = 0; i < m; i += kLanes) {
        uint32_t square[kLanes * kLanes];
        for (int64_t j = 0; j < kLanes; ++j) {
          const S* p = src + i + (u + j) * step * sk;
          if constexpr (sizeof(P) == 4) {
            store<kLanes>(reinterpret_cast<float*>(square + j * kLanes), load<kLanes>(p));
          } else {
            const auto pair = bits_of_lanes(p) | (bits_of_lanes(p + sk) << 16);
            __builtin_memcpy(square + j * kLanes, &pair, sizeof(pair));
          }
        }
        transpose_units(square, kLanes, reinterpret_cast<uint32_t*>(out + i * lda) + u, lda / step);
      }
    for (int64_t i = 0; i < m; ++i)
      for (int64_t k = whole_k * step; k < K; ++k) to_panel(wide(src[i * sm + k * sk]), out + i * lda + k);
  }
  for (; m < M; ++m) {
    const S* from = src + m * sm;
    P* row = out + m * lda;
    int64_t k = 0;
    if (sk == 1 && sizeof(S) == sizeof(P)) __builtin_memcpy(row, from, size_t(K) * sizeof(P)), k = K;
    if (sk == 1)
      for (; k + kLanes <= K; k += kLanes) to_panel(load<kLanes>(from + k), row + k);
    for (; k < K; ++k) to_panel(wide(from[k * sk]), row + k);
  }
  if (padded<P>(K) > K)
    for (m = 0; m < M; ++m) __builtin_memset(out + m * lda + K, 0, size_t(padded<P>(K) - K) * sizeof(P));
}

// ---- products ---------------------------------------------------------------------------------------------------------

// A slice of K of a block of B, in bytes of a column: it stays in the first cache while tiles of A pass by.
constexpr int64_t kTileSlice = 1024;

// C[MR, kColumns] by outer products: two vectors of B meet a broadcast element of every row of A. What C held is added at the
// end: sums of slices err less than one sum of all.
template <int MR>
void float_tile(int64_t K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc, bool accumulate) {
  using V = Vec<float, kLanes>;
  V left[MR], right[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    left[i] = right[i] = V{};
  }
  // Rows are reached from few pointers by multiples of lda, which keeps them all in registers.
  const float *a0 = A, *a1 = A + 5 * lda, *a2 = A + 10 * lda;
  for (int64_t k = 0; k < K; ++k, B += kColumns) {
    const V b0 = load<kLanes>(B), b1 = load<kLanes>(B + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const float* a = i < 5 ? a0 : i < 10 ? a1 : a2;
      const V s = splat<float, kLanes>(a[(i % 5) * lda + k]);
      left[i] += s * b0, right[i] += s * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    if (accumulate) left[i] += load<kLanes>(C + i * ldc), right[i] += load<kLanes>(C + i * ldc + kLanes);
    store<kLanes>(C + i * ldc, left[i]), store<kLanes>(C + i * ldc + kLanes, right[i]);
  }
}

#if SG_BF16 && !SG_AMX
template <int MR>
void pair_tile(int64_t K, const bf16* A, int64_t lda, const bf16* B, float* C, int64_t ldc, bool accumulate) {
  __m512 left[MR], right[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    left[i] = accumulate ? _mm512_loadu_ps(C + i * ldc) : _mm512_setzero_ps();
    right[i] = accumulate ? _mm512_loadu_ps(C + i * ldc + 16) : _mm512_setzero_ps();
  }
  const bf16 *a0 = A, *a1 = A + 5 * lda, *a2 = A + 10 * lda;
  for (int64_t k = 0; k < K; k += 2, B += 2 * kColumns) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(B), b1 = (__m512bh)_mm512_loadu_si512(B + 32);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      int pair;
      __builtin_memcpy(&pair, (i < 5 ? a0 : i < 10 ? a1 : a2) + (i % 5) * lda + k, 4);
      const __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
      left[i] = _mm512_dpbf16_ps(left[i], s, b0), right[i] = _mm512_dpbf16_ps(right[i], s, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) _mm512_storeu_ps(C + i * ldc, left[i]), _mm512_storeu_ps(C + i * ldc + 16, right[i]);
}
#endif

template <int MR, class P>
SG_INLINE void tile(int64_t K, const P* A, int64_t lda, const P* B, float* C, int64_t ldc, bool accumulate) {
  if constexpr (sizeof(P) == 4) float_tile<MR>(K, A, lda, B, C, ldc, accumulate);
#if SG_BF16 && !SG_AMX
  else pair_tile<MR>(K, A, lda, B, C, ldc, accumulate);
#endif
}

template <class P>
using Tile = void (*)(int64_t, const P*, int64_t, const P*, float*, int64_t, bool);

template <class P>
SG_INLINE Tile<P> tile_of(int64_t rows) {
#define SG_TILE(n) \
  case n:          \
    return &tile<n <= kTileRows ? n : 1, P>;
  switch (rows) {
    SG_TILE(2) SG_TILE(3) SG_TILE(4) SG_TILE(5) SG_TILE(6) SG_TILE(7) SG_TILE(8) SG_TILE(9)
    SG_TILE(10) SG_TILE(11) SG_TILE(12) SG_TILE(13) SG_TILE(14)
    default:
      return &tile<1, P>;
  }
#undef SG_TILE
}

template <class P, class Between>
SG_INLINE void gemm_by_tiles(int64_t M, int64_t blocks, int64_t K, const P* A, int64_t lda, const P* B, float* C,
                             int64_t ldc, bool accumulate, const Between& between) {
  constexpr int64_t kSlice = kTileSlice / int64_t(sizeof(P));
  // Tiles of equal height rather than full ones and a rest.
  const int64_t tiles = (M + kTileRows - 1) / kTileRows, depth = padded<P>(K);
  for (int64_t k = 0; k == 0 || k < depth; k += kSlice) {
    const int64_t slice = depth - k < kSlice ? depth - k : kSlice;
    for (int64_t j = 0; j < blocks; ++j)
      for (int64_t t = 0, m = 0; t < tiles; ++t) {
        const int64_t rows = (M - m + tiles - t - 1) / (tiles - t);
        tile_of<P>(rows)(slice, A + m * lda + k, lda, B + j * block_stride<P>(K) + k * kColumns, C + m * ldc + j * kColumns, ldc,
                         accumulate || k > 0);
        between();
        m += rows;
      }
  }
}

#if SG_AMX
// Tiles 0-3 hold C (two by two), 4 and 5 A, 6 and 7 B. `top` and `bottom` are the rows of the upper and lower tiles.
SG_INLINE void configure_tiles(int top, int bottom) {
  alignas(64) uint8_t config[64] = {1};
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64;  // bytes of a row
  config[48 + 0] = config[48 + 1] = config[48 + 4] = uint8_t(top);
  config[48 + 2] = config[48 + 3] = config[48 + 5] = uint8_t(bottom);
  config[48 + 6] = config[48 + 7] = 16;
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler what memory they read
  _tile_loadconfig(config);
}
SG_INLINE void tiles_begin() { configure_tiles(16, 16); }
SG_INLINE void tiles_end() { _tile_release(); }

template <bool lower>
SG_INLINE void amx_tile(int64_t K, const bf16* A, int64_t lda, const bf16* B, float* C, int64_t ldc, bool accumulate) {
  const int64_t bytes = ldc * 4;
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler what memory they read
  if (accumulate) {
    _tile_loadd(0, C, bytes);
    _tile_loadd(1, C + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  if (lower && accumulate) {
    _tile_loadd(2, C + 16 * ldc, bytes);
    _tile_loadd(3, C + 16 * ldc + 16, bytes);
  } else if (lower) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += 32, B += 32 * kColumns) {
    _tile_loadd(6, B, kColumns * 4);
    _tile_loadd(4, A + k, lda * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, B + 32, kColumns * 4);
    _tile_dpbf16ps(1, 4, 7);
    if (lower) {
      _tile_loadd(5, A + 16 * lda + k, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, C, bytes);
  _tile_stored(1, C + 16, bytes);
  if (lower) {
    _tile_stored(2, C + 16 * ldc, bytes);
    _tile_stored(3, C + 16 * ldc + 16, bytes);
  }
}

template <class Between>
inline void gemm_by_amx(int64_t M, int64_t blocks, int64_t K, const bf16* A, int64_t lda, const bf16* B, float* C, int64_t ldc,
                        bool accumulate, const Between& between) {
  // A slice of some rows of A and one of a block of B fill the first cache together.
  constexpr int64_t kSlice = kTileSlice / 2, kGroup = 64;
  const int64_t depth = padded<bf16>(K), full = M / 32 * 32, rest = M - full;
  if (depth == 0 && !accumulate)
    for (int64_t m = 0; m < M; ++m) __builtin_memset(C + m * ldc, 0, size_t(blocks * kColumns) * 4);
  for (int64_t k = 0; k < depth; k += kSlice) {
    const int64_t slice = depth - k < kSlice ? depth - k : kSlice;
    const bool add = accumulate || k > 0;
    const bf16* b = B + k * kColumns;
    for (int64_t group = 0; group < full; group += kGroup)
      for (int64_t j = 0; j < blocks; ++j)
        for (int64_t m = group; m < full && m < group + kGroup; m += 32) {
          amx_tile<true>(slice, A + m * lda + k, lda, b + j * block_stride<bf16>(K), C + m * ldc + j * kColumns, ldc, add);
          between();
        }
    if (rest) {
      configure_tiles(int(rest > 16 ? 16 : rest), int(rest > 16 ? rest - 16 : 1));
      for (int64_t j = 0; j < blocks; ++j) {
        const bf16* block = b + j * block_stride<bf16>(K);
        const bf16* a = A + full * lda + k;
        float* c = C + full * ldc + j * kColumns;
        if (rest > 16) amx_tile<true>(slice, a, lda, block, c, ldc, add);
        else amx_tile<false>(slice, a, lda, block, c, ldc, add);
        between();
      }
      tiles_begin();
    }
  }
}
#else
// gemm() on the AMX set works between these two; elsewhere they do nothing.
SG_INLINE void tiles_begin() {}
SG_INLINE void tiles_end() {}
#endif

// C[M, blocks * kColumns] = (accumulate ? C : 0) + A[M, K] B, B at its first block. A has zeros from K to padded<P>(K).
// `between` is called gemm_steps(M, blocks, K) times, spread evenly over the work.
struct Nothing {
  void operator()() const {}
};
template <class P, class Between = Nothing>
inline void gemm(int64_t M, int64_t blocks, int64_t K, const P* A, int64_t lda, const P* B, float* C, int64_t ldc,
                 bool accumulate, const Between& between = {}) {
#if SG_AMX
  if constexpr (sizeof(P) == 2) return gemm_by_amx(M, blocks, K, A, lda, B, C, ldc, accumulate, between);
  else
#endif
    gemm_by_tiles<P>(M, blocks, K, A, lda, B, C, ldc, accumulate, between);
}
template <class P>
constexpr int64_t gemm_steps(int64_t M, int64_t blocks, int64_t K) {
#if SG_AMX
  constexpr int64_t rows = sizeof(P) == 2 ? 32 : kTileRows;
#else
  constexpr int64_t rows = kTileRows;
#endif
  constexpr int64_t slice = kTileSlice / int64_t(sizeof(P));
  const int64_t slices = (padded<P>(K) + slice - 1) / slice;
  return (M + rows - 1) / rows * blocks * (slices > 1 ? slices : 1);
}
