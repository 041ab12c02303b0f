// Backward of the separable convolution on the CPU: three primitives, for the depthwise half with the norm before it, and
// for the two products of the pointwise half. Their loops are in sepconv_backward_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace snapgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

const SepconvBackwardTable& table(const Tensor& t, const char* op) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "snapgen_cpu::", op,
                  ": activations must be float32 or bfloat16");
  return dtype == ScalarType::Float ? kernels().sepconv_backward_f32 : kernels().sepconv_backward_bf16;
}

bool is_dense(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Raises unless `t` (absent passes) is dense and of this dtype and number of elements.
void check(const Optional& t, const char* op, const char* name, int64_t elements, std::optional<ScalarType> dtype = {}) {
  if (!t) return;
  STD_TORCH_CHECK(t->numel() == elements, "snapgen_cpu::", op, ": ", name, " has ", t->numel(), " elements; expected ", elements);
  STD_TORCH_CHECK(!dtype || t->scalar_type() == *dtype, "snapgen_cpu::", op, ": ", name, " has another dtype than expected");
  STD_TORCH_CHECK(is_dense(*t), "snapgen_cpu::", op, ": ", name, " must be contiguous");
}

const void* data_of(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }
void* memory_of(Optional& t) { return t ? t->mutable_data_ptr() : nullptr; }

// A parameter, or its gradient, element by element; asking the tensor itself takes longer than the element.
class Parameter {
 public:
  explicit Parameter(const Tensor& t)
      : narrow_(t.scalar_type() == ScalarType::BFloat16), data_(const_cast<void*>(t.const_data_ptr())) {
    STD_TORCH_CHECK(narrow_ || t.scalar_type() == ScalarType::Float, "snapgen_cpu: parameters must be float32 or bfloat16");
  }
  explicit Parameter(const Optional& t) : Parameter() {
    if (t) *this = Parameter(*t);
  }
  explicit operator bool() const { return data_; }
  float operator[](int64_t i) const {
    if (!narrow_) return static_cast<const float*>(data_)[i];
    const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data_)[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  void set(int64_t i, double number) {
    const float value = float(number);
    if (!narrow_) {
      static_cast<float*>(data_)[i] = value;
      return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    static_cast<uint16_t*>(data_)[i] = value != value ? 0x7fc0 : uint16_t(rounded >> 16);
  }

 private:
  Parameter() = default;
  bool narrow_ = false;
  void* data_ = nullptr;
};

// Memory that nobody has written to, on a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(new char[size_t(bytes + 64)]) {}
  void* data() { return memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64); }
  float* floats() { return static_cast<float*>(data()); }

 private:
  std::unique_ptr<char[]> memory_;
};

int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t parts_of(int64_t n, int64_t part) { return (n + part - 1) / part; }

// Tasks that an op should have at least, for threads to share.
constexpr int64_t kTasks = 16;
// Bytes of the rows that a depthwise task works in: they stay in the second cache.
constexpr int64_t kRowBytes = 786432;
// Bytes of dz that a task finds in the second cache again.
constexpr int64_t kFinishBytes = 1048576;

void plan(DepthwiseGradient& g, int64_t element_size) {
  g.padded = up_to(g.channels, kPad);
  // As many channels as fit with 16 columns, preferably all: memory is then read in long runs. Then as many columns.
  const auto bytes = [&](int64_t columns) { return 4 * depthwise_channel_floats(g, columns); };
  g.chunks = parts_of(g.padded * bytes(std::min<int64_t>(g.width, 16)), kRowBytes);
  const int64_t per_group = g.groups ? g.channels / g.groups : 1, unit = std::lcm(kPad, per_group);
  g.chunk = std::min(up_to(parts_of(g.channels, g.chunks), unit < g.padded / g.chunks ? unit : kPad), g.padded);
  g.chunks = parts_of(g.channels, g.chunk);
  g.columns = up_to(g.width, 2);
  while (g.columns > 16 && g.chunk * bytes(g.columns) > kRowBytes) g.columns = up_to(g.columns / 2, 2);
  g.tiles = parts_of(g.width, g.columns);
  g.strips = std::clamp<int64_t>(parts_of(kTasks, g.batch * g.chunks * g.tiles), 1, std::max<int64_t>(g.height / 8, 1));
  g.rows = parts_of(g.height, g.strips);
  g.strips = parts_of(g.height, g.rows);
  g.finish = g.groups && g.dx && g.strips * g.tiles == 1 && (g.chunks == 1 || g.chunk % per_group == 0) &&
             g.height * g.width * g.chunk * element_size <= kFinishBytes;
}

// What the depthwise half is asked for, its parameters as the kernels read them, and its sums.
class Depthwise {
 public:
  DepthwiseGradient g{};

  Depthwise(const char* op, const Tensor& x, const Tensor& dw_weight, const Optional& dw_bias, const Optional& norm_weight,
            const Optional& norm_bias, const Optional& mean, const Optional& rstd, const Optional& extra, int64_t num_groups,
            int64_t stride, int64_t scale, Optional& dx, const Optional& grad_dw_weight, const Optional& grad_dw_bias,
            const Optional& grad_norm_weight, const Optional& grad_norm_bias)
      : to_dw_weight_(grad_dw_weight), to_dw_bias_(grad_dw_bias), to_norm_weight_(grad_norm_weight),
        to_norm_bias_(grad_norm_bias) {
    STD_TORCH_CHECK(x.dim() == 4, "snapgen_cpu::", op, ": x must be [B, H, W, C]");
    STD_TORCH_CHECK((stride == 1 || stride == 2) && (scale == 1 || scale == 2), "snapgen_cpu::", op,
                    ": stride and scale are 1 or 2");
    STD_TORCH_CHECK(x.numel() > 0, "snapgen_cpu::", op, ": x is empty");
    g.batch = x.size(0), g.height = x.size(1), g.width = x.size(2), g.channels = x.size(3);
    g.stride = stride, g.scale = scale;
    g.out_height = (g.height * scale - 1) / stride + 1, g.out_width = (g.width * scale - 1) / stride + 1;
    const ScalarType dtype = x.scalar_type();
    const int64_t C = g.channels;
    g.groups = norm_weight ? num_groups : 0;
    STD_TORCH_CHECK(!g.groups || (C % g.groups == 0 && norm_bias && mean && rstd), "snapgen_cpu::", op,
                    ": the norm is not whole");
    check(x, op, "x", x.numel(), dtype);
    check(dw_weight, op, "dw_weight", 9 * C);
    check(dw_bias, op, "dw_bias", C);
    check(norm_weight, op, "norm_weight", C);
    check(norm_bias, op, "norm_bias", C);
    check(mean, op, "mean", g.batch * g.groups, ScalarType::Float);
    check(rstd, op, "rstd", g.batch * g.groups, ScalarType::Float);
    check(extra, op, "extra", x.numel(), dtype);
    check(dx, op, "dx", x.numel(), dtype);
    check(grad_dw_weight, op, "grad_dw_weight", 9 * C);
    check(grad_dw_bias, op, "grad_dw_bias", C);
    check(grad_norm_weight, op, "grad_norm_weight", C);
    check(grad_norm_bias, op, "grad_norm_bias", C);
    g.x = x.const_data_ptr(), g.extra = data_of(extra), g.dx = memory_of(dx);
    g.weights = grad_dw_weight || grad_dw_bias, g.inputs = dx || grad_norm_weight || grad_norm_bias;
    plan(g, int64_t(x.element_size()));

    parameters_.resize(12 * g.padded);
    float *taps = parameters_.data(), *bias = taps + 9 * g.padded, *weight_n = bias + g.padded, *bias_n = weight_n + g.padded;
    const Parameter dw_weights(dw_weight), dw_biases(dw_bias), norm_weights(norm_weight), norm_biases(norm_bias);
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t i = 0; i < 9; ++i) taps[i * g.padded + c] = dw_weights[c * 9 + i];
      if (dw_biases) bias[c] = dw_biases[c];
      if (g.groups) weight_n[c] = norm_weights[c], bias_n[c] = norm_biases[c];
    }
    g.taps = taps, g.bias = bias, g.norm_weight = weight_n, g.norm_bias = bias_n;
    g.mean = static_cast<const float*>(data_of(mean)), g.rstd = static_cast<const float*>(data_of(rstd));
    sums_ = Buffer(parts() * kGradientSums * g.padded * 4);
    g.sums = sums_.floats();
  }

  int64_t parts() const { return g.batch * g.strips * g.tiles; }

  // The gradients of the parameters, once the sums are there.
  void store_parameters(const SepconvBackwardTable& kernel) {
    if (!g.weights && !to_norm_weight_ && !to_norm_bias_) return;
    std::vector<float> merged(kGradientSums * g.padded);
    g.merged = merged.data();
    torch::stable::parallel_for(0, kGradientSums * g.padded / 16, std::max<int64_t>(1, 4096 / parts()),
                                [&](int64_t begin, int64_t end) { kernel.merge(g, begin, end); });
    for (int64_t c = 0; c < g.channels; ++c) {
      if (to_dw_weight_)
        for (int64_t i = 0; i < 9; ++i) to_dw_weight_.set(c * 9 + i, merged[i * g.padded + c]);
      if (to_dw_bias_) to_dw_bias_.set(c, merged[9 * g.padded + c]);
      if (to_norm_bias_) to_norm_bias_.set(c, merged[10 * g.padded + c]);
      if (to_norm_weight_) to_norm_weight_.set(c, merged[11 * g.padded + c]);
    }
  }

 private:
  std::vector<float> parameters_;
  Buffer sums_{0};
  Parameter to_dw_weight_, to_dw_bias_, to_norm_weight_, to_norm_bias_;
};

void depthwise_gradient(Tensor x, Optional dd, Tensor dw_weight, Optional dw_bias, Optional norm_weight, Optional norm_bias,
                        Optional mean, Optional rstd, Optional extra, int64_t num_groups, int64_t stride, int64_t scale,
                        Optional dx, Optional d, Optional grad_dw_weight, Optional grad_dw_bias, Optional grad_norm_weight,
                        Optional grad_norm_bias) {
  const char* op = "depthwise_gradient";
  const SepconvBackwardTable& kernel = table(x, op);
  Depthwise depthwise(op, x, dw_weight, dw_bias, norm_weight, norm_bias, mean, rstd, extra, num_groups, stride, scale, dx,
                      grad_dw_weight, grad_dw_bias, grad_norm_weight, grad_norm_bias);
  DepthwiseGradient& g = depthwise.g;
  const int64_t outputs = g.batch * g.out_height * g.out_width * g.channels;
  check(dd, op, "dd", outputs, x.scalar_type());
  check(d, op, "d", outputs, x.scalar_type());
  STD_TORCH_CHECK(dd || !(g.weights || g.inputs), "snapgen_cpu::", op, ": dd is missing");
  g.dd = data_of(dd), g.d = memory_of(d);
  const int64_t scratch = depthwise_scratch_floats(g);
  const int64_t work = g.rows * g.columns * scale * scale * g.chunk;
  torch::stable::parallel_for(0, depthwise.parts() * g.chunks, std::max<int64_t>(1, 8192 / work),
                              [&](int64_t begin, int64_t end) {
                                float* memory = static_cast<float*>(thread_scratch().get(scratch * 4));
                                kernel.depthwise(g, begin, end, memory);
                              });
  if (g.groups && g.dx && !g.finish)
    torch::stable::parallel_for(0, g.batch * g.height, std::max<int64_t>(1, 32768 / (g.width * g.channels)),
                                [&](int64_t begin, int64_t end) {
                                  float* memory = static_cast<float*>(thread_scratch().get(5 * g.padded * 4));
                                  kernel.norm(g, begin, end, memory);
                                });
  depthwise.store_parameters(kernel);
}

void check_packed(const char* op, const Tensor& packed, ScalarType dtype, int64_t depth, int64_t columns) {
  const PackTable& pack = kernels().pack;
  const auto elements = dtype == ScalarType::Float ? pack.elements_f32 : pack.elements_bf16;
  STD_TORCH_CHECK(packed.numel() == elements(depth, columns), "snapgen_cpu::", op,
                  ": packed is not of this size or of this instruction set");
}

// The column sums of dy -> gradients of the shift [B, O] and of the bias [O].
void store_column_sums(const PointwiseGradient& g, const Optional& grad_shift, const Optional& grad_bias) {
  const int64_t O = g.outputs;
  std::vector<double> sample(O), total(O);
  Parameter to_shift(grad_shift), to_bias(grad_bias);
  for (int64_t b = 0; b < g.batch; ++b) {
    std::fill(sample.begin(), sample.end(), 0.0);
    for (int64_t k = 0; k < g.parts; ++k)
      for (int64_t o = 0; o < O; ++o) sample[o] += g.sums[(b * g.parts + k) * O + o];
    if (to_shift)
      for (int64_t o = 0; o < O; ++o) to_shift.set(b * O + o, sample[o]);
    for (int64_t o = 0; o < O; ++o) total[o] += sample[o];
  }
  if (to_bias)
    for (int64_t o = 0; o < O; ++o) to_bias.set(o, total[o]);
}

void pointwise_gradient(Tensor dy, Optional packed, Optional dd, Optional grad_shift, Optional grad_bias) {
  const char* op = "pointwise_gradient";
  STD_TORCH_CHECK(dy.dim() == 4 && dy.numel() > 0, "snapgen_cpu::", op, ": dy must be [B, H, W, O], and not empty");
  const SepconvBackwardTable& kernel = table(dy, op);
  const ScalarType dtype = dy.scalar_type();
  PointwiseGradient g{};
  g.batch = dy.size(0), g.pixels = dy.size(1) * dy.size(2), g.outputs = dy.size(3);
  g.channels = dd ? dd->size(3) : 0;
  check(dy, op, "dy", dy.numel(), dtype);
  check(dd, op, "dd", g.batch * g.pixels * g.channels, dtype);
  check(grad_shift, op, "grad_shift", g.batch * g.outputs);
  check(grad_bias, op, "grad_bias", g.outputs);
  STD_TORCH_CHECK(!dd || packed, "snapgen_cpu::", op, ": dd needs the weight");
  if (dd) check_packed(op, *packed, dtype, g.outputs, g.channels);
  const int64_t most = 128;  // pixels of a task
  g.samples = std::clamp<int64_t>(most / g.pixels, 1, std::max<int64_t>(g.batch / kTasks, 1));
  g.part = std::min(most, g.pixels), g.parts = parts_of(g.pixels, g.part);
  g.dy = dy.const_data_ptr(), g.weight = data_of(packed), g.dd = memory_of(dd);
  const bool summed = grad_shift || grad_bias;
  Buffer sums(summed ? g.batch * g.parts * g.outputs * int64_t(sizeof(double)) : 0);
  g.sums = summed ? static_cast<double*>(sums.data()) : nullptr;
  const int64_t scratch = kernel.pointwise_scratch(g), tasks = parts_of(g.batch, g.samples) * g.parts;
  const int64_t work = g.part * g.samples * g.outputs * std::max<int64_t>(g.channels, 1);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, 524288 / work), [&](int64_t begin, int64_t end) {
    kernel.pointwise(g, begin, end, thread_scratch().get(scratch));
  });
  if (summed) store_column_sums(g, grad_shift, grad_bias);
}

// A tile of the result stays in the second cache with the slices of both operands.
PointwiseWeightGradient weight_tiles(int64_t outputs, int64_t channels) {
  PointwiseWeightGradient g{};
  g.outputs = outputs, g.channels = channels, g.row = up_to(channels, 32);
  g.tile_outputs = up_to(parts_of(outputs, parts_of(outputs, 512)), 32), g.tiles_outputs = parts_of(outputs, g.tile_outputs);
  g.tile_channels = up_to(parts_of(channels, parts_of(channels, 512)), 32);
  g.tiles_channels = parts_of(channels, g.tile_channels);
  g.slice = 256;
  return g;
}

void merge_weight_gradient(const SepconvBackwardTable& kernel, const PointwiseWeightGradient& g) {
  torch::stable::parallel_for(0, g.outputs, std::max<int64_t>(1, 16384 / (g.row * g.parts)),
                              [&](int64_t begin, int64_t end) { kernel.weight_merge(g, begin, end); });
}

void pointwise_weight_gradient(Tensor dy, Tensor d, Tensor dw) {
  const char* op = "pointwise_weight_gradient";
  STD_TORCH_CHECK(dy.dim() == 4 && d.dim() == 4 && dy.numel() > 0 && d.numel() > 0, "snapgen_cpu::", op,
                  ": dy and d must be [B, H, W, O] and [B, H, W, C], and not empty");
  const SepconvBackwardTable& kernel = table(dy, op);
  const ScalarType dtype = dy.scalar_type();
  PointwiseWeightGradient g = weight_tiles(dy.size(3), d.size(3));
  g.pixels = dy.numel() / g.outputs;
  check(dy, op, "dy", dy.numel(), dtype);
  check(d, op, "d", g.pixels * g.channels, dtype);
  check(dw, op, "dw", g.outputs * g.channels, dtype);
  const int64_t kinds = g.tiles_outputs * g.tiles_channels;
  // Parts are for the threads, and for fp32: sums of short chains of additions.
  g.parts = std::clamp<int64_t>(parts_of(kTasks / 2, kinds), 1, parts_of(g.pixels, 32));
  g.part = up_to(parts_of(g.pixels, g.parts), 32);
  g.parts = parts_of(g.pixels, g.part);
  g.slice = std::min(g.slice, g.part);
  g.dy = dy.const_data_ptr(), g.d = d.const_data_ptr(), g.dw = dw.mutable_data_ptr();
  Buffer partial(g.parts * g.outputs * g.row * 4);
  g.partial = partial.floats();
  const int64_t scratch = kernel.weight_scratch(g), work = g.tile_outputs * g.tile_channels * g.part;
  torch::stable::parallel_for(0, kinds * g.parts, std::max<int64_t>(1, 524288 / work), [&](int64_t begin, int64_t end) {
    kernel.weight(g, begin, end, thread_scratch().get(scratch));
  });
  merge_weight_gradient(kernel, g);
}

// Bytes of all images that samples taken together meet, and of all partial results.
constexpr int64_t kSampleBytes = 1048576, kPartialBytes = 4194304;

// All gradients of a separable convolution of small images; false, and nothing done, where they are not small or few.
bool separable_gradient(Tensor dy, Tensor packed, Tensor x, Tensor dw_weight, Optional dw_bias, Optional norm_weight,
                        Optional norm_bias, Optional mean, Optional rstd, Optional extra, int64_t num_groups, int64_t stride,
                        int64_t scale, Tensor grad_x, Tensor grad_dw_weight, Tensor grad_pw_weight, Optional grad_dw_bias,
                        Optional grad_pw_bias, Optional grad_norm_weight, Optional grad_norm_bias, Optional grad_shift) {
  const char* op = "separable_gradient";
  STD_TORCH_CHECK(dy.dim() == 4 && x.dim() == 4 && x.numel() > 0 && dy.numel() > 0, "snapgen_cpu::", op,
                  ": dy and x must be [B, H', W', O] and [B, H, W, C], and not empty");
  const int64_t batch = x.size(0), O = dy.size(3), C = x.size(3), pixels = dy.size(1) * dy.size(2);
  const int64_t size = int64_t(x.element_size());
  const int64_t sample_bytes = size * (pixels * (O + 2 * C) + 2 * x.size(1) * x.size(2) * C);
  const int64_t most_parts = std::min<int64_t>(kTasks, kPartialBytes / (4 * O * up_to(C, 32)));
  if (batch < kTasks || most_parts < kTasks / 4 || sample_bytes > kSampleBytes) return false;

  const SepconvBackwardTable& kernel = table(x, op);
  const ScalarType dtype = x.scalar_type();
  Optional dx(grad_x);
  Depthwise depthwise(op, x, dw_weight, dw_bias, norm_weight, norm_bias, mean, rstd, extra, num_groups, stride, scale, dx,
                      grad_dw_weight, grad_dw_bias, grad_norm_weight, grad_norm_bias);
  if (depthwise.g.chunks * depthwise.g.strips * depthwise.g.tiles > 1 || (depthwise.g.groups && !depthwise.g.finish)) return false;
  STD_TORCH_CHECK(dy.size(1) == depthwise.g.out_height && dy.size(2) == depthwise.g.out_width, "snapgen_cpu::", op,
                  ": dy has another size than the output for x");
  check(dy, op, "dy", batch * pixels * O, dtype);
  check(grad_pw_weight, op, "grad_pw_weight", O * C, dtype);
  check(grad_shift, op, "grad_shift", batch * O);
  check(grad_pw_bias, op, "grad_pw_bias", O);
  check_packed(op, packed, dtype, O, C);

  SeparableGradient g{};
  g.part = parts_of(batch, most_parts);
  // Few samples make a product of few pixels; more are taken together where the cache has room.
  g.samples = std::clamp<int64_t>(std::min(parts_of(256, pixels), kSampleBytes / sample_bytes), 1, g.part);
  const int64_t tasks = parts_of(batch, g.part);
  PointwiseGradient& outer = g.pointwise;
  outer.batch = batch, outer.pixels = pixels, outer.outputs = O, outer.channels = C;
  outer.part = pixels, outer.parts = 1, outer.samples = g.samples;
  outer.dy = dy.const_data_ptr(), outer.weight = packed.const_data_ptr();
  const bool summed = grad_shift || grad_pw_bias;
  Buffer sums(summed ? batch * O * int64_t(sizeof(double)) : 0);
  outer.sums = summed ? static_cast<double*>(sums.data()) : nullptr;
  g.weight = weight_tiles(O, C);
  g.weight.slice = std::min(g.weight.slice, g.samples * pixels);
  g.weight.dw = grad_pw_weight.mutable_data_ptr();
  Buffer partial(tasks * O * g.weight.row * 4);
  g.weight.partial = partial.floats();
  g.depthwise = depthwise.g;
  const int64_t scratch = kernel.separable_scratch(g);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    kernel.separable(g, begin, end, thread_scratch().get(scratch));
  });
  depthwise.store_parameters(kernel);
  if (summed) store_column_sums(outer, grad_shift, grad_pw_bias);
  g.weight.parts = tasks;
  merge_weight_gradient(kernel, g.weight);
  return true;
}

}  // namespace
}  // namespace snapgen

STABLE_TORCH_LIBRARY_FRAGMENT(snapgen_cpu, m) {
  m.def(
      "depthwise_gradient(Tensor x, Tensor? dd, Tensor dw_weight, Tensor? dw_bias, Tensor? norm_weight, Tensor? norm_bias, "
      "Tensor? mean, Tensor? rstd, Tensor? extra, int num_groups, int stride, int scale, Tensor(a!)? dx, Tensor(b!)? d, "
      "Tensor(c!)? grad_dw_weight, Tensor(d!)? grad_dw_bias, Tensor(e!)? grad_norm_weight, Tensor(f!)? grad_norm_bias) -> ()");
  m.def(
      "pointwise_gradient(Tensor dy, Tensor? packed, Tensor(a!)? dd, Tensor(b!)? grad_shift, Tensor(c!)? grad_bias) -> ()");
  m.def("pointwise_weight_gradient(Tensor dy, Tensor d, Tensor(a!) dw) -> ()");
  m.def(
      "separable_gradient(Tensor dy, Tensor packed, Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? mean, Tensor? rstd, Tensor? extra, int num_groups, int stride, int scale, "
      "Tensor(a!) grad_x, Tensor(b!) grad_dw_weight, Tensor(c!) grad_pw_weight, Tensor(d!)? grad_dw_bias, "
      "Tensor(e!)? grad_pw_bias, Tensor(f!)? grad_norm_weight, Tensor(g!)? grad_norm_bias, Tensor(h!)? grad_shift) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(snapgen_cpu, CPU, m) {
  m.impl("depthwise_gradient", TORCH_BOX(&snapgen::depthwise_gradient));
  m.impl("pointwise_gradient", TORCH_BOX(&snapgen::pointwise_gradient));
  m.impl("pointwise_weight_gradient", TORCH_BOX(&snapgen::pointwise_weight_gradient));
  m.impl("separable_gradient", TORCH_BOX(&snapgen::separable_gradient));
}
