// The body of isa_<set>.cpp: every kernel, in the namespace of that set, and their table.
// SG_ISA is the namespace, VECTOR_BYTES the register width.
#include "kernels.h"

#define SG_INLINE static inline __attribute__((always_inline))
#define SG_LAMBDA __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operand of its own AVX-512 intrinsics for one that is used.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace snapgen::SG_ISA {
namespace {
#include "simd.h"
#include "gemm.h"
#include "group_norm_silu_kernel.h"
#include "pack_kernel.h"
#include "geglu_kernel.h"
#include "qk_norm_rope_kernel.h"
#include "rows.h"
#include "sepconv_kernel.h"
#include "attention_kernel.h"
#include "sepconv_backward_kernel.h"
#include "decoder_block_kernel.h"
}  // namespace

#define SG_STRING_(name) #name
#define SG_STRING(name) SG_STRING_(name)
extern const Kernels kernels;
const Kernels kernels = {
    SG_STRING(SG_ISA),
    group_norm_silu_table<float>(),
    group_norm_silu_table<bf16>(),
    group_norm_silu_table<double>(),
    pack_table(),
    norm_rope_table<float>(),
    norm_rope_table<bf16>(),
    sepconv_table(),
    attention_table<float>(),
    attention_table<bf16>(),
    sepconv_backward_table<float>(),
    sepconv_backward_table<bf16>(),
    decoder_block_table<float>(),
    decoder_block_table<bf16>(),
    geglu_table<float>(),
    geglu_table<bf16>(),
    outer_table<float>(),
    outer_table<bf16>(),
};

}  // namespace snapgen::SG_ISA
