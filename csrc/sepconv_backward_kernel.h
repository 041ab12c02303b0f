// Backward of the separable convolution. Included once per instruction set (see simd.h and gemm.h).
//
// The depthwise sweep walks down the rows of an image with a chunk of channels. It keeps three rows of a, the activation
// that it computes again from x, and four of dd, as fp32 in the order [block of kLanes channels][pixel][lane], with zeros
// around the image: from these rows come d, the sums for the weights, and the gradient of a, each in one pass along a row
// with taps and sums in registers.

// The first `count` of kLanes elements; zeros behind them.
template <class T>
SG_INLINE Vec<float, kLanes> load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load<kLanes>(p);
  T some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load<kLanes>(some);
}
template <class T>
SG_INLINE void store_some(T* p, Vec<float, kLanes> v, int64_t count) {
  if (count >= kLanes) return store<kLanes>(p, v);
  T some[kLanes];
  store<kLanes>(some, v);
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
}

struct GradientTask {
  int64_t sample, strip, c0, count, blocks;  // count: channels that are there
};

SG_INLINE GradientTask gradient_task(const DepthwiseGradient& g, int64_t task) {
  const int64_t chunk = task % g.chunks, at = task / g.chunks;
  const int64_t c0 = chunk * g.chunk, count = g.channels - c0 < g.chunk ? g.channels - c0 : g.chunk;
  return {at / g.strips, at % g.strips, c0, count, (count + kLanes - 1) / kLanes};
}

// The working memory of a task.
struct GradientRows {
  int64_t a_row, dd_row, slope_row;  // floats of one block's row
  float *a, *dd, *slope, *zero, *up;
  float *mean, *rstd, *k1, *k2, *k3;  // per channel of the chunk
  int64_t blocks;

  inline SG_LAMBDA float* a_at(int64_t y, int64_t block) const { return a + ((y % 3) * blocks + block) * a_row; }
  inline SG_LAMBDA float* slope_at(int64_t y, int64_t block) const { return slope + ((y % 3) * blocks + block) * slope_row; }
  inline SG_LAMBDA float* dd_at(int64_t y, int64_t block) const { return dd + ((y & 3) * blocks + block) * dd_row; }
};

SG_INLINE GradientRows gradient_rows(const DepthwiseGradient& g, float* scratch) {
  GradientRows r;
  const int64_t conv_width = g.width * g.scale, wide = conv_width > g.out_width ? conv_width : g.out_width;
  r.blocks = g.chunk / kLanes;
  r.a_row = (conv_width + 2) * kLanes, r.dd_row = (g.out_width + 3) * kLanes, r.slope_row = g.width * kLanes;
  r.a = scratch;
  r.dd = r.a + 3 * r.blocks * r.a_row;
  r.slope = r.dd + 4 * r.blocks * r.dd_row;
  r.mean = r.slope + 3 * r.blocks * r.slope_row;
  r.rstd = r.mean + g.chunk, r.k1 = r.rstd + g.chunk, r.k2 = r.k1 + g.chunk, r.k3 = r.k2 + g.chunk;
  r.zero = r.k3 + g.chunk;
  r.up = r.zero + (wide + 3) * kLanes;
  for (int64_t i = 0; i < (wide + 3) * kLanes; ++i) r.zero[i] = 0;
  return r;
}

// mean and rstd of every channel of the chunk; zeros behind the last.
SG_INLINE void spread_statistics(const DepthwiseGradient& g, int64_t sample, int64_t c0, int64_t count, float* mean,
                                 float* rstd) {
  const int64_t per_group = g.channels / g.groups;
  for (int64_t c = 0; c < g.chunk; ++c) mean[c] = rstd[c] = 0;
  for (int64_t group = c0 / per_group; group * per_group < c0 + count; ++group) {
    const float m = g.mean[sample * g.groups + group], r = g.rstd[sample * g.groups + group];
    const int64_t from = group * per_group < c0 ? 0 : group * per_group - c0, last = (group + 1) * per_group - c0;
    for (int64_t c = from; c < last && c < count; ++c) mean[c] = m, rstd[c] = r;
  }
}

constexpr int64_t kAhead = 8;  // pixels: the chunk of a pixel is a small part of its channels, so no prefetcher follows

// Row y of x -> a row of a and of d silu(z) / dz.
template <class T>
void load_activation(const DepthwiseGradient& g, const GradientTask& t, const GradientRows& r, int64_t y) {
  using V = Vec<float, kLanes>;
  const int64_t C = g.channels;
  const T* x = static_cast<const T*>(g.x) + ((t.sample * g.height + y) * g.width) * C + t.c0;
  float *a = r.a_at(y, 0), *slope = r.slope_at(y, 0);
  const V zero{};
  for (int64_t b = 0; b < t.blocks; ++b) {
    store<kLanes>(a + b * r.a_row, zero);
    store<kLanes>(a + (b + 1) * r.a_row - kLanes, zero);
  }
  for (int64_t p = 0; p < g.width; ++p, x += C) {
    for (int64_t b = 0; b < t.blocks; ++b) {
      const int64_t c = b * kLanes;
      __builtin_prefetch(x + kAhead * C + c);
      V v = load_some(x + c, t.count - c);
      if (g.groups) {
        const V xhat = (v - load<kLanes>(r.mean + c)) * load<kLanes>(r.rstd + c);
        const V z = xhat * load<kLanes>(g.norm_weight + t.c0 + c) + load<kLanes>(g.norm_bias + t.c0 + c);
        const V s = reciprocal<float, kLanes>(exp_of<kLanes>(-z) + 1.0f);
        v = z * s;
        store<kLanes>(slope + b * r.slope_row + p * kLanes, s + v * (1.0f - s));
      }
      float* out = a + b * r.a_row + kLanes;
      if (g.scale == 2) {
        store<kLanes>(out + 2 * p * kLanes, v);
        store<kLanes>(out + (2 * p + 1) * kLanes, v);
      } else {
        store<kLanes>(out + p * kLanes, v);
      }
    }
  }
}

template <class T>
void load_gradient(const DepthwiseGradient& g, const GradientTask& t, const GradientRows& r, int64_t y) {
  using V = Vec<float, kLanes>;
  const int64_t C = g.channels;
  const T* from = static_cast<const T*>(g.dd) + ((t.sample * g.out_height + y) * g.out_width) * C + t.c0;
  float* out = r.dd_at(y, 0);
  const V zero{};
  for (int64_t b = 0; b < t.blocks; ++b) {
    store<kLanes>(out + b * r.dd_row, zero);
    store<kLanes>(out + (b + 1) * r.dd_row - 2 * kLanes, zero);
    store<kLanes>(out + (b + 1) * r.dd_row - kLanes, zero);
  }
  for (int64_t p = 0; p < g.out_width; ++p, from += C)
    for (int64_t b = 0; b < t.blocks; ++b) {
      __builtin_prefetch(from + kAhead * C + b * kLanes);
      store<kLanes>(out + b * r.dd_row + (p + 1) * kLanes, load_some(from + b * kLanes, t.count - b * kLanes));
    }
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
template <class T, bool store_d, bool weights>
SG_INLINE void gradient_outputs(const DepthwiseGradient& g, const float* r0, const float* r1, const float* r2, const float* dd,
                                const float* taps, const float* bias, T* d, int64_t count, float* sums) {
  using V = Vec<float, kLanes>;
  V k[9], acc[9] = {}, total{};
  const V offset = load<kLanes>(bias);
  if (store_d)
    for (int i = 0; i < 9; ++i) k[i] = load<kLanes>(taps + i * g.padded);
  if (g.stride == 1) {
    V first{}, second{}, g1{}, g2{};  // g0, g1, g2: dd at columns j, j - 1, j - 2 of the image
    for (int64_t j = 0; j < g.out_width + 2; ++j) {
      const V u = load<kLanes>(r0 + j * kLanes), v = load<kLanes>(r1 + j * kLanes), w = load<kLanes>(r2 + j * kLanes);
      if constexpr (weights) {
        const V g0 = load<kLanes>(dd + (j + 1) * kLanes);  // a column of zeros follows the last
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
        if (j >= 2) store_some(d + (j - 2) * g.channels, value + offset, count);
      }
    }
  } else {
    for (int64_t x = 0; x < g.out_width; ++x) {
      const V g0 = load<kLanes>(dd + (x + 1) * kLanes);
      V value = offset;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const int64_t at = (2 * x + i) * kLanes;
        const V u = load<kLanes>(r0 + at), v = load<kLanes>(r1 + at), w = load<kLanes>(r2 + at);
        if constexpr (store_d) value += u * k[i] + v * k[3 + i] + w * k[6 + i];
        if constexpr (weights) acc[i] += u * g0, acc[3 + i] += v * g0, acc[6 + i] += w * g0;
      }
      if constexpr (weights) total += g0;
      if constexpr (store_d) store_some(d + x * g.channels, value, count);
    }
  }
  if constexpr (weights) {
    for (int i = 0; i < 9; ++i) store<kLanes>(sums + i * g.padded, load<kLanes>(sums + i * g.padded) + acc[i]);
    store<kLanes>(sums + 9 * g.padded, load<kLanes>(sums + 9 * g.padded) + total);
  }
}

// The gradient of row `row` of the convolution's input -> out, where that is not simply convolve().
SG_INLINE void gradient_of_row(const DepthwiseGradient& g, const GradientRows& r, int64_t row, int64_t block,
                               const Vec<float, kLanes>* k, float* out) {
  using V = Vec<float, kLanes>;
  const int64_t width = g.width * g.scale;
  const auto at = [&](int64_t y) SG_LAMBDA -> const float* {
    return y < 0 || y >= g.out_height ? r.zero : r.dd_at(y, block);
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
  const float* upper = odd ? at((row - 1) / 2) : r.zero;
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
template <class T>
SG_INLINE void gradient_inputs(const DepthwiseGradient& g, const GradientTask& t, const GradientRows& r, int64_t y,
                               int64_t block, float* sums) {
  using V = Vec<float, kLanes>;
  const int64_t C = g.channels, c = block * kLanes, count = t.count - c;
  const int64_t pixel = ((t.sample * g.height + y) * g.width) * C + t.c0 + c;
  const T* x = static_cast<const T*>(g.x) + pixel;
  const T* extra = g.extra && !g.groups ? static_cast<const T*>(g.extra) + pixel : nullptr;
  T* dx = g.dx ? static_cast<T*>(g.dx) + pixel : nullptr;
  const float* slope = g.groups ? r.slope_at(y, block) : nullptr;
  const V mean = g.groups ? load<kLanes>(r.mean + c) : V{}, rstd = g.groups ? load<kLanes>(r.rstd + c) : V{};
  V sum{}, sum_x{};
  const auto emit = [&](int64_t p, V da) SG_LAMBDA {
    if (slope) {
      da *= load<kLanes>(slope + p * kLanes);
      const V xhat = (load_some(x + p * C, count) - mean) * rstd;
      sum += da, sum_x += da * xhat;
    } else if (extra) {
      da += load_some(extra + p * C, count);
    }
    if (dx) store_some(dx + p * C, da, count);
  };
  V k[9];
  for (int i = 0; i < 9; ++i) k[i] = load<kLanes>(g.taps + i * g.padded + t.c0 + c);
  if (g.stride == 1 && g.scale == 1) {
    V flipped[9];
    for (int i = 0; i < 9; ++i) flipped[i] = k[8 - i];
    convolve(y > 0 ? r.dd_at(y - 1, block) : r.zero, r.dd_at(y, block), y + 1 < g.out_height ? r.dd_at(y + 1, block) : r.zero,
             flipped, g.width, emit);
  } else {
    const int64_t width = g.width * g.scale;
    for (int64_t i = 0; i < g.scale; ++i) gradient_of_row(g, r, y * g.scale + i, block, k, r.up + i * width * kLanes);
    for (int64_t p = 0; p < g.width; ++p) {
      const float* u = r.up + g.scale * p * kLanes;
      V da = load<kLanes>(u);
      if (g.scale == 2) {
        const float* lower = u + width * kLanes;
        da = (da + load<kLanes>(u + kLanes)) + (load<kLanes>(lower) + load<kLanes>(lower + kLanes));
      }
      emit(p, da);
    }
  }
  if (g.groups) {
    store<kLanes>(sums + 10 * g.padded, load<kLanes>(sums + 10 * g.padded) + sum);
    store<kLanes>(sums + 11 * g.padded, load<kLanes>(sums + 11 * g.padded) + sum_x);
  }
}

// What turns dz into dx: dx = k1 dz + k2 xhat + k3, of the channels [c0, c0 + count).
SG_INLINE void norm_coefficients(const DepthwiseGradient& g, const GradientTask& t, const GradientRows& r) {
  const int64_t per_group = g.channels / g.groups;
  const double n = double(per_group) * double(g.height) * double(g.width);
  const float* sums = g.sums + t.sample * g.strips * kGradientSums * g.padded + t.c0;
  for (int64_t c = 0; c < t.count; ++c) {
    double dz = 0, dzx = 0;
    for (int64_t s = 0; s < g.strips; ++s) {
      dz += sums[(s * kGradientSums + 10) * g.padded + c];
      dzx += sums[(s * kGradientSums + 11) * g.padded + c];
    }
    const float w = g.norm_weight[t.c0 + c];
    r.k3[c] = float(dz * w), r.k2[c] = float(dzx * w);
  }
  for (int64_t first = 0; first < t.count; first += per_group) {
    double total = 0, total_x = 0;
    for (int64_t c = first; c < first + per_group; ++c) total += r.k3[c], total_x += r.k2[c];
    for (int64_t c = first; c < first + per_group; ++c) {
      const float rstd = r.rstd[c];
      r.k1[c] = rstd * g.norm_weight[t.c0 + c];
      r.k2[c] = float(-rstd * (total_x / n)), r.k3[c] = float(-rstd * (total / n));
    }
  }
}

template <class T>
SG_INLINE void norm_pixels(const DepthwiseGradient& g, const GradientTask& t, const GradientRows& r, int64_t first,
                           int64_t last) {
  using V = Vec<float, kLanes>;
  const int64_t C = g.channels;
  int64_t at = (t.sample * g.height * g.width + first) * C + t.c0;
  const T* x = static_cast<const T*>(g.x);
  const T* extra = static_cast<const T*>(g.extra);
  T* dx = static_cast<T*>(g.dx);
  for (int64_t p = first; p < last; ++p, at += C)
    for (int64_t c = 0; c < t.count; c += kLanes) {
      const int64_t count = t.count - c;
      const V xhat = (load_some(x + at + c, count) - load_some(r.mean + c, count)) * load_some(r.rstd + c, count);
      V v = load_some(dx + at + c, count) * load_some(r.k1 + c, count) + load_some(r.k3 + c, count);
      v += xhat * load_some(r.k2 + c, count);
      if (extra) v += load_some(extra + at + c, count);
      store_some(dx + at + c, v, count);
    }
}

template <class T>
void depthwise_gradient(const DepthwiseGradient& g, int64_t begin, int64_t end, float* scratch) {
  const GradientRows r = gradient_rows(g, scratch);
  const int64_t conv_height = g.height * g.scale;
  for (int64_t task = begin; task < end; ++task) {
    const GradientTask t = gradient_task(g, task);
    if (g.groups) spread_statistics(g, t.sample, t.c0, t.count, r.mean, r.rstd);
    float* sums = g.sums + (t.sample * g.strips + t.strip) * kGradientSums * g.padded + t.c0;
    for (int64_t i = 0; i < kGradientSums; ++i)
      for (int64_t c = 0; c < t.blocks * kLanes; ++c) sums[i * g.padded + c] = 0;
    const int64_t y0 = t.strip * g.rows, y1 = y0 + g.rows < g.height ? y0 + g.rows : g.height;
    int64_t have_a = y0 > 0 ? y0 - 1 : 0, have_dd = -1;  // the next rows to load
    for (int64_t y = y0; y < y1; ++y) {
      for (; have_a <= y + 1 && have_a < g.height; ++have_a) load_activation<T>(g, t, r, have_a);
      // Rows of dd that row y of a meets: centres from y * scale - 1 to (y + 1) * scale.
      const int64_t low = (y * g.scale - 1 + g.stride - 1) / g.stride, high = (y + 1) * g.scale / g.stride;
      if (have_dd < 0) have_dd = low > 0 ? low : 0;
      for (; g.dd && have_dd <= high && have_dd < g.out_height; ++have_dd) load_gradient<T>(g, t, r, have_dd);
      for (int64_t b = 0; b < t.blocks; ++b) {
        const int64_t c = b * kLanes;
        if (g.d || g.weights) {
          const auto row = [&](int64_t i) SG_LAMBDA -> const float* {
            return i < 0 || i >= conv_height ? r.zero : r.a_at(g.scale == 2 ? i / 2 : i, b);
          };
          for (int64_t o = (y * g.scale + g.stride - 1) / g.stride; o * g.stride < (y + 1) * g.scale; ++o) {
            const float *r0 = row(o * g.stride - 1), *r1 = row(o * g.stride), *r2 = row(o * g.stride + 1);
            const float *dd = r.dd_at(o, b), *taps = g.taps + t.c0 + c, *bias = g.bias + t.c0 + c;
            T* d = static_cast<T*>(g.d);
            if (d) d += ((t.sample * g.out_height + o) * g.out_width) * g.channels + t.c0 + c;
            if (g.d && g.weights) gradient_outputs<T, true, true>(g, r0, r1, r2, dd, taps, bias, d, t.count - c, sums + c);
            else if (g.d) gradient_outputs<T, true, false>(g, r0, r1, r2, dd, taps, bias, d, t.count - c, sums + c);
            else gradient_outputs<T, false, true>(g, r0, r1, r2, dd, taps, bias, d, t.count - c, sums + c);
          }
        }
        if (g.inputs) gradient_inputs<T>(g, t, r, y, b, sums + c);
      }
    }
    if (g.finish) {
      norm_coefficients(g, t, r);
      norm_pixels<T>(g, t, r, 0, g.height * g.width);
    }
  }
}

// dz -> dx where the sums of a group come from several tasks. A task is a strip with all its channels.
template <class T>
void norm_gradient(const DepthwiseGradient& g, int64_t begin, int64_t end, float* scratch) {
  GradientRows r;
  r.mean = scratch, r.rstd = r.mean + g.padded, r.k1 = r.rstd + g.padded, r.k2 = r.k1 + g.padded, r.k3 = r.k2 + g.padded;
  int64_t sample = -1;
  for (int64_t task = begin; task < end; ++task) {
    const GradientTask t{task / g.height, 0, 0, g.channels, 0};
    if (t.sample != sample) {
      DepthwiseGradient whole = g;
      whole.chunk = g.padded;
      spread_statistics(whole, sample = t.sample, 0, g.channels, r.mean, r.rstd);
      norm_coefficients(g, t, r);
    }
    const int64_t y = task % g.height;
    norm_pixels<T>(g, t, r, y * g.width, (y + 1) * g.width);
  }
}

inline void merge_gradient_sums(const DepthwiseGradient& g, int64_t begin, int64_t end) {
  const int64_t count = g.batch * g.strips, step = kGradientSums * g.padded;
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
  float* c = reinterpret_cast<float*>(static_cast<char*>(scratch) + packed_bytes);
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
      gemm<P>(rows, some, K, a, lda, b, c, ldc, false);
      const int64_t columns = N - n0 < some * kColumns ? N - n0 : some * kColumns;
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; n += kLanes)
          store_some(out + m * N + n0 + n, load<kLanes>(c + m * ldc + n), columns - n);
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
         bytes64(packed_elements<P>(g.slice, g.tile_channels) * int64_t(sizeof(P))) +
         (sizeof(P) == 4 ? g.tile_outputs * kGradientBlocks * kColumns * 4 : 0);
}

template <class T>
void pointwise_weight_gradient(const PointwiseWeightGradient& g, int64_t begin, int64_t end, void* scratch) {
  using P = Panel<T>;
  P* a = static_cast<P*>(scratch);
  const int64_t lda = slice_row<P>(g.slice);
  P* b = reinterpret_cast<P*>(static_cast<char*>(scratch) + bytes64(g.tile_outputs * lda * int64_t(sizeof(P))));
  float* sum = reinterpret_cast<float*>(reinterpret_cast<char*>(b) +
                                        bytes64(packed_elements<P>(g.slice, g.tile_channels) * int64_t(sizeof(P))));
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
      const bool first = k == part * g.part;
      if (sizeof(P) == 2 || first) {
        gemm<P>(M, blocks_of(N), K, a, lda, b, c, g.row, !first);
        continue;
      }
      // The sum of a slice is added as a whole: one long chain of fp32 additions would lose twice the digits.
      for (int64_t j = 0; j < blocks_of(N); j += kGradientBlocks) {
        const int64_t some = blocks_of(N) - j < kGradientBlocks ? blocks_of(N) - j : kGradientBlocks;
        const int64_t columns = some * kColumns;
        gemm<P>(M, some, K, a, lda, b + j * block_stride<P>(K), sum, columns, false);
        for (int64_t m = 0; m < M; ++m) {
          float* to = c + m * g.row + j * kColumns;
          for (int64_t n = 0; n < columns; n += kLanes)
            store<kLanes>(to + n, load<kLanes>(to + n) + load<kLanes>(sum + m * columns + n));
        }
      }
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

template <class T>
constexpr SepconvBackwardTable sepconv_backward_table() {
  return {depthwise_gradient<T>,        norm_gradient<T>,
          merge_gradient_sums,       pointwise_gradient<T>,
          pointwise_gradient_scratch<T>, pointwise_weight_gradient<T>,
          pointwise_weight_scratch<T>,  pointwise_weight_merge<T>,
          kColumns};
}
