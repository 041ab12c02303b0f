// The sweeps of the tiny decoder's block, and its last layer. Included once per instruction set (see simd.h, gemm.h).
//
// Rings are laid out by blocks of channels, so that every inner loop walks along a row through contiguous memory with the
// nine taps of its channels in registers.

#define SG_MEMBER inline __attribute__((always_inline))

constexpr int64_t lanes_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// Rows of A that gemm takes without a rest: where the rest costs a new tile configuration, tasks round up to it.
template <class P>
constexpr int64_t kGranule = 1;
#if SG_AMX
template <>
constexpr int64_t kGranule<bf16> = 32;
#endif
template <class P>
constexpr int64_t granules(int64_t rows) {
  return (rows + kGranule<P> - 1) / kGranule<P> * kGranule<P>;
}

// Mean and sum of squared deviations of every channel of a task, row by row: two passes over a row, Chan's merge after it.
struct RowMoments {
  float* mean;
  float* square;

  template <int64_t step>
  SG_MEMBER void add(const float* row, int64_t count, Vec<float, kLanes> sum, int64_t c, float before) const {
    using V = Vec<float, kLanes>;
    const V center = sum * (1.0f / float(count));
    V a{}, b{};
    int64_t p = 0;
    for (; p + 2 <= count; p += 2) {
      const V d = load<kLanes>(row + p * step) - center, e = load<kLanes>(row + (p + 1) * step) - center;
      a += d * d, b += e * e;
    }
    if (p < count) {
      const V d = load<kLanes>(row + p * step) - center;
      a += d * d;
    }
    const float share = float(count) / (before + float(count));
    const V old = load<kLanes>(mean + c), delta = center - old;
    store<kLanes>(mean + c, old + delta * share);
    store<kLanes>(square + c, load<kLanes>(square + c) + (a + b) + delta * delta * (before * share));
  }

  void into_groups(int64_t channels, int64_t groups, double count, double* out) const {
    const int64_t per_group = channels / groups;
    for (int64_t g = 0; g < groups; ++g) {
      double center = 0, squares = 0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) center += mean[c];
      center /= double(per_group);
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        const double delta = mean[c] - center;
        squares += square[c] + count * delta * delta;
      }
      out[2 * g] = center, out[2 * g + 1] = squares;
    }
  }
};

// One row of a depthwise 3x3 for kLanes channels: emit(p, value) for p in [0, count); r0, r1, r2 are three rows of
// count + 2 pixels, `step` floats apart; taps and bias `ws` floats apart.
template <int64_t step, class Emit>
SG_INLINE void depthwise_lanes(const float* r0, const float* r1, const float* r2, int64_t count, const float* w, int64_t ws,
                               Emit emit) {
  using V = Vec<float, kLanes>;
  const V w00 = load<kLanes>(w), w01 = load<kLanes>(w + ws), w02 = load<kLanes>(w + 2 * ws);
  const V w10 = load<kLanes>(w + 3 * ws), w11 = load<kLanes>(w + 4 * ws), w12 = load<kLanes>(w + 5 * ws);
  const V w20 = load<kLanes>(w + 6 * ws), w21 = load<kLanes>(w + 7 * ws), w22 = load<kLanes>(w + 8 * ws);
  const V bias = load<kLanes>(w + 9 * ws);
  V a = load<kLanes>(r0), b = load<kLanes>(r1), c = load<kLanes>(r2);
  V here = bias + a * w00 + b * w10 + c * w20;
  a = load<kLanes>(r0 + step), b = load<kLanes>(r1 + step), c = load<kLanes>(r2 + step);
  V next = bias + a * w00 + b * w10 + c * w20;
  here = here + a * w01 + b * w11 + c * w21;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t at = (p + 2) * step;
    a = load<kLanes>(r0 + at), b = load<kLanes>(r1 + at), c = load<kLanes>(r2 + at);
    emit(p, here + a * w02 + b * w12 + c * w22);
    here = next + a * w01 + b * w11 + c * w21;
    next = bias + a * w00 + b * w10 + c * w20;
  }
}

struct Span {
  int64_t sample, band, r0, r1, c0, c1;
};

template <class G>
SG_INLINE Span span_of(const G& g, int64_t task) {
  const int64_t tile = task % g.tiles, band = task / g.tiles % g.bands, sample = task / g.tiles / g.bands;
  const int64_t r0 = band * g.band, c0 = tile * g.tile;
  const int64_t r1 = r0 + g.band < g.height ? r0 + g.band : g.height, c1 = c0 + g.tile < g.width ? c0 + g.tile : g.width;
  return {sample, band, r0, r1, c0, c1};
}

// Where the scratch of a thread is: constructed on null it only counts.
struct Carver {
  char* at;
  template <class A>
  SG_MEMBER A* take(int64_t n) {
    A* found = reinterpret_cast<A*>(at);
    at += (n * int64_t(sizeof(A)) + 63) / 64 * 64;
    return found;
  }
};

template <class T>
struct BlockScratch {
  using P = Panel<T>;
  int64_t x_columns, x_slot, m_columns, m_slot, C, M, lda1, lda2;  // C, M: padded to blocks of columns
  float *x, *ring, *row, *c, *stats;
  P *a1, *a2;
  T* h;
  int64_t bytes;

  BlockScratch(const DecoderBlock& g, void* base) {
    C = blocks_of(g.channels) * kColumns, M = blocks_of(g.middle) * kColumns;
    x_columns = g.tile + 4, x_slot = lanes_of(g.channels) * kLanes * x_columns;
    m_columns = granules<P>(g.tile + 2), m_slot = M * m_columns;
    lda1 = C > padded<P>(g.channels) ? C : padded<P>(g.channels);
    lda2 = M > padded<P>(g.middle) ? M : padded<P>(g.middle);
    Carver carver{static_cast<char*>(base)};
    x = carver.take<float>(3 * x_slot);
    ring = carver.take<float>(3 * m_slot);
    row = carver.take<float>(m_columns * kColumns);
    c = carver.take<float>(m_columns * C);
    stats = carver.take<float>(2 * M + 2 * C);
    a1 = carver.take<P>(m_columns * lda1);
    a2 = carver.take<P>(m_columns * lda2);
    h = g.kept ? carver.take<T>(g.tile * g.middle) : nullptr;
    bytes = carver.at - static_cast<char*>(base);
  }
};

template <class T>
int64_t block_scratch_bytes(const DecoderBlock& g) {
  return BlockScratch<T>(g, nullptr).bytes;
}

// A task's frame: two rows above and two below, then of every row of its own two pixels to the left and two to the right.
SG_INLINE int64_t frame_rows(const DecoderBlock& g) { return 4 * (g.tile + 4) * g.channels; }
inline int64_t frame_elements(const DecoderBlock& g) { return frame_rows(g) + 4 * g.band * g.channels; }

SG_INLINE int64_t kept_before(const DecoderBlock& g, int64_t band) { return band * g.kept / g.bands; }
SG_INLINE bool is_kept(const DecoderBlock& g, int64_t band) { return kept_before(g, band + 1) > kept_before(g, band); }

template <class T>
void block_frames(const DecoderBlock& g, int64_t begin, int64_t end, void*) {
  for (int64_t task = begin; task < end; ++task) {
    const Span s = span_of(g, task);
    if (is_kept(g, s.band)) continue;
    const T* x = static_cast<const T*>(g.x) + s.sample * g.height * g.width * g.channels;
    T* frame = static_cast<T*>(g.frames) + task * frame_elements(g);
    const int64_t first = s.c0 < 2 ? 0 : s.c0 - 2, last = s.c1 + 2 < g.width ? s.c1 + 2 : g.width;
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t r = i < 2 ? s.r0 - 2 + i : s.r1 + i - 2;
      if (r < 0 || r >= g.height) continue;
      __builtin_memcpy(frame + (i * (g.tile + 4) + first - (s.c0 - 2)) * g.channels, x + (r * g.width + first) * g.channels,
                       size_t((last - first) * g.channels) * sizeof(T));
    }
    T* sides = frame + frame_rows(g);
    for (int64_t r = s.r0; r < s.r1; ++r, sides += 4 * g.channels)
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t c = i < 2 ? s.c0 - 2 + i : s.c1 + i - 2;
        if (c < 0 || c >= g.width) continue;
        __builtin_memcpy(sides + i * g.channels, x + (r * g.width + c) * g.channels, size_t(g.channels) * sizeof(T));
      }
  }
}

template <class T, bool last>
struct BlockSweep {
  using P = Panel<T>;
  using V = Vec<float, kLanes>;
  const DecoderBlock& g;
  const BlockScratch<T> s;
  Span at;
  int64_t columns, task;

  SG_MEMBER float* x_row(int64_t r) const { return s.x + (r + 3) % 3 * s.x_slot; }
  SG_MEMBER float* middle_row(int64_t r) const { return s.ring + (r + 3) % 3 * s.m_slot; }

  // `count` pixels into a row of x's ring, from its column `to` on; null: zeros. `below`: the pixels that come next.
  SG_MEMBER void fill(float* row, int64_t to, int64_t count, const T* from, const T* below = nullptr) const {
    const int64_t C = g.channels, step = s.x_columns;
    constexpr int64_t kLine = 64 / int64_t(sizeof(T));
    row += to * kLanes;
    for (int64_t p = 0; p < count; ++p, row += kLanes) {
      int64_t c = 0;
      if (!from) {
        for (; c < C; c += kLanes) store<kLanes>(row + c * step, V{});
        continue;
      }
      for (; c + kLanes <= C; c += kLanes) store<kLanes>(row + c * step, load<kLanes>(from + p * C + c));
      if (c < C) store<kLanes>(row + c * step, load_some(from + p * C + c, C - c));
      if (below)
        for (c = 0; c < C; c += kLine) __builtin_prefetch(below + p * C + c, 0, 2);
    }
  }

  void fetch(int64_t r) const {
    float* row = x_row(r);
    if (r < 0 || r >= g.height) return fill(row, 0, columns + 4, nullptr);
    const int64_t left = at.c0 < 2 ? at.c0 : 2, right = g.width - at.c1 < 2 ? g.width - at.c1 : 2;
    const T* x = static_cast<const T*>(g.x) + ((at.sample * g.height + r) * g.width + at.c0) * g.channels;
    if (left < 2) fill(row, 0, 2 - left, nullptr);
    if (right < 2) fill(row, columns + 2 + right, 2 - right, nullptr);
    const T* below = r + 1 < g.height && r + 1 < at.r1 + 2 ? x + g.width * g.channels : nullptr;
    if (!last || !g.frames)
      return fill(row, 2 - left, columns + left + right, x - left * g.channels, below ? below - left * g.channels : nullptr);
    const T* frame = static_cast<const T*>(g.frames) + task * frame_elements(g);
    if (r < at.r0 || r >= at.r1) {
      const int64_t i = r < at.r0 ? r - at.r0 + 2 : r - at.r1 + 2;
      return fill(row, 2 - left, columns + left + right, frame + (i * (g.tile + 4) + 2 - left) * g.channels);
    }
    const T* sides = frame + frame_rows(g) + (r - at.r0) * 4 * g.channels;
    fill(row, 2 - left, left, sides + (2 - left) * g.channels);
    fill(row, 2, columns, x, below);
    fill(row, columns + 2, right, sides + 2 * g.channels);
  }

  // The panel of DW1's row r.
  SG_MEMBER void first_depthwise(int64_t r) const {
    const float *r0 = x_row(r - 1), *r1 = x_row(r), *r2 = x_row(r + 1);
    const int64_t ws = lanes_of(g.channels) * kLanes;
    for (int64_t c = 0; c < g.channels; c += kLanes) {
      const int64_t offset = c * s.x_columns;
      P* out = s.a1 + c;
      const int64_t lda = s.lda1;
      depthwise_lanes<kLanes>(r0 + offset, r1 + offset, r2 + offset, columns + 2, g.dw1 + c, ws,
                              [=](int64_t p, V v) SG_LAMBDA { to_panel(v, out + p * lda); });
    }
  }

  // A block of columns of PW1's row r into the ring, zero where the image ends.
  SG_MEMBER void first_product(int64_t r, int64_t block) const {
    float* out = middle_row(r) + block * kColumns * s.m_columns;
    if (r < 0 || r >= g.height) {
      __builtin_memset(out, 0, size_t((columns + 2) * kColumns) * 4);
      return;
    }
    gemm<P>(granules<P>(columns + 2), 1, g.channels, s.a1, s.lda1,
            static_cast<const P*>(g.pw1) + block * block_stride<P>(g.channels), out, kColumns, false);
    if (at.c0 == 0) __builtin_memset(out, 0, kColumns * 4);
    if (at.c1 == g.width) __builtin_memset(out + (columns + 1) * kColumns, 0, kColumns * 4);
  }

  // h's row r, a block of columns of it: its statistics and its copy in memory, or the panel of its product.
  SG_MEMBER void second_depthwise(int64_t r, int64_t block) const {
    const int64_t ws = lanes_of(g.middle) * kLanes, offset = block * kColumns * s.m_columns, count = columns;
    for (int64_t k = 0; k < kColumns && block * kColumns + k < g.middle; k += kLanes) {
      const int64_t c = block * kColumns + k;
      float* row = s.row + k;
      V sum{};
      depthwise_lanes<kColumns>(middle_row(r - 1) + offset + k, middle_row(r) + offset + k, middle_row(r + 1) + offset + k,
                                count, g.dw2 + c, ws, [&sum, row](int64_t p, V v) SG_LAMBDA {
                                  store<kLanes>(row + p * kColumns, v);
                                  if (!last) sum += v;
                                });
      if (last) {
        const float* n = g.norm + at.sample * 3 * ws + c;
        const V mean = load<kLanes>(n), scale = load<kLanes>(n + ws), bias = load<kLanes>(n + 2 * ws);
        P* panel = s.a2 + c;
        const int64_t lda = s.lda2;
        for (int64_t p = 0; p < count; ++p)
          to_panel(row_silu<T, kLanes>((load<kLanes>(row + p * kColumns) - mean) * scale + bias), panel + p * lda);
      } else {
        RowMoments{s.stats, s.stats + s.M}.template add<kColumns>(row, count, sum, c, float((r - at.r0) * count));
      }
    }
    if (!last && is_kept(g, at.band)) keep_block(block * kColumns);
  }

  // A block of columns of a row of h, as T. It goes to memory when the row is complete: long runs cost memory less.
  SG_MEMBER void keep_block(int64_t c) const {
    const int64_t some = g.middle - c, M = g.middle, count = columns;
    const float* row = s.row;
    T* h = s.h + c;
    for (int64_t p = 0; p < count; ++p, h += M, row += kColumns) {
      int64_t k = 0;
      for (; k < kColumns && k + kLanes <= some; k += kLanes) store<kLanes>(h + k, load<kLanes>(row + k));
      if (k < kColumns && k < some) store_some(h + k, load<kLanes>(row + k), some - k);
    }
  }

  // Past the cache: nobody reads it before the next sweep.
  SG_MEMBER void keep_row(int64_t r) const {
    const T* from = s.h;
    T* to = h_row(r);
    int64_t bytes = columns * g.middle * int64_t(sizeof(T));
#if SG_AVX512
    const int64_t lines = uintptr_t(to) % 64 == 0 ? bytes / 64 : 0;
    for (int64_t i = 0; i < lines; ++i)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to) + i, _mm512_load_si512(reinterpret_cast<const __m512i*>(from) + i));
    from += lines * 64 / int64_t(sizeof(T)), to += lines * 64 / int64_t(sizeof(T)), bytes -= lines * 64;
#endif
    __builtin_memcpy(to, from, size_t(bytes));
  }

  SG_MEMBER T* h_row(int64_t r) const {
    const int64_t height = g.kept == g.bands ? g.height : g.kept * g.band;
    const int64_t row = at.sample * height + kept_before(g, at.band) * g.band + r - at.r0;
    return static_cast<T*>(g.h) + (row * g.width + at.c0) * g.middle;
  }

  // The panel of a row of h that the first sweep stored.
  SG_MEMBER void stored_row(int64_t r) const {
    const int64_t M = g.middle, ws = lanes_of(M) * kLanes, lda = s.lda2, count = columns;
    const float* n = g.norm + at.sample * 3 * ws;
    const T* h = h_row(r);
    const T* below = h + (r + 1 < at.r1 ? g.width * M : 0);
    P* panel = s.a2;
    constexpr int64_t kLine = 64 / int64_t(sizeof(T));
    const auto normalised = [n, ws](V v, int64_t c) SG_LAMBDA {
      return row_silu<T, kLanes>((v - load<kLanes>(n + c)) * load<kLanes>(n + ws + c) + load<kLanes>(n + 2 * ws + c));
    };
    for (int64_t p = 0; p < count; ++p, h += M, below += M, panel += lda) {
      for (int64_t c = 0; c < M; c += kLine) __builtin_prefetch(below + c, 0, 2);
      int64_t c = 0;
      for (; c + kLanes <= M; c += kLanes) to_panel(normalised(load<kLanes>(h + c), c), panel + c);
      if (c < M) to_panel(normalised(load_some(h + c, M - c), c), panel + c);
    }
  }

  // y's row r from the panel.
  SG_MEMBER void second_product(int64_t r) const {
    const int64_t pixel = (at.sample * g.height + r) * g.width + at.c0;
    const T* x = static_cast<const T*>(g.x) + pixel * g.channels;
    T* out = static_cast<T*>(g.out) + pixel * g.channels;
    gemm<P>(granules<P>(columns), blocks_of(g.channels), g.middle, s.a2, s.lda2, static_cast<const P*>(g.pw2), s.c, s.C, false);
    const int64_t C = g.channels, ldc = s.C, count = columns;
    const float* from = s.c;
    if (!g.out_moments) {
      for (int64_t p = 0; p < count; ++p, from += ldc, x += C, out += C) {
        int64_t c = 0;
        for (; c + kLanes <= C; c += kLanes) store<kLanes>(out + c, load<kLanes>(from + c) + load<kLanes>(x + c));
        if (c < C) store_some(out + c, load<kLanes>(from + c) + load_some(x + c, C - c), C - c);
      }
      return;
    }
    const RowMoments moments{s.stats + 2 * s.M, s.stats + 2 * s.M + s.C};
    float* row = s.row;
    for (int64_t c = 0; c < C; c += kLanes) {
      const int64_t some = C - c;
      V sum{};
      for (int64_t p = 0; p < count; ++p) {
        const V v = load<kLanes>(from + p * ldc + c) + load_some(x + p * C + c, some);
        store_some(out + p * C + c, v, some);
        store<kLanes>(row + p * kLanes, v);
        sum += v;
      }
      moments.add<kLanes>(row, count, sum, c, float((r - at.r0) * count));
    }
  }

  void run(int64_t index) {
    task = index, at = span_of(g, index), columns = at.c1 - at.c0;
    __builtin_memset(s.stats, 0, size_t(2 * s.M + 2 * s.C) * 4);
    if (last && is_kept(g, at.band)) {
      for (int64_t r = at.r0; r < at.r1; ++r) stored_row(r), second_product(r);
    } else {
      fetch(at.r0 - 2), fetch(at.r0 - 1);
      for (int64_t r = at.r0 - 1; r <= at.r1; ++r) {
        fetch(r + 1);
        if (r >= 0 && r < g.height) first_depthwise(r);
        for (int64_t block = 0; block < blocks_of(g.middle); ++block) {
          first_product(r, block);
          if (r > at.r0) second_depthwise(r - 1, block);
        }
        if (last && r > at.r0) second_product(r - 1);
        if (!last && r > at.r0 && is_kept(g, at.band)) keep_row(r - 1);
      }
    }
    const double count = double(at.r1 - at.r0) * double(columns);
    if (!last) RowMoments{s.stats, s.stats + s.M}.into_groups(g.middle, g.groups, count, g.moments + index * 2 * g.groups);
    if (last && g.out_moments)
      RowMoments{s.stats + 2 * s.M, s.stats + 2 * s.M + s.C}.into_groups(g.channels, g.out_groups, count,
                                                                         g.out_moments + index * 2 * g.out_groups);
  }
};

template <class T, bool last>
void block_sweep(const DecoderBlock& g, int64_t begin, int64_t end, void* scratch) {
  BlockSweep<T, last> sweep{g, BlockScratch<T>(g, scratch), {}, 0, 0};
  __builtin_memset(scratch, 0, size_t(sweep.s.bytes));  // padding is never written
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) sweep.run(task);
  tiles_end();
#if SG_AVX512
  if (!last && g.kept) _mm_sfence();  // lines that went past the cache
#endif
}

// ---- GroupNorm, SiLU, dense 3x3 to few channels ------------------------------------------------------------------------

template <class T>
struct ConvScratch {
  using P = Panel<T>;
  int64_t columns, lda, ldc, slot;
  P* panel;
  float* ring;
  int64_t bytes;

  ConvScratch(const NormConv& g, void* base) {
    columns = granules<P>(g.tile + 2), ldc = blocks_of(9 * g.outputs) * kColumns, slot = columns * ldc;
    lda = lanes_of(g.channels) * kLanes > padded<P>(g.channels) ? lanes_of(g.channels) * kLanes : padded<P>(g.channels);
    Carver carver{static_cast<char*>(base)};
    panel = carver.take<P>(columns * lda);
    ring = carver.take<float>(3 * slot + kLanes);
    bytes = carver.at - static_cast<char*>(base);
  }
};

template <class T>
int64_t conv_scratch_bytes(const NormConv& g) {
  return ConvScratch<T>(g, nullptr).bytes;
}

template <class T>
void norm_conv(const NormConv& g, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  const ConvScratch<T> s(g, scratch);
  const int64_t ws = lanes_of(g.channels) * kLanes, O = g.outputs;
  __builtin_memset(scratch, 0, size_t(s.bytes));
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const Span at = span_of(g, task);
    const int64_t columns = at.c1 - at.c0;
    const float* n = g.norm + at.sample * 3 * ws;
    for (int64_t r = at.r0 - 1; r <= at.r1; ++r) {
      float* taps = s.ring + (r + 3) % 3 * s.slot;
      if (r < 0 || r >= g.height) {
        __builtin_memset(taps, 0, size_t(s.slot) * 4);
      } else {
        const T* x = static_cast<const T*>(g.x) + ((at.sample * g.height + r) * g.width + at.c0 - 1) * g.channels;
        for (int64_t p = 0; p < columns + 2; ++p) {
          P* row = s.panel + p * s.lda;
          const int64_t column = at.c0 - 1 + p;
          if (column < 0 || column >= g.width) {
            __builtin_memset(row, 0, size_t(s.lda) * sizeof(P));
            continue;
          }
          for (int64_t c = 0; c < g.channels; c += kLanes) {
            const auto v = load_some(x + p * g.channels + c, g.channels - c);
            to_panel(row_silu<T, kLanes>((v - load<kLanes>(n + c)) * load<kLanes>(n + ws + c) + load<kLanes>(n + 2 * ws + c)), row + c);
          }
        }
        gemm<P>(granules<P>(columns + 2), s.ldc / kColumns, g.channels, s.panel, s.lda, static_cast<const P*>(g.taps), taps,
                s.ldc, false);
      }
      if (r <= at.r0) continue;
      const float* rows[3] = {s.ring + (r + 1) % 3 * s.slot, s.ring + (r + 2) % 3 * s.slot, taps};  // r - 2, r - 1, r
      T* out = static_cast<T*>(g.out) + ((at.sample * g.height + r - 1) * g.width + at.c0) * O;
      for (int64_t p = 0; p < columns; ++p)
        for (int64_t o = 0; o < O; o += 4) {
          Vec<float, 4> y{};
          for (int64_t i = 0; i < 4 && o + i < O; ++i) y[i] = g.bias[o + i];
          for (int64_t ky = 0; ky < 3; ++ky)
            for (int64_t kx = 0; kx < 3; ++kx) y += load<4>(rows[ky] + (p + kx) * s.ldc + (ky * 3 + kx) * O + o);
          for (int64_t i = 0; i < 4 && o + i < O; ++i) to_panel(y[i], out + p * O + o + i);
        }
    }
  }
  tiles_end();
}

template <class T>
constexpr DecoderBlockTable decoder_block_table() {
  return {kLanes,          kGranule<Panel<T>> > 1 ? kGranule<Panel<T>> : kTileRows,
          frame_elements,  block_scratch_bytes<T>,
          block_frames<T>, block_sweep<T, false>,
          block_sweep<T, true>, conv_scratch_bytes<T>,
          norm_conv<T>};
}
