// snapgen_cpu::decoder_block_*, the sweeps of the tiny decoder's block, and ::norm_conv, its last layer: plans, checks,
// parameters, threads. The loops are in decoder_block_kernel.h, the order of the calls in snapgen_kernels/_cpu/.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "norm.h"
#include "scratch.h"

namespace snapgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

const DecoderBlockTable& table(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "snapgen_cpu::decoder_block: x must be float32 or bfloat16");
  return dtype == ScalarType::Float ? kernels().decoder_block_f32 : kernels().decoder_block_bf16;
}

void check_image(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, "snapgen_cpu::decoder_block: ", name, " must be [B, C, H, W]");
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), strides[4] = {H * W * C, 1, W * C, C};
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(x.size(d) == 1 || x.stride(d) == strides[d] || x.numel() == 0, "snapgen_cpu::decoder_block: ", name,
                    " must be dense and channels_last");
}

// [10, lanes(C)]: the nine taps of every channel, and its bias.
std::vector<float> depthwise_rows(const Tensor& weight, const Tensor& bias, int64_t channels, int64_t lanes) {
  STD_TORCH_CHECK(weight.numel() == 9 * channels && bias.numel() == channels,
                  "snapgen_cpu::decoder_block: a depthwise weight or bias does not fit");
  const auto w = widened<float>(weight, "a depthwise weight"), b = widened<float>(bias, "a depthwise bias");
  const int64_t stride = up(channels, lanes);
  std::vector<float> rows(10 * stride);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap) rows[tap * stride + c] = w[c * 9 + tap];
    rows[9 * stride + c] = b[c];
  }
  return rows;
}

// [batch, 3, lanes(C)]: mean, rstd * weight, bias of every channel.
std::vector<float> norm_rows(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t batch,
                             int64_t channels, int64_t groups, int64_t lanes) {
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "snapgen_cpu::decoder_block: groups must divide the channels");
  STD_TORCH_CHECK(weight.numel() == channels && bias.numel() == channels && mean.numel() == batch * groups &&
                      rstd.numel() == batch * groups,
                  "snapgen_cpu::decoder_block: the norm's parameters or statistics do not fit");
  const auto w = widened<float>(weight, "norm_weight"), b = widened<float>(bias, "norm_bias");
  const auto m = widened<float>(mean, "mean"), r = widened<float>(rstd, "rstd");
  const int64_t stride = up(channels, lanes), per_group = channels / groups;
  std::vector<float> rows(batch * 3 * stride);
  for (int64_t s = 0; s < batch; ++s)
    for (int64_t c = 0; c < channels; ++c) {
      float* at = rows.data() + s * 3 * stride + c;
      at[0] = m[s * groups + c / per_group];
      at[stride] = r[s * groups + c / per_group] * w[c];
      at[2 * stride] = b[c];
    }
  return rows;
}

// Columns of a task: as many as leave `most` with the row's halo, in the number of tiles that wastes the least.
template <class G>
void plan_tiles(G& g, int64_t most, int64_t granule) {
  const int64_t fewest = (g.width + most - 1) / most;
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int64_t tiles = fewest; tiles < fewest + 5 && tiles <= g.width; ++tiles) {
    const int64_t columns = (g.width + tiles - 1) / tiles, work = tiles * up(columns + 2, granule);
    if (work < best) best = work, g.tile = columns;
  }
  g.tiles = (g.width + g.tile - 1) / g.tile;
}

// Rows of a task: few enough for many threads, many enough for the halo to cost little.
template <class G>
void plan_bands(G& g) {
  int64_t rows = 64;
  while (rows > 16 && g.batch * g.tiles * ((g.height + rows - 1) / rows) < 16) rows /= 2;
  g.bands = (g.height + rows - 1) / rows;
  g.band = (g.height + g.bands - 1) / g.bands;
  g.bands = (g.height + g.band - 1) / g.band;
}

template <class G>
int64_t tasks_of(const G& g) {
  return g.batch * g.bands * g.tiles;
}

// Bytes of the rings that a thread keeps in its cache.
constexpr int64_t kRingBytes = 640 << 10;

DecoderBlock plan(const Tensor& x, int64_t middle) {
  check_image(x, "x");
  const DecoderBlockTable& kernel = table(x);
  DecoderBlock g{};
  g.batch = x.size(0), g.channels = x.size(1), g.height = x.size(2), g.width = x.size(3), g.middle = middle;
  g.x = x.const_data_ptr();
  if (x.numel() == 0) return g;
  plan_tiles(g, std::max<int64_t>(kRingBytes / (12 * up(middle, kernel.lanes)) - 2, 14), kernel.granule);
  plan_bands(g);
  return g;
}

int64_t tasks(Tensor x, int64_t middle) { return tasks_of(plan(x, middle)); }

// Elements of x's dtype that `finish` needs besides, where it writes over x and computes rows of h anew.
int64_t frame(Tensor x, int64_t middle) {
  const DecoderBlock g = plan(x, middle);
  return tasks_of(g) * table(x).frame_elements(g);
}

int64_t bands(Tensor x, int64_t middle) { return plan(x, middle).bands; }
int64_t band_rows(Tensor x, int64_t middle) { return plan(x, middle).band; }

template <class G, class F>
void in_parallel(const G& g, int64_t begin, int64_t end, int64_t scratch, F task) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
    task(g, first, last, thread_scratch().get(scratch));
  });
}

void keep(DecoderBlock& g, const Tensor& x, const Tensor& h, int64_t kept) {
  const int64_t rows = kept == g.bands ? g.height : kept * g.band;
  STD_TORCH_CHECK(kept >= 0 && kept <= g.bands, "snapgen_cpu::decoder_block: kept must be in [0, ", g.bands, "]");
  STD_TORCH_CHECK(h.scalar_type() == x.scalar_type() && h.numel() == g.batch * rows * g.width * g.middle,
                  "snapgen_cpu::decoder_block: h does not fit");
  if (kept) check_image(h, "h");
  g.kept = kept;
}

void check_range(const DecoderBlock& g, int64_t begin, int64_t end) {
  STD_TORCH_CHECK(begin >= 0 && begin <= end && end <= tasks_of(g), "snapgen_cpu::decoder_block: no such tasks");
}

void check_moments(const Tensor& moments, int64_t tasks, int64_t groups) {
  STD_TORCH_CHECK(moments.scalar_type() == ScalarType::Double && moments.numel() == tasks * groups * 2,
                  "snapgen_cpu::decoder_block: moments must be float64 [tasks, groups, 2]");
}

// The first sweep on tasks [begin, end): moments of h, and its rows in the kept bands.
void statistics(Tensor x, Tensor dw1_weight, Tensor dw1_bias, Tensor pw1, Tensor dw2_weight, Tensor dw2_bias, int64_t groups,
                int64_t kept, int64_t begin, int64_t end, Tensor h, Tensor moments) {
  const int64_t middle = dw2_bias.numel();
  const DecoderBlockTable& kernel = table(x);
  DecoderBlock g = plan(x, middle);
  check_range(g, begin, end);
  keep(g, x, h, kept);
  check_moments(moments, tasks_of(g), groups);
  STD_TORCH_CHECK(groups > 0 && middle % groups == 0, "snapgen_cpu::decoder_block: groups must divide the channels");
  const auto dw1 = depthwise_rows(dw1_weight, dw1_bias, g.channels, kernel.lanes);
  const auto dw2 = depthwise_rows(dw2_weight, dw2_bias, middle, kernel.lanes);
  g.groups = groups, g.dw1 = dw1.data(), g.dw2 = dw2.data(), g.pw1 = pw1.const_data_ptr();
  g.h = h.mutable_data_ptr(), g.moments = static_cast<double*>(moments.mutable_data_ptr());
  in_parallel(g, begin, end, kernel.scratch_bytes(g), kernel.statistics);
}

// Chan's merge of the tasks' moments, in their order: of h, or with `channels` of y those of y.
void merge(Tensor x, int64_t middle, int64_t channels, Tensor moments, double eps, Tensor mean, Tensor rstd) {
  const DecoderBlock g = plan(x, middle);
  const int64_t groups = g.batch ? mean.numel() / g.batch : 0;
  check_moments(moments, tasks_of(g), groups);
  const double* from = static_cast<const double*>(moments.const_data_ptr());
  float* means = static_cast<float*>(mean.mutable_data_ptr());
  float* rstds = static_cast<float*>(rstd.mutable_data_ptr());
  for (int64_t s = 0; s < g.batch; ++s)
    for (int64_t group = 0; group < groups; ++group) {
      Moments merged;
      for (int64_t band = 0; band < g.bands; ++band)
        for (int64_t tile = 0; tile < g.tiles; ++tile) {
          const int64_t pixels = std::min(g.band, g.height - band * g.band) * std::min(g.tile, g.width - tile * g.tile);
          const double* at = from + (((s * g.bands + band) * g.tiles + tile) * groups + group) * 2;
          merged.add(double(pixels * (channels / groups)), at[0], at[1]);
        }
      means[s * groups + group] = float(merged.mean()), rstds[s * groups + group] = float(merged.rstd(eps));
    }
}

// What tasks read of their neighbours, set aside before `finish` writes over x.
void frames(Tensor x, int64_t middle, int64_t kept, Tensor out) {
  DecoderBlock g = plan(x, middle);
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.numel() == tasks_of(g) * table(x).frame_elements(g),
                  "snapgen_cpu::decoder_block: frames do not fit");
  g.kept = kept, g.frames = out.mutable_data_ptr();
  in_parallel(g, 0, tasks_of(g), 0, table(x).frames);
}

// The second sweep on tasks [begin, end): y, and its moments where out_moments is not empty.
void finish(Tensor x, Tensor dw1_weight, Tensor dw1_bias, Tensor pw1, Tensor dw2_weight, Tensor dw2_bias, Tensor norm_weight,
            Tensor norm_bias, Tensor pw2, Tensor mean, Tensor rstd, int64_t groups, Tensor h, int64_t kept, Tensor framed,
            int64_t out_groups, int64_t begin, int64_t end, Tensor out, Tensor out_moments) {
  const int64_t middle = dw2_bias.numel();
  const DecoderBlockTable& kernel = table(x);
  DecoderBlock g = plan(x, middle);
  check_range(g, begin, end);
  keep(g, x, h, kept);
  check_image(out, "out");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.numel() == x.numel(),
                  "snapgen_cpu::decoder_block: out must have the shape and dtype of x");
  const auto dw1 = depthwise_rows(dw1_weight, dw1_bias, g.channels, kernel.lanes);
  const auto dw2 = depthwise_rows(dw2_weight, dw2_bias, middle, kernel.lanes);
  const auto norm = norm_rows(norm_weight, norm_bias, mean, rstd, g.batch, middle, groups, kernel.lanes);
  g.groups = groups, g.dw1 = dw1.data(), g.dw2 = dw2.data(), g.norm = norm.data();
  g.pw1 = pw1.const_data_ptr(), g.pw2 = pw2.const_data_ptr();
  g.h = const_cast<void*>(h.const_data_ptr()), g.out = out.mutable_data_ptr();
  const bool over = g.out == g.x && kept < g.bands;
  STD_TORCH_CHECK(!over || (framed.scalar_type() == x.scalar_type() &&
                            framed.numel() == tasks_of(g) * kernel.frame_elements(g)),
                  "snapgen_cpu::decoder_block: to write over x takes its frames");
  if (over) g.frames = const_cast<void*>(framed.const_data_ptr());
  if (out_groups > 0) {
    STD_TORCH_CHECK(g.channels % out_groups == 0, "snapgen_cpu::decoder_block: out_groups must divide the channels");
    check_moments(out_moments, tasks_of(g), out_groups);
    g.out_groups = out_groups, g.out_moments = static_cast<double*>(out_moments.mutable_data_ptr());
  }
  in_parallel(g, begin, end, kernel.scratch_bytes(g), kernel.finish);
}

NormConv conv_plan(const Tensor& x, int64_t outputs) {
  check_image(x, "x");
  NormConv g{};
  g.batch = x.size(0), g.channels = x.size(1), g.height = x.size(2), g.width = x.size(3), g.outputs = outputs;
  g.x = x.const_data_ptr();
  if (x.numel() == 0) return g;
  plan_tiles(g, 254, table(x).granule);
  plan_bands(g);
  return g;
}

// out = conv3x3(SiLU(GroupNorm(x))) + bias; `taps` is the packed B of products channels -> 9 * outputs, tap-major.
void norm_conv(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor rstd, int64_t groups, Tensor taps, Tensor bias,
               Tensor out) {
  const DecoderBlockTable& kernel = table(x);
  NormConv g = conv_plan(x, bias.numel());
  check_image(out, "out");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.numel() == g.batch * g.height * g.width * g.outputs,
                  "snapgen_cpu::norm_conv: out does not fit");
  const auto norm = norm_rows(norm_weight, norm_bias, mean, rstd, g.batch, g.channels, groups, kernel.lanes);
  const auto biases = widened<float>(bias, "bias");
  g.norm = norm.data(), g.bias = biases.data(), g.taps = taps.const_data_ptr(), g.out = out.mutable_data_ptr();
  in_parallel(g, 0, tasks_of(g), kernel.norm_conv_scratch_bytes(g), kernel.norm_conv);
}

// Asks for large pages behind a tensor that nothing was written to yet: the first touch of 100 MB by pages of 4 KB takes
// longer than many a sweep over them. Only advice; where malloc keeps its pages it changes nothing.
void huge_pages(Tensor fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t end = start + uintptr_t(fresh.numel()) * uintptr_t(fresh.element_size());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last >= first + 8 * kPage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace snapgen

STABLE_TORCH_LIBRARY_FRAGMENT(snapgen_cpu, m) {
  m.def("huge_pages(Tensor(a!) fresh) -> ()");
  m.def("decoder_block_tasks(Tensor x, int middle) -> int");
  m.def("decoder_block_bands(Tensor x, int middle) -> int");
  m.def("decoder_block_band_rows(Tensor x, int middle) -> int");
  m.def("decoder_block_frame(Tensor x, int middle) -> int");
  m.def("decoder_block_frames(Tensor x, int middle, int kept, Tensor(a!) out) -> ()");
  m.def(
      "decoder_block_statistics(Tensor x, Tensor dw1_weight, Tensor dw1_bias, Tensor pw1, Tensor dw2_weight, Tensor dw2_bias, "
      "int groups, int kept, int begin, int end, Tensor(a!) h, Tensor(b!) moments) -> ()");
  m.def(
      "decoder_block_merge(Tensor x, int middle, int channels, Tensor moments, float eps, Tensor(a!) mean, Tensor(b!) rstd) -> ()");
  m.def(
      "decoder_block_finish(Tensor x, Tensor dw1_weight, Tensor dw1_bias, Tensor pw1, Tensor dw2_weight, Tensor dw2_bias, "
      "Tensor norm_weight, Tensor norm_bias, Tensor pw2, Tensor mean, Tensor rstd, int groups, Tensor h, int kept, "
      "Tensor frames, int out_groups, int begin, int end, Tensor(a!) out, Tensor(b!) out_moments) -> ()");
  m.def(
      "norm_conv(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor rstd, int groups, Tensor taps, Tensor bias, "
      "Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(snapgen_cpu, CPU, m) {
  m.impl("huge_pages", TORCH_BOX(&snapgen::huge_pages));
  m.impl("decoder_block_tasks", TORCH_BOX(&snapgen::tasks));
  m.impl("decoder_block_bands", TORCH_BOX(&snapgen::bands));
  m.impl("decoder_block_band_rows", TORCH_BOX(&snapgen::band_rows));
  m.impl("decoder_block_frame", TORCH_BOX(&snapgen::frame));
  m.impl("decoder_block_frames", TORCH_BOX(&snapgen::frames));
  m.impl("decoder_block_statistics", TORCH_BOX(&snapgen::statistics));
  m.impl("decoder_block_merge", TORCH_BOX(&snapgen::merge));
  m.impl("decoder_block_finish", TORCH_BOX(&snapgen::finish));
  m.impl("norm_conv", TORCH_BOX(&snapgen::norm_conv));
}
