// Python's view of the CPU kernels: addresses and strides as integers, no tensor type. Every function checks only what
// would be out of bounds here; the checks a user sees are Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/params.h"
#include "cpu/select.h"

namespace py = pybind11;

namespace {

using ela::AggregateParams;
using ela::BackwardParams;
using ela::ColumnView;
using ela::GatherKeyParams;
using ela::ImageShape;
using ela::LayerBackwardParams;
using ela::LayerParams;
using ela::MapView;
using ela::RowView;
using ela::Shape;
using ela::WeightsParams;

using Ints = std::vector<int64_t>;

void* address(int64_t x) { return reinterpret_cast<void*>(static_cast<uintptr_t>(x)); }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Addresses and strides of some tensors; `strides` has one set for each address, or one for all.
std::vector<MapView> maps(const Ints& addresses, const Ints& strides) {
  const size_t step = strides.size() == 2 ? 0 : 2;
  require(strides.size() == (step == 0 ? 2 : 2 * addresses.size()) || addresses.empty(), "strides: two for each map");
  std::vector<MapView> out;
  out.reserve(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) {
    out.push_back({address(addresses[i]), strides[i * step], strides[i * step + 1]});
  }
  return out;
}

template <class View>
std::vector<View> one_stride_each(const Ints& addresses, const Ints& strides) {
  const size_t step = strides.size() == 1 ? 0 : 1;
  require(strides.size() == (step == 0 ? 1 : addresses.size()) || addresses.empty(), "strides: one for each tensor");
  std::vector<View> out;
  out.reserve(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) out.push_back({address(addresses[i]), strides[i * step]});
  return out;
}

std::vector<RowView> rows(const Ints& addresses, const Ints& strides) {
  return one_stride_each<RowView>(addresses, strides);
}

std::vector<ColumnView> columns(const Ints& addresses, const Ints& strides) {
  return one_stride_each<ColumnView>(addresses, strides);
}

// B, C, G, N, interleaved
Shape shape_of(const std::array<int64_t, 5>& s) {
  if (s[0] < 0 || s[3] < 0 || s[2] < 1 || s[1] < s[2] || s[1] % s[2] != 0) {
    throw std::invalid_argument("shape: heads must divide channels, sizes must not be negative");
  }
  return {s[0], s[1], s[2], s[3], s[4] != 0};
}

int checked_dtype(int dtype) {
  if (dtype < 0 || dtype >= ela::kDTypes) throw std::invalid_argument("dtype: unknown code");
  return dtype;
}

size_t element_size(int dtype) { return dtype == static_cast<int>(ela::DType::kFloat64) ? 8 : 4; }

WeightsParams weights_params(const Shape& shape, double scale, const RowView& query, const std::vector<RowView>& keys,
                             int64_t prev, int64_t prev_depth, int64_t weights, int64_t kl) {
  const int64_t depth = static_cast<int64_t>(keys.size());
  require(depth >= 1 && (prev == 0 || (prev_depth >= 1 && prev_depth <= depth)), "depth: previous weights too long");
  return {shape,
          depth,
          prev == 0 ? 0 : prev_depth,
          scale,
          query,
          keys.data(),
          address(prev),
          address(weights),
          prev == 0 ? nullptr : address(kl)};
}

RowView row(int64_t data, int64_t stride) { return {address(data), stride}; }

MapView map(const std::array<int64_t, 3>& view) { return {address(view[0]), view[1], view[2]}; }

void weights(int dtype, const std::array<int64_t, 5>& sizes, double scale, int64_t query, int64_t query_stride,
             const Ints& keys, const Ints& key_strides, int64_t prev, int64_t prev_depth, int64_t weights, int64_t kl,
             int threads) {
  const std::vector<RowView> key_views = rows(keys, key_strides);
  const WeightsParams p =
      weights_params(shape_of(sizes), scale, row(query, query_stride), key_views, prev, prev_depth, weights, kl);
  const auto kernel = ela::kernels().weights[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

void forward(int dtype, const std::array<int64_t, 5>& sizes, double scale, int64_t query, int64_t query_stride,
             const Ints& keys, const Ints& key_strides, const Ints& values, const Ints& value_strides, int64_t prev,
             int64_t prev_depth, int64_t weights, int64_t kl, const std::array<int64_t, 3>& out, int64_t workspace,
             int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<RowView> key_views = rows(keys, key_strides);
  const std::vector<MapView> value_views = maps(values, value_strides);
  require(value_views.size() == key_views.size(), "values: one for each key");
  const WeightsParams p =
      weights_params(shape, scale, row(query, query_stride), key_views, prev, prev_depth, weights, kl);
  const size_t size = element_size(checked_dtype(dtype));
  std::vector<ColumnView> weight_columns;
  weight_columns.reserve(key_views.size());
  for (int64_t j = 0; j < p.depth; ++j) {
    weight_columns.push_back({static_cast<char*>(p.weights) + j * size, p.depth});
  }
  const AggregateParams a = {shape, p.depth, value_views.data(), weight_columns.data(), map(out), address(workspace),
                             {}};
  const ela::Kernels& k = ela::kernels();
  py::gil_scoped_release unlocked;
  k.weights[dtype](p, threads);
  k.aggregate[dtype](a, threads);
}

// One layer's own gradients. The push form asks for dkeys and dvalues here; the pull form gathers them (see gather).
void backward(int dtype, const std::array<int64_t, 5>& sizes, double scale, int64_t query, int64_t query_stride,
              const Ints& keys, const Ints& key_strides, const Ints& values, const Ints& value_strides, int64_t prev,
              int64_t prev_depth, int64_t weights, const std::array<int64_t, 3>& dout, int64_t dweights, int64_t dkl,
              int64_t dscores, int64_t dquery, const Ints& dkeys, int64_t dprev, const Ints& dvalues,
              const Ints& dvalue_strides, int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<RowView> key_views = rows(keys, key_strides);
  const std::vector<RowView> dkey_views = rows(dkeys, {shape.channels});
  const std::vector<MapView> value_views = maps(values, value_strides);
  const std::vector<MapView> dvalue_views = maps(dvalues, dvalue_strides);
  const MapView dout_view = map(dout);
  const size_t depth = key_views.size();
  require(dout[0] == 0 || value_views.size() == depth, "values: one for each key");
  require(dkey_views.empty() || dkey_views.size() == depth, "dkeys: one for each key, or none");
  require(dvalue_views.empty() || (dvalue_views.size() == depth && dout[0] != 0), "dvalues: one each, or none");
  require(dprev == 0 || (prev != 0 && dkl != 0), "dprev: needs previous weights and dkl");
  const BackwardParams p = {
      weights_params(shape, scale, row(query, query_stride), key_views, prev, prev_depth, weights, 0),
      value_views.data(),
      dout[0] == 0 ? nullptr : &dout_view,
      address(dweights),
      address(dkl),
      address(dscores),
      row(dquery, shape.channels),
      dkey_views.empty() ? nullptr : dkey_views.data(),
      address(dprev),
      dvalue_views.empty() ? nullptr : dvalue_views.data(),
      address(workspace),
  };
  const auto kernel = ela::kernels().backward[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

// The pull form's second half: a layer's dkey from (query, dscores) and its dvalue from (dout, weights) of the layers
// that retrieved it. An address of 0 leaves that one out.
void gather(int dtype, const std::array<int64_t, 5>& sizes, const Ints& queries, const Ints& query_strides,
            const Ints& score_columns, const Ints& score_strides, int64_t dkey, const Ints& douts,
            const Ints& dout_strides, const Ints& weight_columns, const Ints& weight_strides,
            const std::array<int64_t, 3>& dvalue, int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<RowView> query_views = rows(queries, query_strides);
  const std::vector<ColumnView> score_views = columns(score_columns, score_strides);
  const std::vector<MapView> dout_views = maps(douts, dout_strides);
  const std::vector<ColumnView> weight_views = columns(weight_columns, weight_strides);
  require(dkey == 0 || query_views.size() == score_views.size(), "queries: one column each");
  require(dvalue[0] == 0 || (!dout_views.empty() && dout_views.size() == weight_views.size()),
          "douts: one column of weights each, at least one");
  const GatherKeyParams key = {shape, static_cast<int64_t>(query_views.size()), query_views.data(), score_views.data(),
                               row(dkey, shape.channels)};
  const AggregateParams value = {shape,
                                 static_cast<int64_t>(dout_views.size()),
                                 dout_views.data(),
                                 weight_views.data(),
                                 map(dvalue),
                                 address(workspace),
                                 {}};
  const ela::Kernels& k = ela::kernels();
  checked_dtype(dtype);
  py::gil_scoped_release unlocked;
  if (dkey != 0) k.gather_key[dtype](key, threads);
  if (dvalue[0] != 0) k.aggregate[dtype](value, threads);
}

Shape flat_shape(const ImageShape& s, int64_t heads) {
  return shape_of({s.batch, s.channels, heads, s.positions(), s.interleaved});
}

// B, C, H, W, interleaved
ImageShape image_shape_of(const std::array<int64_t, 5>& s) {
  require(s[0] >= 0 && s[1] >= 0 && s[2] >= 0 && s[3] >= 0, "shape: sizes must not be negative");
  return {s[0], s[1], s[2], s[3], s[4] != 0};
}

// What a layer makes of its input: mean over space, key and value (written to the last address of each list), and,
// where an address is given for the query, what it retrieves. The workspace is layer_workspace() elements.
void layer(int dtype, const std::array<int64_t, 5>& sizes, int64_t heads, double scale, const std::array<int64_t, 3>& x,
           int64_t wq, int64_t wk, int64_t filter_size, int64_t wv, int64_t mean, int64_t query, const Ints& keys,
           const Ints& key_strides, const Ints& values, const Ints& value_strides, int64_t prev, int64_t prev_depth,
           int64_t weights, int64_t kl, const std::array<int64_t, 3>& out, bool residual, int64_t workspace,
           int threads) {
  const ImageShape image = image_shape_of(sizes);
  const Shape shape = flat_shape(image, heads);
  require(filter_size > 0 && filter_size % 2 == 1, "filter: its size must be odd");
  require((query == 0) == (weights == 0) && (query == 0 || wq != 0), "query: needs its filter, and the weights");
  const std::vector<RowView> key_views = rows(keys, key_strides);
  const std::vector<MapView> value_views = maps(values, value_strides);
  require(value_views.size() == key_views.size() && !key_views.empty(), "values: one for each key");
  const size_t size = element_size(checked_dtype(dtype));
  char* scratch = static_cast<char*>(address(workspace));
  void* after_taps = scratch + 9 * image.channels * size;
  const RowView query_view = row(query, shape.channels);
  const WeightsParams w = weights_params(shape, scale, query_view, key_views, prev, prev_depth, weights, kl);
  std::vector<ColumnView> columns;
  columns.reserve(key_views.size());
  for (int64_t j = 0; j < w.depth; ++j) columns.push_back({static_cast<char*>(w.weights) + j * size, w.depth});
  const LayerParams p = {
      query != 0,
      {image, map(x), address(wv), value_views.back(), address(mean), nullptr, after_taps},
      {shape, filter_size, address(mean), address(wq), address(wk), address(query), key_views.back().data},
      w,
      {shape, w.depth, value_views.data(), columns.data(), map(out), after_taps, residual ? map(x) : MapView{}},
      scratch};
  const auto kernel = ela::kernels().layer[dtype];
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
                    const Ints& weight_strides, bool residual, int64_t dquery, int64_t dkey, int64_t dmean,
                    const std::array<int64_t, 3>& dx, int64_t dwq, int64_t dwk, int64_t dwv, int64_t workspace,
                    int threads) {
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
       address(wv), nullptr, dquery == 0 && dkey == 0 ? nullptr : address(dmean), residual ? dout_view : MapView{},
       map(dx), address(dwv), map_scratch},
      taps};
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
  const int64_t forward = std::max(k.depthwise_workspace(image), k.aggregate_workspace(shape, depth));
  const int64_t backward = 2 * image.batch * filter_size + k.backward_workspace(shape, depth) +
                           k.gather_convolve_workspace(image, sources, threads);
  return 9 * image.channels + std::max(forward, backward);
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("simd_level", [] { return std::string(ela::kernels().name); });
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const ela::Kernels* k : ela::available_kernels()) names.emplace_back(k->name);
    return names;
  });
  m.def("weights", &weights);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("gather", &gather);
  m.def("layer", &layer);
  m.def("layer_backward", &layer_backward);
  m.def("layer_workspace", &layer_workspace);
  m.def("aggregate_workspace", [](const std::array<int64_t, 5>& sizes, int64_t sources) {
    return ela::kernels().aggregate_workspace(shape_of(sizes), sources);
  });
  m.def("backward_workspace", [](const std::array<int64_t, 5>& sizes, int64_t depth) {
    return ela::kernels().backward_workspace(shape_of(sizes), depth);
  });
}
