// The CUDA kernels of a layer's rows, and of an attention that makes them itself; left out of a build without nvcc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cuda_views.h"
#include "binding/named.h"
#include "cuda/layer/layer_attention.h"
#include "cuda/layer/layer_attention_plan.h"

namespace py = pybind11;
using ela::binding::def_group;
using ela::binding::def_named;

namespace {

using ela::cuda::AttendCall;
using ela::cuda::Parts;
using ela::cuda::RowsCall;
using ela::cuda::RowsKernels;
using namespace ela::cuda::binding;

const RowsKernels& kernels_for(int dtype) {
  const RowsKernels* kernels = ela::cuda::rows_kernels_for(checked_dtype(dtype));
  require(kernels != nullptr, "dtype: not served by the CUDA kernels");
  return *kernels;
}

// What the rows are made of, `groups` of sums and the filters, of `filter_size`; and where mean, query and key are
// written.
struct Rows {
  int64_t sums, groups;
  Small wq, wk;
  int64_t filter_size, mean, query, key;

  template <class Visit>
  void fields(Visit visit) {
    visit("sums", sums), visit("groups", groups), visit("wq", wq), visit("wk", wk), visit("filter_size", filter_size);
    visit("mean", mean), visit("query", query), visit("key", key);
  }
};

RowsCall rows_call(const Sizes& sizes, const Rows& r) {
  require(r.sums != 0 && r.wk[0] != 0 && r.mean != 0 && r.key != 0, "rows: an address is missing");
  require((r.wq[0] == 0) == (r.query == 0), "rows: a query needs its filter, and a filter its query");
  require(r.groups >= 1 && r.filter_size >= 1, "rows: at least one group of sums, and one tap of the filters");
  return {shape_of(sizes), address<float>(r.sums), r.groups,         parameter(r.wq), parameter(r.wk),
          r.filter_size,   address(r.mean),        address(r.query), address(r.key)};
}

int cuda_rows(const Where& where, int dtype, const Sizes& sizes, const Rows& rows) {
  const RowsKernels& kernels = kernels_for(dtype);
  const RowsCall call = rows_call(sizes, rows);
  py::gil_scoped_release unlocked;
  return kernels.rows(target(where), call);
}

// Of the attention, `keys` are those of the layers before, `values` all of them, and the query is that of the rows; the
// residual lies as the values do. Returns the error code, and how the moments are cut: parts of a sample, and positions
// of a part.
py::tuple cuda_attend(const Where& where, int dtype, const Sizes& sizes, const Rows& rows, const Attention& attention,
                      int64_t residual, int64_t kl, const View& out, int64_t moments) {
  const RowsKernels& kernels = kernels_for(dtype);
  const RowsCall call = rows_call(sizes, rows);
  require(call.query != nullptr, "rows: an attention needs a query");
  require(attention.query == rows.query, "query: not that of the rows");
  require(attention.keys.size() < ela::cuda::kMaxDepth, "more tensors than the CUDA kernels' greatest depth");
  auto key_list = addresses(attention.keys);
  key_list.push_back(call.key);
  auto map_list = addresses(attention.values);
  require(map_list.size() == key_list.size(), "values: one for each key, the layer's own last");
  if (residual != 0) map_list.push_back(address(residual));
  present(map_list, "values"), present(out[0], "out");
  const Strides& strides = attention.value_strides;
  const AttendCall attend = {call,
                             {weights_call(sizes, attention, key_list, kl),
                              {map_list.data(), length(map_list), strides[0], strides[1]},
                              map(out)},
                             residual != 0,
                             address<float>(moments)};
  Parts parts = {0, 0};
  int code = 0;
  {
    py::gil_scoped_release unlocked;
    code = kernels.attend(target(where), attend, &parts);
  }
  return py::make_tuple(code, parts.chunks, parts.span);
}

int64_t cuda_attend_moments(int dtype, const Sizes& sizes, int64_t sources) {
  return ela::cuda::attend_moments(shape_of(sizes), element_size(dtype), sources);
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Rows> : ela::binding::GroupCaster<Rows> {};

}  // namespace pybind11::detail

void bind_cuda_layer(py::module_& module) {
  def_group<Rows>(module, "cuda_row_group");
  def_named(module, "cuda_rows", &cuda_rows, "where, dtype, *, sizes, rows");
  def_named(module, "cuda_attend", &cuda_attend, "where, dtype, *, sizes, rows, attention, residual, kl, out, moments");
  def_named(module, "cuda_attend_moments", &cuda_attend_moments, "dtype, *, sizes, sources");
}
