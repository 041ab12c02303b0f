// What the drivers of normalising ops share: layouts, parameters, statistics of groups.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

namespace snapgen {

inline bool is_contiguous_as(const torch::stable::Tensor& x, bool channels_last) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t last[4] = {height * width * channels, 1, width * channels, channels};
  const int64_t plain[4] = {channels * height * width, height * width, width, 1};
  for (int64_t d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != (channels_last ? last : plain)[d]) return false;
  return true;
}

// The parameters in the accumulation type, whatever theirs is.
template <class A>
std::vector<A> widened(const torch::stable::Tensor& parameter, const char* name) {
  using torch::headeronly::ScalarType;
  const torch::stable::Tensor dense = torch::stable::contiguous(parameter);
  const int64_t n = dense.numel();
  std::vector<A> out(n);
  const void* data = dense.const_data_ptr();
  switch (dense.scalar_type()) {
    case ScalarType::Float:
      std::copy_n(static_cast<const float*>(data), n, out.begin());
      break;
    case ScalarType::Double:
      std::copy_n(static_cast<const double*>(data), n, out.begin());
      break;
    case ScalarType::BFloat16:
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[i]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        out[i] = A(value);
      }
      break;
    default:
      STD_TORCH_CHECK(false, "snapgen (CPU): ", name, " must be float32, float64 or bfloat16");
  }
  return out;
}

// Sums in the dtype of their parameter.
inline void store_parameter(const std::vector<double>& values, torch::stable::Tensor& out) {
  using torch::headeronly::ScalarType;
  const int64_t n = int64_t(values.size());
  switch (out.scalar_type()) {
    case ScalarType::Float:
      std::copy_n(values.begin(), n, static_cast<float*>(out.mutable_data_ptr()));
      break;
    case ScalarType::Double:
      std::copy_n(values.begin(), n, static_cast<double*>(out.mutable_data_ptr()));
      break;
    default:  // bfloat16: widened() has refused everything else
      for (int64_t i = 0; i < n; ++i) {
        const float value = float(values[i]);
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        static_cast<uint16_t*>(out.mutable_data_ptr())[i] = value != value ? 0x7fc0 : uint16_t(rounded >> 16);
      }
  }
}

// Chan's merge of the moments of parts, in the order of the calls: sums do not depend on who computed the parts.
class Moments {
 public:
  void add(double length, double mean, double squares) {
    const double delta = mean - center_, sum = n_ + length;
    if (sum == 0) return;
    squares_ += squares + delta * delta * (n_ * length / sum);
    center_ += delta * (length / sum);
    n_ = sum;
  }
  double mean() const { return n_ > 0 ? center_ : std::numeric_limits<double>::quiet_NaN(); }
  double rstd(double eps) const {
    return n_ > 0 ? 1.0 / std::sqrt(std::max(squares_ / n_, 0.0) + eps) : std::numeric_limits<double>::quiet_NaN();
  }

 private:
  double n_ = 0, center_ = 0, squares_ = 0;
};

inline const GroupNormSiluTable& group_norm_silu_table(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return kernels().group_norm_silu_f32;
    case ScalarType::BFloat16:
      return kernels().group_norm_silu_bf16;
    case ScalarType::Double:
      return kernels().group_norm_silu_f64;
    default:
      STD_TORCH_CHECK(false, "snapgen (CPU): x must be float32, float64 or bfloat16");
  }
}

// How the passes over a dense x [B, C, H, W] are cut into tasks; its statistics.
struct NormPlan {
  GroupNormSilu args{};
  bool last;
  int64_t group_tasks, tasks;  // of the statistics; of everything else
  int64_t group_chunk, group_chunks;
  // Bytes of x in a chunk: small enough for the second pass to find them in the first two caches.
  static constexpr int64_t kChunkBytes = 32768;

  NormPlan(const torch::stable::Tensor& x, int64_t groups, bool channels_last) : last(channels_last) {
    args.batch = x.size(0);
    args.channels = x.size(1);
    args.pixels = x.size(2) * x.size(3);
    args.groups = groups;
    args.x = x.const_data_ptr();
    const int64_t elements = std::max<int64_t>(kChunkBytes / int64_t(x.element_size()), 1);
    if (last) {
      args.chunk = std::max<int64_t>(elements / std::max<int64_t>(args.channels, 1) / 4 * 4, 16);
      args.chunks = (args.pixels + args.chunk - 1) / args.chunk;
      tasks = group_tasks = args.batch * args.chunks;
      group_chunk = args.chunk, group_chunks = args.chunks;
    } else {
      args.chunk = group_chunk = elements;
      args.chunks = (args.pixels + args.chunk - 1) / args.chunk;
      group_chunks = (args.channels / groups * args.pixels + group_chunk - 1) / group_chunk;
      tasks = args.batch * args.channels * args.chunks;
      group_tasks = args.batch * groups * group_chunks;
    }
  }

  // Tasks that one thread should at least have, so that small tensors stay on one.
  int64_t grain(int64_t count) const {
    const int64_t total = args.batch * args.channels * args.pixels;
    return std::max<int64_t>(1, count * 32768 / std::max<int64_t>(total, 1));
  }

  template <class A>
  void run(GroupNormSiluTask task, int64_t count) const {
    torch::stable::parallel_for(0, count, grain(count), [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(last ? 6 * args.channels : 0);
      task(args, begin, end, scratch.data());
    });
  }

  // mean and rstd [batch, groups] of x.
  template <class A>
  void statistics(const GroupNormSiluTable& kernel, double eps, A* mean, A* rstd) {
    std::vector<double> moments(group_tasks * 2 * (last ? args.groups : 1));
    args.moments = moments.data();
    std::swap(args.chunk, group_chunk), std::swap(args.chunks, group_chunks);
    run<A>(last ? kernel.moments_last : kernel.moments_contiguous, group_tasks);
    std::swap(args.chunk, group_chunk), std::swap(args.chunks, group_chunks);
    args.moments = nullptr;
    const int64_t per_group = args.channels / args.groups, length = per_group * args.pixels;
    for (int64_t b = 0; b < args.batch; ++b)
      for (int64_t g = 0; g < args.groups; ++g) {
        Moments merged;
        for (int64_t k = 0; k < group_chunks; ++k) {
          const double n = last ? double(per_group * std::min(args.chunk, args.pixels - k * args.chunk))
                                : double(std::min(group_chunk, length - k * group_chunk));
          const int64_t at = last ? (b * group_chunks + k) * args.groups + g : (b * args.groups + g) * group_chunks + k;
          merged.add(n, moments[2 * at], moments[2 * at + 1]);
        }
        mean[b * args.groups + g] = A(merged.mean());
        rstd[b * args.groups + g] = A(merged.rstd(eps));
      }
  }
};

}  // namespace snapgen
