// snapgen::group_norm_silu and its backward on the CPU: layouts, buffers, threads; the loops are in group_norm_silu_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace snapgen {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_contiguous_as(const Tensor& x, bool channels_last) {
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t last[4] = {height * width * channels, 1, width * channels, channels};
  const int64_t plain[4] = {channels * height * width, height * width, width, 1};
  for (int64_t d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != (channels_last ? last : plain)[d]) return false;
  return true;
}

Tensor in_layout(const Tensor& x, bool channels_last) {
  if (is_contiguous_as(x, channels_last)) return x;
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// The parameters in the accumulation type, whatever theirs is.
template <class A>
std::vector<A> widened(const Tensor& parameter, const char* name) {
  const Tensor dense = torch::stable::contiguous(parameter);
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
      STD_TORCH_CHECK(false, "snapgen::group_norm_silu (CPU): ", name, " must be float32, float64 or bfloat16");
  }
  return out;
}

const GroupNormSiluTable& table(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return kernels().group_norm_silu_f32;
    case ScalarType::BFloat16:
      return kernels().group_norm_silu_bf16;
    case ScalarType::Double:
      return kernels().group_norm_silu_f64;
    default:
      STD_TORCH_CHECK(false, "snapgen::group_norm_silu (CPU): x must be float32, float64 or bfloat16");
  }
}

void check(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() == 4, "snapgen::group_norm_silu: x must be [B, C, H, W], not of ", x.dim(), " dimensions");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "snapgen::group_norm_silu: num_groups (", groups,
                  ") must divide the channels of x (", x.size(1), ")");
  STD_TORCH_CHECK(weight.numel() == x.size(1) && bias.numel() == x.size(1),
                  "snapgen::group_norm_silu: weight and bias must have one element per channel of x");
}

// Bytes of x in a chunk: small enough for the second pass to find them in the first two caches.
constexpr int64_t kChunkBytes = 32768;

struct Plan {
  GroupNormSilu args{};
  bool last;
  int64_t group_tasks, tasks;  // of the statistics; of everything else
  int64_t group_chunk, group_chunks;

  Plan(const Tensor& x, int64_t groups, bool channels_last) : last(channels_last) {
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

  template <class A>
  void run_moments(GroupNormSiluTask task) {
    std::swap(args.chunk, group_chunk), std::swap(args.chunks, group_chunks);
    run<A>(task, group_tasks);
    std::swap(args.chunk, group_chunk), std::swap(args.chunks, group_chunks);
  }
};

// Chan's merge of the chunks' moments, in their order.
template <class A>
void merge(const Plan& plan, const std::vector<double>& moments, double eps, A* mean, A* rstd) {
  const GroupNormSilu& a = plan.args;
  const int64_t per_group = a.channels / a.groups, run = per_group * a.pixels;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t g = 0; g < a.groups; ++g) {
      double n = 0, center = 0, squares = 0;
      for (int64_t k = 0; k < plan.group_chunks; ++k) {
        const double length = plan.last ? double(per_group * std::min(a.chunk, a.pixels - k * a.chunk))
                                        : double(std::min(plan.group_chunk, run - k * plan.group_chunk));
        const int64_t at = plan.last ? (b * plan.group_chunks + k) * a.groups + g : (b * a.groups + g) * plan.group_chunks + k;
        const double delta = moments[2 * at] - center, sum = n + length;
        squares += moments[2 * at + 1] + delta * delta * (n * length / sum);
        center += delta * (length / sum);
        n = sum;
      }
      const double nan = std::numeric_limits<double>::quiet_NaN();
      mean[b * a.groups + g] = A(n > 0 ? center : nan);
      rstd[b * a.groups + g] = A(n > 0 ? 1.0 / std::sqrt(std::max(squares / n, 0.0) + eps) : nan);
    }
}

template <class A>
void forward(Plan& plan, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, Tensor& y, Tensor& mean,
             Tensor& rstd) {
  const GroupNormSiluTable& kernel = table(x.scalar_type());
  const std::vector<A> w = widened<A>(weight, "weight"), b = widened<A>(bias, "bias");
  std::vector<double> moments(plan.group_tasks * 2 * (plan.last ? plan.args.groups : 1));
  plan.args.moments = moments.data();
  plan.run_moments<A>(plan.last ? kernel.moments_last : kernel.moments_contiguous);
  A* means = static_cast<A*>(mean.mutable_data_ptr());
  A* rstds = static_cast<A*>(rstd.mutable_data_ptr());
  merge<A>(plan, moments, eps, means, rstds);
  plan.args.weight = w.data(), plan.args.bias = b.data(), plan.args.mean = means, plan.args.rstd = rstds;
  plan.args.out = y.mutable_data_ptr();
  plan.run<A>(plan.last ? kernel.apply_last : kernel.apply_contiguous, plan.tasks);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(Tensor x, int64_t num_groups, Tensor weight, Tensor bias, double eps) {
  check(x, num_groups, weight, bias);
  const bool last = !is_contiguous_as(x, false) && is_contiguous_as(x, true);
  const Tensor dense = in_layout(x, last);
  Tensor out = torch::stable::empty_like(x);
  Tensor y = is_contiguous_as(out, last) ? out : torch::stable::empty_like(dense);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const auto statistics = std::optional<ScalarType>(wide ? ScalarType::Double : ScalarType::Float);
  Tensor mean = torch::stable::new_empty(x, {x.size(0), num_groups}, statistics);
  Tensor rstd = torch::stable::new_empty(x, {x.size(0), num_groups}, statistics);
  Plan plan(dense, num_groups, last);
  if (wide) forward<double>(plan, dense, weight, bias, eps, y, mean, rstd);
  else forward<float>(plan, dense, weight, bias, eps, y, mean, rstd);
  if (y.mutable_data_ptr() != out.mutable_data_ptr()) torch::stable::copy_(out, y);
  return {out, mean, rstd};
}

template <class A>
void store_parameter(const std::vector<double>& values, Tensor& out) {
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

template <class A>
void backward(Plan& plan, const Tensor& x, const Tensor& dy, const Tensor& weight, const Tensor& bias, const Tensor& mean,
              const Tensor& rstd, Tensor* dx, Tensor* dweight, Tensor* dbias) {
  GroupNormSilu& a = plan.args;
  const GroupNormSiluTable& kernel = table(x.scalar_type());
  const std::vector<A> w = widened<A>(weight, "weight"), b = widened<A>(bias, "bias");
  const std::vector<A> means = widened<A>(mean, "mean"), rstds = widened<A>(rstd, "rstd");
  a.dy = dy.const_data_ptr();
  a.weight = w.data(), a.bias = b.data(), a.mean = means.data(), a.rstd = rstds.data();
  std::vector<A> sums(plan.tasks * 2 * (plan.last ? a.channels : 1));
  a.sums = sums.data();
  a.out = dx ? dx->mutable_data_ptr() : nullptr;
  plan.run<A>(plan.last ? kernel.sums_last : kernel.sums_contiguous, plan.tasks);

  const int64_t C = a.channels, per_group = C / a.groups;
  const double n = double(per_group) * double(a.pixels);
  std::vector<double> dw(C), db(C), dz(C), dzx(C);
  std::vector<A> mean_g(a.batch * a.groups), mean_gx(a.batch * a.groups);
  for (int64_t s = 0; s < a.batch; ++s) {
    std::fill(dz.begin(), dz.end(), 0.0), std::fill(dzx.begin(), dzx.end(), 0.0);
    for (int64_t k = 0; k < a.chunks; ++k)
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at = plan.last ? (s * a.chunks + k) * 2 * C + c : ((s * C + c) * a.chunks + k) * 2;
        dz[c] += sums[at], dzx[c] += sums[at + (plan.last ? C : 1)];
      }
    for (int64_t g = 0; g < a.groups; ++g) {
      double total = 0, total_x = 0;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) total += dz[c] * w[c], total_x += dzx[c] * w[c];
      mean_g[s * a.groups + g] = A(total / n), mean_gx[s * a.groups + g] = A(total_x / n);
    }
    for (int64_t c = 0; c < C; ++c) dw[c] += dzx[c], db[c] += dz[c];
  }
  if (dweight) store_parameter<A>(dw, *dweight);
  if (dbias) store_parameter<A>(db, *dbias);
  if (!dx) return;
  a.mean_g = mean_g.data(), a.mean_gx = mean_gx.data();
  plan.run<A>(plan.last ? kernel.gradient_last : kernel.gradient_contiguous, plan.tasks);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor dy, Tensor x, int64_t num_groups, Tensor weight, Tensor bias,
                                                            double, Tensor mean, Tensor rstd, std::vector<bool> needs) {
  check(x, num_groups, weight, bias);
  STD_TORCH_CHECK(needs.size() == 3, "snapgen::group_norm_silu_backward: needs must have three entries");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.numel() == x.numel(),
                  "snapgen::group_norm_silu_backward: grad_0 must have the shape and dtype of x");
  const bool last = !is_contiguous_as(x, false) && is_contiguous_as(x, true);
  const Tensor dense = in_layout(x, last), dense_dy = in_layout(dy, last);
  const auto empty = [&] { return torch::stable::new_empty(dy, {0}); };
  Tensor out = needs[0] ? torch::stable::empty_like(x) : empty();
  Tensor dx = !needs[0] || is_contiguous_as(out, last) ? out : torch::stable::empty_like(dense);
  Tensor dweight = needs[1] ? torch::stable::empty_like(weight) : empty();
  Tensor dbias = needs[2] ? torch::stable::empty_like(bias) : empty();
  Plan plan(dense, num_groups, last);
  Tensor* const slots[3] = {needs[0] ? &dx : nullptr, needs[1] ? &dweight : nullptr, needs[2] ? &dbias : nullptr};
  if (x.scalar_type() == ScalarType::Double)
    backward<double>(plan, dense, dense_dy, weight, bias, mean, rstd, slots[0], slots[1], slots[2]);
  else
    backward<float>(plan, dense, dense_dy, weight, bias, mean, rstd, slots[0], slots[1], slots[2]);
  if (needs[0] && dx.mutable_data_ptr() != out.mutable_data_ptr()) torch::stable::copy_(out, dx);
  return {out, dweight, dbias};
}

}  // namespace
}  // namespace snapgen

STABLE_TORCH_LIBRARY_IMPL(snapgen, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&snapgen::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&snapgen::group_norm_silu_backward));
}
