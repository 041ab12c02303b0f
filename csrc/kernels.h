// The interface between the drivers (built once, for any machine) and the kernels (built once per instruction set).
// Nothing of the C++ library may be used on the kernels' side: an inline function compiled there with wider instructions
// could be the copy that the linker keeps for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

namespace snapgen {

struct bf16 {
  uint16_t bits;
};

// One GroupNorm + SiLU over x [batch, channels, pixels]. A chunk is a fixed part of a sample, chosen by the shape alone, so
// that sums are added in the same order whatever the number of threads.
//   channels_last: a chunk is `chunk` pixels with all channels;  contiguous: `chunk` elements of a run.
struct GroupNormSilu {
  int64_t batch, channels, pixels, groups;
  int64_t chunk, chunks;
  const void* x;
  const void* dy;
  void* out;  // y, or dx
  // Of the accumulation type (float, or double for double x):
  const void* weight;  // [channels]
  const void* bias;    // [channels]
  const void* mean;    // [batch, groups]
  const void* rstd;    // [batch, groups]
  const void* mean_g;  // [batch, groups]: mean over the group of dz * weight
  const void* mean_gx; // [batch, groups]: mean over the group of dz * weight * xhat
  void* sums;          // [tasks, 2, channels] (channels_last) or [tasks, 2] (contiguous): sums of dz and of dz * xhat
  double* moments;     // [tasks, groups, 2] (channels_last) or [tasks, 2] (contiguous): mean and sum of squared deviations
};

// Each entry works on tasks [begin, end); `scratch` holds 6 * channels numbers of the accumulation type.
using GroupNormSiluTask = void (*)(const GroupNormSilu&, int64_t begin, int64_t end, void* scratch);

struct GroupNormSiluTable {
  GroupNormSiluTask moments_last, apply_last, sums_last, gradient_last;
  GroupNormSiluTask moments_contiguous, apply_contiguous, sums_contiguous, gradient_contiguous;
};

}  // namespace snapgen

#include "attention.h"
#include "decoder_block.h"
#include "geglu.h"
#include "pack.h"
#include "qk_norm_rope.h"
#include "sepconv.h"
#include "sepconv_backward.h"

namespace snapgen {

struct Kernels {
  const char* name;
  GroupNormSiluTable group_norm_silu_f32, group_norm_silu_bf16, group_norm_silu_f64;
  PackTable pack;
  NormRopeTable norm_rope_f32, norm_rope_bf16;
  SepconvTable sepconv;
  AttentionTable attention_f32, attention_bf16;
  SepconvBackwardTable sepconv_backward_f32, sepconv_backward_bf16;
  DecoderBlockTable decoder_block_f32, decoder_block_bf16;
  GegluTable geglu_f32, geglu_bf16;
  OuterTable outer_f32, outer_bf16;
};

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

// The table of the best instruction set that this processor has, or of the one that a test forced.
const Kernels& kernels();

}  // namespace snapgen
