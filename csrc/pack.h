// Packed weights and plain products: see gemm.h for the formats.
#pragma once

#include <cstdint>

namespace snapgen {

// B[k][n] = source[k * stride_k + n * stride_n], packed by blocks of columns; blocks [begin, end).
struct Pack {
  const void* source;
  int64_t stride_k, stride_n, depth, columns;
  void* out;
};

// out[rows, columns] = a[rows, depth] B, with B packed. `scratch` holds scratch_bytes(tile_rows, depth) bytes.
struct Product {
  const void* a;
  int64_t stride_m, stride_k, rows, columns, depth;
  const void* b;
  void* out;
  int64_t tile_rows;  // rows of a task
  // A deep product goes through `slice` of its depth at a time, with sums of `group_columns` columns in the L2 cache; a
  // task is then a tile of rows and a group of columns. 0: the whole depth at once, and all columns.
  int64_t slice, group_columns;
};

struct PackTable {
  bool panel_is_bf16;  // of bf16 tensors; float else
  int64_t (*elements_f32)(int64_t depth, int64_t columns);
  int64_t (*elements_bf16)(int64_t depth, int64_t columns);
  int64_t block_columns;
  void (*pack_f32)(const Pack&, int64_t begin, int64_t end);
  void (*pack_bf16)(const Pack&, int64_t begin, int64_t end);
  int64_t (*scratch_f32)(const Product&);
  int64_t (*scratch_bf16)(const Product&);
  void (*product_f32)(const Product&, int64_t begin, int64_t end, void* scratch);
  void (*product_bf16)(const Product&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace snapgen
