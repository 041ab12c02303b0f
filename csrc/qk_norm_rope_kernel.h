// RMSNorm and rotation of one row, forward and backward, and of chunks of rows. Included once per instruction set.
//
// Pairs (2i, 2i + 1) turn together: with a pair as one 64-bit lane, swapping its halves is a rotation by 32 bits.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a pair's first element is the low half of its 64-bit lane");

template <int N>
SG_INLINE Vec<float, N> swap_pairs(Vec<float, N> v, uint64_t signs) {
  const auto u = (Vec<uint64_t, N / 2>)v;
  return (Vec<float, N>)(((u >> 32) | (u << 32)) ^ signs);
}
// rot(v)[2i] = -v[2i + 1], rot(v)[2i + 1] = v[2i]; and its transpose.
template <int N>
SG_INLINE Vec<float, N> turned(Vec<float, N> v) {
  return swap_pairs<N>(v, 0x80000000ull);
}
template <int N>
SG_INLINE Vec<float, N> turned_back(Vec<float, N> v) {
  return swap_pairs<N>(v, 0x8000000000000000ull);
}

// Sum of the lanes, by halves.
template <int N>
SG_INLINE float tree_sum(Vec<float, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<float, N / 2> half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    return tree_sum<N / 2>(half[0] + half[1]);
  }
}

// Runs body(c, lanes) over [0, dim): whole vectors, then pairs; an odd last element alone (never with a rotation).
#define SG_OVER_PAIRS(dim, ...)                      \
  {                                                  \
    int64_t c = 0;                                   \
    for (; c + kRowLanes <= (dim); c += kRowLanes) { \
      constexpr int N = kRowLanes;                   \
      __VA_ARGS__                                    \
    }                                                \
    for (; c + 2 <= (dim); c += 2) {                 \
      constexpr int N = 2;                           \
      __VA_ARGS__                                    \
    }                                                \
    for (; c < (dim); ++c) {                         \
      constexpr int N = 1;                           \
      __VA_ARGS__                                    \
    }                                                \
  }
constexpr int kRowLanes = Accumulate<float>::lanes;

// 1 / sqrt(mean(x^2) + eps)
template <class X>
SG_INLINE float inverse_rms(const X* x, float eps, int64_t dim) {
  Vec<float, kRowLanes> wide{};
  float rest = 0;
  SG_OVER_PAIRS(dim, {
    const auto v = load<N>(x + c);
    if constexpr (N == kRowLanes)
      wide += v * v;
    else
      rest += tree_sum<N>(v * v);
  })
  return 1.0f / __builtin_sqrtf((tree_sum<kRowLanes>(wide) + rest) / float(dim) + eps);
}

// out = rope(norm(x)) * scale; returns the sum of squares of what was stored, before it was rounded.
template <bool kNorm, bool kRope, class X, class O>
SG_INLINE float norm_rope_row(const X* x, O* out, const float* weight, const float* cos, const float* sin, float eps,
                              float scale, int64_t dim) {
  const float r = kNorm ? inverse_rms(x, eps, dim) : 1.0f;
  Vec<float, kRowLanes> squares{};
  float rest = 0;
  SG_OVER_PAIRS(dim, {
    auto n = load<N>(x + c);
    if constexpr (kNorm) n = n * r * load<N>(weight + c);
    if constexpr (kRope && N > 1) n = n * load<N>(cos + c) + turned<N>(n) * load<N>(sin + c);
    n *= scale;
    store<N>(out + c, n);
    if constexpr (N == kRowLanes)
      squares += n * n;
    else
      rest += tree_sum<N>(n * n);
  })
  return tree_sum<kRowLanes>(squares) + rest;
}

template <int N, bool kRope, class G>
SG_INLINE Vec<float, N> unturned(const G* dy, const float* cos, const float* sin) {
  auto g = load<N>(dy);
  if constexpr (kRope && N > 1) g = g * load<N>(cos) + turned_back<N>(g * load<N>(sin));
  return g;
}

// The gradient of x from that of rope(norm(x)), and dweight += its terms. dx and dweight may be null.
template <bool kNorm, bool kRope, class X, class G, class O>
SG_INLINE void norm_rope_row_backward(const X* x, const G* dy, O* dx, float* dweight, const float* weight,
                                      const float* cos, const float* sin, float eps, int64_t dim) {
  const float r = kNorm ? inverse_rms(x, eps, dim) : 1.0f;
  float mean = 0;
  if constexpr (kNorm) {
    Vec<float, kRowLanes> wide{};
    float rest = 0;
    SG_OVER_PAIRS(dim, {
      const auto g = unturned<N, kRope>(dy + c, cos + c, sin + c), xhat = load<N>(x + c) * r;
      if (dweight) store<N>(dweight + c, load<N>(dweight + c) + g * xhat);
      const auto term = g * load<N>(weight + c) * xhat;
      if constexpr (N == kRowLanes)
        wide += term;
      else
        rest += tree_sum<N>(term);
    })
    mean = (tree_sum<kRowLanes>(wide) + rest) / float(dim);
  }
  if (!dx) return;
  SG_OVER_PAIRS(dim, {
    auto g = unturned<N, kRope>(dy + c, cos + c, sin + c);
    if constexpr (kNorm) g = (g * load<N>(weight + c) - load<N>(x + c) * r * mean) * r;
    store<N>(dx + c, g);
  })
}

template <bool kNorm, bool kRope, class T>
void norm_rope_chunk(const NormRope& a, int64_t first, int64_t last, const T* x, T* out) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = kRope ? row / a.heads % a.tokens * a.dim : 0;
    const T* from = x + row * a.dim;
    if (a.dim == 64)
      norm_rope_row<kNorm, kRope>(from, out + row * 64, a.weight, a.cos + at, a.sin + at, a.eps, 1.0f, 64);
    else
      norm_rope_row<kNorm, kRope>(from, out + row * a.dim, a.weight, a.cos + at, a.sin + at, a.eps, 1.0f, a.dim);
  }
}

template <class T>
void norm_rope_forward(const NormRope& a, int64_t begin, int64_t end) {
  const int64_t first = begin * a.chunk, last = end * a.chunk < a.rows ? end * a.chunk : a.rows;
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  if (a.weight)
    a.cos ? norm_rope_chunk<true, true>(a, first, last, x, out) : norm_rope_chunk<true, false>(a, first, last, x, out);
  else
    a.cos ? norm_rope_chunk<false, true>(a, first, last, x, out)
          : norm_rope_chunk<false, false>(a, first, last, x, out);
}

template <bool kNorm, bool kRope, class T>
void norm_rope_chunk_backward(const NormRope& a, int64_t first, int64_t last, float* dweight) {
  const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.out);
  for (int64_t row = first; row < last; ++row) {
    const int64_t token = kRope ? row / a.heads % a.tokens * a.dim : 0, at = row * a.dim;
    const float *cos = a.cos + token, *sin = a.sin + token;
    T* to = dx ? dx + at : nullptr;
    if (a.dim == 64)
      norm_rope_row_backward<kNorm, kRope>(x + at, dy + at, to, dweight, a.weight, cos, sin, a.eps, 64);
    else
      norm_rope_row_backward<kNorm, kRope>(x + at, dy + at, to, dweight, a.weight, cos, sin, a.eps, a.dim);
  }
}

template <class T>
void norm_rope_backward(const NormRope& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * a.chunk, rest = a.rows - first, last = first + (rest < a.chunk ? rest : a.chunk);
    float* dweight = a.partials ? a.partials + chunk * a.dim : nullptr;
    if (dweight)
      for (int64_t c = 0; c < a.dim; ++c) dweight[c] = 0;
    if (a.weight)
      a.cos ? norm_rope_chunk_backward<true, true, T>(a, first, last, dweight)
            : norm_rope_chunk_backward<true, false, T>(a, first, last, dweight);
    else
      a.cos ? norm_rope_chunk_backward<false, true, T>(a, first, last, dweight)
            : norm_rope_chunk_backward<false, false, T>(a, first, last, dweight);
  }
}

template <class T>
constexpr NormRopeTable norm_rope_table() {
  return {norm_rope_forward<T>, norm_rope_backward<T>};
}
