// GroupNorm + SiLU, forward and backward, on chunks. Included once per instruction set (see simd.h).
//
// Statistics of a chunk take two passes over data that the first pass left in the cache: the mean, then the sum of squared
// deviations from it. Chunks are merged by the driver (Chan) in double. No E[x^2] - E[x]^2 anywhere.
//
// The backward keeps dz, the gradient before SiLU, in the memory of dx between its two passes: that takes less than to
// compute it twice, and eager rounds it to the dtype of x too.

template <class A, int N>
SG_INLINE Vec<A, N> silu(Vec<A, N> z) {
  return z * reciprocal<A, N>(exp_of<N>(-z) + A(1));
}

// dy * d silu(z) / dz
template <class A, int N>
SG_INLINE Vec<A, N> silu_gradient(Vec<A, N> z, Vec<A, N> dy) {
  auto s = reciprocal<A, N>(exp_of<N>(-z) + A(1));
  return dy * (s * (z * (A(1) - s) + A(1)));
}

struct Chunk {
  int64_t sample, first, count;
};

SG_INLINE Chunk chunk_of(const GroupNormSilu& g, int64_t task, int64_t length) {
  const int64_t sample = task / g.chunks, first = (task % g.chunks) * g.chunk;
  const int64_t rest = length - first;
  return {sample, first, rest < g.chunk ? rest : g.chunk};
}

// ---- channels_last: a chunk is g.chunk pixels of a sample ----

template <class T>
void moments_last(const GroupNormSilu& g, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t C = g.channels, per_group = C / g.groups;
  A* sum = static_cast<A*>(scratch);
  A* center = sum + C;
  A* square = sum + 2 * C;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk k = chunk_of(g, task, g.pixels);
    const T* x = static_cast<const T*>(g.x) + (k.sample * g.pixels + k.first) * C;
    for (int64_t c = 0; c < C; ++c) sum[c] = 0;
    int64_t p = 0;
    for (; p + 4 <= k.count; p += 4) {
      const T* r = x + p * C;
      SG_OVER_LANES(T, C, {
        auto a = load<N>(r + c) + load<N>(r + C + c), b = load<N>(r + 2 * C + c) + load<N>(r + 3 * C + c);
        store<N>(sum + c, load<N>(sum + c) + (a + b));
      })
    }
    for (; p < k.count; ++p) {
      const T* r = x + p * C;
      SG_OVER_LANES(T, C, { store<N>(sum + c, load<N>(sum + c) + load<N>(r + c)); })
    }
    const double n = double(per_group) * double(k.count);
    for (int64_t i = 0; i < g.groups; ++i) {
      double total = 0;
      for (int64_t c = i * per_group; c < (i + 1) * per_group; ++c) total += sum[c];
      for (int64_t c = i * per_group; c < (i + 1) * per_group; ++c) {
        center[c] = A(total / n);
        sum[c] = 0;
        square[c] = 0;
      }
    }
    for (p = 0; p + 4 <= k.count; p += 4) {
      const T* r = x + p * C;
      SG_OVER_LANES(T, C, {
        const auto m = load<N>(center + c);
        auto d0 = load<N>(r + c) - m, d1 = load<N>(r + C + c) - m;
        auto d2 = load<N>(r + 2 * C + c) - m, d3 = load<N>(r + 3 * C + c) - m;
        store<N>(sum + c, load<N>(sum + c) + ((d0 + d1) + (d2 + d3)));
        store<N>(square + c, load<N>(square + c) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)));
      })
    }
    for (; p < k.count; ++p) {
      const T* r = x + p * C;
      SG_OVER_LANES(T, C, {
        auto d = load<N>(r + c) - load<N>(center + c);
        store<N>(sum + c, load<N>(sum + c) + d);
        store<N>(square + c, load<N>(square + c) + d * d);
      })
    }
    // What the rounded centre left over corrects the mean and the squares.
    for (int64_t i = 0; i < g.groups; ++i) {
      double off = 0, squares = 0;
      for (int64_t c = i * per_group; c < (i + 1) * per_group; ++c) off += sum[c], squares += square[c];
      g.moments[(task * g.groups + i) * 2] = center[i * per_group] + off / n;
      g.moments[(task * g.groups + i) * 2 + 1] = squares - off * off / n;
    }
  }
}

// Per channel: mean, rstd, weight, bias into four rows of scratch.
template <class A>
SG_INLINE void spread(const GroupNormSilu& g, int64_t sample, A* rows) {
  const int64_t C = g.channels, per_group = C / g.groups;
  const A* mean = static_cast<const A*>(g.mean) + sample * g.groups;
  const A* rstd = static_cast<const A*>(g.rstd) + sample * g.groups;
  const A* weight = static_cast<const A*>(g.weight);
  const A* bias = static_cast<const A*>(g.bias);
  for (int64_t i = 0; i < g.groups; ++i)
    for (int64_t c = i * per_group; c < (i + 1) * per_group; ++c) {
      rows[c] = mean[i];
      rows[C + c] = rstd[i];
      rows[2 * C + c] = weight[c];
      rows[3 * C + c] = bias[c];
    }
}

template <class T>
void apply_last(const GroupNormSilu& g, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t C = g.channels;
  A* mean = static_cast<A*>(scratch);
  A *scale = mean + C, *bias = mean + 3 * C;
  int64_t sample = -1;
  // Backwards: the chunks that the statistics read last are still in the cache.
  for (int64_t task = end - 1; task >= begin; --task) {
    const Chunk k = chunk_of(g, task, g.pixels);
    if (k.sample != sample) {
      spread<A>(g, sample = k.sample, mean);
      for (int64_t c = 0; c < C; ++c) scale[c] *= mean[2 * C + c];
    }
    const int64_t at = (k.sample * g.pixels + k.first) * C;
    const T* x = static_cast<const T*>(g.x) + at;
    T* y = static_cast<T*>(g.out) + at;
    for (int64_t p = 0; p < k.count; ++p, x += C, y += C) {
      SG_OVER_LANES(T, C, {
        auto z = (load<N>(x + c) - load<N>(mean + c)) * load<N>(scale + c) + load<N>(bias + c);
        store<N>(y + c, silu<A, N>(z));
      })
    }
  }
}

template <class T>
void sums_last(const GroupNormSilu& g, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t C = g.channels;
  A* mean = static_cast<A*>(scratch);
  A *rstd = mean + C, *weight = mean + 2 * C, *bias = mean + 3 * C;
  int64_t sample = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk k = chunk_of(g, task, g.pixels);
    if (k.sample != sample) spread<A>(g, sample = k.sample, mean);
    const int64_t at = (k.sample * g.pixels + k.first) * C;
    const T* x = static_cast<const T*>(g.x) + at;
    const T* dy = static_cast<const T*>(g.dy) + at;
    T* kept = g.out ? static_cast<T*>(g.out) + at : nullptr;
    A* dz_sum = static_cast<A*>(g.sums) + task * 2 * C;
    A* dzx_sum = dz_sum + C;
    for (int64_t c = 0; c < 2 * C; ++c) dz_sum[c] = 0;
    for (int64_t p = 0; p < k.count; ++p, x += C, dy += C) {
      SG_OVER_LANES(T, C, {
        auto xhat = (load<N>(x + c) - load<N>(mean + c)) * load<N>(rstd + c);
        auto dz = silu_gradient<A, N>(xhat * load<N>(weight + c) + load<N>(bias + c), load<N>(dy + c));
        if (kept) store<N>(kept + p * C + c, dz);
        store<N>(dz_sum + c, load<N>(dz_sum + c) + dz);
        store<N>(dzx_sum + c, load<N>(dzx_sum + c) + dz * xhat);
      })
    }
  }
}

template <class T>
void gradient_last(const GroupNormSilu& g, int64_t begin, int64_t end, void* scratch) {
  using A = Acc<T>;
  const int64_t C = g.channels, per_group = C / g.groups;
  A* mean = static_cast<A*>(scratch);
  A *rstd = mean + C, *weight = mean + 2 * C, *mean_g = mean + 4 * C, *mean_gx = mean + 5 * C;
  int64_t sample = -1;
  for (int64_t task = end - 1; task >= begin; --task) {
    const Chunk k = chunk_of(g, task, g.pixels);
    if (k.sample != sample) {
      spread<A>(g, sample = k.sample, mean);
      for (int64_t i = 0; i < g.groups; ++i)
        for (int64_t c = i * per_group; c < (i + 1) * per_group; ++c) {
          mean_g[c] = static_cast<const A*>(g.mean_g)[sample * g.groups + i];
          mean_gx[c] = static_cast<const A*>(g.mean_gx)[sample * g.groups + i];
        }
    }
    const int64_t at = (k.sample * g.pixels + k.first) * C;
    const T* x = static_cast<const T*>(g.x) + at;
    T* dx = static_cast<T*>(g.out) + at;
    for (int64_t p = 0; p < k.count; ++p, x += C, dx += C) {
      SG_OVER_LANES(T, C, {
        const auto r = load<N>(rstd + c);
        auto xhat = (load<N>(x + c) - load<N>(mean + c)) * r;
        auto dz = load<N>(dx + c);
        store<N>(dx + c, r * (dz * load<N>(weight + c) - load<N>(mean_g + c) - xhat * load<N>(mean_gx + c)));
      })
    }
  }
}

// ---- contiguous: a chunk is g.chunk elements of a run (a group for the statistics, a channel elsewhere) ----

template <class T>
void moments_contiguous(const GroupNormSilu& g, int64_t begin, int64_t end, void*) {
  using A = Acc<T>;
  const int64_t run = g.channels / g.groups * g.pixels;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk k = chunk_of(g, task, run);  // sample: index of the group over the whole batch
    const T* x = static_cast<const T*>(g.x) + k.sample * run + k.first;
    Vec<A, Accumulate<T>::lanes> wide{};
    Vec<A, 1> tail{};
    SG_OVER_LANES(T, k.count, {
      if constexpr (N > 1) wide += load<Accumulate<T>::lanes>(x + c);
      else tail += load<1>(x + c);
    })
    const double n = double(k.count);
    const double total = sum_lanes<A, Accumulate<T>::lanes>(wide) + tail[0];
    const A center = A(total / n);
    Vec<A, Accumulate<T>::lanes> off{}, square{};
    Vec<A, 1> off_tail{}, square_tail{};
    SG_OVER_LANES(T, k.count, {
      auto d = load<N>(x + c) - center;
      if constexpr (N > 1) off += d, square += d * d;
      else off_tail += d, square_tail += d * d;
    })
    const double rest = sum_lanes<A, Accumulate<T>::lanes>(off) + off_tail[0];
    const double squares = sum_lanes<A, Accumulate<T>::lanes>(square) + square_tail[0];
    g.moments[task * 2] = center + rest / n;
    g.moments[task * 2 + 1] = squares - rest * rest / n;
  }
}

template <class T>
struct Channel {
  Acc<T> mean, rstd, weight, bias;
  int64_t group;
};

template <class T>
SG_INLINE Channel<T> channel_of(const GroupNormSilu& g, int64_t index) {
  using A = Acc<T>;
  const int64_t sample = index / g.channels, c = index % g.channels;
  const int64_t group = sample * g.groups + c / (g.channels / g.groups);
  return {static_cast<const A*>(g.mean)[group], static_cast<const A*>(g.rstd)[group],
          static_cast<const A*>(g.weight)[c], static_cast<const A*>(g.bias)[c], group};
}

template <class T>
void apply_contiguous(const GroupNormSilu& g, int64_t begin, int64_t end, void*) {
  using A = Acc<T>;
  for (int64_t task = end - 1; task >= begin; --task) {
    const Chunk k = chunk_of(g, task, g.pixels);
    const Channel<T> ch = channel_of<T>(g, k.sample);
    const A scale = ch.rstd * ch.weight;
    const T* x = static_cast<const T*>(g.x) + k.sample * g.pixels + k.first;
    T* y = static_cast<T*>(g.out) + k.sample * g.pixels + k.first;
    SG_OVER_LANES(T, k.count, { store<N>(y + c, silu<A, N>((load<N>(x + c) - ch.mean) * scale + ch.bias)); })
  }
}

template <class T>
void sums_contiguous(const GroupNormSilu& g, int64_t begin, int64_t end, void*) {
  using A = Acc<T>;
  for (int64_t task = begin; task < end; ++task) {
    const Chunk k = chunk_of(g, task, g.pixels);
    const Channel<T> ch = channel_of<T>(g, k.sample);
    const T* x = static_cast<const T*>(g.x) + k.sample * g.pixels + k.first;
    const T* dy = static_cast<const T*>(g.dy) + k.sample * g.pixels + k.first;
    T* kept = g.out ? static_cast<T*>(g.out) + k.sample * g.pixels + k.first : nullptr;
    Vec<A, Accumulate<T>::lanes> dz_sum{}, dzx_sum{};
    Vec<A, 1> dz_tail{}, dzx_tail{};
    SG_OVER_LANES(T, k.count, {
      auto xhat = (load<N>(x + c) - ch.mean) * ch.rstd;
      auto dz = silu_gradient<A, N>(xhat * ch.weight + ch.bias, load<N>(dy + c));
      if (kept) store<N>(kept + c, dz);
      if constexpr (N > 1) dz_sum += dz, dzx_sum += dz * xhat;
      else dz_tail += dz, dzx_tail += dz * xhat;
    })
    A* out = static_cast<A*>(g.sums) + task * 2;
    out[0] = A(sum_lanes<A, Accumulate<T>::lanes>(dz_sum) + dz_tail[0]);
    out[1] = A(sum_lanes<A, Accumulate<T>::lanes>(dzx_sum) + dzx_tail[0]);
  }
}

template <class T>
void gradient_contiguous(const GroupNormSilu& g, int64_t begin, int64_t end, void*) {
  using A = Acc<T>;
  for (int64_t task = end - 1; task >= begin; --task) {
    const Chunk k = chunk_of(g, task, g.pixels);
    const Channel<T> ch = channel_of<T>(g, k.sample);
    const A mean_g = static_cast<const A*>(g.mean_g)[ch.group], mean_gx = static_cast<const A*>(g.mean_gx)[ch.group];
    const int64_t at = k.sample * g.pixels + k.first;
    const T* x = static_cast<const T*>(g.x) + at;
    T* dx = static_cast<T*>(g.out) + at;
    SG_OVER_LANES(T, k.count, {
      auto xhat = (load<N>(x + c) - ch.mean) * ch.rstd;
      store<N>(dx + c, ch.rstd * (load<N>(dx + c) * ch.weight - mean_g - xhat * mean_gx));
    })
  }
}

template <class T>
constexpr GroupNormSiluTable group_norm_silu_table() {
  return {moments_last<T>,       apply_last<T>,       sums_last<T>,       gradient_last<T>,
          moments_contiguous<T>, apply_contiguous<T>, sums_contiguous<T>, gradient_contiguous<T>};
}
