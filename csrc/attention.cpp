// snapgen_cpu::attention and its backward: operands, buffers, threads; the loops are in attention_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"

namespace snapgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Uninitialised, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(new char[size_t(bytes) + 64]) {}
  void* data() { return memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64); }

 private:
  std::unique_ptr<char[]> memory_;
};

const AttentionTable& table(const Tensor& q) {
  const bool narrow = q.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(narrow || q.scalar_type() == ScalarType::Float,
                  "snapgen_cpu::attention: q must be float32 or bfloat16");
  return narrow ? kernels().attention_bf16 : kernels().attention_f32;
}

const void* dense(const Tensor& t, const Tensor& q, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == q.scalar_type() && t.numel() == count,
                  "snapgen_cpu::attention: ", name, " must be dense, of the dtype of q and of ", count, " elements");
  return t.const_data_ptr();
}
const float* floats(const Optional& t, int64_t count, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == count,
                  "snapgen_cpu::attention: ", name, " must be dense float32 of ", count, " elements");
  return static_cast<const float*>(t->const_data_ptr());
}
void* result(const Optional& t, const Tensor& q, int64_t count, const char* name) {
  return t ? const_cast<void*>(dense(*t, q, count, name)) : nullptr;
}

struct Plan {
  Attention args{};
  const AttentionTable& kernel;
  std::vector<int64_t> index, counts;

  Plan(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& key_mask, const Optional& q_weight,
       const Optional& k_weight, const Optional& cos, const Optional& sin, double scale, double eps, bool backward)
      : kernel(table(q)) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 3, "snapgen_cpu::attention: q must be [B, N, H, D] and k [B, M, D]");
    STD_TORCH_CHECK(bool(cos) == bool(sin), "snapgen_cpu::attention: cos and sin: both or neither");
    Attention& a = args;
    a.batch = q.size(0), a.tokens = q.size(1), a.heads = q.size(2), a.dim = q.size(3), a.keys = k.size(1);
    STD_TORCH_CHECK(!cos || a.keys == a.tokens, "snapgen_cpu::attention: a rotation needs as many keys as queries");
    a.scale = scale, a.eps = float(eps);
    a.q = dense(q, q, a.batch * a.tokens * a.heads * a.dim, "q");
    a.k = dense(k, q, a.batch * a.keys * a.dim, "k");
    a.v = dense(v, q, a.batch * a.keys * a.dim, "v");
    a.q_weight = floats(q_weight, a.dim, "q_weight"), a.k_weight = floats(k_weight, a.dim, "k_weight");
    a.cos = floats(cos, a.tokens * a.dim, "cos"), a.sin = floats(sin, a.tokens * a.dim, "sin");
    a.key_block = backward ? kernel.backward_keys : kernel.forward_keys;
    a.key_blocks = std::max<int64_t>(1, (a.keys + a.key_block - 1) / a.key_block);
    counts.assign(a.batch, a.keys);
    if (key_mask) {
      STD_TORCH_CHECK(key_mask->scalar_type() == ScalarType::Bool && key_mask->is_contiguous() &&
                          key_mask->numel() == a.batch * a.keys,
                      "snapgen_cpu::attention: key_mask must be dense bool [B, M]");
      const bool* mask = static_cast<const bool*>(key_mask->const_data_ptr());
      index.resize(a.batch * a.keys);
      for (int64_t b = 0; b < a.batch; ++b) {
        int64_t n = 0;
        for (int64_t j = 0; j < a.keys; ++j)
          if (mask[b * a.keys + j]) index[b * a.keys + n++] = j;
        counts[b] = n;
      }
      a.index = index.data();
    }
    a.counts = counts.data();
  }

  int64_t rows() const { return args.tokens * args.heads; }

  void run(AttentionTask task, AttentionBytes scratch, int64_t tasks, int64_t grain) const {
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      Buffer memory(scratch(args));
      task(args, begin, end, memory.data());
    });
  }
  void prepare() const { run(kernel.prepare, kernel.prepare_scratch, args.batch * args.key_blocks, 2); }
};

void attention(Tensor q, Tensor k, Tensor v, Optional key_mask, Optional q_weight, Optional k_weight, Optional cos,
               Optional sin, double scale, double eps, Tensor out, Tensor logsumexp) {
  Plan plan(q, k, v, key_mask, q_weight, k_weight, cos, sin, scale, eps, false);
  Attention& a = plan.args;
  const int64_t rows = plan.rows(), blocks = (rows + plan.kernel.forward_rows - 1) / plan.kernel.forward_rows;
  a.out = result(out, q, a.batch * rows * a.dim, "out");
  a.logsumexp = const_cast<float*>(floats(logsumexp, a.batch * rows, "logsumexp"));
  Buffer keys(a.batch * plan.kernel.by_dim(a)), values(a.batch * plan.kernel.by_key(a));
  std::vector<float> squares(a.batch * a.key_blocks);
  a.keys_by_dim = keys.data(), a.values_by_key = values.data(), a.squares = squares.data();
  plan.prepare();
  const int64_t work = plan.kernel.forward_rows * std::max<int64_t>(1, a.keys) * a.dim;  // of a task
  plan.run(plan.kernel.forward, plan.kernel.forward_scratch, a.batch * blocks, std::max<int64_t>(1, 1000000 / work));
}

// Query rows of a chunk: few enough for many threads, many enough for the sums over chunks to cost little.
constexpr int64_t kChunkRows = 1024;

void sum_parts(const std::vector<float>& parts, int64_t count, int64_t dim, const Optional& out) {
  if (!out) return;
  float* sums = static_cast<float*>(out->mutable_data_ptr());
  for (int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += parts[i * dim + d];
    sums[d] = float(sum);
  }
}

void attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Optional key_mask, Optional q_weight,
                        Optional k_weight, Optional cos, Optional sin, double scale, double eps, Tensor out,
                        Tensor logsumexp, Optional dq, Optional dk, Optional dv, Optional dq_weight,
                        Optional dk_weight) {
  Plan plan(q, k, v, key_mask, q_weight, k_weight, cos, sin, scale, eps, true);
  Attention& a = plan.args;
  const int64_t rows = plan.rows(), size = a.batch * rows * a.dim;
  a.dout = dense(dout, q, size, "dout"), a.o = dense(out, q, size, "out");
  a.logsumexp = const_cast<float*>(floats(logsumexp, a.batch * rows, "logsumexp"));
  a.out = result(dq, q, size, "dq");
  a.dk = result(dk, q, a.batch * a.keys * a.dim, "dk"), a.dv = result(dv, q, a.batch * a.keys * a.dim, "dv");
  floats(dq_weight, a.dim, "dq_weight"), floats(dk_weight, a.dim, "dk_weight");
  STD_TORCH_CHECK((!dq_weight || q_weight) && (!dk_weight || k_weight),
                  "snapgen_cpu::attention_backward: a weight's gradient needs the weight");
  a.chunk = (kChunkRows + plan.kernel.backward_rows - 1) / plan.kernel.backward_rows * plan.kernel.backward_rows;
  a.chunks = (rows + a.chunk - 1) / a.chunk;
  const bool for_keys = dk || dk_weight;
  const int64_t sums = a.batch * a.chunks * a.dim * a.key_blocks * a.key_block * int64_t(sizeof(float));
  Buffer keys_by_dim(a.batch * plan.kernel.by_dim(a)), values_by_dim(a.batch * plan.kernel.by_dim(a));
  Buffer keys_by_key(a.batch * plan.kernel.by_key(a)), key_sums(for_keys ? sums : 0), value_sums(dv ? sums : 0);
  std::vector<float> squares(a.batch * a.key_blocks), q_parts(dq_weight ? a.batch * a.chunks * a.dim : 0),
      k_parts(dk_weight ? a.batch * a.key_blocks * a.dim : 0);
  a.keys_by_dim = keys_by_dim.data(), a.values_by_dim = values_by_dim.data(), a.keys_by_key = keys_by_key.data();
  a.squares = squares.data();
  a.key_sums = for_keys ? static_cast<float*>(key_sums.data()) : nullptr;
  a.value_sums = dv ? static_cast<float*>(value_sums.data()) : nullptr;
  a.q_weight_sums = dq_weight ? q_parts.data() : nullptr;
  a.k_weight_sums = dk_weight ? k_parts.data() : nullptr;
  plan.prepare();
  plan.run(plan.kernel.backward, plan.kernel.backward_scratch, a.batch * a.chunks, 1);
  if (for_keys || dv) plan.run(plan.kernel.finish, plan.kernel.finish_scratch, a.batch * a.key_blocks, 1);
  sum_parts(q_parts, a.batch * a.chunks, a.dim, dq_weight);
  sum_parts(k_parts, a.batch * a.key_blocks, a.dim, dk_weight);
}

}  // namespace
}  // namespace snapgen

STABLE_TORCH_LIBRARY_FRAGMENT(snapgen_cpu, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
      "Tensor? sin, float scale, float eps, Tensor(a!) out, Tensor(b!) logsumexp) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? q_weight, Tensor? "
      "k_weight, "
      "Tensor? cos, Tensor? sin, float scale, float eps, Tensor out, Tensor logsumexp, Tensor(a!)? dq, Tensor(b!)? dk, "
      "Tensor(c!)? dv, Tensor(d!)? dq_weight, Tensor(e!)? dk_weight) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(snapgen_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&snapgen::attention));
  m.impl("attention_backward", TORCH_BOX(&snapgen::attention_backward));
}
