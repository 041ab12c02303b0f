// snapgen_cpu::norm_rope and its backward: RMSNorm and rotation of dense rows. The loops are in qk_norm_rope_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"

namespace snapgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const NormRopeTable& table(const Tensor& x) {
  const bool narrow = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(narrow || x.scalar_type() == ScalarType::Float,
                  "snapgen_cpu::norm_rope: x must be float32 or bfloat16");
  return narrow ? kernels().norm_rope_bf16 : kernels().norm_rope_f32;
}

const float* floats(const std::optional<Tensor>& t, int64_t count, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == count,
                  "snapgen_cpu::norm_rope: ", name, " must be dense float32 of ", count, " elements");
  return static_cast<const float*>(t->const_data_ptr());
}

constexpr int64_t kChunkRows = 256;

NormRope plan(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& cos,
              const std::optional<Tensor>& sin, int64_t heads, int64_t tokens, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "snapgen_cpu::norm_rope: x must be dense");
  STD_TORCH_CHECK(bool(cos) == bool(sin), "snapgen_cpu::norm_rope: cos and sin: both or neither");
  NormRope a{};
  a.dim = x.size(x.dim() - 1);
  a.rows = a.dim ? x.numel() / a.dim : 0;
  a.heads = std::max<int64_t>(heads, 1), a.tokens = std::max<int64_t>(tokens, 1);
  STD_TORCH_CHECK(a.rows % (a.heads * a.tokens) == 0,
                  "snapgen_cpu::norm_rope: heads and tokens must divide the rows of x");
  a.chunk = kChunkRows;
  a.eps = float(eps);
  a.weight = floats(weight, a.dim, "weight");
  a.cos = floats(cos, a.tokens * a.dim, "cos");
  a.sin = floats(sin, a.tokens * a.dim, "sin");
  a.x = x.const_data_ptr();
  return a;
}

int64_t chunks_of(const NormRope& a) { return (a.rows + a.chunk - 1) / a.chunk; }

void norm_rope(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> cos, std::optional<Tensor> sin,
               int64_t heads, int64_t tokens, double eps, Tensor out) {
  NormRope a = plan(x, weight, cos, sin, heads, tokens, eps);
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == x.numel() && out.scalar_type() == x.scalar_type(),
                  "snapgen_cpu::norm_rope: out must be dense and like x");
  a.out = out.mutable_data_ptr();
  const NormRopeTask task = table(x).forward;
  torch::stable::parallel_for(0, chunks_of(a), 2, [&](int64_t begin, int64_t end) { task(a, begin, end); });
}

// dweight is float32; either gradient may be absent.
void norm_rope_backward(Tensor x, Tensor dy, std::optional<Tensor> weight, std::optional<Tensor> cos,
                        std::optional<Tensor> sin, int64_t heads, int64_t tokens, double eps, std::optional<Tensor> dx,
                        std::optional<Tensor> dweight) {
  NormRope a = plan(x, weight, cos, sin, heads, tokens, eps);
  STD_TORCH_CHECK(dy.is_contiguous() && dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(),
                  "snapgen_cpu::norm_rope_backward: dy must be dense and like x");
  STD_TORCH_CHECK(!dx || (dx->is_contiguous() && dx->numel() == x.numel() && dx->scalar_type() == x.scalar_type()),
                  "snapgen_cpu::norm_rope_backward: dx must be dense and like x");
  floats(dweight, a.dim, "dweight");
  STD_TORCH_CHECK(!dweight || weight, "snapgen_cpu::norm_rope_backward: dweight needs weight");
  a.dy = dy.const_data_ptr();
  a.out = dx ? dx->mutable_data_ptr() : nullptr;
  const int64_t chunks = chunks_of(a);
  std::vector<float> partials(dweight ? chunks * a.dim : 0);
  a.partials = dweight ? partials.data() : nullptr;
  const NormRopeTask task = table(x).backward;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { task(a, begin, end); });
  if (!dweight) return;
  float* sums = static_cast<float*>(dweight->mutable_data_ptr());
  for (int64_t c = 0; c < a.dim; ++c) {
    double sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partials[k * a.dim + c];
    sums[c] = float(sum);
  }
}

}  // namespace
}  // namespace snapgen

STABLE_TORCH_LIBRARY_FRAGMENT(snapgen_cpu, m) {
  m.def(
      "norm_rope(Tensor x, Tensor? weight, Tensor? cos, Tensor? sin, int heads, int tokens, float eps, "
      "Tensor(a!) out) -> ()");
  m.def(
      "norm_rope_backward(Tensor x, Tensor dy, Tensor? weight, Tensor? cos, Tensor? sin, int heads, int tokens, "
      "float eps, Tensor(a!)? dx, Tensor(b!)? dweight) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(snapgen_cpu, CPU, m) {
  m.impl("norm_rope", TORCH_BOX(&snapgen::norm_rope));
  m.impl("norm_rope_backward", TORCH_BOX(&snapgen::norm_rope_backward));
}
