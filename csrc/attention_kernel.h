// Multi-query attention, forward and backward, without the score matrix. Included once per instruction set.
//
// A block of query rows meets the keys block by block; scores live in the first caches only. Where the norms of queries
// and keys bound every score (always, with RMSNorm and weights near one), the exponentials need no running maximum.

template <class T>
struct AttentionSizes {
#if SG_AMX
  static constexpr int64_t rows = sizeof(Panel<T>) == 2 ? 32 : 2 * kTileRows;
#else
  static constexpr int64_t rows = (VECTOR_BYTES == 64 ? 2 : 4) * kTileRows;
#endif
  // Scores, keys and values of a block share the first cache: of 64 to 256 keys, the fastest with AMX.
  static constexpr int64_t keys = 128;
  // The fastest of blocks of 64 to 256 on a side, with AMX.
  static constexpr int64_t backward_rows = 4 * rows;
  static constexpr int64_t backward_keys = 128;
};

// The unit of exponents. For fp32 they are natural ones, s * scale - m, rounded as plain PyTorch rounds them; for bf16
// powers of two, which saves multiplications.
template <class T>
constexpr double kUnit = sizeof(T) == 4 ? 1.0 : 1.4426950408889634;

// A score is the product of a key and of a query times `query`, times `score` in kUnit. Rows that are rounded to bf16
// after a norm or a rotation take the whole scale along; others only its sign, since their elements are exact as they
// are.
struct Factors {
  float query, score;
};
template <class T>
SG_INLINE Factors factors_of(const Attention& a) {
  const double size = a.scale < 0 ? -a.scale : a.scale, sign = a.scale < 0 ? -1 : 1;
  if (sizeof(T) == 2 && (a.q_weight || a.cos)) return {float(a.scale * kUnit<T>), 1.0f};
  return {float(sign), float(size * kUnit<T>)};
}

// 2^x, with an error of 7.5e-5: a fiftieth of bf16's rounding. NaN stays NaN.
SG_INLINE Vec<float, kLanes> exp2_of(Vec<float, kLanes> x) {
#if VECTOR_BYTES == 64
  const auto r = (Vec<float, kLanes>)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 1);  // x - floor(x)
  auto p = r * 0.0780245226f + 0.226067155f;
  p = p * r + 0.69583354f;
  p = p * r + 0.999925219f;
  return (Vec<float, kLanes>)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);  // p 2^floor(x)
#else
  x = x < -126.0f ? splat<float, kLanes>(-126.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const auto t = x + magic, r = x - (t - magic);
  auto p = r * 0.0551716691f + 0.242611122f;
  p = p * r + 0.693260985f;
  p = p * r + 0.999928074f;
  return p * (Vec<float, kLanes>)(((Vec<int32_t, kLanes>)t - 0x4b400000 + 127) << 23);
#endif
}
// e^(x / kUnit)
template <class T>
SG_INLINE Vec<float, kLanes> power(Vec<float, kLanes> x) {
  if constexpr (sizeof(T) == 4)
    return exp_of<kLanes>(x);
  else
    return exp2_of(x);
}

SG_INLINE Vec<float, kLanes> first_lanes(Vec<float, kLanes> v, int64_t count, float other) {
  Vec<int32_t, kLanes> lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < int32_t(count) ? v : splat<float, kLanes>(other);
}

// Two vectors side by side into a panel.
SG_INLINE void store_two(float* out, Vec<float, kLanes> a, Vec<float, kLanes> b) {
  store<kLanes>(out, a), store<kLanes>(out + kLanes, b);
}
// Rows k and k + 1 of kLanes columns of a packed B; `out` is where row k (even) begins. And the rows themselves, into
// panels.
SG_INLINE void store_rows(float* packed, float* row, int64_t stride, Vec<float, kLanes> a, Vec<float, kLanes> b) {
  if (packed) store<kLanes>(packed, a), store<kLanes>(packed + kColumns, b);
  if (row) store<kLanes>(row, a), store<kLanes>(row + stride, b);
}
#if SG_BF16
SG_INLINE void store_two(bf16* out, Vec<float, kLanes> a, Vec<float, kLanes> b) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
SG_INLINE void store_rows(bf16* packed, bf16* row, int64_t stride, Vec<float, kLanes> a, Vec<float, kLanes> b) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  if (packed) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    _mm512_storeu_si512(packed, _mm512_maskz_permutexvar_epi16(0xffffffffu, _mm512_load_si512(order), both));
  }
  if (row) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + stride), _mm512_maskz_extracti64x4_epi64(0xf, both, 1));
  }
}
#endif

// A query or key row, normalised and rotated where asked, times `factor`, as a row of a panel; returns its sum of
// squares.
template <class T>
float operand_row(const T* x, Panel<T>* out, const float* weight, const float* cos, const float* sin, float eps,
                  float factor, int64_t dim) {
#define SG_ROW(kNorm, kRope)                                                          \
  (dim == 64 ? norm_rope_row<kNorm, kRope>(x, out, weight, cos, sin, eps, factor, 64) \
             : norm_rope_row<kNorm, kRope>(x, out, weight, cos, sin, eps, factor, dim))
  if (weight) return cos ? SG_ROW(true, true) : SG_ROW(true, false);
  return cos ? SG_ROW(false, true) : SG_ROW(false, false);
#undef SG_ROW
}
template <class T>
void gradient_row(const T* x, const float* dy, T* dx, float* dweight, const float* weight, const float* cos,
                  const float* sin, float eps, int64_t dim) {
#define SG_ROW(kNorm, kRope) norm_rope_row_backward<kNorm, kRope>(x, dy, dx, dweight, weight, cos, sin, eps, dim)
  if (weight)
    cos ? SG_ROW(true, true) : SG_ROW(true, false);
  else
    cos ? SG_ROW(false, true) : SG_ROW(false, false);
#undef SG_ROW
}

// Carves aligned arrays from scratch; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used;
  template <class A>
  A* take(int64_t count) {
    A* p = reinterpret_cast<A*>(reinterpret_cast<uintptr_t>(base) + uintptr_t(used));
    used += (count * int64_t(sizeof(A)) + 63) / 64 * 64;
    return p;
  }
};

template <class P>
SG_INLINE int64_t by_dim_elements(const Attention& a) {
  return packed_elements<P>(a.dim, a.key_block);
}
template <class P>
SG_INLINE int64_t by_key_elements(const Attention& a) {
  return packed_elements<P>(a.key_block, a.dim);
}
template <class T>
int64_t attention_by_dim(const Attention& a) {
  return a.key_blocks * by_dim_elements<Panel<T>>(a) * int64_t(sizeof(Panel<T>));
}
template <class T>
int64_t attention_by_key(const Attention& a) {
  return a.key_blocks * by_key_elements<Panel<T>>(a) * int64_t(sizeof(Panel<T>));
}

// ---- keys and values as operands --------------------------------------------------------------------------------

template <class T>
struct PrepareScratch {
  Panel<T>* rows;
  T* values;
  Arena arena;
  PrepareScratch(const Attention& a, void* base) : arena{static_cast<char*>(base), 0} {
    rows = arena.template take<Panel<T>>(a.key_block * a.dim);
    values = arena.template take<T>(a.key_block * a.dim);
  }
};

template <class T>
void attention_prepare(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  const PrepareScratch<T> s(a, scratch);
  const int64_t D = a.dim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / a.key_blocks, first = task % a.key_blocks * a.key_block;
    const int64_t left = a.counts[sample] - first, n = left < a.key_block ? left : a.key_block;
    a.squares[task] = 0;
    if (n <= 0) continue;
    const T* k = static_cast<const T*>(a.k) + sample * a.keys * D;
    const T* v = static_cast<const T*>(a.v) + sample * a.keys * D;
    float most = 0;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t key = a.index ? a.index[sample * a.keys + first + j] : first + j;
      const float* cos = a.cos ? a.cos + key * D : nullptr;
      const float* sin = a.cos ? a.sin + key * D : nullptr;
      const float squares = operand_row<T>(k + key * D, s.rows + j * D, a.k_weight, cos, sin, a.eps, 1.0f, D);
      most = squares > most || squares != squares ? squares : most;
      if (a.index) __builtin_memcpy(s.values + j * D, v + key * D, size_t(D) * sizeof(T));
    }
    a.squares[task] = most;
    const T* values = a.index ? s.values : v + first * D;
    const auto at = [&](void* packed, int64_t elements) { return static_cast<P*>(packed) + task * elements; };
    pack_b<P, P>(s.rows, 1, D, D, n, at(a.keys_by_dim, by_dim_elements<P>(a)));
    if (a.values_by_dim) pack_b<P, T>(values, 1, D, D, n, at(a.values_by_dim, by_dim_elements<P>(a)));
    if (a.keys_by_key) pack_b<P, P>(s.rows, D, 1, n, D, at(a.keys_by_key, by_key_elements<P>(a)));
    if (a.values_by_key) pack_b<P, T>(values, D, 1, n, D, at(a.values_by_key, by_key_elements<P>(a)));
  }
}

// ---- forward ----------------------------------------------------------------------------------------------------

// Scores up to this need no maximum: e^30 times thousands of keys times any sane value is far inside fp32.
constexpr float kBoundedScore = 30.0f;

// Scores of a row -> weights (in place too, where a bf16 panel takes the first half of the row); up to a whole number
// of blocks, columns from n on become zero.
enum class Scores { ready, bounded, any };  // exponents as they are; times c; times c less the largest yet

template <class T, Scores kScores>
SG_INLINE void weigh(const float* row, Panel<T>* out, float c, float m, int64_t n, Vec<float, kLanes>& sum) {
  const auto weight = [&](int64_t j) __attribute__((always_inline)) {
    const auto s = load<kLanes>(row + j);
    if constexpr (kScores == Scores::ready)
      return power<T>(s);
    else if constexpr (kScores == Scores::bounded)
      return power<T>(s * c);
    else
      return power<T>(s * c - m);
  };
  int64_t j = 0;
  for (; j + kColumns <= n; j += kColumns) {
    const auto a = weight(j), b = weight(j + kLanes);
    sum += a + b;
    store_two(out + j, a, b);
  }
  if (j < n) {
    const auto a = first_lanes(weight(j), n - j, 0), b = first_lanes(weight(j + kLanes), n - j - kLanes, 0);
    sum += a + b;
    store_two(out + j, a, b);
  }
}

SG_INLINE float largest(const float* row, int64_t n, float most) {
  auto wide = splat<float, kLanes>(most);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const auto s = load<kLanes>(row + j);
    wide = s > wide ? s : wide;  // a NaN is passed over here and shows in its own weight
  }
  if (j < n) {
    const auto s = first_lanes(load<kLanes>(row + j), n - j, most);
    wide = s > wide ? s : wide;
  }
  for (int i = 0; i < kLanes; ++i) most = wide[i] > most ? wide[i] : most;
  return most;
}

template <class T>
struct ForwardScratch {
  static constexpr int64_t rows = AttentionSizes<T>::rows;
  Panel<T>* q;
  float *scores, *o, *sums, *most;
  int64_t lda, ldo;
  Arena arena;
  ForwardScratch(const Attention& a, void* base) : arena{static_cast<char*>(base), 0} {
    lda = padded<Panel<T>>(a.dim), ldo = blocks_of(a.dim) * kColumns;
    q = arena.template take<Panel<T>>(rows * lda);
    scores = arena.template take<float>(rows * a.key_block);
    o = arena.template take<float>(rows * ldo);
    sums = arena.template take<float>(rows * kLanes);
    most = arena.template take<float>(rows);
  }
};

// Query rows [first, first + count) of a sample as a panel; the rest of the block is zero. Returns the largest |q|^2.
template <class T>
float query_panel(const Attention& a, int64_t sample, int64_t first, int64_t count, int64_t rows, Panel<T>* out,
                  int64_t lda) {
  const T* q = static_cast<const T*>(a.q) + (sample * a.tokens * a.heads + first) * a.dim;
  float most = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t token = (first + r) / a.heads * a.dim;
    const float squares = operand_row<T>(q + r * a.dim, out + r * lda, a.q_weight, a.cos ? a.cos + token : nullptr,
                                         a.cos ? a.sin + token : nullptr, a.eps, factors_of<T>(a).query, a.dim);
    most = squares > most || squares != squares ? squares : most;
    if (lda > a.dim) __builtin_memset(out + r * lda + a.dim, 0, size_t(lda - a.dim) * sizeof(Panel<T>));
  }
  if (count < rows) __builtin_memset(out + count * lda, 0, size_t((rows - count) * lda) * sizeof(Panel<T>));
  return most;
}

// True where no score can exceed kBoundedScore, by Cauchy and Schwarz; one hundredth is for the rounding to bf16.
template <class T>
SG_INLINE bool scores_bounded(const Attention& a, int64_t sample, float q_squares) {
  float most = 0;
  for (int64_t b = 0; b < a.key_blocks; ++b) {
    const float squares = a.squares[sample * a.key_blocks + b];
    most = squares > most || squares != squares ? squares : most;
  }
  return __builtin_sqrtf(q_squares) * __builtin_sqrtf(most) * factors_of<T>(a).score * 1.01f <=
         kBoundedScore * float(kUnit<T>);
}

// C[rows, blocks * kColumns] = A[rows, dim] B with a panel of queries or their gradients: as gemm, but on AMX 32 rows
// of up to 64 dimensions stay in four tiles while the keys pass by.
template <class P>
SG_INLINE void scores_of(int64_t rows, int64_t blocks, int64_t dim, const P* A, int64_t lda, const P* B, float* C,
                         int64_t ldc) {
#if SG_AMX
  if constexpr (sizeof(P) == 2)
    if (lda == 64 && rows % 32 == 0) {
      asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler what memory they read
      for (int64_t m = 0; m < rows; m += 32) {
        const P* a = A + m * 64;
        _tile_loadd(2, a, 128);
        _tile_loadd(3, a + 32, 128);
        _tile_loadd(4, a + 16 * 64, 128);
        _tile_loadd(5, a + 16 * 64 + 32, 128);
        for (int64_t j = 0; j < 2 * blocks; ++j) {
          const P* b = B + j / 2 * (64 * kColumns) + j % 2 * 32;
          float* c = C + m * ldc + j * 16;
          _tile_loadd(6, b, kColumns * 4);
          _tile_loadd(7, b + 32 * kColumns, kColumns * 4);
          _tile_zero(0);
          _tile_zero(1);
          _tile_dpbf16ps(0, 2, 6);
          _tile_dpbf16ps(1, 4, 6);
          _tile_dpbf16ps(0, 3, 7);
          _tile_dpbf16ps(1, 5, 7);
          _tile_stored(0, c, ldc * 4);
          _tile_stored(1, c + 16 * ldc, ldc * 4);
        }
      }
      return;
    }
#endif
  gemm<P>(rows, blocks, dim, A, lda, B, C, ldc, false);
}

template <class T, Scores kScores>
SG_INLINE void attend(const Attention& a, const ForwardScratch<T>& s, int64_t sample, int64_t count, float c) {
  using P = Panel<T>;
  constexpr int64_t R = ForwardScratch<T>::rows, kP = sizeof(float) / sizeof(P);
  const int64_t keys = a.counts[sample];
  for (int64_t first = 0; first < keys; first += a.key_block) {
    const int64_t n = keys - first < a.key_block ? keys - first : a.key_block;
    const int64_t at = sample * a.key_blocks + first / a.key_block;
    const P* k = static_cast<const P*>(a.keys_by_dim) + at * by_dim_elements<P>(a);
    const P* v = static_cast<const P*>(a.values_by_key) + at * by_key_elements<P>(a);
    scores_of<P>(R, blocks_of(n), a.dim, s.q, s.lda, k, s.scores, a.key_block);
    for (int64_t r = 0; r < count; ++r) {
      float* row = s.scores + r * a.key_block;
      auto sum = load<kLanes>(s.sums + r * kLanes);
      if constexpr (kScores == Scores::any) {
        const float before = s.most[r], now = largest(row, n, before);
        if (now != before && first > 0) {
          const float shrink = power<T>(splat<float, kLanes>(before) * c - now * c)[0];
          sum *= shrink;
          for (int64_t d = 0; d < s.ldo; d += kLanes)
            store<kLanes>(s.o + r * s.ldo + d, load<kLanes>(s.o + r * s.ldo + d) * shrink);
        }
        s.most[r] = now;
        weigh<T, kScores>(row, reinterpret_cast<P*>(row), c, now * c, n, sum);
      } else {
        weigh<T, kScores>(row, reinterpret_cast<P*>(row), c, 0, n, sum);
      }
      store<kLanes>(s.sums + r * kLanes, sum);
    }
    gemm<P>(R, blocks_of(a.dim), n, reinterpret_cast<const P*>(s.scores), a.key_block * kP, v, s.o, s.ldo, first > 0);
  }
}

template <class T>
void attention_forward(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t R = ForwardScratch<T>::rows;
  const ForwardScratch<T> s(a, scratch);
  const int64_t rows = a.tokens * a.heads, blocks = (rows + R - 1) / R, D = a.dim;
  const float c = factors_of<T>(a).score;
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / blocks, first = task % blocks * R, count = rows - first < R ? rows - first : R;
    T* out = static_cast<T*>(a.out) + (sample * rows + first) * D;
    float* logsumexp = a.logsumexp + sample * rows + first;
    if (a.counts[sample] == 0) {
      __builtin_memset(out, 0, size_t(count * D) * sizeof(T));
      for (int64_t r = 0; r < count; ++r) logsumexp[r] = -__builtin_inff();
      continue;
    }
    const bool bounded = scores_bounded<T>(a, sample, query_panel<T>(a, sample, first, count, R, s.q, s.lda));
    for (int64_t i = 0; i < R * kLanes; ++i) s.sums[i] = 0;
    for (int64_t r = 0; r < R; ++r) s.most[r] = bounded ? 0 : -__builtin_inff();
    if (bounded && sizeof(T) == 2 && c == 1.0f)
      attend<T, Scores::ready>(a, s, sample, count, c);
    else if (bounded)
      attend<T, Scores::bounded>(a, s, sample, count, c);
    else
      attend<T, Scores::any>(a, s, sample, count, c);
    for (int64_t r = 0; r < count; ++r) {
      const float sum = tree_sum<kLanes>(load<kLanes>(s.sums + r * kLanes)), inverse = 1.0f / sum;
      const float* o = s.o + r * s.ldo;
      const float offset = s.most[r] * c;  // rounded as above
      logsumexp[r] = float(double(offset) / kUnit<T> + double(__builtin_logf(sum)));
      int64_t d = 0;
      for (; d + kLanes <= D; d += kLanes) store<kLanes>(out + r * D + d, load<kLanes>(o + d) * inverse);
      for (; d < D; ++d) store<1>(out + r * D + d, load<1>(o + d) * inverse);
    }
  }
  tiles_end();
}

// ---- backward ---------------------------------------------------------------------------------------------------
//
// With p = softmax, delta = sum(do o): dp = do v^T, ds = p (dp - delta), dq = scale ds k, dk = scale ds^T q, dv = p^T
// do. The last two are made transposed, [dim, keys], so that p and ds are the packed operand of their products.

template <class T>
struct BackwardScratch {
  static constexpr int64_t rows = AttentionSizes<T>::backward_rows;
  Panel<T>*q, *dout, *q_by_dim, *dout_by_dim;  // [rows, dim], and transposed
  float *scores, *dp;                          // [rows, key_block]
  Panel<T>*p_packed, *ds_packed, *ds;          // B [rows, key_block] twice; the panel [rows, key_block]
  float *dq, *delta, *logsumexp;               // of these, logsumexp in kUnit
  float* part;                                 // [dim, key_block]
  int64_t lda, ldo;
  Arena arena;
  BackwardScratch(const Attention& a, void* base) : arena{static_cast<char*>(base), 0} {
    using P = Panel<T>;
    lda = padded<P>(a.dim), ldo = blocks_of(a.dim) * kColumns;
    q = arena.template take<P>(rows * lda), dout = arena.template take<P>(rows * lda);
    q_by_dim = arena.template take<P>(a.dim * rows), dout_by_dim = arena.template take<P>(a.dim * rows);
    scores = arena.template take<float>(rows * a.key_block), dp = arena.template take<float>(rows * a.key_block);
    p_packed = arena.template take<P>(packed_elements<P>(rows, a.key_block));
    ds_packed = arena.template take<P>(packed_elements<P>(rows, a.key_block));
    ds = arena.template take<P>(rows * a.key_block);
    dq = arena.template take<float>(rows * ldo);
    logsumexp = arena.template take<float>(rows), delta = arena.template take<float>(rows);
    part = arena.template take<float>(a.dim * a.key_block);
  }
};

// p and ds of a block of scores, in the formats of the products that follow.
template <class T>
SG_INLINE void differentiate(const Attention& a, const BackwardScratch<T>& s, int64_t n, float c) {
  using P = Panel<T>;
  constexpr int64_t R = BackwardScratch<T>::rows, step = 4 / sizeof(P);  // rows in a unit of B
  const bool values = a.value_sums, keys = a.key_sums, queries = a.out || a.q_weight_sums;
  for (int64_t r = 0; r < R; r += 2) {
    const float l0 = s.logsumexp[r], l1 = s.logsumexp[r + 1], d0 = s.delta[r], d1 = s.delta[r + 1];
    const float *s0 = s.scores + r * a.key_block, *s1 = s0 + a.key_block;
    const float *g0 = s.dp + r * a.key_block, *g1 = g0 + a.key_block;
    for (int64_t j = 0; j < n; j += kLanes) {
      auto p0 = power<T>(load<kLanes>(s0 + j) * c - l0), p1 = power<T>(load<kLanes>(s1 + j) * c - l1);
      auto ds0 = p0 * (load<kLanes>(g0 + j) - d0), ds1 = p1 * (load<kLanes>(g1 + j) - d1);
      if (j + kLanes > n) {
        p0 = first_lanes(p0, n - j, 0), p1 = first_lanes(p1, n - j, 0);
        ds0 = first_lanes(ds0, n - j, 0), ds1 = first_lanes(ds1, n - j, 0);
      }
      const int64_t at = j / kColumns * block_stride<P>(R) + (r / step * kColumns + j % kColumns) * step;
      store_rows(values ? s.p_packed + at : nullptr, static_cast<P*>(nullptr), 0, p0, p1);
      store_rows(keys ? s.ds_packed + at : nullptr, queries ? s.ds + r * a.key_block + j : nullptr, a.key_block, ds0,
                 ds1);
    }
    // The depth of ds k is padded: what lies there meets zeros, but must be a number.
    for (int64_t j = (n + kLanes - 1) / kLanes * kLanes; j < blocks_of(n) * kColumns; j += kLanes)
      store_rows(static_cast<P*>(nullptr), s.ds + r * a.key_block + j, a.key_block, Vec<float, kLanes>{},
                 Vec<float, kLanes>{});
  }
}

// C += A B. In fp32 the product is made apart and then added: one sum over a thousand rows would lose a bit to plain
// PyTorch.
template <class T>
SG_INLINE void add_product(int64_t M, int64_t blocks, int64_t K, const Panel<T>* A, const Panel<T>* B, float* part,
                           float* C, int64_t ldc, bool accumulate) {
  if (sizeof(T) == 2 || !accumulate) return gemm<Panel<T>>(M, blocks, K, A, K, B, C, ldc, accumulate);
  const int64_t n = blocks * kColumns;
  gemm<Panel<T>>(M, blocks, K, A, K, B, part, n, false);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t j = 0; j < n; j += kLanes)
      store<kLanes>(C + m * ldc + j, load<kLanes>(C + m * ldc + j) + load<kLanes>(part + m * n + j));
}

template <class T>
void attention_backward(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  constexpr int64_t R = BackwardScratch<T>::rows;
  const BackwardScratch<T> s(a, scratch);
  const int64_t rows = a.tokens * a.heads, D = a.dim, ldk = a.key_blocks * a.key_block;
  const float c = factors_of<T>(a).score;
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / a.chunks, start = task % a.chunks * a.chunk;
    const int64_t stop = start + a.chunk < rows ? start + a.chunk : rows, keys = a.counts[sample];
    float* dweight = a.q_weight_sums ? a.q_weight_sums + task * D : nullptr;
    if (dweight)
      for (int64_t d = 0; d < D; ++d) dweight[d] = 0;
    const T *q = static_cast<const T*>(a.q) + sample * rows * D, *o = static_cast<const T*>(a.o) + sample * rows * D;
    const T* dout = static_cast<const T*>(a.dout) + sample * rows * D;
    T* dq = a.out ? static_cast<T*>(a.out) + sample * rows * D : nullptr;
    if (keys == 0) {
      if (dq) __builtin_memset(dq + start * D, 0, size_t((stop - start) * D) * sizeof(T));
      continue;
    }
    for (int64_t first = start; first < stop; first += R) {
      const int64_t count = stop - first < R ? stop - first : R;
      query_panel<T>(a, sample, first, count, R, s.q, s.lda);
      if (count < R) __builtin_memset(s.dout, 0, size_t(R * s.lda) * sizeof(P));
      pack_a<P, T>(dout + first * D, D, 1, count, D, s.dout, s.lda);
      if (a.key_sums) pack_a<P, P>(s.q, 1, s.lda, D, R, s.q_by_dim, R);
      if (a.value_sums) pack_a<P, P>(s.dout, 1, s.lda, D, R, s.dout_by_dim, R);
      for (int64_t r = 0; r < R; ++r) {
        s.logsumexp[r] = s.delta[r] = 0;
        if (r >= count) continue;
        s.logsumexp[r] = float(a.logsumexp[sample * rows + first + r] * kUnit<T>);
        const T *x = dout + (first + r) * D, *y = o + (first + r) * D;
        Vec<float, kLanes> sum{};
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) sum += load<kLanes>(x + d) * load<kLanes>(y + d);
        float rest = 0;
        for (; d < D; ++d) rest += load<1>(x + d)[0] * load<1>(y + d)[0];
        s.delta[r] = tree_sum<kLanes>(sum) + rest;
      }
      for (int64_t key = 0; key < keys; key += a.key_block) {
        const int64_t n = keys - key < a.key_block ? keys - key : a.key_block, blocks = blocks_of(n);
        const int64_t at = sample * a.key_blocks + key / a.key_block;
        const int64_t by_dim = at * by_dim_elements<P>(a), by_key = at * by_key_elements<P>(a);
        scores_of<P>(R, blocks, D, s.q, s.lda, static_cast<const P*>(a.keys_by_dim) + by_dim, s.scores, a.key_block);
        scores_of<P>(R, blocks, D, s.dout, s.lda, static_cast<const P*>(a.values_by_dim) + by_dim, s.dp, a.key_block);
        differentiate<T>(a, s, n, c);
        if (a.value_sums)
          add_product<T>(D, blocks, R, s.dout_by_dim, s.p_packed, s.part, a.value_sums + task * D * ldk + key, ldk,
                         first > start);
        if (a.key_sums)
          add_product<T>(D, blocks, R, s.q_by_dim, s.ds_packed, s.part, a.key_sums + task * D * ldk + key, ldk,
                         first > start);
        if (dq || dweight)
          gemm<P>(R, blocks_of(D), n, s.ds, a.key_block, static_cast<const P*>(a.keys_by_key) + by_key, s.dq, s.ldo,
                  key > 0);
      }
      if (!dq && !dweight) continue;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = first + r, token = row / a.heads * D;
        float* g = s.dq + r * s.ldo;
        for (int64_t d = 0; d < s.ldo; d += kLanes) store<kLanes>(g + d, load<kLanes>(g + d) * float(a.scale));
        gradient_row<T>(q + row * D, g, dq ? dq + row * D : nullptr, dweight, a.q_weight,
                        a.cos ? a.cos + token : nullptr, a.cos ? a.sin + token : nullptr, a.eps, D);
      }
    }
  }
  tiles_end();
}

template <class T>
struct FinishScratch {
  float *sums, *rows;
  Arena arena;
  FinishScratch(const Attention& a, void* base) : arena{static_cast<char*>(base), 0} {
    sums = arena.template take<float>(a.dim * a.key_block), rows = arena.template take<float>(a.dim * a.key_block);
  }
};

// The chunks' sums of n keys from `key` on, added in their order, as rows.
template <class T>
void add_chunks(const Attention& a, const float* parts, int64_t sample, int64_t key, int64_t n,
                const FinishScratch<T>& s) {
  const int64_t ldk = a.key_blocks * a.key_block, D = a.dim, wide_n = (n + kLanes - 1) / kLanes * kLanes;
  if (!a.chunks) __builtin_memset(s.sums, 0, size_t(D * a.key_block) * sizeof(float));
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    const float* part = parts + (sample * a.chunks + chunk) * D * ldk + key;
    for (int64_t d = 0; d < D; ++d)
      for (int64_t j = 0; j < wide_n; j += kLanes) {
        const auto sum = load<kLanes>(part + d * ldk + j);
        store<kLanes>(s.sums + d * a.key_block + j, chunk ? load<kLanes>(s.sums + d * a.key_block + j) + sum : sum);
      }
  }
  pack_a<float, float>(s.sums, 1, a.key_block, n, D, s.rows, D);
}

template <class T>
void attention_finish(const Attention& a, int64_t begin, int64_t end, void* scratch) {
  const FinishScratch<T> s(a, scratch);
  const int64_t D = a.dim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / a.key_blocks, first = task % a.key_blocks * a.key_block;
    const int64_t left = a.counts[sample] - first, n = left < a.key_block ? left : a.key_block;
    float* dweight = a.k_weight_sums ? a.k_weight_sums + task * D : nullptr;
    if (dweight)
      for (int64_t d = 0; d < D; ++d) dweight[d] = 0;
    if (n <= 0) continue;
    const auto key_of = [&](int64_t j) {
      return sample * a.keys + (a.index ? a.index[sample * a.keys + first + j] : first + j);
    };
    if (a.value_sums && a.dv) {
      add_chunks<T>(a, a.value_sums, sample, first, n, s);
      for (int64_t j = 0; j < n; ++j) {
        T* to = static_cast<T*>(a.dv) + key_of(j) * D;
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) store<kLanes>(to + d, load<kLanes>(s.rows + j * D + d));
        for (; d < D; ++d) store<1>(to + d, load<1>(s.rows + j * D + d));
      }
    }
    if (!a.key_sums) continue;
    add_chunks<T>(a, a.key_sums, sample, first, n, s);
    const float scale =
        a.scale == 0 ? 0.0f : float(a.scale / factors_of<T>(a).query);  // of it the queries had their part
    for (int64_t i = 0; i < n * D; ++i) s.rows[i] *= scale;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t row = key_of(j), token = (row - sample * a.keys) * D;
      gradient_row<T>(static_cast<const T*>(a.k) + row * D, s.rows + j * D,
                      a.dk ? static_cast<T*>(a.dk) + row * D : nullptr, dweight, a.k_weight,
                      a.cos ? a.cos + token : nullptr, a.cos ? a.sin + token : nullptr, a.eps, D);
    }
  }
}

template <class T, template <class> class Scratch>
int64_t attention_scratch(const Attention& a) {
  return Scratch<T>(a, nullptr).arena.used;
}

template <class T>
constexpr AttentionTable attention_table() {
  using S = AttentionSizes<T>;
  return {S::keys,
          S::backward_keys,
          S::rows,
          S::backward_rows,
          attention_by_dim<T>,
          attention_by_key<T>,
          attention_scratch<T, PrepareScratch>,
          attention_scratch<T, ForwardScratch>,
          attention_scratch<T, BackwardScratch>,
          attention_scratch<T, FinishScratch>,
          attention_prepare<T>,
          attention_forward<T>,
          attention_backward<T>,
          attention_finish<T>};
}
