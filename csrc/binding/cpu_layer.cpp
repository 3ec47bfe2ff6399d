// Python's view of the CPU kernels of a whole layer; see cpu_attention.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cpu_views.h"
#include "binding/named.h"
#include "cpu/select.h"

namespace py = pybind11;
using namespace ela::binding;

namespace {

using ela::BackwardParams;
using ela::ColumnView;
using ela::ImageShape;
using ela::LayerBackwardParams;
using ela::LayerParams;
using ela::MapView;
using ela::RowView;
using ela::Shape;
using ela::WeightsParams;

// What all layers over maps of one shape and layout have in common; Python keeps one for each. `made`: batch and inner
// stride of the maps that are made for a layer.
struct LayerPlan {
  LayerPlan(int value_type, const std::array<int64_t, 5>& sizes, int64_t heads, int64_t filter_size,
            const std::array<int64_t, 2>& x, const std::array<int64_t, 2>& made)
      : value_type(checked_value_type(value_type)),
        image(image_shape_of(sizes)),
        shape(shape_of({sizes[0], sizes[1], heads, image.positions(), sizes[4]})),
        filter_size(filter_size),
        x(x),
        made(made),
        size(element_size(value_type)) {
    require(filter_size > 0 && filter_size % 2 == 1, "filter: its size must be odd");
  }
  MapView input(int64_t data) const { return {address(data), x[0], x[1]}; }
  MapView made_map(int64_t data) const { return {address(data), made[0], made[1]}; }

  int value_type;
  ImageShape image;
  Shape shape;
  int64_t filter_size;
  std::array<int64_t, 2> x, made;
  size_t size;  // of an accumulation element
};

// What a layer makes of its input: mean over space, key and value (written to the last address of each list), and,
// where an address is given for the query, what it retrieves.
void layer(const LayerPlan& plan, int64_t x, int64_t wq, int64_t wk, int64_t wv, int64_t mean,
           const Attention& attention, int64_t kl, int64_t out, bool has_residual, int64_t mean_out,
           int64_t variance_out, const std::optional<Norm>& norm, int threads) {
  const ImageShape& image = plan.image;
  const Shape& shape = plan.shape;
  const int64_t query = attention.query;
  require((query == 0) == (attention.weights == 0) && (query == 0 || wq != 0),
          "query: needs its filter, and the weights");
  require((mean_out == 0) == (variance_out == 0), "statistics: mean and variance, or neither");
  const int64_t elements = elements_of(shape);
  present(x, elements, "x"), present(wk, 1, "wk"), present(wv, shape.channels, "wv"),
      present(mean, rows_of(shape), "mean");
  present(attention.keys, rows_of(shape), "keys"), present(attention.values, elements, "values");
  present(out, query == 0 ? 0 : elements, "out");
  const std::vector<RowView> key_views = rows(attention.keys, attention.key_strides);
  const std::vector<MapView> value_views = maps(attention.values, attention.value_strides);
  require(value_views.size() == key_views.size() && !key_views.empty(), "values: one for each key");
  const int64_t size = static_cast<int64_t>(plan.size), depth = static_cast<int64_t>(key_views.size());
  WeightsParams w = {};
  if (query != 0) w = weights_params(shape, attention, key_views, kl);
  std::vector<ColumnView> columns;
  columns.reserve(key_views.size());
  for (int64_t j = 0; j < depth; ++j) {
    columns.push_back({static_cast<char*>(w.weights) + j * size, depth, w.tolerance});
  }
  // Each kernel has memory of its own: samples are at different kernels at the same time.
  const ela::Kernels& k = ela::kernels();
  const int64_t for_taps = 9 * image.channels * size, for_depthwise = k.depthwise_workspace(image) * size,
                for_aggregate = k.aggregate_workspace(shape, depth) * size, for_norm = k.norm_workspace(image) * size;
  py::gil_scoped_release unlocked;
  Scratch scratch(for_taps + for_depthwise + for_aggregate + for_norm + norm_bytes(image, norm, plan.size));
  void* taps = scratch.take(for_taps);
  const MapView out_view = plan.made_map(out);
  const LayerParams p = {
      query != 0,
      {image, plan.input(x), address(wv), value_views.back(), address(mean), nullptr, scratch.take(for_depthwise)},
      {shape, plan.filter_size, address(mean), address(wq), address(wk), address(query), key_views.back().data},
      w,
      {shape, depth, value_views.data(), columns.data(), out_view, scratch.take(for_aggregate),
       has_residual ? plan.input(x) : MapView{}, nullptr},
      taps,
      mean_out != 0,
      {image, out_view, scratch.take(for_norm), address(mean_out), address(variance_out)},
      norm.has_value(),
      norm_params(image, norm, mean_out != 0, plan.size, scratch)};
  k.layer[plan.value_type](p, threads);
}

// A layer's own attention, and what arrives there.
struct Own {
  Attention attention;
  View dout;
  int64_t dweights, dkl, dscores, dprev;

  template <class Visit>
  void fields(Visit visit) {
    visit("attention", attention), visit("dout", dout);
    visit("dweights", dweights), visit("dkl", dkl), visit("dscores", dscores), visit("dprev", dprev);
  }
};

// What arrives at the layer of a place, `index`, from the layers that retrieved it (see source()) and from elsewhere:
// at its key, its value, and past it at its input.
struct Arrived {
  py::bytes sources;
  int64_t index, dk;
  View dv, residual;

  template <class Visit>
  void fields(Visit visit) {
    visit("sources", sources), visit("index", index), visit("dk", dk), visit("dv", dv), visit("residual", residual);
  }
};

// The gradients that are written; an address of 0 leaves one out.
struct Gradients {
  int64_t dx, dwq, dwk, dwv;

  template <class Visit>
  void fields(Visit visit) {
    visit("dx", dx), visit("dwq", dwq), visit("dwk", dwk), visit("dwv", dwv);
  }
};

// A layer's own attention, where it attends (as in backward(), without the push form), and then the gradients of its
// input and filters from what arrived: its key's, its mean's, and its value's, gathered (as in gather()) and convolved.
void layer_backward(const LayerPlan& plan, const std::optional<Own>& own, const Arrived& arrived, int64_t x, int64_t wq,
                    int64_t wk, int64_t wv, int64_t mean, bool wants_query, bool wants_key, const Gradients& gradients,
                    const std::optional<Norm>& norm, bool batch_statistics, int threads) {
  const ImageShape& image = plan.image;
  const Shape& shape = plan.shape;
  const int64_t size = static_cast<int64_t>(plan.size);
  const auto& [dx, dwq, dwk, dwv] = gradients;
  const Own nothing = {};
  const auto& [attention, dout, dweights, dkl, dscores, dprev] = own ? *own : nothing;
  const std::vector<RowView> key_views = rows(attention.keys, attention.key_strides);
  const std::vector<MapView> value_views = maps(attention.values, attention.value_strides);
  require(!own || dout[0] == 0 || value_views.size() == key_views.size(), "values: one for each key");
  require(dprev == 0 || (attention.prev != 0 && dkl != 0), "dprev: needs previous weights and dkl");
  const int64_t elements = elements_of(shape);
  present(x, elements, "x"), present(wk, 1, "wk"), present(wv, shape.channels, "wv"),
      present(mean, rows_of(shape), "mean");
  present(wq, wants_query || dwq != 0 ? 1 : 0, "wq"), present(dscores, own ? shape.batch : 0, "dscores");
  present(attention.values, own && dout[0] != 0 ? elements : 0, "values");
  auto [queries, scores, douts, weight_columns] = source_views(arrived.sources, arrived.index, plan.size, shape);
  // One more source, with a weight of one.
  const double one64 = 1;
  const float one32 = 1;
  const void* one = size == 8 ? static_cast<const void*>(&one64) : &one32;
  if (arrived.dk != 0) queries.push_back(row(arrived.dk, shape.channels)), scores.push_back({one, 0});
  if (arrived.dv[0] != 0) douts.push_back(map(arrived.dv)), weight_columns.push_back({one, 0});

  const ela::Kernels& k = ela::kernels();
  // That of the attention first: it holds doubles.
  const int64_t depth = static_cast<int64_t>(key_views.size()), source_maps = static_cast<int64_t>(douts.size());
  const int64_t for_attention = k.backward_workspace(shape, depth) * size, for_taps = 9 * image.channels * size,
                for_filters = 2 * image.batch * plan.filter_size * size,
                for_maps = k.gather_convolve_workspace(image, source_maps, threads) * size,
                for_rows = image.batch * image.channels * size;
  py::gil_scoped_release unlocked;
  Scratch scratch(for_attention + for_taps + for_filters + for_maps + 3 * for_rows +
                  norm_bytes(image, norm, plan.size));
  const MapView dout_view = map(dout);
  void* attention_scratch = scratch.take(for_attention);
  void* dquery = wants_query ? scratch.take(for_rows) : nullptr;
  void* dkey = wants_key ? scratch.take(for_rows) : nullptr;
  void* dmean = wants_query || wants_key ? scratch.take(for_rows) : nullptr;
  BackwardParams own_params = {};
  own_params.forward.shape = shape;
  if (own) {
    own_params = {weights_params(shape, attention, key_views, 0),
                  value_views.data(),
                  dout[0] == 0 ? nullptr : &dout_view,
                  address(dweights),
                  address(dkl),
                  address(dscores),
                  {dquery, shape.channels},
                  nullptr,
                  address(dprev),
                  nullptr,
                  attention_scratch};
  }
  void* taps = scratch.take(for_taps);
  const LayerBackwardParams p = {
      own.has_value(),
      own_params,
      {shape, static_cast<int64_t>(queries.size()), queries.data(), scores.data(), {dkey, shape.channels}},
      {{shape, plan.filter_size, address(mean), address(wq), address(wk), nullptr, nullptr},
       dquery,
       dkey,
       dmean,
       address(dwq),
       address(dwk),
       scratch.take(for_filters)},
      {image, shape.heads, source_maps, douts.data(), weight_columns.data(), plan.input(x), address(wv), nullptr, dmean,
       map(arrived.residual), plan.made_map(dx), address(dwv), scratch.take(for_maps)},
      taps,
      norm.has_value(),
      norm_params(image, norm, batch_statistics, plan.size, scratch)};
  k.layer_backward[plan.value_type](p, threads);
}

// The end of a block that makes nothing else, and its gradients.
void norm_forward(int dtype, const std::array<int64_t, 5>& sizes, const std::optional<Norm>& norm, int threads) {
  require(norm.has_value(), "norm: needed");
  const ImageShape image = image_shape_of(sizes);
  const size_t size = element_size(checked_dtype(dtype));
  py::gil_scoped_release unlocked;
  Scratch scratch(norm_bytes(image, norm, size));
  const ela::NormParams p = norm_params(image, norm, false, size, scratch);
  ela::kernels().norm_forward[dtype](p, threads);
}

void norm_backward(int dtype, const std::array<int64_t, 5>& sizes, const std::optional<Norm>& norm,
                   bool batch_statistics, int threads) {
  require(norm.has_value(), "norm: needed");
  const ImageShape image = image_shape_of(sizes);
  const size_t size = element_size(checked_dtype(dtype));
  py::gil_scoped_release unlocked;
  Scratch scratch(norm_bytes(image, norm, size));
  const ela::NormParams p = norm_params(image, norm, batch_statistics, size, scratch);
  ela::kernels().norm_backward[dtype](p, threads);
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Own> : GroupCaster<Own> {};
template <>
struct type_caster<Arrived> : GroupCaster<Arrived> {};
template <>
struct type_caster<Gradients> : GroupCaster<Gradients> {};

}  // namespace pybind11::detail

void bind_cpu_layer(py::module_& m) {
  py::class_<LayerPlan>(m, "LayerPlan")
      .def(py::init<int, const std::array<int64_t, 5>&, int64_t, int64_t, const std::array<int64_t, 2>&,
                    const std::array<int64_t, 2>&>(),
           py::arg("value_type"), py::kw_only(), py::arg("sizes"), py::arg("heads"), py::arg("filter_size"),
           py::arg("x"), py::arg("made"));
  def_group<Attention>(m, "attention");
  def_group<Norm>(m, "norm");
  def_group<Own>(m, "own");
  def_group<Arrived>(m, "arrived");
  def_group<Gradients>(m, "gradients");
  def_named(m, "layer", &layer,
            "plan, *, x, wq, wk, wv, mean, attention, kl, out, has_residual, mean_out, variance_out, "
            "norm, threads");
  def_named(m, "layer_backward", &layer_backward,
            "plan, *, own, arrived, x, wq, wk, wv, mean, wants_query, wants_key, gradients, norm, "
            "batch_statistics, threads");
  def_named(m, "norm_forward", &norm_forward, "dtype, *, sizes, norm, threads");
  def_named(m, "norm_backward", &norm_backward, "dtype, *, sizes, norm, batch_statistics, threads");
}
