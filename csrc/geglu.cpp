// snapgen_cpu::geglu, its gradient before the products, and ::outer (sums of outer products, for gradients of weights).
// The loops are in geglu_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace snapgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool narrow(const Tensor& t, const char* op) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "snapgen_cpu::", op,
                  ": tensors must be float32 or bfloat16");
  return dtype == ScalarType::BFloat16;
}

// Rows that are dense in themselves.
void check_rows(const Tensor& t, int64_t columns, const Tensor& like, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == columns && (columns < 2 || t.stride(1) == 1) &&
                      t.scalar_type() == like.scalar_type(),
                  "snapgen_cpu::", op, ": ", name, " must be [rows, ", columns, "] with dense rows, in the dtype of the rest");
}
void check_dense(const Tensor& t, int64_t rows, int64_t columns, const Tensor& like, const char* op, const char* name) {
  check_rows(t, columns, like, op, name);
  STD_TORCH_CHECK(t.size(0) == rows && t.is_contiguous(), "snapgen_cpu::", op, ": ", name, " must be dense, ", rows, " rows");
}

const GegluTable& table(bool narrow) { return narrow ? kernels().geglu_bf16 : kernels().geglu_f32; }

// weight [2 F, C] -> packed blocks of weight^T: values, their gates, values, ...
Tensor pack_pairs(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) % 2 == 0, "snapgen_cpu::pack_pairs: weight must be [2 F, C]");
  const bool bf = narrow(weight, "pack_pairs");
  const PackTable& pack = kernels().pack;
  const auto dtype = bf && pack.panel_is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  const int64_t features = weight.size(0) / 2, depth = weight.size(1);
  const int64_t width = dtype == ScalarType::Float ? 4 : 2, blocks = table(bf).pairs(features);
  const int64_t block = (bf ? pack.elements_bf16 : pack.elements_f32)(depth, pack.block_columns) * width;
  Tensor out = torch::stable::new_empty(weight, {table(bf).weight_elements(depth, features)}, std::optional<ScalarType>(dtype));
  const char* source = static_cast<const char*>(weight.const_data_ptr());
  const int64_t gates = features * weight.stride(0) * int64_t(weight.element_size());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const auto pack_blocks = bf ? pack.pack_bf16 : pack.pack_f32;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t half = 0; half < 2; ++half) {
        // Block j goes to j blocks behind `out`, which is moved on so that it becomes 2 j + half.
        const Pack args{source + half * gates, weight.stride(1), weight.stride(0), depth, features, to + (j + half) * block};
        pack_blocks(args, j, j + 1);
      }
  });
  return out;
}

// x [tokens, C]; weight: value and gate blocks of [2 F, C], packed in pairs; h [tokens, 2 F] if it is to be kept.
void geglu(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> h, Tensor y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "snapgen_cpu::geglu: x and y must have two dimensions");
  Geglu a{};
  a.tokens = x.size(0), a.channels = x.size(1), a.features = y.size(1);
  check_rows(x, a.channels, x, "geglu", "x");
  check_dense(y, a.tokens, a.features, x, "geglu", "y");
  if (h) check_dense(*h, a.tokens, 2 * a.features, x, "geglu", "h");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == 2 * a.features && bias->scalar_type() == x.scalar_type()),
                  "snapgen_cpu::geglu: bias must be dense, 2 F elements in the dtype of x");
  if (y.numel() == 0) return;
  const GegluTable& kernel = table(narrow(x, "geglu"));
  STD_TORCH_CHECK(weight.numel() == kernel.weight_elements(a.channels, a.features),
                  "snapgen_cpu::geglu: weight is not packed for this size or for this instruction set");
  a.x = x.const_data_ptr(), a.stride = x.stride(0);
  a.weight = weight.const_data_ptr();
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  a.h = h ? h->mutable_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  // A tile and what a product reads of the weight stay in L2. Few tokens are shared by columns instead.
  a.tile_rows = std::max<int64_t>(32, std::min<int64_t>(256, 262144 / std::max<int64_t>(1, a.channels) / 32 * 32));
  const int64_t tiles = (a.tokens + a.tile_rows - 1) / a.tile_rows, pairs = kernel.pairs(a.features);
  a.groups = std::max<int64_t>(1, std::min<int64_t>(pairs, 16 / tiles));
  const int64_t scratch = kernel.scratch(a);
  torch::stable::parallel_for(0, tiles * a.groups, 1, [&](int64_t begin, int64_t end) {
    kernel.forward(a, begin, end, thread_scratch().get(scratch));
  });
}

// dh [tokens, 2 F] from h and dy; dbias [2 F] in float32, or absent.
void geglu_gradient(Tensor h, Tensor dy, Tensor dh, std::optional<Tensor> dbias) {
  STD_TORCH_CHECK(dy.dim() == 2, "snapgen_cpu::geglu_gradient: dy must have two dimensions");
  GegluGradient a{};
  a.tokens = dy.size(0), a.features = dy.size(1), a.chunk = 64;
  check_dense(dy, a.tokens, a.features, dy, "geglu_gradient", "dy");
  check_dense(h, a.tokens, 2 * a.features, dy, "geglu_gradient", "h");
  check_dense(dh, a.tokens, 2 * a.features, dy, "geglu_gradient", "dh");
  STD_TORCH_CHECK(!dbias || (dbias->is_contiguous() && dbias->numel() == 2 * a.features &&
                             dbias->scalar_type() == ScalarType::Float),
                  "snapgen_cpu::geglu_gradient: dbias must be dense float32 of 2 F elements");
  a.h = h.const_data_ptr(), a.dy = dy.const_data_ptr(), a.dh = dh.mutable_data_ptr();
  const int64_t chunks = (a.tokens + a.chunk - 1) / a.chunk, width = 2 * a.features;
  std::vector<float> partials(dbias ? chunks * width : 0);
  a.partials = dbias ? partials.data() : nullptr;
  const GegluTable& kernel = table(narrow(dy, "geglu_gradient"));
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) { kernel.gradient(a, begin, end); });
  if (!dbias) return;
  float* sums = static_cast<float*>(dbias->mutable_data_ptr());
  torch::stable::parallel_for(0, width, 1024, [&](int64_t begin, int64_t end) {
    std::vector<double> total(end - begin);
    for (int64_t k = 0; k < chunks; ++k)
      for (int64_t c = begin; c < end; ++c) total[c - begin] += partials[k * width + c];
    for (int64_t c = begin; c < end; ++c) sums[c] = float(total[c - begin]);
  });
}

// out[M, N] = a^T b for a [rows, M] and b [rows, N]; sums over rows in an order that depends on their number alone.
void outer(Tensor a, Tensor b, Tensor out) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0), "snapgen_cpu::outer: a and b must have equal rows");
  check_rows(a, a.size(1), a, "outer", "a");
  check_rows(b, b.size(1), a, "outer", "b");
  check_dense(out, a.size(1), b.size(1), a, "outer", "out");
  const bool bf = narrow(a, "outer");
  if (out.numel() == 0) return;
  if (a.size(0) == 0) {
    torch::stable::zero_(out);
    return;
  }
  const OuterTable& kernel = bf ? kernels().outer_bf16 : kernels().outer_f32;
  Outer o{};
  o.rows = a.size(0), o.M = a.size(1), o.N = b.size(1);
  o.a = a.const_data_ptr(), o.stride_a = a.stride(0), o.b = b.const_data_ptr(), o.stride_b = b.stride(0);
  o.out = out.mutable_data_ptr();
  o.slice = std::min<int64_t>(512, (o.rows + 31) / 32 * 32);
  o.tile = 128, o.group_columns = std::min<int64_t>(1024, (o.N + 31) / 32 * 32);
  Tensor packed = torch::stable::new_empty(a, {kernel.packed_bytes(o)}, std::optional<ScalarType>(ScalarType::Byte));
  o.packed = packed.mutable_data_ptr();
  const int64_t slices = (o.rows + o.slice - 1) / o.slice;
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) { kernel.pack(o, begin, end); });
  const int64_t tasks = (o.M + o.tile - 1) / o.tile * ((o.N + o.group_columns - 1) / o.group_columns);
  const int64_t scratch = kernel.scratch(o);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    kernel.product(o, begin, end, thread_scratch().get(scratch));
  });
}

}  // namespace
}  // namespace snapgen

STABLE_TORCH_LIBRARY_FRAGMENT(snapgen_cpu, m) {
  m.def("pack_pairs(Tensor weight) -> Tensor");
  m.def("geglu(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? h, Tensor(b!) y) -> ()");
  m.def("geglu_gradient(Tensor h, Tensor dy, Tensor(a!) dh, Tensor(b!)? dbias) -> ()");
  m.def("outer(Tensor a, Tensor b, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(snapgen_cpu, CPU, m) {
  m.impl("pack_pairs", TORCH_BOX(&snapgen::pack_pairs));
  m.impl("geglu", TORCH_BOX(&snapgen::geglu));
  m.impl("geglu_gradient", TORCH_BOX(&snapgen::geglu_gradient));
  m.impl("outer", TORCH_BOX(&snapgen::outer));
}
