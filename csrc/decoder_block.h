// The block of the tiny decoder, y = x + PW2(SiLU(GN(DW2(PW1(DW1(x) + b1)) + b2))), in two sweeps over tasks. A task is
// `band` rows by `tile` columns of a sample, chosen by the shape alone. Rows of the two inner images live in rings that
// stay in the cache; a task computes one row and one column around it itself, so that tasks do not meet.
#pragma once

#include <cstdint>

namespace snapgen {

struct DecoderBlock {
  int64_t batch, height, width, channels, middle, groups;
  int64_t tile, tiles, band, bands;
  int64_t kept;       // bands of a sample whose rows of h are stored by the first sweep; the second computes the others
  const void* x;      // [batch, height, width, channels]
  void* out;          // as x, which it may be if `frames` is given or everything is kept
  void* h;            // [batch, rows of kept bands, width, middle]
  void* frames;       // null, or what each task reads of its neighbours: frame_elements() of x's type a task
  const void* pw1;    // packed, channels -> middle
  const void* pw2;    // packed, middle -> channels
  const float* dw1;   // [10, lanes(channels)]: nine taps and the bias, zero padded
  const float* dw2;   // [10, lanes(middle)]
  const float* norm;  // [batch, 3, lanes(middle)]: mean, rstd * weight, bias of every channel
  double* moments;    // [tasks, groups, 2]: mean and sum of squared deviations of h
  int64_t out_groups;
  double* out_moments;  // null, or the same of y: [tasks, out_groups, 2]
};

// The rows of a fused GroupNorm, SiLU and dense 3x3 convolution to few channels: a product gives all nine taps of every
// output at once, and a pixel adds up those of its neighbours.
struct NormConv {
  int64_t batch, height, width, channels, outputs;
  int64_t tile, tiles, band, bands;
  const void* x;      // [batch, height, width, channels]
  void* out;          // [batch, height, width, outputs]
  const void* taps;   // packed, channels -> 9 * outputs, tap-major
  const float* bias;  // [outputs]
  const float* norm;  // [batch, 3, lanes(channels)]
};

// Tasks [begin, end), with scratch_bytes() bytes of scratch.
using DecoderBlockTask = void (*)(const DecoderBlock&, int64_t begin, int64_t end, void* scratch);
using NormConvTask = void (*)(const NormConv&, int64_t begin, int64_t end, void* scratch);

struct DecoderBlockTable {
  int64_t lanes;    // rows of parameters are padded to a multiple of this
  int64_t granule;  // products are fastest on rows of a multiple of this
  int64_t (*frame_elements)(const DecoderBlock&);
  int64_t (*scratch_bytes)(const DecoderBlock&);
  DecoderBlockTask frames, statistics, finish;
  int64_t (*norm_conv_scratch_bytes)(const NormConv&);
  NormConvTask norm_conv;
};

}  // namespace snapgen
