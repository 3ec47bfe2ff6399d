// Python's view of the CPU kernels of a whole layer; see cpu.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "binding/views.h"
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

Shape flat_shape(const ImageShape& s, int64_t heads) {
  return shape_of({s.batch, s.channels, heads, s.positions(), s.interleaved});
}

// What a layer makes of its input: mean over space, key and value (written to the last address of each list), and,
// where an address is given for the query, what it retrieves. The workspace is layer_workspace() elements.
void layer(int dtype, const std::array<int64_t, 5>& sizes, int64_t heads, double scale, const std::array<int64_t, 3>& x,
           int64_t wq, int64_t wk, int64_t filter_size, int64_t wv, int64_t mean, int64_t query, const Ints& keys,
           const Ints& key_strides, const Ints& values, const Ints& value_strides, int64_t prev, int64_t prev_depth,
           int64_t weights, int64_t kl, const std::array<int64_t, 3>& out, bool residual, int64_t mean_out,
           int64_t variance_out, const NormArguments& norm, int64_t workspace, int threads) {
  const ImageShape image = image_shape_of(sizes);
  const Shape shape = flat_shape(image, heads);
  require(filter_size > 0 && filter_size % 2 == 1, "filter: its size must be odd");
  require((query == 0) == (weights == 0) && (query == 0 || wq != 0), "query: needs its filter, and the weights");
  const std::vector<RowView> key_views = rows(keys, key_strides);
  const std::vector<MapView> value_views = maps(values, value_strides);
  require(value_views.size() == key_views.size() && !key_views.empty(), "values: one for each key");
  const size_t size = element_size(checked_dtype(dtype));
  // Each kernel has memory of its own: samples are at different kernels at the same time.
  const ela::Kernels& k = ela::kernels();
  char* scratch = static_cast<char*>(address(workspace));
  char* for_depthwise = scratch + 9 * image.channels * size;
  char* for_aggregate = for_depthwise + k.depthwise_workspace(image) * size;
  char* for_norm = for_aggregate + k.aggregate_workspace(shape, static_cast<int64_t>(key_views.size())) * size;
  const RowView query_view = row(query, shape.channels);
  const WeightsParams w = weights_params(shape, scale, query_view, key_views, prev, prev_depth, weights, kl);
  std::vector<ColumnView> columns;
  columns.reserve(key_views.size());
  for (int64_t j = 0; j < w.depth; ++j) columns.push_back({static_cast<char*>(w.weights) + j * size, w.depth});
  const LayerParams p = {
      query != 0,
      {image, map(x), address(wv), value_views.back(), address(mean), nullptr, for_depthwise},
      {shape, filter_size, address(mean), address(wq), address(wk), address(query), key_views.back().data},
      w,
      {shape, w.depth, value_views.data(), columns.data(), map(out), for_aggregate, residual ? map(x) : MapView{}},
      scratch,
      mean_out != 0,
      {image, map(out), for_norm, address(mean_out), address(variance_out)},
      norm.has_value(),
      norm_params(image, norm, mean_out != 0, size)};
  const auto kernel = k.layer[dtype];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

// A layer's own attention, where it `attends` (as in backward(), without the push form), and then the gradients of its
// input and filters from what the layers that retrieved it left (as in gather()): its key's, its mean's, and its
// value's, gathered and convolved. An address of 0 leaves that one out. The workspace is layer_workspace() elements.
void layer_backward(int dtype, const std::array<int64_t, 5>& sizes, int64_t heads, double scale, bool attends,
                    int64_t query, const Ints& keys, const Ints& key_strides, const Ints& values,
                    const Ints& value_strides, int64_t prev, int64_t prev_depth, int64_t weights,
                    const std::array<int64_t, 3>& dout, int64_t dweights, int64_t dkl, int64_t dscores, int64_t dprev,
                    const std::array<int64_t, 3>& x, int64_t wq, int64_t wk, int64_t filter_size, int64_t wv,
                    int64_t mean, const Ints& queries, const Ints& query_strides, const Ints& score_columns,
                    const Ints& score_strides, const Ints& douts, const Ints& dout_strides, const Ints& weight_columns,
                    const Ints& weight_strides, const std::array<int64_t, 3>& residual, int64_t dquery, int64_t dkey,
                    int64_t dmean, const std::array<int64_t, 3>& dx, int64_t dwq, int64_t dwk, int64_t dwv,
                    const NormArguments& norm, bool batch_statistics, int64_t workspace, int threads) {
  const ImageShape image = image_shape_of(sizes);
  const Shape shape = flat_shape(image, heads);
  require(filter_size > 0 && filter_size % 2 == 1, "filter: its size must be odd");
  const std::vector<RowView> key_views = rows(keys, key_strides);
  const std::vector<MapView> value_views = maps(values, value_strides);
  const std::vector<RowView> query_views = rows(queries, query_strides);
  const std::vector<ColumnView> score_views = columns(score_columns, score_strides);
  const std::vector<MapView> dout_views = maps(douts, dout_strides);
  const std::vector<ColumnView> weight_views = columns(weight_columns, weight_strides);
  require(!attends || dout[0] == 0 || value_views.size() == key_views.size(), "values: one for each key");
  require(query_views.size() == score_views.size(), "queries: one column each");
  require(dout_views.size() == weight_views.size(), "douts: one column of weights each");
  require((dquery == 0 && dkey == 0) || dmean != 0, "dmean: needed for the gradient of query or key");
  require(dprev == 0 || (prev != 0 && dkl != 0), "dprev: needs previous weights and dkl");
  const size_t size = element_size(checked_dtype(dtype));
  // That of the attention first: it holds doubles.
  char* scratch = static_cast<char*>(address(workspace));
  char* taps = scratch + ela::kernels().backward_workspace(shape, static_cast<int64_t>(key_views.size())) * size;
  char* filter_scratch = taps + 9 * image.channels * size;
  char* map_scratch = filter_scratch + 2 * image.batch * filter_size * size;
  const MapView dout_view = map(dout);
  const RowView query_view = row(query, shape.channels);
  BackwardParams attention = {};
  attention.forward.shape = shape;
  if (attends) {
    attention = {weights_params(shape, scale, query_view, key_views, prev, prev_depth, weights, 0),
                 value_views.data(),
                 dout[0] == 0 ? nullptr : &dout_view,
                 address(dweights),
                 address(dkl),
                 address(dscores),
                 row(dquery, shape.channels),
                 nullptr,
                 address(dprev),
                 nullptr,
                 scratch};
  }
  const LayerBackwardParams p = {
      attends,
      attention,
      {shape, static_cast<int64_t>(query_views.size()), query_views.data(), score_views.data(),
       row(dkey, shape.channels)},
      {{shape, filter_size, address(mean), address(wq), address(wk), nullptr, nullptr},
       address(dquery),
       address(dkey),
       address(dmean),
       address(dwq),
       address(dwk),
       filter_scratch},
      {image, heads, static_cast<int64_t>(dout_views.size()), dout_views.data(), weight_views.data(), map(x),
       address(wv), nullptr, dquery == 0 && dkey == 0 ? nullptr : address(dmean), map(residual), map(dx), address(dwv),
       map_scratch},
      taps,
      norm.has_value(),
      norm_params(image, norm, batch_statistics, size)};
  const auto kernel = ela::kernels().layer_backward[dtype];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

// Accumulation elements that a layer of some depth needs, forward and backward, with `sources` layers retrieving it.
int64_t layer_workspace(const std::array<int64_t, 5>& sizes, int64_t heads, int64_t filter_size, int64_t depth,
                        int64_t sources, int threads) {
  const ImageShape image = image_shape_of(sizes);
  const Shape shape = flat_shape(image, heads);
  const ela::Kernels& k = ela::kernels();
  const int64_t forward = k.depthwise_workspace(image) + k.aggregate_workspace(shape, depth) + k.norm_workspace(image);
  const int64_t backward = 2 * image.batch * filter_size + k.backward_workspace(shape, depth) +
                           k.gather_convolve_workspace(image, sources, threads);
  return 9 * image.channels + std::max(forward, backward);
}

}  // namespace

void bind_layer(py::module_& m) {
  m.def("layer", &layer);
  m.def("layer_backward", &layer_backward);
  m.def("layer_workspace", &layer_workspace);
  m.def("norm_workspace",
        [](const std::array<int64_t, 5>& sizes) { return ela::kernels().norm_workspace(image_shape_of(sizes)); });
}
