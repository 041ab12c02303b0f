// snapgen_cpu::sepconv: how one separable convolution is cut into units and shared among threads; the loops are in
// sepconv_kernel.h.
#include <optional>

#include "norm.h"
#include "scratch.h"

namespace snapgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRingBytes = 786432;   // of the three normalised rows; with a panel and the weight they share the L2
constexpr int64_t kTileWidth = 256;
constexpr int64_t kPanelBytes = 524288;
constexpr int64_t kStreamBytes = 12582912;

// The cut of the outputs into tiles and units: by the shape and the dtype alone.
void cut(Sepconv& s, int64_t element_size) {
  const int64_t scale = s.upsample ? 2 : 1;
  int64_t widest = (kRingBytes / (3 * 4 * std::max<int64_t>(s.channels, 1)) - 3) * scale / s.stride;
  widest = std::max<int64_t>(8, std::min(widest, kTileWidth));
  s.tile_width = s.out_width;
  if (s.out_width > widest) {
    const int64_t parts = (s.out_width + widest - 1) / widest;
    s.tile_width = ((s.out_width + parts - 1) / parts + 1) / 2 * 2;
  }
  s.tiles = (s.out_width + s.tile_width - 1) / s.tile_width;
  const int64_t pixels = s.batch * s.out_height * s.out_width, target = pixels >= 4096 ? 128 : 64;
  s.unit_rows = std::min(s.out_height, std::max<int64_t>(1, target / s.tile_width));
  s.units_of_tile = (s.out_height + s.unit_rows - 1) / s.unit_rows;
  const int64_t most = std::max<int64_t>(64, std::min<int64_t>(256, kPanelBytes / (element_size * std::max<int64_t>(s.channels, 1))));
  s.panel_units = std::max<int64_t>(1, most / (s.unit_rows * s.tile_width));
}

void check_image(const Tensor& t, const char* name, int64_t batch, int64_t channels, int64_t height, int64_t width,
                 ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == channels && t.size(2) == height && t.size(3) == width &&
                      t.scalar_type() == dtype && is_contiguous_as(t, true),
                  "snapgen_cpu::sepconv: ", name, " does not fit x in shape or dtype, or is not channels_last");
}

// y [B, O, H', W'] = pointwise(depthwise(SiLU(norm(x)))) + bias + residual + pointwise of skip. mean and rstd [B, groups] fp32
// are those of the norm. pw and skip_weight are packed. bias [B, O] fp32. out_mean and out_rstd [B, out_groups] fp32 receive the
// statistics of y. Everything of the size of an image is channels_last.
void sepconv(Tensor x, Tensor dw_weight, std::optional<Tensor> dw_bias, Tensor pw, Tensor bias, std::optional<Tensor> mean,
             std::optional<Tensor> rstd, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
             std::optional<Tensor> residual, std::optional<Tensor> skip, std::optional<Tensor> skip_weight, int64_t stride,
             bool upsample, Tensor y, std::optional<Tensor> out_mean, std::optional<Tensor> out_rstd, double out_eps) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "snapgen_cpu::sepconv: x must be float32 or bfloat16");
  STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 4 && (stride == 1 || stride == 2), "snapgen_cpu::sepconv: shapes do not fit");
  const bool narrow = dtype == ScalarType::BFloat16;
  const int64_t scale = upsample ? 2 : 1;
  Sepconv s{};
  s.batch = x.size(0), s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3), s.outputs = y.size(1);
  s.out_height = (s.height * scale - 1) / stride + 1, s.out_width = (s.width * scale - 1) / stride + 1;
  s.stride = stride, s.upsample = upsample;
  check_image(x, "x", s.batch, s.channels, s.height, s.width, dtype);
  check_image(y, "y", s.batch, s.outputs, s.out_height, s.out_width, dtype);
  STD_TORCH_CHECK(x.numel() > 0 && y.numel() > 0, "snapgen_cpu::sepconv: x and y must not be empty");
  STD_TORCH_CHECK(dw_weight.numel() == 9 * s.channels && (!dw_bias || dw_bias->numel() == s.channels) &&
                      bias.numel() == s.batch * s.outputs,
                  "snapgen_cpu::sepconv: weights do not fit x and y");
  const PackTable& pack = kernels().pack;
  const auto elements = narrow ? pack.elements_bf16 : pack.elements_f32;
  STD_TORCH_CHECK(pw.numel() == elements(s.channels, s.outputs),
                  "snapgen_cpu::sepconv: pw is not packed for these channels and this instruction set");
  s.x = x.const_data_ptr(), s.pw = pw.const_data_ptr(), s.out = y.mutable_data_ptr();

  const std::vector<float> taps = widened<float>(dw_weight, "dw_weight"), add = widened<float>(bias, "bias");
  s.dw_weight = taps.data(), s.bias = add.data();
  std::vector<float> tap_bias, means, rstds, weights, biases;
  if (dw_bias) tap_bias = widened<float>(*dw_bias, "dw_bias"), s.dw_bias = tap_bias.data();
  if (mean) {
    STD_TORCH_CHECK(rstd && norm_weight && norm_bias && mean->dim() == 2 && mean->size(0) == s.batch && mean->size(1) > 0 &&
                        s.channels % mean->size(1) == 0 && rstd->numel() == mean->numel() &&
                        norm_weight->numel() == s.channels && norm_bias->numel() == s.channels,
                    "snapgen_cpu::sepconv: the norm does not fit x");
    s.groups = mean->size(1);
    means = widened<float>(*mean, "mean"), rstds = widened<float>(*rstd, "rstd");
    weights = widened<float>(*norm_weight, "norm_weight"), biases = widened<float>(*norm_bias, "norm_bias");
    s.mean = means.data(), s.rstd = rstds.data(), s.norm_weight = weights.data(), s.norm_bias = biases.data();
  }
  if (residual) {
    check_image(*residual, "residual", s.batch, s.outputs, s.out_height, s.out_width, dtype);
    s.residual = residual->const_data_ptr();
  }
  if (skip) {
    s.skip_channels = skip->size(1);
    check_image(*skip, "skip", s.batch, s.skip_channels, s.out_height, s.out_width, dtype);
    STD_TORCH_CHECK(skip_weight && skip_weight->numel() == elements(s.skip_channels, s.outputs),
                    "snapgen_cpu::sepconv: skip_weight is not packed for skip");
    s.skip = skip->const_data_ptr(), s.skip_weight = skip_weight->const_data_ptr();
  }
  cut(s, int64_t(x.element_size()));
  s.stream = y.numel() * int64_t(y.element_size()) >= kStreamBytes;
  const int64_t units = s.batch * s.tiles * s.units_of_tile;
  std::vector<double> moments;
  if (out_mean) {
    STD_TORCH_CHECK(out_rstd && out_mean->dim() == 2 && out_mean->size(0) == s.batch && out_mean->size(1) > 0 &&
                        s.outputs % out_mean->size(1) == 0 && out_rstd->numel() == out_mean->numel(),
                    "snapgen_cpu::sepconv: out_mean and out_rstd do not fit y");
    s.out_groups = out_mean->size(1);
    moments.resize(units * 2 * s.out_groups);
    s.moments = moments.data();
  }

  const SepconvTable& table = kernels().sepconv;
  const int64_t bytes = (narrow ? table.scratch_bf16 : table.scratch_f32)(s);
  const double flops = 2.0 * double(s.out_height * s.out_width) * double(s.batch) * double(s.channels) * double(s.outputs + 32);
  const int64_t grain = std::max<int64_t>(1, int64_t(double(units) * 2e6 / flops));
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    (narrow ? table.run_bf16 : table.run_f32)(s, begin, end, thread_scratch().get(bytes));
  });
  if (!out_mean) return;
  float *to_mean = static_cast<float*>(out_mean->mutable_data_ptr()), *to_rstd = static_cast<float*>(out_rstd->mutable_data_ptr());
  const int64_t per_sample = s.tiles * s.units_of_tile, per_group = s.outputs / s.out_groups;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t g = 0; g < s.out_groups; ++g) {
      Moments merged;
      for (int64_t i = 0; i < per_sample; ++i) {
        const int64_t rows = std::min(s.unit_rows, s.out_height - i % s.units_of_tile * s.unit_rows);
        const int64_t columns = std::min(s.tile_width, s.out_width - i / s.units_of_tile * s.tile_width);
        const double* found = s.moments + ((b * per_sample + i) * s.out_groups + g) * 2;
        merged.add(double(rows * columns * per_group), found[0], found[1]);
      }
      to_mean[b * s.out_groups + g] = float(merged.mean());
      to_rstd[b * s.out_groups + g] = float(merged.rstd(out_eps));
    }
}

}  // namespace
}  // namespace snapgen

STABLE_TORCH_LIBRARY_FRAGMENT(snapgen_cpu, m) {
  m.def(
      "sepconv(Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor pw, Tensor bias, Tensor? mean, Tensor? rstd, "
      "Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, Tensor? skip, Tensor? skip_weight, int stride, bool upsample, "
      "Tensor(a!) y, Tensor(b!)? out_mean, Tensor(c!)? out_rstd, float out_eps) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(snapgen_cpu, CPU, m) { m.impl("sepconv", TORCH_BOX(&snapgen::sepconv)); }
