// Python's view of the CPU kernels of a light layer; see cpu_attention.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cpu_views.h"
#include "binding/named.h"
#include "cpu/select.h"

namespace py = pybind11;
using namespace ela::binding;

namespace {

using ela::ImageShape;
using ela::LightBackwardParams;
using ela::LightParams;

// A light layer: its input, its parameters, and what its forward leaves for its backward.
struct LightLayer {
  std::array<int64_t, 5> sizes;  // B, C, H, W, interleaved
  int64_t heads;
  double scale;
  int act;  // an Activation
  View x;
  int64_t wq, wk, filter_size, wv, decay;
  View prev;
  int64_t mean, query, key;
  View v;
  int64_t factors;

  template <class Visit>
  void fields(Visit visit) {
    visit("sizes", sizes), visit("heads", heads), visit("scale", scale);
    visit("act", act), visit("x", x);
    visit("wq", wq), visit("wk", wk), visit("filter_size", filter_size), visit("wv", wv), visit("decay", decay);
    visit("prev", prev), visit("mean", mean), visit("query", query), visit("key", key);
    visit("v", v), visit("factors", factors);
  }
};

LightParams light_params(const LightLayer& layer, int64_t workspace) {
  const auto& [sizes, heads, scale, act, x, wq, wk, filter_size, wv, decay, prev, mean, query, key, v, factors] = layer;
  const ImageShape image = image_shape_of(sizes);
  require(heads >= 1 && image.channels % heads == 0, "heads: must divide channels");
  require(act >= 0 && act < ela::kActivations, "act: out of range");
  require(filter_size > 0 && filter_size % 2 == 1, "filter: its size must be odd");
  const int64_t rows = image.batch * image.channels, elements = rows * image.positions();
  present(x[0], elements, "x"), present(v[0], elements, "v"), present(prev[0], elements, "prev");
  present(wq, 1, "wq"), present(wk, 1, "wk"), present(wv, image.channels, "wv");
  present(decay, image.channels, "decay"), present(factors, rows, "factors");
  present(mean, rows, "mean"), present(query, rows, "query"), present(key, rows, "key");
  present(workspace, image.channels, "workspace");
  return {image,
          heads,
          filter_size,
          scale,
          static_cast<ela::Activation>(act),
          map(x),
          map(v),
          map(prev),
          {},
          true,
          address(wq),
          address(wk),
          address(wv),
          address(decay),
          address(mean),
          address(query),
          address(key),
          address(factors),
          nullptr,
          nullptr,
          address(workspace),
          false,
          {}};
}

// out, with what the backward will need: mean, query, key, v and the factors [2, B, C]; and the statistics of out,
// where addresses are given. The workspace is light_workspace() elements. Where v is not kept it is scratch, of
// light_values() samples.
void light_layer(int dtype, const LightLayer& layer, bool keeps_v, const View& out, int64_t mean_out,
                 int64_t variance_out, const std::optional<Norm>& norm, int64_t workspace, int threads) {
  LightParams p = light_params(layer, workspace);
  p.keeps_v = keeps_v;
  present(out[0], p.shape.batch * p.shape.channels * p.shape.positions(), "out");
  require((mean_out == 0) == (variance_out == 0), "statistics: mean and variance, or neither");
  p.out = map(out);
  p.mean_out = address(mean_out), p.variance_out = address(variance_out);
  p.is_block = norm.has_value();
  const size_t size = element_size(checked_dtype(dtype));
  const auto kernel = ela::kernels().light_layer[dtype];
  py::gil_scoped_release unlocked;
  Scratch scratch(norm_bytes(p.shape, norm, size));
  p.norm = norm_params(p.shape, norm, mean_out != 0, size, scratch);
  kernel(p, threads);
}

// The gradients from that of out, `dx_residual` added to that of x. An address of 0 leaves that one out; `dv` is a map
// to work in.
void light_layer_backward(int dtype, const LightLayer& layer, const View& dout, const View& dx_residual, const View& dx,
                          int64_t dwq, int64_t dwk, int64_t dwv, int64_t ddecay, const View& dprev, const View& dv,
                          const std::optional<Norm>& norm, bool batch_statistics, int64_t workspace, int threads) {
  LightBackwardParams p = {light_params(layer, workspace),
                           map(dout),
                           map(dx_residual),
                           map(dx),
                           map(dprev),
                           map(dv),
                           address(dwq),
                           address(dwk),
                           address(dwv),
                           address(ddecay)};
  const ImageShape& image = p.forward.shape;
  present(dout[0], image.batch * image.channels * image.positions(), "dout");
  const bool has_maps = dx[0] != 0 || dwv != 0;
  require((dv[0] != 0) == (has_maps && p.forward.act != ela::Activation::kNone),
          "dv: where the value passes an activation and its gradient is used, and nowhere else");
  p.forward.is_block = norm.has_value();
  const size_t size = element_size(checked_dtype(dtype));
  const auto kernel = ela::kernels().light_layer_backward[dtype];
  py::gil_scoped_release unlocked;
  Scratch scratch(norm_bytes(image, norm, size));
  p.forward.norm = norm_params(image, norm, batch_statistics, size, scratch);
  kernel(p, threads);
}

int64_t light_workspace(const std::array<int64_t, 5>& sizes, int64_t filter_size, int threads) {
  return ela::kernels().light_workspace(image_shape_of(sizes), filter_size, threads);
}

int64_t light_values(const std::array<int64_t, 5>& sizes, int threads) {
  return ela::kernels().light_values(image_shape_of(sizes), threads);
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<LightLayer> : GroupCaster<LightLayer> {};

}  // namespace pybind11::detail

void bind_cpu_light(py::module_& m) {
  def_group<LightLayer>(m, "light");
  def_named(m, "light_layer", &light_layer,
            "dtype, *, layer, keeps_v, out, mean_out, variance_out, norm, workspace, threads");
  def_named(m, "light_layer_backward", &light_layer_backward,
            "dtype, *, layer, dout, dx_residual, dx, dwq, dwk, dwv, ddecay, dprev, dv, norm, "
            "batch_statistics, workspace, threads");
  def_named(m, "light_workspace", &light_workspace, "*, sizes, filter_size, threads");
  def_named(m, "light_values", &light_values, "*, sizes, threads");
}
