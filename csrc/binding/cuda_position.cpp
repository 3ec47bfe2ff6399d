// The CUDA kernels of attention over depth at every position; left out of a build without nvcc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cuda_views.h"
#include "binding/named.h"
#include "cuda/position/position.h"
#include "cuda/position/position_plan.h"

namespace py = pybind11;
using ela::binding::def_group;
using ela::binding::def_named;

namespace {

using ela::Shape;
using ela::cuda::PositionBackwardCall;
using ela::cuda::PositionCall;
using ela::cuda::PositionForwardCall;
using ela::cuda::PositionGatherCall;
using ela::cuda::PositionKernels;
using namespace ela::cuda::binding;

// What a position retrieves from, and with what. `query`, `keys` and `prev` may be left out.
struct Position {
  Sizes sizes;  // of one head
  bool normed;
  double eps;
  int64_t row;
  View query;
  Ints values;
  Strides value_strides;
  Ints keys;
  Strides key_strides;
  int64_t prev, prev_depth, weights;

  template <class Visit>
  void fields(Visit visit) {
    visit("sizes", sizes), visit("normed", normed), visit("eps", eps), visit("row", row), visit("query", query);
    visit("values", values), visit("value_strides", value_strides);
    visit("keys", keys), visit("key_strides", key_strides);
    visit("prev", prev), visit("prev_depth", prev_depth), visit("weights", weights);
  }
};

const PositionKernels& kernels_for(int dtype) {
  const PositionKernels* kernels = ela::cuda::position_kernels_for(checked_dtype(dtype));
  require(kernels != nullptr, "dtype: not served by the CUDA kernels");
  return *kernels;
}

Shape shape_of_positions(const Sizes& sizes) {
  require(sizes[2] == 1, "sizes: one head");
  return shape_of(sizes);
}

// `values` and `keys`: addresses() of those of the call.
PositionCall position_call(const Position& p, const std::vector<const void*>& values,
                           const std::vector<const void*>& keys) {
  require(!values.empty(), "values: at least one");
  require(keys.empty() || keys.size() == values.size(), "keys: one for each value, or none");
  require(p.prev == 0 || (p.prev_depth >= 1 && p.prev_depth <= length(values)), "depth: previous weights too long");
  present(p.row, "row"), present(values, "values"), present(keys, "keys"), present(p.weights, "weights");
  return {shape_of_positions(p.sizes),
          p.normed,
          static_cast<float>(p.eps),
          address<float>(p.row),
          map(p.query),
          {values.data(), length(values), p.value_strides[0], p.value_strides[1]},
          {keys.data(), length(keys), p.key_strides[0], p.key_strides[1]},
          address<float>(p.prev),
          p.prev == 0 ? 0 : p.prev_depth,
          address<float>(p.weights)};
}

int cuda_position_forward(const Where& where, int dtype, const Position& call, const View& out, int64_t kl) {
  const PositionKernels& kernels = kernels_for(dtype);
  const auto values = addresses(call.values), keys = addresses(call.keys);
  present(out[0], "out");
  const PositionForwardCall forward = {position_call(call, values, keys), map(out),
                                       call.prev == 0 ? nullptr : address<float>(kl)};
  py::gil_scoped_release unlocked;
  return kernels.forward(target(where), forward);
}

// The error code, and how many rows of `row_parts` were written. `dvalues` and `dkeys` are empty, or have an address
// for each, 0 where the gradient is not wanted.
py::tuple cuda_position_backward(const Where& where, int dtype, const Position& call, const View& dout,
                                 int64_t dweights, int64_t dkl, int64_t planes, int64_t row_parts, const View& dquery,
                                 int64_t dprev, const Ints& dvalues, const Strides& dvalue_strides, const Ints& dkeys,
                                 const Strides& dkey_strides) {
  const PositionKernels& kernels = kernels_for(dtype);
  const auto values = addresses(call.values), keys = addresses(call.keys);
  const auto dvalue_list = addresses(dvalues), dkey_list = addresses(dkeys);
  require(dvalue_list.empty() || dvalue_list.size() == values.size(), "dvalues: one for each value, or none");
  require(dkey_list.empty() || dkey_list.size() == keys.size(), "dkeys: one for each key, or none");
  require(dprev == 0 || (call.prev != 0 && dkl != 0), "dprev: needs previous weights and dkl");
  require(dkl == 0 || call.prev != 0, "dkl: needs previous weights");
  require(dquery[0] == 0 || call.query[0] != 0, "dquery: needs a query");
  present(planes, "planes");
  const PositionBackwardCall backward = {
      position_call(call, values, keys),
      map(dout),
      address<float>(dweights),
      address<float>(dkl),
      address<float>(planes),
      address<float>(row_parts),
      map(dquery),
      address<float>(dprev),
      {dvalue_list.data(), length(dvalue_list), dvalue_strides[0], dvalue_strides[1]},
      {dkey_list.data(), length(dkey_list), dkey_strides[0], dkey_strides[1]}};
  int64_t parts = 0;
  int code = 0;
  {
    py::gil_scoped_release unlocked;
    code = kernels.backward(target(where), backward, &parts);
  }
  return py::make_tuple(code, parts);
}

// Of each source: `douts` and `queries`, 0 where there is none, where its planes of this value begin, its row, and how
// many elements a sample's planes lie apart. `carried` is added, and with `carry` the sum is left there in float32.
int cuda_position_gather(const Where& where, int dtype, const Sizes& sizes, const View& value, const View& dvalue,
                         const Ints& douts, const Strides& dout_strides, const Ints& queries,
                         const Strides& query_strides, const Ints& weights, const Ints& alphas, const Ints& betas,
                         const Ints& rows, const Ints& batches, int64_t carried, int64_t carry) {
  const PositionKernels& kernels = kernels_for(dtype);
  const auto dout_list = addresses(douts), query_list = addresses(queries), weight_list = addresses(weights);
  const auto alpha_list = addresses(alphas), beta_list = addresses(betas), row_list = addresses(rows);
  const size_t count = dout_list.size();
  require(count >= 1 && query_list.size() == count && weight_list.size() == count && alpha_list.size() == count &&
              beta_list.size() == count && row_list.size() == count && batches.size() == count,
          "douts: a query, planes, a row and a batch stride each, at least one");
  present(value[0], "value"), present(weight_list, "weights"), present(alpha_list, "alphas");
  present(beta_list, "betas"), present(row_list, "rows");
  require((dvalue[0] != 0) != (carry != 0), "dvalue: either that, or carry");
  const PositionGatherCall call = {shape_of_positions(sizes),
                                   map(value),
                                   map(dvalue),
                                   {dout_list.data(), length(dout_list), dout_strides[0], dout_strides[1]},
                                   {query_list.data(), length(query_list), query_strides[0], query_strides[1]},
                                   weight_list.data(),
                                   alpha_list.data(),
                                   beta_list.data(),
                                   row_list.data(),
                                   batches.data(),
                                   address<float>(carried),
                                   address<float>(carry)};
  py::gil_scoped_release unlocked;
  return kernels.gather(target(where), call);
}

int64_t cuda_position_parts(int dtype, const Sizes& sizes) {
  return ela::cuda::position_parts(shape_of_positions(sizes), element_size(dtype));
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Position> : ela::binding::GroupCaster<Position> {};

}  // namespace pybind11::detail

void bind_cuda_position(py::module_& module) {
  def_group<Position>(module, "cuda_position");
  def_named(module, "cuda_position_forward", &cuda_position_forward, "where, dtype, *, call, out, kl");
  def_named(module, "cuda_position_backward", &cuda_position_backward,
            "where, dtype, *, call, dout, dweights, dkl, planes, row_parts, dquery, dprev, dvalues, dvalue_strides, "
            "dkeys, dkey_strides");
  def_named(module, "cuda_position_gather", &cuda_position_gather,
            "where, dtype, *, sizes, value, dvalue, douts, dout_strides, queries, query_strides, weights, alphas, "
            "betas, rows, batches, carried, carry");
  def_named(module, "cuda_position_parts", &cuda_position_parts, "dtype, *, sizes");
}
