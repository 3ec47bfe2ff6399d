// Python's view of the CPU kernels: addresses and strides as integers, no tensor type. Every function checks only what
// would be out of bounds here; the checks a user sees are Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cpu_views.h"
#include "binding/named.h"
#include "cpu/select.h"

namespace py = pybind11;
using namespace ela::binding;

namespace {

using ela::AggregateParams;
using ela::BackwardParams;
using ela::ColumnView;
using ela::GatherKeyParams;
using ela::MapView;
using ela::RowView;
using ela::Shape;
using ela::WeightsParams;

void weights(int dtype, const std::array<int64_t, 5>& sizes, const Attention& attention, int64_t kl, int threads) {
  const std::vector<RowView> key_views = rows(attention.keys, attention.key_strides);
  const WeightsParams p = weights_params(shape_of(sizes), attention, key_views, kl);
  const auto kernel = ela::kernels().weights[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

void forward(int value_type, const std::array<int64_t, 5>& sizes, const Attention& attention, int64_t kl,
             const View& out, int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<RowView> key_views = rows(attention.keys, attention.key_strides);
  const std::vector<MapView> value_views = maps(attention.values, attention.value_strides);
  require(value_views.size() == key_views.size(), "values: one for each key");
  present(attention.values, elements_of(shape), "values"), present(out[0], elements_of(shape), "out");
  present(workspace, ela::kernels().aggregate_workspace(shape, static_cast<int64_t>(key_views.size())), "workspace");
  const WeightsParams p = weights_params(shape, attention, key_views, kl);
  const size_t size = element_size(checked_value_type(value_type));
  std::vector<ColumnView> weight_columns;
  weight_columns.reserve(key_views.size());
  for (int64_t j = 0; j < p.depth; ++j) {
    weight_columns.push_back({static_cast<char*>(p.weights) + j * size, p.depth, p.tolerance});
  }
  const AggregateParams a = {shape, p.depth, value_views.data(), weight_columns.data(), map(out), address(workspace),
                             {},    nullptr};
  const ela::Kernels& k = ela::kernels();
  py::gil_scoped_release unlocked;
  k.weights[ela::layer_dtype(value_type)](p, threads);
  k.aggregate[value_type](a, threads);
}

// One layer's own gradients. The push form asks for dkeys and dvalues here; the pull form gathers them (see gather).
void backward(int value_type, const std::array<int64_t, 5>& sizes, const Attention& attention, const View& dout,
              int64_t dweights, int64_t dkl, int64_t dscores, int64_t dquery, const Ints& dkeys, int64_t dprev,
              const Ints& dvalues, const Ints& dvalue_strides, int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<RowView> key_views = rows(attention.keys, attention.key_strides);
  const std::vector<RowView> dkey_views = rows(dkeys, {shape.channels});
  const std::vector<MapView> value_views = maps(attention.values, attention.value_strides);
  const std::vector<MapView> dvalue_views = maps(dvalues, dvalue_strides);
  const MapView dout_view = map(dout);
  const size_t depth = key_views.size();
  require(dout[0] == 0 || value_views.size() == depth, "values: one for each key");
  require(dkey_views.empty() || dkey_views.size() == depth, "dkeys: one for each key, or none");
  require(dvalue_views.empty() || (dvalue_views.size() == depth && dout[0] != 0), "dvalues: one each, or none");
  require(dprev == 0 || (attention.prev != 0 && dkl != 0), "dprev: needs previous weights and dkl");
  present(attention.values, dout[0] == 0 ? 0 : elements_of(shape), "values"), present(dscores, shape.batch, "dscores");
  present(workspace, ela::kernels().backward_workspace(shape, static_cast<int64_t>(depth)), "workspace");
  const BackwardParams p = {
      weights_params(shape, attention, key_views, 0),
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
  const auto kernel = ela::kernels().backward[checked_value_type(value_type)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

// out = sum_j weights_j * value_j by weights [B, G, depth] that are given: each counts as it is. `weights` is the
// address of the first one's column, `weight_stride` from one head to the next.
void mix(int dtype, const std::array<int64_t, 5>& sizes, int64_t weights, int64_t weight_stride, const Ints& values,
         const Ints& value_strides, const View& out, int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<MapView> value_views = maps(values, value_strides);
  const int64_t depth = static_cast<int64_t>(value_views.size());
  require(depth >= 1 && weight_stride >= depth, "values: at least one, and not more than weights");
  present(weights, shape.batch, "weights");
  present(values, elements_of(shape), "values"), present(out[0], elements_of(shape), "out");
  present(workspace, ela::kernels().aggregate_workspace(shape, depth), "workspace");
  const int64_t size = static_cast<int64_t>(element_size(checked_dtype(dtype)));
  std::vector<ColumnView> columns;
  columns.reserve(value_views.size());
  for (int64_t j = 0; j < depth; ++j) columns.push_back({address(weights + j * size), weight_stride, 0, true});
  const AggregateParams p = {shape, depth,  value_views.data(), columns.data(), map(out), address(workspace),
                             {},    nullptr};
  const auto kernel = ela::kernels().aggregate[dtype];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

// Of mix(): dweights [B, G, depth], and the gradients of those values that have an address.
void mix_backward(int dtype, const std::array<int64_t, 5>& sizes, int64_t weights, const Ints& values,
                  const Ints& value_strides, const View& dout, int64_t dweights, const Ints& dvalues,
                  const Ints& dvalue_strides, int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const std::vector<MapView> value_views = maps(values, value_strides);
  const std::vector<MapView> dvalue_views = maps(dvalues, dvalue_strides);
  const MapView dout_view = map(dout);
  const int64_t depth = static_cast<int64_t>(value_views.size());
  require(depth >= 1, "values: at least one");
  require(dvalue_views.empty() || dvalue_views.size() == value_views.size(), "dvalues: one for each value, or none");
  present(weights, shape.batch, "weights"), present(dweights, shape.batch, "dweights");
  present(values, elements_of(shape), "values"), present(dout[0], elements_of(shape), "dout");
  present(workspace, ela::kernels().backward_workspace(shape, depth), "workspace");
  BackwardParams p = {};
  p.forward.shape = shape, p.forward.depth = depth;
  p.forward.weights = address(weights), p.forward.is_given = true;
  p.values = value_views.data(), p.dout = &dout_view;
  p.dscores = address(dweights);
  p.dvalues = dvalue_views.empty() ? nullptr : dvalue_views.data();
  p.workspace = address(workspace);
  const auto kernel = ela::kernels().mix_backward[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

// The pull form's second half, of the layer at `index`: its dkey from (query, dscores) and its dvalue from (dout,
// weights) of the layers that retrieved it (see Source). An address of 0 leaves that one out.
void gather(int dtype, const std::array<int64_t, 5>& sizes, const py::bytes& sources, int64_t index, int64_t dkey,
            const View& dvalue, int64_t workspace, int threads) {
  const Shape shape = shape_of(sizes);
  const auto [queries, scores, douts, weights] =
      source_views(sources, index, element_size(checked_dtype(dtype)), shape);
  require(dvalue[0] == 0 || !douts.empty(), "douts: at least one");
  if (dvalue[0] != 0) {
    present(workspace, ela::kernels().aggregate_workspace(shape, static_cast<int64_t>(douts.size())), "workspace");
  }
  const GatherKeyParams key = {shape, static_cast<int64_t>(queries.size()), queries.data(), scores.data(),
                               row(dkey, shape.channels)};
  const AggregateParams value = {
      shape,  static_cast<int64_t>(douts.size()), douts.data(), weights.data(), map(dvalue), address(workspace), {},
      nullptr};
  const ela::Kernels& k = ela::kernels();
  py::gil_scoped_release unlocked;
  if (dkey != 0) k.gather_key[dtype](key, threads);
  if (dvalue[0] != 0) k.aggregate[dtype](value, threads);
}

// As gather() and layer_backward() take what one layer left; those of several follow each other.
py::bytes source(int64_t query, int64_t query_stride, int64_t scores, int64_t depth, const View& dout, int64_t weights,
                 double tolerance) {
  const Source packed = {query, query_stride, scores, depth, dout, weights, tolerance};
  return py::bytes(reinterpret_cast<const char*>(&packed), sizeof(packed));
}

int64_t aggregate_workspace(const std::array<int64_t, 5>& sizes, int64_t sources) {
  return ela::kernels().aggregate_workspace(shape_of(sizes), sources);
}

int64_t backward_workspace(const std::array<int64_t, 5>& sizes, int64_t depth) {
  return ela::kernels().backward_workspace(shape_of(sizes), depth);
}

}  // namespace

void bind_cpu_layer(py::module_& m);
void bind_cpu_light(py::module_& m);
void bind_cpu_position(py::module_& m);

void bind_cpu(py::module_& m) {
  bind_cpu_layer(m);
  bind_cpu_light(m);
  bind_cpu_position(m);
  m.def("simd_level", [] { return std::string(ela::kernels().name); });
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const ela::Kernels* k : ela::available_kernels()) names.emplace_back(k->name);
    return names;
  });
  def_named(m, "weights", &weights, "dtype, *, sizes, attention, kl, threads");
  def_named(m, "forward", &forward, "value_type, *, sizes, attention, kl, out, workspace, threads");
  def_named(m, "backward", &backward,
            "value_type, *, sizes, attention, dout, dweights, dkl, dscores, dquery, dkeys, dprev, "
            "dvalues, dvalue_strides, workspace, threads");
  def_named(m, "mix", &mix, "dtype, *, sizes, weights, weight_stride, values, value_strides, out, workspace, threads");
  def_named(m, "mix_backward", &mix_backward,
            "dtype, *, sizes, weights, values, value_strides, dout, dweights, dvalues, dvalue_strides, workspace, "
            "threads");
  def_named(m, "gather", &gather, "dtype, *, sizes, sources, index, dkey, dvalue, workspace, threads");
  def_named(m, "source", &source, "*, query, query_stride, scores, depth, dout, weights, tolerance");
  def_named(m, "aggregate_workspace", &aggregate_workspace, "*, sizes, sources");
  def_named(m, "backward_workspace", &backward_workspace, "*, sizes, depth");
}
