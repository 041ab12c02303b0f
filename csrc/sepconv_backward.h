// The interface of the kernels in sepconv_backward_kernel.h (see kernels.h). Images are [batch, height, width, channels].
#pragma once

#include <cstdint>

namespace snapgen {

constexpr int64_t kPad = 16;  // rows of per-channel numbers are padded with zeros to a multiple of this
constexpr int64_t kGradientSums = 12;  // nine taps, the bias, dz and dz * xhat

// Of d = depthwise3x3(a) + bias, a = [nearest 2x of] [SiLU(GroupNorm] x [)]: all that follows from dd, the gradient of d.
// A task is `rows` rows and `columns` columns of x, with `chunk` channels, of one sample; all follow from the shape alone.
struct DepthwiseGradient {
  int64_t batch, channels, height, width;  // of x
  int64_t out_height, out_width;           // of d
  int64_t stride, scale;                   // scale 2: nearest 2x before the convolution
  int64_t groups;                          // 0: no norm, a = x
  int64_t chunk, chunks, rows, strips, columns, tiles, padded;
  bool finish;         // a task holds whole groups: it goes on from dz to dx at once
  bool weights;        // the sums of the weights and of the bias are asked for
  bool inputs;         // dz, dx or the sums of the norm are asked for
  const void* x;
  const void* dd;      // null where only d is asked for
  const void* extra;   // added to dx, or null
  void* dx;            // null: not asked for. Holds dz between the passes
  void* d;             // null: not asked for
  const float* taps;   // [9, padded]
  const float* bias;   // [padded]
  const float* norm_weight;  // [padded]
  const float* norm_bias;    // [padded]
  const float* mean;         // [batch, groups]
  const float* rstd;         // [batch, groups]
  float* sums;               // [batch, strips * tiles, kGradientSums, padded]
  float* merged;             // [kGradientSums, padded]: the sums over tasks
};

// dd = dy W over rows of pixels, and the column sums of dy. A task is a part of a sample, or some whole samples.
struct PointwiseGradient {
  int64_t batch, pixels, outputs, channels;
  int64_t part, parts, samples;  // pixels of a task, tasks of a sample, samples of a task
  const void* dy;                // [batch, pixels, outputs]
  const void* weight;            // packed, outputs -> channels
  void* dd;                      // null: not asked for
  double* sums;                  // [batch, parts, outputs], or null
};

// dw[outputs, channels] = dy^T d, a sum over pixels. A task is a tile of dw and a part of the pixels.
struct PointwiseWeightGradient {
  int64_t pixels, outputs, channels;
  int64_t tile_outputs, tiles_outputs, tile_channels, tiles_channels, part, parts, slice;
  int64_t row;        // of a partial result: channels rounded up to whole blocks of columns
  bool accumulate;    // add to the partial result
  const void* dy;     // [pixels, outputs]
  const void* d;      // [pixels, channels]
  float* partial;     // [parts, outputs, row]
  void* dw;           // [outputs, channels]
};

// All of these for images that are small enough to go through them a few at a time, in cache: dd and d are never stored. A
// task is `part` samples, taken `samples` at a time; it has a partial result of its own for the weight of the pointwise half.
struct SeparableGradient {
  DepthwiseGradient depthwise;
  PointwiseGradient pointwise;
  PointwiseWeightGradient weight;
  int64_t part, samples;
};

struct SepconvBackwardTable {
  void (*depthwise)(const DepthwiseGradient&, int64_t begin, int64_t end, float* scratch);
  void (*norm)(const DepthwiseGradient&, int64_t begin, int64_t end, float* scratch);  // dz -> dx; a task is a row
  void (*merge)(const DepthwiseGradient&, int64_t begin, int64_t end);  // a task is 16 columns of one of the sums
  void (*pointwise)(const PointwiseGradient&, int64_t begin, int64_t end, void* scratch);
  int64_t (*pointwise_scratch)(const PointwiseGradient&);
  void (*weight)(const PointwiseWeightGradient&, int64_t begin, int64_t end, void* scratch);
  int64_t (*weight_scratch)(const PointwiseWeightGradient&);
  void (*weight_merge)(const PointwiseWeightGradient&, int64_t begin, int64_t end);  // a task is a row of dw
  void (*separable)(const SeparableGradient&, int64_t begin, int64_t end, void* scratch);
  int64_t (*separable_scratch)(const SeparableGradient&);
};

// Floats that a depthwise task of this width works in, for each of its channels and beside them.
inline int64_t depthwise_channel_floats(const DepthwiseGradient& g, int64_t columns) {
  return 3 * (columns * g.scale + 2) + 4 * (columns * g.scale / g.stride + 3) + 3 * columns + 5;
}
inline int64_t depthwise_scratch_floats(const DepthwiseGradient& g) {
  return g.chunk * depthwise_channel_floats(g, g.columns) + 3 * (g.columns * g.scale + 3) * kPad;
}

}  // namespace snapgen
