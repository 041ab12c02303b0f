// Separable convolution in one sweep over rows. Included once per instruction set (see simd.h).
//
// Three normalised rows of a tile stay in cache in a ring; the depthwise convolution of them fills a panel; the panel meets the
// packed pointwise weight by blocks of columns, and what is added, the store and the statistics follow while those are in
// cache. Nothing of the size of an image is kept.

struct SepconvUnit {
  int64_t sample, first_column, columns, first_row, rows;  // of outputs
};

SG_INLINE SepconvUnit sepconv_unit(const Sepconv& s, int64_t unit) {
  const int64_t column = unit / s.units_of_tile, tile = column % s.tiles;
  SepconvUnit u{column / s.tiles, tile * s.tile_width, s.tile_width, unit % s.units_of_tile * s.unit_rows, s.unit_rows};
  if (u.columns > s.out_width - u.first_column) u.columns = s.out_width - u.first_column;
  if (u.rows > s.out_height - u.first_row) u.rows = s.out_height - u.first_row;
  return u;
}

constexpr int64_t kSepconvRing = 3;

constexpr int64_t kSepconvBlockBytes = 65536;  // of C that an epilogue reads back

// Asks for memory while products run, a few lines at a time: a core has few requests under way, and a burst would stall it.
class Ahead {
 public:
  void clear() { count_ = at_ = 0; }
  void add(const void* begin, int64_t bytes) {
    if (count_ < kMost) begin_[count_] = static_cast<const char*>(begin), bytes_[count_++] = bytes;
  }
  void ask(int64_t lines) {
    while (lines-- > 0 && at_ < count_) {
      __builtin_prefetch(begin_[at_], 0, 2);
      begin_[at_] += 64;
      if ((bytes_[at_] -= 64) <= 0) ++at_;
    }
  }
  int64_t lines() const {
    int64_t sum = 0;
    for (int i = at_; i < count_; ++i) sum += bytes_[i] / 64 + 1;
    return sum;
  }

 private:
  static constexpr int kMost = 16;
  const char* begin_[kMost];
  int64_t bytes_[kMost];
  int count_ = 0, at_ = 0;
};

// Where things lie in a thread's scratch.
template <class T>
struct SepconvBuffers {
  using P = Panel<T>;
  int64_t channels, pitch, slots, lda, skip_lda, columns, blocks, panel_rows;
  int64_t ring, zeros, edge, taps, norm, dw_bias, panel, skip, c, sums, pixels, bytes;

  explicit SepconvBuffers(const Sepconv& s) {
    channels = row_channels<P>(s.channels);
    pitch = spaced(channels, sizeof(float));
    lda = spaced(channels, sizeof(P));
    skip_lda = spaced(padded<P>(s.skip_channels), sizeof(P));
    slots = s.tile_width * s.stride / (s.upsample ? 2 : 1) + 3;
    panel_rows = s.panel_units * s.unit_rows * s.tile_width;
    blocks = kSepconvBlockBytes / (panel_rows * kColumns * 4);
    if (blocks < 1) blocks = 1;
    if (blocks > blocks_of(s.outputs)) blocks = blocks_of(s.outputs);
    columns = blocks_of(s.outputs) * kColumns;
    bytes = 0;
    ring = take(kSepconvRing * slots * pitch * 4);
    zeros = take(slots * pitch * 4);
    edge = take(9 * channels * 4);
    taps = take((s.upsample ? 16 : 9) * channels * 4);
    norm = take(s.mean ? 3 * channels * 4 : 0);
    dw_bias = take(s.dw_bias ? channels * 4 : 0);
    panel = take(panel_rows * lda * int64_t(sizeof(P)));
    skip = take(s.skip ? panel_rows * skip_lda * int64_t(sizeof(P)) : 0);
    c = take(panel_rows * blocks * kColumns * 4);
    pixels = take(panel_rows * 8);
    sums = take(s.moments ? s.panel_units * 3 * columns * 4 : 0);
  }

 private:
  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 63) / 64 * 64;
    return at;
  }
};

template <class T>
int64_t sepconv_scratch(const Sepconv& s) {
  return SepconvBuffers<T>(s).bytes;
}

// V vectors to memory; past the caches, in whole lines, where `stream` says so.
template <class T, int N, int V>
SG_INLINE void emit(T* out, const Vec<float, N>* y, bool stream) {
#if SG_AVX512
  if constexpr (N == 16 && sizeof(T) == 4) {
    if (stream) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_stream_ps(reinterpret_cast<float*>(out + v * N), (__m512)y[v]);
      return;
    }
  }
#endif
#if SG_BF16
  if constexpr (N == 16 && sizeof(T) == 2 && V % 2 == 0) {
    if (stream) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v += 2)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + v * N),
                            (__m512i)_mm512_cvtne2ps_pbh((__m512)y[v + 1], (__m512)y[v]));
      return;
    }
  }
#endif
  if constexpr (V % 2 == 0) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2) store_pair<N>(out + v * N, y[v], y[v + 1]);
  } else {
    store<N>(out, y[0]);
  }
}

// What follows the product, for pixels of consecutive memory: V vectors of N channels from `c` on.
template <class T, int N, int V, bool sums>
SG_INLINE void finish_channels(const float* values, int64_t ldc, int64_t pixels, const float* bias, const T* residual, T* out,
                               int64_t outputs, const ChannelSums& s, int64_t c, bool first, bool stream) {
  using F = Vec<float, N>;
  F add[V], center[V], sum[V], square[V];
  const auto value = [&](int64_t p, int v) __attribute__((always_inline)) {
    F y = load<N>(values + p * ldc + v * N) + add[v];
    if (residual) y = y + load<N>(residual + p * outputs + v * N);
    return y;
  };
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    add[v] = load<N>(bias + v * N);
    if constexpr (sums) {
      if (first) {
        constexpr int64_t kFew = 8;
        const int64_t few = pixels < kFew ? pixels : kFew;
        center[v] = rounded<T, N>(value(0, v));
        for (int64_t p = 1; p < few; ++p) center[v] = center[v] + rounded<T, N>(value(p, v));
        center[v] = center[v] * (1.0f / float(few));
        sum[v] = square[v] = F{};
        store<N>(s.center + c + v * N, center[v]);
      } else {
        center[v] = load<N>(s.center + c + v * N);
        sum[v] = load<N>(s.sum + c + v * N), square[v] = load<N>(s.square + c + v * N);
      }
    }
  }
  for (int64_t p = 0; p < pixels; ++p) {
    F y[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      y[v] = value(p, v);
      if constexpr (sums) {
        const F d = rounded<T, N>(y[v]) - center[v];
        sum[v] = sum[v] + d;
        square[v] = square[v] + d * d;
      }
    }
    emit<T, N, V>(out + p * outputs, y, stream);
  }
  if constexpr (sums) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store<N>(s.sum + c + v * N, sum[v]);
      store<N>(s.square + c + v * N, square[v]);
    }
  }
}

template <class T, bool sums>
__attribute__((noinline)) void finish(const float* values, int64_t ldc, int64_t pixels, const float* bias, const T* residual, T* out, int64_t outputs,
            const ChannelSums& s, int64_t c, int64_t end, bool first, bool stream) {
  const int64_t begin = c;
#define SG_FINISH(N, V)                                                                                                  \
  finish_channels<T, N, V, sums>(values + c - begin, ldc, pixels, bias + c, residual ? residual + c : nullptr, out + c,  \
                                 outputs, s, c, first, stream);
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) SG_FINISH(kLanes, 4)
  for (; c + kLanes <= end; c += kLanes) SG_FINISH(kLanes, 1)
  for (; c < end; ++c) SG_FINISH(1, 1)
#undef SG_FINISH
}

SG_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct SepconvRun {
  using P = Panel<T>;
  // AMX tiles need the fill buffers themselves: asking for what the epilogue touches gains in fp32 and loses in bf16 on AMX.
#if SG_AMX
  static constexpr bool kAskForOutput = sizeof(P) == 4;
#else
  static constexpr bool kAskForOutput = true;
#endif
  const Sepconv& s;
  const SepconvBuffers<T> b;
  char* const memory;
  int64_t held[kSepconvRing];  // input row in each slot of the ring, of this column of units
  int64_t column = -1, sample = -1;
  Ahead ahead;

  SepconvRun(const Sepconv& args, void* scratch) : s(args), b(args), memory(static_cast<char*>(scratch)) {
    float* taps = floats(b.taps);
    if (s.upsample) fold_taps(s.dw_weight, s.channels, b.channels, taps);
    else spread_taps(s.dw_weight, s.channels, b.channels, taps);
    if (s.dw_bias)
      for (int64_t c = 0; c < b.channels; ++c) floats(b.dw_bias)[c] = c < s.channels ? s.dw_bias[c] : 0.0f;
    __builtin_memset(memory + b.zeros, 0, size_t(b.slots * b.pitch * 4));
    if (b.channels > s.channels) __builtin_memset(memory + b.ring, 0, size_t(kSepconvRing * b.slots * b.pitch * 4));
  }

  float* floats(int64_t at) const { return reinterpret_cast<float*>(memory + at); }

  // The row of the tile that begins with input column `left`, normalised, in the ring.
  const float* row(int64_t y, int64_t left) {
    if (y < 0 || y >= s.height) return floats(b.zeros);
    const int64_t slot = y % kSepconvRing;
    float* out = floats(b.ring) + slot * b.slots * b.pitch;
    if (held[slot] == y) return out;
    held[slot] = y;
    const int64_t first = left < 0 ? 0 : left, last = left + b.slots < s.width ? left + b.slots : s.width;
    const auto blank = [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) __builtin_memset(out + (p - left) * b.pitch, 0, size_t(b.channels) * 4);
    };
    blank(left, first);
    blank(last, left + b.slots);
    const T* x = static_cast<const T*>(s.x) + ((sample * s.height + y) * s.width + first) * s.channels;
    float* to = out + (first - left) * b.pitch;
    const float* norm = floats(b.norm);
    if (s.mean) normalise_pixels<T>(x, last - first, s.channels, norm, norm + b.channels, norm + 2 * b.channels, to, b.pitch);
    else copy_pixels<T>(x, last - first, s.channels, to, b.pitch);
    return out;
  }

  // Without a norm, rows are read where they are: a row buffer would be a mere copy.
  bool direct() const { return !s.mean && !s.upsample && b.channels == s.channels; }

  // One row of outputs from rows of x itself; outputs that see beyond the sides come from small copies.
  template <int stride>
  void depthwise_of_x(const SepconvUnit& u, int64_t y, const float* bias, P* panel) {
    const int64_t C = s.channels, top = y * stride - 1, left = u.first_column * stride - 1;
    const T* rows[3];
    for (int64_t r = 0; r < 3; ++r)
      rows[r] = top + r < 0 || top + r >= s.height
                    ? nullptr
                    : static_cast<const T*>(s.x) + ((u.sample * s.height + top + r) * s.width + left) * C;
    const auto at_side = [&](int64_t p) {
      float* edge = floats(b.edge);
      __builtin_memset(edge, 0, size_t(9 * C) * 4);
      for (int64_t r = 0; r < 3; ++r)
        for (int64_t t = 0; t < 3; ++t) {
          const int64_t column = left + p * stride + t;
          if (rows[r] && column >= 0 && column < s.width)
            copy_pixels<T>(rows[r] + (p * stride + t) * C, 1, C, edge + (3 * r + t) * C, C);
        }
      const float* const copies[3] = {edge, edge + 3 * C, edge + 6 * C};
      depthwise_row<stride, P>(copies, C, floats(b.taps), C, bias, 1, panel + p * b.lda, b.lda);
    };
    const int64_t begin = left < 0, end = left + (u.columns - 1) * stride + 2 < s.width ? u.columns : u.columns - 1;
    if (begin == 1) at_side(0);
    if (end == u.columns - 1 && end >= begin) at_side(end);
    if (end <= begin) return;
    const T* inside[3];
    for (int64_t r = 0; r < 3; ++r)
      inside[r] = rows[r] ? rows[r] + begin * stride * C : reinterpret_cast<const T*>(memory + b.zeros);
    depthwise_row<stride, P, T>(inside, C, floats(b.taps), C, bias, end - begin, panel + begin * b.lda, b.lda);
  }

  // The depthwise convolution of a unit into rows of the panel.
  void fill(const SepconvUnit& u, int64_t unit, P* panel) {
    if (unit / s.units_of_tile != column) {
      column = unit / s.units_of_tile;
      for (int64_t& y : held) y = -1;
    }
    if (u.sample != sample) {
      sample = u.sample;
      float* norm = floats(b.norm);
      if (s.mean)
        norm_of_sample(s.channels, s.groups, s.mean + sample * s.groups, s.rstd + sample * s.groups, s.norm_weight,
                       s.norm_bias, norm, norm + b.channels, norm + 2 * b.channels);
    }
    const float *taps = floats(b.taps), *bias = s.dw_bias ? floats(b.dw_bias) : nullptr;
    const int64_t n = b.channels;
    for (int64_t y = u.first_row; y < u.first_row + u.rows; ++y, panel += u.columns * b.lda) {
      if (direct()) {
        if (s.stride == 1) depthwise_of_x<1>(u, y, bias, panel);
        else depthwise_of_x<2>(u, y, bias, panel);
      } else if (s.upsample && s.stride == 1) {
        const int64_t left = u.first_column / 2 - 1, top = (y + 1) / 2 - 1;
        const float* const rows[2] = {row(top, left), row(top + 1, left)};
        depthwise_upsampled_row<2, P>(rows, b.pitch, taps + y % 2 * 8 * n, n, bias, u.columns, panel, b.lda);
      } else if (s.upsample) {
        const int64_t left = u.first_column - 1;
        const float* const rows[2] = {row(y - 1, left), row(y, left)};
        depthwise_upsampled_row<1, P>(rows, b.pitch, taps, n, bias, u.columns, panel, b.lda);
      } else {
        const int64_t left = u.first_column * s.stride - 1, top = y * s.stride - 1;
        const float* const rows[3] = {row(top, left), row(top + 1, left), row(top + 2, left)};
        if (s.stride == 1) depthwise_row<1, P>(rows, b.pitch, taps, n, bias, u.columns, panel, b.lda);
        else depthwise_row<2, P>(rows, b.pitch, taps, n, bias, u.columns, panel, b.lda);
      }
    }
  }

  // The pixels of a unit that lie one after the other in memory: all of it where the tile is as wide as the image.
  struct Runs {
    int64_t count, pixels, first, step;  // first pixel of the image, and distance
  };
  Runs runs(const SepconvUnit& u) const {
    const int64_t first = (u.sample * s.out_height + u.first_row) * s.out_width + u.first_column;
    if (u.columns == s.out_width) return {1, u.rows * u.columns, first, 0};
    return {u.rows, u.columns, first, s.out_width};
  }

  ChannelSums sums(int64_t i) const {
    float* at = floats(b.sums) + i * 3 * b.columns;
    return {at, at + b.columns, at + 2 * b.columns};
  }

  // Input rows that a unit reads, some of them perhaps outside the image.
  void input_rows(const SepconvUnit& u, int64_t* top, int64_t* bottom) const {
    const int64_t last = u.first_row + u.rows - 1;
    if (s.upsample && s.stride == 1) *top = (u.first_row + 1) / 2 - 1, *bottom = (last + 1) / 2;
    else if (s.upsample) *top = u.first_row - 1, *bottom = last;
    else *top = u.first_row * s.stride - 1, *bottom = last * s.stride + 1;
  }

  // What units [begin, end) will read of x that the ring does not hold yet.
  void foresee(int64_t begin, int64_t end) {
    ahead.clear();
    const int64_t size = int64_t(sizeof(T)) * s.channels;
    int64_t seen = -1, seen_column = -1, bottom = 0;
    if (begin > 0) {
      int64_t top;
      input_rows(sepconv_unit(s, begin - 1), &top, &seen);
      seen_column = (begin - 1) / s.units_of_tile;
    }
    for (int64_t unit = begin; unit < end; ++unit, seen = bottom) {
      const SepconvUnit u = sepconv_unit(s, unit);
      int64_t top;
      input_rows(u, &top, &bottom);
      if (unit / s.units_of_tile == seen_column && top <= seen) top = seen + 1;
      seen_column = unit / s.units_of_tile;
      if (top < 0) top = 0;
      const int64_t rows = (bottom < s.height ? bottom + 1 : s.height) - top;
      if (rows <= 0) continue;
      const char* x = static_cast<const char*>(s.x) + (u.sample * s.height + top) * s.width * size;
      if (s.tiles == 1) {
        ahead.add(x, rows * s.width * size);
      } else {
        const int64_t left = u.first_column * s.width / s.out_width, columns = u.columns * s.width / s.out_width;
        for (int64_t y = 0; y < rows; ++y) ahead.add(x + (y * s.width + left) * size, columns * size);
      }
    }
  }

  void panel_of_units(int64_t begin, int64_t end, int64_t next) {
    P* panel = reinterpret_cast<P*>(memory + b.panel);
    P* skip = reinterpret_cast<P*>(memory + b.skip);
    float* c = floats(b.c);
    int64_t* where = reinterpret_cast<int64_t*>(memory + b.pixels);
    int64_t pixels = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      const SepconvUnit u = sepconv_unit(s, unit);
      fill(u, unit, panel + pixels * b.lda);
      const Runs r = runs(u);
      for (int64_t i = 0; i < r.count; ++i, pixels += r.pixels) {
        for (int64_t p = 0; p < r.pixels; ++p) where[pixels + p] = r.first + i * r.step + p;
        if (s.skip)
          pack_a<P, T>(static_cast<const T*>(s.skip) + (r.first + i * r.step) * s.skip_channels, s.skip_channels, 1, r.pixels,
                       s.skip_channels, skip + pixels * b.skip_lda, b.skip_lda);
      }
    }
    foresee(end, next);
    const int64_t steps = gemm_steps<P>(pixels, blocks_of(s.outputs), s.channels);
    const int64_t lines = ahead.lines() / steps + 1;
    const int64_t ldc = b.blocks * kColumns;
    const bool stream = s.stream && s.outputs * int64_t(sizeof(T)) % 64 == 0 && reinterpret_cast<uintptr_t>(s.out) % 64 == 0;
    for (int64_t j = 0; j < blocks_of(s.outputs); j += b.blocks) {
      const int64_t some = blocks_of(s.outputs) - j < b.blocks ? blocks_of(s.outputs) - j : b.blocks;
      // What the epilogue will write and add to, and what the next panel will read, is on its way by the time it is touched.
      const int64_t width = some * kColumns * int64_t(sizeof(T)), row = s.outputs * int64_t(sizeof(T));
      const int64_t spots = (width + 63) / 64 * pixels / gemm_steps<P>(pixels, some, s.channels) + 1;
      const char* out = static_cast<const char*>(s.out) + j * kColumns * int64_t(sizeof(T));
      const char* residual = static_cast<const char*>(s.residual) + j * kColumns * int64_t(sizeof(T));
      int64_t m = 0, offset = 0;
      gemm<P>(pixels, some, s.channels, panel, b.lda, static_cast<const P*>(s.pw) + j * block_stride<P>(s.channels), c, ldc,
              false, [&] {
                ahead.ask(lines);
                if (!kAskForOutput) return;
                for (int64_t i = 0; i < spots && m < pixels; ++i) {
                  if (!stream) __builtin_prefetch(out + where[m] * row + offset, 1, 2);
                  if (s.residual) __builtin_prefetch(residual + where[m] * row + offset, 0, 2);
                  if ((offset += 64) >= width) offset = 0, ++m;
                }
              });
      if (s.skip)
        gemm<P>(pixels, some, s.skip_channels, skip, b.skip_lda,
                static_cast<const P*>(s.skip_weight) + j * block_stride<P>(s.skip_channels), c, ldc, true);
      const int64_t n0 = j * kColumns, n1 = n0 + some * kColumns < s.outputs ? n0 + some * kColumns : s.outputs;
      const float* values = c;
      for (int64_t unit = begin; unit < end; ++unit) {
        const SepconvUnit u = sepconv_unit(s, unit);
        const Runs r = runs(u);
        for (int64_t i = 0; i < r.count; ++i, values += r.pixels * ldc) {
          const int64_t at = (r.first + i * r.step) * s.outputs;
          const T* residual = s.residual ? static_cast<const T*>(s.residual) + at : nullptr;
          T* out = static_cast<T*>(s.out) + at;
          const float* bias = s.bias + u.sample * s.outputs;
          if (s.moments) finish<T, true>(values, ldc, r.pixels, bias, residual, out, s.outputs, sums(unit - begin), n0, n1, i == 0, stream);
          else finish<T, false>(values, ldc, r.pixels, bias, residual, out, s.outputs, {}, n0, n1, true, stream);
        }
      }
    }
    if (s.moments)
      for (int64_t unit = begin; unit < end; ++unit) {
        const SepconvUnit u = sepconv_unit(s, unit);
        group_moments(sums(unit - begin), u.rows * u.columns, s.outputs, s.out_groups, s.moments + unit * 2 * s.out_groups);
      }
  }
};

template <class T>
void sepconv(const Sepconv& s, int64_t begin, int64_t end, void* scratch) {
  SepconvRun<T> run(s, scratch);
  tiles_begin();
  for (int64_t unit = begin; unit < end; unit += s.panel_units)
    run.panel_of_units(unit, least(unit + s.panel_units, end), least(unit + 2 * s.panel_units, end));
  tiles_end();
#if SG_AVX512
  if (s.stream) _mm_sfence();
#endif
}

constexpr SepconvTable sepconv_table() {
  return {sepconv_scratch<float>, sepconv_scratch<bf16>, sepconv<float>, sepconv<bf16>};
}
