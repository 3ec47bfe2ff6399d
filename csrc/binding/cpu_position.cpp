// Python's view of the CPU kernels of attention over depth at every position; see cpu_attention.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cpu_views.h"
#include "binding/named.h"
#include "cpu/select.h"

namespace py = pybind11;
using namespace ela::binding;

namespace {

using ela::MapView;
using ela::PositionBackwardParams;
using ela::PositionForwardParams;
using ela::PositionGatherParams;
using ela::PositionParams;
using ela::PositionSource;
using ela::Shape;

// What a position retrieves from, and with what. `query`, `keys` and `prev` may be left out.
struct Position {
  std::array<int64_t, 5> sizes;  // B, C, 1, N, interleaved
  bool normed;
  double eps;
  int64_t row;
  View query;
  Ints values, value_strides, keys, key_strides;
  int64_t prev, prev_depth, weights;

  template <class Visit>
  void fields(Visit visit) {
    visit("sizes", sizes), visit("normed", normed), visit("eps", eps), visit("row", row), visit("query", query);
    visit("values", values), visit("value_strides", value_strides);
    visit("keys", keys), visit("key_strides", key_strides);
    visit("prev", prev), visit("prev_depth", prev_depth), visit("weights", weights);
  }
};

PositionParams position_params(const Position& p, const std::vector<MapView>& values,
                               const std::vector<MapView>& keys) {
  const Shape shape = shape_of(p.sizes);
  const int64_t depth = static_cast<int64_t>(values.size()), planes = shape.batch * shape.positions;
  require(shape.heads == 1, "sizes: one head");
  require(depth >= 1 && (p.prev == 0 || (p.prev_depth >= 1 && p.prev_depth <= depth)),
          "depth: previous weights too long");
  require(keys.empty() || keys.size() == values.size(), "keys: one for each value, or none");
  present(p.values, elements_of(shape), "values"), present(p.keys, elements_of(shape), "keys");
  present(p.row, shape.channels, "row"), present(p.weights, planes, "weights");
  return {shape,
          depth,
          p.prev == 0 ? 0 : p.prev_depth,
          p.normed,
          p.eps,
          address(p.row),
          map(p.query),
          values.data(),
          keys.empty() ? nullptr : keys.data(),
          address(p.prev),
          address(p.weights)};
}

void position_forward(int dtype, const Position& call, const View& out, int64_t kl, int threads) {
  const std::vector<MapView> values = maps(call.values, call.value_strides), keys = maps(call.keys, call.key_strides);
  const PositionForwardParams p = {position_params(call, values, keys), map(out), address(call.prev == 0 ? 0 : kl)};
  present(out[0], elements_of(p.call.shape), "out");
  const auto kernel = ela::kernels().position_forward[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

// `dvalues` and `dkeys` are empty, or have an address for each, 0 where the gradient is not wanted.
void position_backward(int dtype, const Position& call, const View& dout, int64_t dweights, int64_t dkl,
                       int64_t coefficients, int64_t drow, const View& dquery, int64_t dprev, const Ints& dvalues,
                       const Ints& dvalue_strides, const Ints& dkeys, const Ints& dkey_strides, int64_t workspace,
                       int threads) {
  const std::vector<MapView> values = maps(call.values, call.value_strides), keys = maps(call.keys, call.key_strides);
  const std::vector<MapView> dvalue_views = maps(dvalues, dvalue_strides), dkey_views = maps(dkeys, dkey_strides);
  const MapView dout_view = map(dout);
  const size_t depth = values.size();
  require(dvalue_views.empty() || dvalue_views.size() == depth, "dvalues: one for each value, or none");
  require(dkey_views.empty() || dkey_views.size() == keys.size(), "dkeys: one for each key, or none");
  require(dprev == 0 || (call.prev != 0 && dkl != 0), "dprev: needs previous weights and dkl");
  require(dkl == 0 || call.prev != 0, "dkl: needs previous weights");
  require(dquery[0] == 0 || call.query[0] != 0, "dquery: needs a query");
  const PositionBackwardParams p = {
      position_params(call, values, keys),
      dout[0] == 0 ? nullptr : &dout_view,
      address(dweights),
      address(dkl),
      address(coefficients),
      drow != 0 || dquery[0] != 0 || !dvalues.empty() || !dkeys.empty(),
      address(drow),
      map(dquery),
      address(dprev),
      dvalue_views.empty() ? nullptr : dvalue_views.data(),
      dkey_views.empty() ? nullptr : dkey_views.data(),
      address(workspace),
  };
  const Shape& shape = p.call.shape;
  present(coefficients, shape.batch * shape.positions, "coefficients");
  present(workspace, ela::kernels().position_workspace(shape), "workspace");
  const auto kernel = ela::kernels().position_backward[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

// A layer's part in a gather: maps `dout` and `query` (either may be left out), the addresses of its planes of one
// depth, and `row`.
struct PositionLeft {
  View dout;
  int64_t weights, alpha, beta, batch, row;
  View query;

  template <class Visit>
  void fields(Visit visit) {
    visit("dout", dout), visit("weights", weights), visit("alpha", alpha), visit("beta", beta);
    visit("batch", batch), visit("row", row), visit("query", query);
  }
};

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Position> : GroupCaster<Position> {};
template <>
struct type_caster<PositionLeft> : GroupCaster<PositionLeft> {};

}  // namespace pybind11::detail

namespace {

void position_gather(int dtype, const std::array<int64_t, 5>& sizes, const View& value,
                     const std::vector<PositionLeft>& sources, const View& dvalue, int threads) {
  const Shape shape = shape_of(sizes);
  const int64_t planes = shape.batch * shape.positions;
  std::vector<PositionSource> views;
  views.reserve(sources.size());
  for (const PositionLeft& left : sources) {
    present(left.weights, planes, "weights of a source"), present(left.alpha, planes, "alpha of a source");
    present(left.beta, planes, "beta of a source"), present(left.row, shape.channels, "row of a source");
    views.push_back({map(left.dout), address(left.weights), address(left.alpha), address(left.beta), left.batch,
                     address(left.row), map(left.query)});
  }
  present(value[0], elements_of(shape), "value"), present(dvalue[0], elements_of(shape), "dvalue");
  const PositionGatherParams p = {shape, map(value), map(dvalue), views.data(), static_cast<int64_t>(views.size())};
  const auto kernel = ela::kernels().position_gather[checked_dtype(dtype)];
  py::gil_scoped_release unlocked;
  kernel(p, threads);
}

int64_t position_workspace(const std::array<int64_t, 5>& sizes) {
  return ela::kernels().position_workspace(shape_of(sizes));
}

}  // namespace

void bind_cpu_position(py::module_& m) {
  def_group<Position>(m, "position");
  def_group<PositionLeft>(m, "position_left");
  def_named(m, "position_forward", &position_forward, "dtype, *, call, out, kl, threads");
  def_named(m, "position_backward", &position_backward,
            "dtype, *, call, dout, dweights, dkl, coefficients, drow, dquery, dprev, dvalues, dvalue_strides, dkeys, "
            "dkey_strides, workspace, threads");
  def_named(m, "position_gather", &position_gather, "dtype, *, sizes, value, sources, dvalue, threads");
  def_named(m, "position_workspace", &position_workspace, "*, sizes");
}
