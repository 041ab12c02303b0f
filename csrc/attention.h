// Multi-query attention: the tokens * heads query rows of a sample are rows of one head against its keys and values.
#pragma once

#include <cstdint>

namespace snapgen {

struct Attention {
  int64_t batch, tokens, heads, keys, dim;
  float eps;
  double scale;
  const void* q;  // [batch, tokens, heads, dim]
  const void* k;  // [batch, keys, dim]
  const void* v;
  const float* q_weight;  // [dim], or null: no norm
  const float* k_weight;
  const float* cos;  // [tokens, dim], or null: no rotation
  const float* sin;
  const int64_t* index;   // [batch, keys]: the keys that may be attended come first; null: all, in their order
  const int64_t* counts;  // [batch]: how many

  // Keys and values of every sample as operands, key_block keys at a time, blocks one after the other. B is [depth,
  // columns].
  int64_t key_block, key_blocks;
  void* keys_by_dim;    // B [dim, keys]
  void* values_by_dim;  // B [dim, keys] (backward)
  void* keys_by_key;    // B [keys, dim] (backward)
  void* values_by_key;  // B [keys, dim] (forward)
  float* squares;       // [batch, key_blocks]: the largest |k|^2

  void* out;         // o; backward: dq, or null
  float* logsumexp;  // [batch, tokens, heads]

  // Backward only. A chunk is a number of query rows, chosen by the shape alone: sums over queries are made in chunks,
  // and those added in their order.
  const void* o;
  const void* dout;
  int64_t chunk, chunks;
  float* key_sums;    // [batch, chunks, dim, key_blocks * key_block], or null where neither dk nor dk_weight is needed
  float* value_sums;  // the same, or null
  float* q_weight_sums;  // [batch, chunks, dim], or null
  float* k_weight_sums;  // [batch, key_blocks, dim], or null
  void* dk;              // or null
  void* dv;              // or null
};

// Works on tasks [begin, end) with scratch of the size that the function beside it gives.
using AttentionTask = void (*)(const Attention&, int64_t begin, int64_t end, void* scratch);
using AttentionBytes = int64_t (*)(const Attention&);

struct AttentionTable {
  int64_t forward_keys, backward_keys;  // key_block of each pass
  int64_t forward_rows, backward_rows;  // query rows of a block; a chunk of the backward pass is a multiple
  AttentionBytes by_dim, by_key;        // bytes of one sample's operand
  AttentionBytes prepare_scratch, forward_scratch, backward_scratch, finish_scratch;
  AttentionTask prepare;   // packs keys and values: tasks are (sample, key block)
  AttentionTask forward;   // tasks are (sample, block of query rows)
  AttentionTask backward;  // dq and sums for dk and dv: tasks are (sample, chunk)
  AttentionTask finish;    // dk and dv: tasks are (sample, key block)
};

}  // namespace snapgen
