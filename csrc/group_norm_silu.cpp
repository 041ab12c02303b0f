// snapgen::group_norm_silu and its backward on the CPU: layouts, buffers, threads; the loops are in group_norm_silu_kernel.h.
#include <optional>
#include <tuple>

#include "norm.h"

namespace snapgen {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor in_layout(const Tensor& x, bool channels_last) {
  if (is_contiguous_as(x, channels_last)) return x;
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

void check(const Tensor& x, int64_t groups, const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() == 4, "snapgen::group_norm_silu: x must be [B, C, H, W], not of ", x.dim(), " dimensions");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "snapgen::group_norm_silu: num_groups (", groups,
                  ") must divide the channels of x (", x.size(1), ")");
  STD_TORCH_CHECK(weight.numel() == x.size(1) && bias.numel() == x.size(1),
                  "snapgen::group_norm_silu: weight and bias must have one element per channel of x");
}

template <class A>
void forward(NormPlan& plan, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, Tensor& y, Tensor& mean,
             Tensor& rstd) {
  const GroupNormSiluTable& kernel = group_norm_silu_table(x.scalar_type());
  const std::vector<A> w = widened<A>(weight, "weight"), b = widened<A>(bias, "bias");
  A* means = static_cast<A*>(mean.mutable_data_ptr());
  A* rstds = static_cast<A*>(rstd.mutable_data_ptr());
  plan.statistics<A>(kernel, eps, means, rstds);
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
  NormPlan plan(dense, num_groups, last);
  if (wide) forward<double>(plan, dense, weight, bias, eps, y, mean, rstd);
  else forward<float>(plan, dense, weight, bias, eps, y, mean, rstd);
  if (y.mutable_data_ptr() != out.mutable_data_ptr()) torch::stable::copy_(out, y);
  return {out, mean, rstd};
}

// mean and rstd [B, G] of x, dense in either layout.
void group_statistics(Tensor x, int64_t num_groups, double eps, Tensor mean, Tensor rstd) {
  const bool plain = is_contiguous_as(x, false);
  STD_TORCH_CHECK(x.dim() == 4 && (plain || is_contiguous_as(x, true)), "snapgen_cpu::group_statistics: x must be dense");
  STD_TORCH_CHECK(num_groups > 0 && x.size(1) % num_groups == 0,
                  "snapgen_cpu::group_statistics: num_groups must divide the channels of x");
  NormPlan plan(x, num_groups, !plain);
  const GroupNormSiluTable& kernel = group_norm_silu_table(x.scalar_type());
  void *m = mean.mutable_data_ptr(), *r = rstd.mutable_data_ptr();
  if (x.scalar_type() == ScalarType::Double) plan.statistics(kernel, eps, static_cast<double*>(m), static_cast<double*>(r));
  else plan.statistics(kernel, eps, static_cast<float*>(m), static_cast<float*>(r));
}

template <class A>
void backward(NormPlan& plan, const Tensor& x, const Tensor& dy, const Tensor& weight, const Tensor& bias, const Tensor& mean,
              const Tensor& rstd, Tensor* dx, Tensor* dweight, Tensor* dbias) {
  GroupNormSilu& a = plan.args;
  const GroupNormSiluTable& kernel = group_norm_silu_table(x.scalar_type());
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
  if (dweight) store_parameter(dw, *dweight);
  if (dbias) store_parameter(db, *dbias);
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
  NormPlan plan(dense, num_groups, last);
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

STABLE_TORCH_LIBRARY_FRAGMENT(snapgen_cpu, m) {
  m.def("group_statistics(Tensor x, int num_groups, float eps, Tensor(a!) mean, Tensor(b!) rstd) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(snapgen_cpu, CPU, m) { m.impl("group_statistics", TORCH_BOX(&snapgen::group_statistics)); }
STABLE_TORCH_LIBRARY_IMPL(snapgen, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&snapgen::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&snapgen::group_norm_silu_backward));
}
