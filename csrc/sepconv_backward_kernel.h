// Backward of the separable convolution. Included once per instruction set (see simd.h and gemm.h).
//
// The depthwise sweep walks down the rows of a part of an image. It keeps three rows of a, the activation that it computes
// again from x, and four of dd, as fp32 in the order [block of kLanes channels][pixel][lane], with zeros around the image: from these rows come d, the sums for the weights, and the gradient of a, each in one pass along a row
// with taps and sums in registers.

// The first `count` of kLanes elements, zeros behind them; all of them where `whole`. Callers branch on wholeness outside
// their loops: the tail's copy is a call, around which no vector stays in a register.
template <bool whole, class T>
SG_INLINE Vec<float, kLanes> load_some(const T* p, int64_t count) {
  if constexpr (whole) return load<kLanes>(p);
  T some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load<kLanes>(some);
}
template <bool whole, class T>
SG_INLINE void store_some(T* p, Vec<float, kLanes> v, int64_t count) {
  if constexpr (whole) return store<kLanes>(p, v);
  T some[kLanes];
  store<kLanes>(some, v);
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
}

// Where the branch may be taken inside a loop.
template <class T>
SG_INLINE Vec<float, kLanes> load_some(const T* p, int64_t count) {
  return count >= kLanes ? load<kLanes>(p) : load_some<false>(p, count);
}
template <class T>
SG_INLINE void store_some(T* p, Vec<float, kLanes> v, int64_t count) {
  count >= kLanes ? store<kLanes>(p, v) : store_some<false>(p, v, count);
}

// One task: its part of a sample and the working memory. Columns and channels count from the task's first.
struct GradientTask {
  int64_t sample, part;
  int64_t c0, count, blocks, whole;  // channels; blocks of kLanes channels, and those of them that are full
  int64_t y0, y1, x0, width;         // of x
  int64_t o0, out_width;             // columns of d whose middle tap is in the task's part
  int64_t a_row, dd_row, slope_row;  // floats of one block's row
  float *a, *dd, *slope, *zero, *up;
  float *mean, *rstd, *k1, *k2, *k3;  // per channel

  inline SG_LAMBDA float* a_at(int64_t y, int64_t block) const { return a + ((y % 3) * blocks + block) * a_row; }
  inline SG_LAMBDA float* slope_at(int64_t y, int64_t block) const { return slope + ((y % 3) * blocks + block) * slope_row; }
  inline SG_LAMBDA float* dd_at(int64_t y, int64_t block) const { return dd + ((y & 3) * blocks + block) * dd_row; }
};

SG_INLINE GradientTask gradient_task(const DepthwiseGradient& g, int64_t task, float* scratch) {
  GradientTask t;
  t.c0 = task % g.chunks * g.chunk, task /= g.chunks;
  t.count = g.channels - t.c0 < g.chunk ? g.channels - t.c0 : g.chunk;
  t.blocks = (t.count + kLanes - 1) / kLanes, t.whole = t.count / kLanes;
  t.part = task % (g.strips * g.tiles), t.sample = task / (g.strips * g.tiles);
  t.y0 = t.part / g.tiles * g.rows, t.y1 = t.y0 + g.rows < g.height ? t.y0 + g.rows : g.height;
  t.x0 = t.part % g.tiles * g.columns, t.width = g.width - t.x0 < g.columns ? g.width - t.x0 : g.columns;
  t.o0 = t.x0 * g.scale / g.stride;  // a tile is even in width
  const int64_t o1 = ((t.x0 + t.width) * g.scale + g.stride - 1) / g.stride;
  t.out_width = o1 - t.o0;
  t.a_row = (t.width * g.scale + 2) * kLanes, t.dd_row = (t.out_width + 2) * kLanes, t.slope_row = t.width * kLanes;
  t.a = scratch;
  t.dd = t.a + 3 * t.blocks * t.a_row;
  t.slope = t.dd + 4 * t.blocks * t.dd_row;
  t.mean = t.slope + 3 * t.blocks * t.slope_row;
  t.rstd = t.mean + g.chunk, t.k1 = t.rstd + g.chunk, t.k2 = t.k1 + g.chunk, t.k3 = t.k2 + g.chunk;
  t.zero = t.k3 + g.chunk;
  const int64_t zeros = t.a_row > t.dd_row ? t.a_row : t.dd_row;
  t.up = t.zero + zeros;
  for (int64_t i = 0; i < zeros; ++i) t.zero[i] = 0;
  return t;
}

// mean and rstd of every channel of the task; zeros behind the last.
SG_INLINE void spread_statistics(const DepthwiseGradient& g, const GradientTask& t) {
  const int64_t per_group = g.channels / g.groups;
  int64_t c = 0;
  for (int64_t group = t.c0 / per_group; c < t.count; ++group) {
    const float m = g.mean[t.sample * g.groups + group], r = g.rstd[t.sample * g.groups + group];
    for (; c < t.count && t.c0 + c < (group + 1) * per_group; ++c) t.mean[c] = m, t.rstd[c] = r;
  }
  for (; c < t.blocks * kLanes; ++c) t.mean[c] = t.rstd[c] = 0;
}

// Row y of x -> a row of a, and of d silu(z) / dz; blocks [b0, b1).
template <class T, bool norm, bool whole>
SG_INLINE void load_activation(const DepthwiseGradient& g, const GradientTask& t, int64_t y, int64_t b0, int64_t b1) {
  using V = Vec<float, kLanes>;
  const int64_t C = g.channels, first = t.x0 > 0 ? -1 : 0, last = t.x0 + t.width < g.width ? t.width + 1 : t.width;
  const T* x = static_cast<const T*>(g.x) + ((t.sample * g.height + y) * g.width + t.x0) * C + t.c0;
  float *a = t.a_at(y, 0), *slope = norm ? t.slope_at(y, 0) : nullptr;
  const float *w = g.norm_weight + t.c0, *bias = g.norm_bias + t.c0;
  const V zero{};
  for (int64_t b = b0; b < b1; ++b) {
    if (first == 0) store<kLanes>(a + b * t.a_row, zero);
    if (last == t.width) store<kLanes>(a + (b + 1) * t.a_row - kLanes, zero);
  }
  for (int64_t p = first; p < last; ++p) {
    const bool inside = p >= 0 && p < t.width;
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t c = b * kLanes;
      V v = load_some<whole>(x + p * C + c, t.count - c);
      if constexpr (norm) {
        const V xhat = (v - load<kLanes>(t.mean + c)) * load<kLanes>(t.rstd + c);
        const V z = xhat * load<kLanes>(w + c) + load<kLanes>(bias + c);
        const V s = row_sigmoid<T, kLanes>(z);
        v = z * s;
        if (inside) store<kLanes>(slope + b * t.slope_row + p * kLanes, s + v * (1.0f - s));
      }
      float* out = a + b * t.a_row + (p * g.scale + 1) * kLanes;
      if (g.scale == 1) {
        store<kLanes>(out, v);
      } else {
        if (p >= 0) store<kLanes>(out, v);
        if (p < t.width) store<kLanes>(out + kLanes, v);
      }
    }
  }
}

template <class T>
SG_INLINE void load_activations(const DepthwiseGradient& g, const GradientTask& t, int64_t y) {
  if (g.groups) {
    load_activation<T, true, true>(g, t, y, 0, t.whole);
    if (t.whole < t.blocks) load_activation<T, true, false>(g, t, y, t.whole, t.blocks);
  } else {
    load_activation<T, false, true>(g, t, y, 0, t.whole);
    if (t.whole < t.blocks) load_activation<T, false, false>(g, t, y, t.whole, t.blocks);
  }
}

// Row y of dd, with one column more on either side.
template <class T, bool whole>
SG_INLINE void load_gradient(const DepthwiseGradient& g, const GradientTask& t, int64_t y, int64_t b0, int64_t b1) {
  using V = Vec<float, kLanes>;
  const int64_t C = g.channels, first = t.o0 > 0 ? -1 : 0, last = t.out_width + (t.o0 + t.out_width < g.out_width ? 1 : 0);
  const T* from = static_cast<const T*>(g.dd) + ((t.sample * g.out_height + y) * g.out_width + t.o0) * C + t.c0;
  float* out = t.dd_at(y, 0);
  const V zero{};
  for (int64_t b = b0; b < b1; ++b) {
    if (first == 0) store<kLanes>(out + b * t.dd_row, zero);
    if (last == t.out_width) store<kLanes>(out + (b + 1) * t.dd_row - kLanes, zero);
  }
  for (int64_t p = first; p < last; ++p)
    for (int64_t b = b0; b < b1; ++b)
      store<kLanes>(out + b * t.dd_row + (p + 1) * kLanes, load_some<whole>(from + p * C + b * kLanes, t.count - b * kLanes));
}

template <class T>
SG_INLINE void load_gradients(const DepthwiseGradient& g, const GradientTask& t, int64_t y) {
  load_gradient<T, true>(g, t, y, 0, t.whole);
  if (t.whole < t.blocks) load_gradient<T, false>(g, t, y, t.whole, t.blocks);
}

// emit(x, value) for every x of a row: a 3x3 convolution of three rows that start one pixel left of it. Every column is
// read once and added to the three pixels that see it.
template <class Emit>
SG_INLINE void convolve(const float* r0, const float* r1, const float* r2, const Vec<float, kLanes>* k, int64_t width,
                        Emit emit) {
  using V = Vec<float, kLanes>;
  const V k0 = k[0], k1 = k[1], k2 = k[2], k3 = k[3], k4 = k[4], k5 = k[5], k6 = k[6], k7 = k[7], k8 = k[8];
  V u = load<kLanes>(r0), v = load<kLanes>(r1), w = load<kLanes>(r2);
  V first = u * k0 + v * k3 + w * k6;
  u = load<kLanes>(r0 + kLanes), v = load<kLanes>(r1 + kLanes), w = load<kLanes>(r2 + kLanes);
  first = first + u * k1 + v * k4 + w * k7;
  V second = u * k0 + v * k3 + w * k6;
  for (int64_t x = 0; x < width; ++x) {
    const int64_t at = (x + 2) * kLanes;
    u = load<kLanes>(r0 + at), v = load<kLanes>(r1 + at), w = load<kLanes>(r2 + at);
    const V value = first + u * k2 + v * k5 + w * k8;
    first = second + u * k1 + v * k4 + w * k7;
    second = u * k0 + v * k3 + w * k6;
    emit(x, value);
  }
}

// From three rows of a around a row of dd: that row of d, and what it adds to the sums of the weights and the bias.
template <class T, bool whole, bool store_d, bool weights>
SG_INLINE void gradient_outputs(const DepthwiseGradient& g, int64_t width, const float* r0, const float* r1, const float* r2,
                                const float* dd, const float* taps, const float* bias, T* d, int64_t count, float* sums) {
  using V = Vec<float, kLanes>;
  V k[9], acc[9] = {}, total{};
  const V offset = load<kLanes>(bias);
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) k[i] = load<kLanes>(taps + i * g.padded);
  if (g.stride == 1) {
    V first{}, second{}, g1{}, g2{};  // g0, g1, g2: dd at columns j, j - 1, j - 2
    for (int64_t j = 0; j < width + 2; ++j) {
      const V u = load<kLanes>(r0 + j * kLanes), v = load<kLanes>(r1 + j * kLanes), w = load<kLanes>(r2 + j * kLanes);
      if constexpr (weights) {
        V g0{};
        if (j < width) g0 = load<kLanes>(dd + (j + 1) * kLanes);
        acc[0] += u * g0, acc[3] += v * g0, acc[6] += w * g0;
        acc[1] += u * g1, acc[4] += v * g1, acc[7] += w * g1;
        acc[2] += u * g2, acc[5] += v * g2, acc[8] += w * g2;
        total += g0;
        g2 = g1, g1 = g0;
      }
      if constexpr (store_d) {
        const V value = first + u * k[2] + v * k[5] + w * k[8];
        first = second + u * k[1] + v * k[4] + w * k[7];
        second = u * k[0] + v * k[3] + w * k[6];
        if (j >= 2) store_some<whole>(d + (j - 2) * g.channels, value + offset, count);
      }
    }
  } else {
    for (int64_t x = 0; x < width; ++x) {
      const V g0 = weights ? load<kLanes>(dd + (x + 1) * kLanes) : V{};
      V value = offset;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const int64_t at = (2 * x + i) * kLanes;
        const V u = load<kLanes>(r0 + at), v = load<kLanes>(r1 + at), w = load<kLanes>(r2 + at);
        if constexpr (store_d) value += u * k[i] + v * k[3 + i] + w * k[6 + i];
        if constexpr (weights) acc[i] += u * g0, acc[3 + i] += v * g0, acc[6 + i] += w * g0;
      }
      if constexpr (weights) total += g0;
      if constexpr (store_d) store_some<whole>(d + x * g.channels, value, count);
    }
  }
  if constexpr (weights) {
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) store<kLanes>(sums + i * g.padded, load<kLanes>(sums + i * g.padded) + acc[i]);
    store<kLanes>(sums + 9 * g.padded, load<kLanes>(sums + 9 * g.padded) + total);
  }
}

// The gradient of row `row` of the convolution's input -> out.
SG_INLINE void gradient_of_row(const DepthwiseGradient& g, const GradientTask& t, int64_t row, int64_t block,
                               const Vec<float, kLanes>* k, float* out) {
  using V = Vec<float, kLanes>;
  const int64_t width = t.width * g.scale;
  const auto at = [&](int64_t y) SG_LAMBDA -> const float* {
    return y < 0 || y >= g.out_height ? t.zero : t.dd_at(y, block);
  };
  if (g.stride == 1) {
    V flipped[9];
    for (int i = 0; i < 9; ++i) flipped[i] = k[8 - i];
    convolve(at(row - 1), at(row), at(row + 1), flipped, width,
             [&](int64_t x, V value) SG_LAMBDA { store<kLanes>(out + x * kLanes, value); });
    return;
  }
  // A row or column of even index is met by the middle tap alone, one of odd index by the two outer taps.
  const bool odd = row & 1;
  const float* lower = at((row + 1) / 2);  // met by tap row 0 (odd) or 1 (even, where (row + 1) / 2 = row / 2)
  const float* upper = odd ? at((row - 1) / 2) : t.zero;
  const V *ka = odd ? k : k + 3, *kb = k + 6;
  for (int64_t x = 0; x < width; ++x) {
    const int64_t left = (x / 2 + 1) * kLanes;
    V value;
    if (x & 1) {
      const int64_t right = left + kLanes;
      value = load<kLanes>(lower + right) * ka[0] + load<kLanes>(lower + left) * ka[2];
      if (odd) value += load<kLanes>(upper + right) * kb[0] + load<kLanes>(upper + left) * kb[2];
    } else {
      value = load<kLanes>(lower + left) * ka[1];
      if (odd) value += load<kLanes>(upper + left) * kb[1];
    }
    store<kLanes>(out + x * kLanes, value);
  }
}

// Row y of dz (of dx, where there is no norm) for one block of channels, and its sums.
template <class T, bool norm, bool whole>
SG_INLINE void gradient_inputs(const DepthwiseGradient& g, const GradientTask& t, int64_t y, int64_t block, float* sums) {
  using V = Vec<float, kLanes>;
  const int64_t C = g.channels, c = block * kLanes, count = t.count - c;
  const int64_t pixel = ((t.sample * g.height + y) * g.width + t.x0) * C + t.c0 + c;
  const T* x = static_cast<const T*>(g.x) + pixel;
  const T* extra = g.extra && !norm ? static_cast<const T*>(g.extra) + pixel : nullptr;
  T* dx = g.dx ? static_cast<T*>(g.dx) + pixel : nullptr;
  const float* slope = norm ? t.slope_at(y, block) : nullptr;
  const V mean = norm ? load<kLanes>(t.mean + c) : V{}, rstd = norm ? load<kLanes>(t.rstd + c) : V{};
  V sum{}, sum_x{};
  const auto emit = [&](int64_t p, V da) SG_LAMBDA {
    if constexpr (norm) {
      da *= load<kLanes>(slope + p * kLanes);
      const V xhat = (load_some<whole>(x + p * C, count) - mean) * rstd;
      sum += da, sum_x += da * xhat;
    } else if (extra) {
      da += load_some<whole>(extra + p * C, count);
    }
    if (dx) store_some<whole>(dx + p * C, da, count);
  };
  V k[9];
  for (int i = 0; i < 9; ++i) k[i] = load<kLanes>(g.taps + i * g.padded + t.c0 + c);
  if (g.stride == 1 && g.scale == 1) {
    V flipped[9];
    for (int i = 0; i < 9; ++i) flipped[i] = k[8 - i];
    convolve(y > 0 ? t.dd_at(y - 1, block) : t.zero, t.dd_at(y, block), y + 1 < g.out_height ? t.dd_at(y + 1, block) : t.zero,
             flipped, t.width, emit);
  } else {
    const int64_t width = t.width * g.scale;
    for (int64_t i = 0; i < g.scale; ++i) gradient_of_row(g, t, y * g.scale + i, block, k, t.up + i * width * kLanes);
    for (int64_t p = 0; p < t.width; ++p) {
      const float* u = t.up + g.scale * p * kLanes;
      V da = load<kLanes>(u);
      if (g.scale == 2) {
        const float* lower = u + width * kLanes;
        da = (da + load<kLanes>(u + kLanes)) + (load<kLanes>(lower) + load<kLanes>(lower + kLanes));
      }
      emit(p, da);
    }
  }
  if constexpr (norm) {
    store<kLanes>(sums + 10 * g.padded, load<kLanes>(sums + 10 * g.padded) + sum);
    store<kLanes>(sums + 11 * g.padded, load<kLanes>(sums + 11 * g.padded) + sum_x);
  }
}

// All of one row for one block of channels.
template <class T, bool whole>
SG_INLINE void gradient_block(const DepthwiseGradient& g, const GradientTask& t, int64_t y, int64_t b, float* sums) {
  const int64_t c = b * kLanes, conv_height = g.height * g.scale;
  if (g.d || g.weights) {
    const auto row = [&](int64_t i) SG_LAMBDA -> const float* {
      return i < 0 || i >= conv_height ? t.zero : t.a_at(g.scale == 2 ? i / 2 : i, b);
    };
    for (int64_t o = (y * g.scale + g.stride - 1) / g.stride; o * g.stride < (y + 1) * g.scale; ++o) {
      const float *r0 = row(o * g.stride - 1), *r1 = row(o * g.stride), *r2 = row(o * g.stride + 1);
      const float *dd = t.dd_at(o, b), *taps = g.taps + t.c0 + c, *bias = g.bias + t.c0 + c;
      T* d = static_cast<T*>(g.d);
      if (d) d += ((t.sample * g.out_height + o) * g.out_width + t.o0) * g.channels + t.c0 + c;
      const int64_t count = t.count - c;
      if (g.d && g.weights)
        gradient_outputs<T, whole, true, true>(g, t.out_width, r0, r1, r2, dd, taps, bias, d, count, sums + c);
      else if (g.d)
        gradient_outputs<T, whole, true, false>(g, t.out_width, r0, r1, r2, dd, taps, bias, d, count, sums + c);
      else
        gradient_outputs<T, whole, false, true>(g, t.out_width, r0, r1, r2, dd, taps, bias, d, count, sums + c);
    }
  }
  if (g.inputs && g.groups) gradient_inputs<T, true, whole>(g, t, y, b, sums + c);
  else if (g.inputs) gradient_inputs<T, false, whole>(g, t, y, b, sums + c);
}

// What turns dz into dx: dx = k1 dz + k2 xhat + k3, of the task's channels.
SG_INLINE void norm_coefficients(const DepthwiseGradient& g, const GradientTask& t) {
  const int64_t per_group = g.channels / g.groups, parts = g.strips * g.tiles;
  const double n = double(per_group) * double(g.height) * double(g.width);
  const float* sums = g.sums + t.sample * parts * kGradientSums * g.padded + t.c0;
  for (int64_t c = 0; c < t.count; ++c) {
    double dz = 0, dzx = 0;
    for (int64_t s = 0; s < parts; ++s) {
      dz += sums[(s * kGradientSums + 10) * g.padded + c];
      dzx += sums[(s * kGradientSums + 11) * g.padded + c];
    }
    const float w = g.norm_weight[t.c0 + c];
    t.k3[c] = float(dz * w), t.k2[c] = float(dzx * w);
  }
  for (int64_t first = 0; first < t.count; first += per_group) {
    double total = 0, total_x = 0;
    for (int64_t c = first; c < first + per_group; ++c) total += t.k3[c], total_x += t.k2[c];
    for (int64_t c = first; c < first + per_group; ++c) {
      const float rstd = t.rstd[c];
      t.k1[c] = rstd * g.norm_weight[t.c0 + c];
      t.k2[c] = float(-rstd * (total_x / n)), t.k3[c] = float(-rstd * (total / n));
    }
  }
}

template <class T>
SG_INLINE void norm_pixels(const DepthwiseGradient& g, const GradientTask& t, int64_t first, int64_t last) {
  const int64_t C = g.channels, at = (t.sample * g.height * g.width + first) * C + t.c0;
  const T* x = static_cast<const T*>(g.x) + at;
  const T* extra = g.extra ? static_cast<const T*>(g.extra) + at : nullptr;
  T* dx = static_cast<T*>(g.dx) + at;
  for (int64_t p = first; p < last; ++p, x += C, dx += C) {
    SG_OVER_LANES(T, t.count, {
      const auto xhat = (load<N>(x + c) - load<N>(t.mean + c)) * load<N>(t.rstd + c);
      auto v = load<N>(dx + c) * load<N>(t.k1 + c) + load<N>(t.k3 + c) + xhat * load<N>(t.k2 + c);
      if (extra) v += load<N>(extra + c);
      store<N>(dx + c, v);
    })
    if (extra) extra += C;
  }
}

template <class T>
void depthwise_gradient(const DepthwiseGradient& g, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    const GradientTask t = gradient_task(g, task, scratch);
    if (g.groups) spread_statistics(g, t);
    float* sums = g.sums + (t.sample * g.strips * g.tiles + t.part) * kGradientSums * g.padded + t.c0;
    for (int64_t i = 0; i < kGradientSums; ++i)
      for (int64_t c = 0; c < t.blocks * kLanes; ++c) sums[i * g.padded + c] = 0;
    int64_t have_a = t.y0 > 0 ? t.y0 - 1 : 0, have_dd = -1;  // the next rows to load
    for (int64_t y = t.y0; y < t.y1; ++y) {
      for (; have_a <= y + 1 && have_a < g.height; ++have_a) load_activations<T>(g, t, have_a);
      // Rows of dd that row y of a meets: centres from y * scale - 1 to (y + 1) * scale.
      const int64_t low = (y * g.scale - 1 + g.stride - 1) / g.stride, high = (y + 1) * g.scale / g.stride;
      if (have_dd < 0) have_dd = low > 0 ? low : 0;
      for (; g.dd && have_dd <= high && have_dd < g.out_height; ++have_dd) load_gradients<T>(g, t, have_dd);
      for (int64_t b = 0; b < t.whole; ++b) gradient_block<T, true>(g, t, y, b, sums);
      for (int64_t b = t.whole; b < t.blocks; ++b) gradient_block<T, false>(g, t, y, b, sums);
    }
    if (g.finish) {
      norm_coefficients(g, t);
      norm_pixels<T>(g, t, 0, g.height * g.width);
    }
  }
}

// dz -> dx where the sums of a group come from several tasks. A task is a row of an image with all its channels.
template <class T>
void norm_gradient(const DepthwiseGradient& g, int64_t begin, int64_t end, float* scratch) {
  GradientTask t{};
  t.sample = -1, t.count = g.channels, t.blocks = g.padded / kLanes;
  t.mean = scratch, t.rstd = t.mean + g.padded, t.k1 = t.rstd + g.padded, t.k2 = t.k1 + g.padded, t.k3 = t.k2 + g.padded;
  for (int64_t task = begin; task < end; ++task) {
    if (t.sample != task / g.height) {
      t.sample = task / g.height;
      spread_statistics(g, t);
      norm_coefficients(g, t);
    }
    const int64_t y = task % g.height;
    norm_pixels<T>(g, t, y * g.width, (y + 1) * g.width);
  }
}

inline void merge_gradient_sums(const DepthwiseGradient& g, int64_t begin, int64_t end) {
  const int64_t count = g.batch * g.strips * g.tiles, step = kGradientSums * g.padded;
  for (int64_t i = begin * 16; i < end * 16; i += 16) {
    double total[16] = {};
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = 0; j < 16; ++j) total[j] += g.sums[k * step + i + j];
    for (int64_t j = 0; j < 16; ++j) g.merged[i + j] = float(total[j]);
  }
}

// ---- pointwise ----

constexpr int64_t kGradientBlocks = 4;  // column blocks of a C buffer

SG_INLINE int64_t bytes64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Whether rows of T are panels as they stand.
template <class T>
SG_INLINE bool is_panel(int64_t K) {
  return sizeof(Panel<T>) == sizeof(T) && K % kDepth<Panel<T>> == 0;
}

template <class T>
int64_t pointwise_gradient_scratch(const PointwiseGradient& g) {
  using P = Panel<T>;
  const int64_t rows = g.part * g.samples;
  const int64_t panel = is_panel<T>(g.outputs) ? 0 : bytes64(rows * padded<P>(g.outputs) * int64_t(sizeof(P)));
  return panel + rows * kGradientBlocks * kColumns * 4;
}

template <class T>
void pointwise_gradient(const PointwiseGradient& g, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  const int64_t K = g.outputs, N = g.channels, blocks = blocks_of(N), ldc = kGradientBlocks * kColumns;
  P* panel = static_cast<P*>(scratch);
  const bool direct = is_panel<T>(K);
  const int64_t packed_bytes = direct ? 0 : bytes64(g.part * g.samples * padded<P>(K) * int64_t(sizeof(P)));
  float* sum = reinterpret_cast<float*>(static_cast<char*>(scratch) + packed_bytes);
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    int64_t first, rows, sample = task / g.parts * g.samples;
    const int64_t samples = g.batch - sample < g.samples ? g.batch - sample : g.samples, part = task % g.parts;
    first = sample * g.pixels + part * g.part;
    rows = g.samples > 1 ? samples * g.pixels : g.pixels - part * g.part < g.part ? g.pixels - part * g.part : g.part;
    const T* dy = static_cast<const T*>(g.dy) + first * K;
    if (g.sums)
      for (int64_t s = 0; s < samples; ++s) {
        const int64_t count = rows / samples;
        const T* from = dy + s * count * K;
        double* sums = g.sums + ((sample + s) * g.parts + part) * K;
        for (int64_t c = 0; c < K; ++c) sums[c] = 0;
        for (int64_t p = 0; p < count; ++p, from += K)
          SG_OVER_LANES(T, K, {
            const auto wide_row = __builtin_convertvector(load<N>(from + c), Vec<double, N>);
            store<N>(sums + c, load<N>(sums + c) + wide_row);
          })
      }
    if (!g.dd) continue;
    const P* a;
    int64_t lda;
    if (direct) {
      a = reinterpret_cast<const P*>(dy), lda = K;
    } else {
      lda = padded<P>(K);
      pack_a<P, T>(dy, K, 1, rows, K, panel, lda);
      a = panel;
    }
    T* out = static_cast<T*>(g.dd) + first * N;
    for (int64_t j = 0; j < blocks; j += kGradientBlocks) {
      const int64_t some = blocks - j < kGradientBlocks ? blocks - j : kGradientBlocks, n0 = j * kColumns;
      const P* b = static_cast<const P*>(g.weight) + j * block_stride<P>(K);
      if constexpr (sizeof(T) == 4) {
        if (n0 + some * kColumns <= N) {
          gemm<P>(rows, some, K, a, lda, b, reinterpret_cast<float*>(out) + n0, N, false);
          continue;
        }
      }
      gemm<P>(rows, some, K, a, lda, b, sum, ldc, false);
      const int64_t columns = N - n0 < some * kColumns ? N - n0 : some * kColumns;
      for (int64_t m = 0; m < rows; ++m)
        SG_OVER_LANES(T, columns, { store<N>(out + m * g.channels + n0 + c, load<N>(sum + m * ldc + c)); })
    }
  }
  tiles_end();
}

// Elements of a row of the transposed dy in a slice: not a power of two, which would fall on few sets of the cache.
template <class P>
SG_INLINE int64_t slice_row(int64_t slice) {
  return padded<P>(slice) + 64 / int64_t(sizeof(P));
}

template <class T>
int64_t pointwise_weight_scratch(const PointwiseWeightGradient& g) {
  using P = Panel<T>;
  return bytes64(g.tile_outputs * slice_row<P>(g.slice) * int64_t(sizeof(P))) +
         packed_elements<P>(g.slice, g.tile_channels) * int64_t(sizeof(P));
}

template <class T>
void pointwise_weight_gradient(const PointwiseWeightGradient& g, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  P* a = static_cast<P*>(scratch);
  const int64_t lda = slice_row<P>(g.slice);
  P* b = reinterpret_cast<P*>(static_cast<char*>(scratch) + bytes64(g.tile_outputs * lda * int64_t(sizeof(P))));
  tiles_begin();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % g.parts, tile = task / g.parts;
    const int64_t o0 = tile / g.tiles_channels * g.tile_outputs, c0 = tile % g.tiles_channels * g.tile_channels;
    const int64_t M = g.outputs - o0 < g.tile_outputs ? g.outputs - o0 : g.tile_outputs;
    const int64_t N = g.channels - c0 < g.tile_channels ? g.channels - c0 : g.tile_channels;
    const int64_t last = (part + 1) * g.part < g.pixels ? (part + 1) * g.part : g.pixels;
    float* c = g.partial + (part * g.outputs + o0) * g.row + c0;
    for (int64_t k = part * g.part; k < last; k += g.slice) {
      const int64_t K = last - k < g.slice ? last - k : g.slice;
      pack_a<P, T>(static_cast<const T*>(g.dy) + k * g.outputs + o0, 1, g.outputs, M, K, a, lda);
      pack_b<P, T>(static_cast<const T*>(g.d) + k * g.channels + c0, g.channels, 1, K, N, b);
      gemm<P>(M, blocks_of(N), K, a, lda, b, c, g.row, g.accumulate || k > part * g.part);
    }
  }
  tiles_end();
}

template <class T>
void pointwise_weight_merge(const PointwiseWeightGradient& g, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; ++o) {
    const float* from = g.partial + o * g.row;
    T* out = static_cast<T*>(g.dw) + o * g.channels;
    SG_OVER_LANES(T, g.channels, {
      auto total = load<N>(from + c);
      for (int64_t k = 1; k < g.parts; ++k) total += load<N>(from + k * g.outputs * g.row + c);
      store<N>(out + c, total);
    })
  }
}

// ---- all of it, for small images ----

template <class T>
SG_INLINE int64_t separable_image_bytes(const SeparableGradient& g) {
  return bytes64(g.samples * g.pointwise.pixels * g.depthwise.channels * int64_t(sizeof(T)));
}

template <class T>
int64_t separable_gradient_scratch(const SeparableGradient& g) {
  const int64_t needs[3] = {pointwise_gradient_scratch<T>(g.pointwise), depthwise_scratch_floats(g.depthwise) * 4,
                            pointwise_weight_scratch<T>(g.weight)};
  int64_t most = 0;
  for (const int64_t bytes : needs) most = bytes > most ? bytes : most;
  return 2 * separable_image_bytes<T>(g) + most;
}

template <class T>
void separable_gradient(const SeparableGradient& g, int64_t begin, int64_t end, void* scratch) {
  const int64_t pixels = g.pointwise.pixels, O = g.pointwise.outputs, C = g.depthwise.channels;
  char* memory = static_cast<char*>(scratch);
  T *dd = reinterpret_cast<T*>(memory), *d = reinterpret_cast<T*>(memory + separable_image_bytes<T>(g));
  void* work = memory + 2 * separable_image_bytes<T>(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * g.part, last = first + g.part < g.depthwise.batch ? first + g.part : g.depthwise.batch;
    for (int64_t b = first; b < last; b += g.samples) {
      const int64_t count = last - b < g.samples ? last - b : g.samples;
      const T* dy = static_cast<const T*>(g.pointwise.dy) + b * pixels * O;
      PointwiseGradient outer = g.pointwise;
      outer.batch = count, outer.dy = dy, outer.dd = dd;
      if (outer.sums) outer.sums += b * O;
      pointwise_gradient<T>(outer, 0, 1, work);
      // The images in cache stand where those of samples [b, b + count) would.
      DepthwiseGradient inner = g.depthwise;
      inner.dd = dd - b * pixels * C, inner.d = d - b * pixels * C;
      depthwise_gradient<T>(inner, b, b + count, static_cast<float*>(work));
      PointwiseWeightGradient weight = g.weight;
      weight.pixels = weight.part = count * pixels, weight.parts = 1, weight.accumulate = b > first;
      weight.dy = dy, weight.d = d, weight.partial += task * weight.outputs * weight.row;
      pointwise_weight_gradient<T>(weight, 0, weight.tiles_outputs * weight.tiles_channels, work);
    }
  }
}

template <class T>
constexpr SepconvBackwardTable sepconv_backward_table() {
  return {depthwise_gradient<T>,        norm_gradient<T>,
          merge_gradient_sums,       pointwise_gradient<T>,
          pointwise_gradient_scratch<T>, pointwise_weight_gradient<T>,
          pointwise_weight_scratch<T>,  pointwise_weight_merge<T>,
          separable_gradient<T>,        separable_gradient_scratch<T>};
}
