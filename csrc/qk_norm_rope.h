// RMSNorm and rotation of rows: what queries and keys go through before their product.
#pragma once

#include <cstdint>

namespace snapgen {

// Rows of `dim` elements, dense; row i belongs to token (i / heads) % tokens. A chunk is a fixed number of rows, chosen
// by the shape alone, so that sums are added in the same order whatever the number of threads.
struct NormRope {
  int64_t rows, heads, tokens, dim, chunk;
  float eps;
  const float* weight;  // [dim], or null: no norm
  const float* cos;     // [tokens, dim], or null: no rotation
  const float* sin;
  const void* x;
  const void* dy;
  void* out;        // y, or dx (may be null)
  float* partials;  // [chunks, dim]: sums of dweight (may be null)
};

using NormRopeTask = void (*)(const NormRope&, int64_t begin, int64_t end);  // chunks [begin, end)

struct NormRopeTable {
  NormRopeTask forward, backward;
};

}  // namespace snapgen
