// One separable convolution: see sepconv.cpp for the plan and sepconv_kernel.h for the loops.
#pragma once

#include <cstdint>

namespace snapgen {

// Images are channels_last: x [batch, height, width, channels], out [batch, out_height, out_width, outputs].
// The image of outputs is cut into tiles of `tile_width` columns, a tile into units of `unit_rows` rows. Units are numbered by
// (sample, tile, rows from the top). The cut is by the shape alone; a thread takes units [begin, end) and joins up to
// `panel_units` of them in one product.
struct Sepconv {
  int64_t batch, channels, height, width, outputs, out_height, out_width;
  int64_t stride, upsample;
  int64_t tile_width, tiles, unit_rows, units_of_tile, panel_units;
  const void* x;
  int64_t groups;             // of the norm on x; mean is null where there is none
  const float* mean;          // [batch, groups]
  const float* rstd;          // [batch, groups]
  const float* norm_weight;   // [channels]
  const float* norm_bias;     // [channels]
  const float* dw_weight;     // [channels, 9]
  const float* dw_bias;       // [channels] or null
  const void* pw;             // packed, channels -> outputs
  const float* bias;          // [batch, outputs]: all that is added to every pixel
  const void* residual;       // like out, or null
  const void* skip;           // [batch, out_height, out_width, skip_channels], or null
  const void* skip_weight;    // packed, skip_channels -> outputs
  int64_t skip_channels;
  void* out;
  bool stream;                // out is larger than what the caches keep until it is read
  int64_t out_groups;         // of the statistics of out
  double* moments;            // [units, out_groups, 2], or null: mean and sum of squared deviations
};

struct SepconvTable {
  int64_t (*scratch_f32)(const Sepconv&);
  int64_t (*scratch_bf16)(const Sepconv&);
  // Units [begin, end); `scratch` holds scratch(...) bytes and is aligned to 64.
  void (*run_f32)(const Sepconv&, int64_t begin, int64_t end, void* scratch);
  void (*run_bf16)(const Sepconv&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace snapgen
