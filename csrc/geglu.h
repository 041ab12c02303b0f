// The gated feed-forward's first half, and sums of outer products for the gradients of weights.
#pragma once

#include <cstdint>

namespace snapgen {

// y = value * gelu(gate) with [value, gate] = x weight^T + bias. A task is a tile of tokens and a group of pairs of column
// blocks (a block of values and the gates that belong to it).
struct Geglu {
  int64_t tokens, channels, features;
  int64_t tile_rows;  // tokens of a tile
  int64_t groups;     // of pairs, for each tile
  const void* x;      // rows of `stride` elements
  int64_t stride;
  const void* weight;  // packed: block 2 j holds values, block 2 j + 1 their gates
  const void* bias;    // [2 features], or null
  void* h;             // [tokens, 2 features]: value and gate, or null
  void* y;             // [tokens, features]
};

// dh = [dy gelu(gate), dy value gelu'(gate)]. A chunk is a fixed number of tokens, chosen by the shape alone.
struct GegluGradient {
  int64_t tokens, features, chunk;
  const void* h;
  const void* dy;
  void* dh;
  float* partials;  // [chunks, 2 features]: sums of dh over each chunk, or null
};

// out[M, N] = sum over rows r of a[r, :]^T b[r, :]. Rows are taken in slices; b's are packed first.
struct Outer {
  int64_t rows, M, N;
  int64_t slice, tile;    // rows of a slice, rows of out in a task
  int64_t group_columns;  // columns of out in a task, a multiple of the block
  const void* a;
  int64_t stride_a;
  const void* b;
  int64_t stride_b;
  void* packed;
  void* out;
};

struct GegluTable {
  int64_t (*pairs)(int64_t features);
  int64_t (*weight_elements)(int64_t channels, int64_t features);
  int64_t (*scratch)(const Geglu&);
  void (*forward)(const Geglu&, int64_t begin, int64_t end, void* scratch);
  void (*gradient)(const GegluGradient&, int64_t begin, int64_t end);  // chunks
};

struct OuterTable {
  int64_t (*packed_bytes)(const Outer&);
  int64_t (*scratch)(const Outer&);
  void (*pack)(const Outer&, int64_t begin, int64_t end);                     // slices
  void (*product)(const Outer&, int64_t begin, int64_t end, void* scratch);  // tasks: tiles of M times groups of N
};

}  // namespace snapgen
