// snapgen_cpu::pack, ::fingerprint and ::product: weights in the format of the products, and products with them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "kernels.h"

namespace snapgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_bf16(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "snapgen_cpu: ", name,
                  " must be float32 or bfloat16");
  return dtype == ScalarType::BFloat16;
}

// matrix [K, N] with any strides -> the packed B of products with K deep and N wide.
Tensor pack(Tensor matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2, "snapgen_cpu::pack: matrix must have two dimensions");
  const bool narrow = is_bf16(matrix, "matrix");
  const PackTable& table = kernels().pack;
  Pack args{matrix.const_data_ptr(), matrix.stride(0), matrix.stride(1), matrix.size(0), matrix.size(1), nullptr};
  const int64_t elements = (narrow ? table.elements_bf16 : table.elements_f32)(args.depth, args.columns);
  const auto dtype = narrow && table.panel_is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor out = torch::stable::new_empty(matrix, {elements}, std::optional<ScalarType>(dtype));
  args.out = out.mutable_data_ptr();
  const int64_t blocks = (args.columns + table.block_columns - 1) / table.block_columns;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, args.depth * table.block_columns));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    (narrow ? table.pack_bf16 : table.pack_f32)(args, begin, end);
  });
  return out;
}

// A hash of 64 words spread over a dense tensor: notices updates that PyTorch's version counter does not see.
int64_t fingerprint(Tensor tensor) {
  const int64_t bytes = tensor.numel() * int64_t(tensor.element_size()), words = bytes / 4;
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  uint64_t hash = 1469598103934665603ull;
  for (int64_t i = 0; i < std::min<int64_t>(64, words); ++i) {
    uint32_t word;
    std::memcpy(&word, data + (words <= 64 ? i : i * (words - 1) / 63) * 4, 4);
    hash = (hash ^ word) * 1099511628211ull;
  }
  return int64_t(hash >> 1);
}

constexpr int64_t kDeep = 1024;

// out[M, N] = a[M, K] B, with B = packed of [K, N].
void product(Tensor a, Tensor packed, Tensor out) {
  STD_TORCH_CHECK(a.dim() == 2 && out.dim() == 2 && a.size(0) == out.size(0), "snapgen_cpu::product: shapes do not fit");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(out.stride(1) == 1 && (out.size(0) < 2 || out.stride(0) == out.size(1)),
                  "snapgen_cpu::product: out must be contiguous");
  STD_TORCH_CHECK(out.scalar_type() == a.scalar_type(), "snapgen_cpu::product: out must have the dtype of a");
  const bool narrow = is_bf16(a, "a");
  const PackTable& table = kernels().pack;
  Product args{a.const_data_ptr(), a.stride(0), a.stride(1), a.size(0), out.size(1), a.size(1), packed.const_data_ptr(),
               out.mutable_data_ptr(), 0, 0, 0};
  STD_TORCH_CHECK(packed.numel() == (narrow ? table.elements_bf16 : table.elements_f32)(args.depth, args.columns),
                  "snapgen_cpu::product: packed is not of this size or of this instruction set");
  if (args.depth > kDeep) {
    const int64_t block = table.block_columns;
    args.slice = 512, args.tile_rows = 256, args.group_columns = std::min<int64_t>(1024, (args.columns + block - 1) / block * block);
  } else {
    const int64_t row_bytes = std::max<int64_t>(1, args.depth * int64_t(a.element_size()));
    args.tile_rows = std::max<int64_t>(32, std::min<int64_t>(128, (int64_t(1) << 20) / row_bytes / 32 * 32));
  }
  const int64_t groups = args.slice ? (args.columns + args.group_columns - 1) / args.group_columns : 1;
  const int64_t tasks = (args.rows + args.tile_rows - 1) / args.tile_rows * groups;
  const int64_t scratch = (narrow ? table.scratch_bf16 : table.scratch_f32)(args);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> memory(scratch + 64);
    char* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
    (narrow ? table.product_bf16 : table.product_f32)(args, begin, end, aligned);
  });
}

}  // namespace
}  // namespace snapgen

STABLE_TORCH_LIBRARY_FRAGMENT(snapgen_cpu, m) {
  m.def("pack(Tensor matrix) -> Tensor");
  m.def("fingerprint(Tensor tensor) -> int");
  m.def("product(Tensor a, Tensor packed, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(snapgen_cpu, CPU, m) {
  m.impl("pack", TORCH_BOX(&snapgen::pack));
  m.impl("fingerprint", TORCH_BOX(&snapgen::fingerprint));
  m.impl("product", TORCH_BOX(&snapgen::product));
}
