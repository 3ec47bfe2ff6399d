// The CUDA kernels of a layer's rows, and of an attention that makes them itself; left out of a build without nvcc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cuda_views.h"
#include "cuda/layer/layer_attention.h"
#include "cuda/layer/layer_attention_plan.h"

namespace py = pybind11;

namespace {

using ela::cuda::AttendCall;
using ela::cuda::Parts;
using ela::cuda::RowsCall;
using ela::cuda::RowsKernels;
using namespace ela::cuda::binding;

// Sums and how many groups of them; the filters of query and key, and their size; mean, query and key to write.
using Rows = std::tuple<std::array<int64_t, 2>, Small, Small, int64_t, std::array<int64_t, 3>>;

const RowsKernels& kernels_for(int dtype) {
  const RowsKernels* kernels = ela::cuda::rows_kernels_for(checked_dtype(dtype));
  require(kernels != nullptr, "dtype: not served by the CUDA kernels");
  return *kernels;
}

RowsCall rows_call(const Sizes& sizes, const Rows& rows) {
  const auto& [sums, query_filter, key_filter, size, out] = rows;
  require(sums[0] != 0 && key_filter[0] != 0 && out[0] != 0 && out[2] != 0, "rows: an address is missing");
  require((query_filter[0] == 0) == (out[1] == 0), "rows: a query needs its filter, and a filter its query");
  require(sums[1] >= 1 && size >= 1, "rows: at least one group of sums, and one tap of the filters");
  return {shape_of(sizes),         address<float>(sums[0]), sums[1],
          parameter(query_filter), parameter(key_filter),   size,
          address(out[0]),         address(out[1]),         address(out[2])};
}

int cuda_rows(int device, int64_t stream, int dtype, const Sizes& sizes, const Rows& rows) {
  const RowsKernels& kernels = kernels_for(dtype);
  const RowsCall call = rows_call(sizes, rows);
  py::gil_scoped_release unlocked;
  return kernels.rows({device, address(stream)}, call);
}

// `keys` are those of the layers before, `values` all of them; the residual lies as they do. Returns the error code,
// and how the moments are cut: parts of a sample, and positions of a part.
py::tuple cuda_attend(int device, int64_t stream, int dtype, const Sizes& sizes, double scale, const Rows& rows,
                      const Ints& keys, int64_t key_stride, const Ints& values, const Strides& value_strides,
                      int64_t residual, int64_t prev, int64_t prev_depth, int64_t weights, int64_t kl, const View& out,
                      int64_t moments) {
  const RowsKernels& kernels = kernels_for(dtype);
  const RowsCall call = rows_call(sizes, rows);
  require(call.query != nullptr, "rows: an attention needs a query");
  require(keys.size() < ela::cuda::kMaxDepth, "more tensors than the CUDA kernels' greatest depth");
  auto key_list = addresses(keys);
  key_list.push_back(call.key);
  auto map_list = addresses(values);
  require(map_list.size() == key_list.size(), "values: one for each key, the layer's own last");
  if (residual != 0) map_list.push_back(address(residual));
  present(map_list, "values"), present(out[0], "out");
  const int64_t query = std::get<4>(rows)[1];
  const AttendCall attend = {
      call,
      {weights_call(sizes, scale, query, sizes[1], key_list, key_stride, prev, prev_depth, weights, kl),
       {map_list.data(), length(map_list), value_strides[0], value_strides[1]},
       map(out)},
      residual != 0,
      address<float>(moments)};
  Parts parts = {0, 0};
  int code = 0;
  {
    py::gil_scoped_release unlocked;
    code = kernels.attend({device, address(stream)}, attend, &parts);
  }
  return py::make_tuple(code, parts.chunks, parts.span);
}

int64_t cuda_attend_moments(int dtype, const Sizes& sizes, int64_t sources) {
  return ela::cuda::attend_moments(shape_of(sizes), element_size(dtype), sources);
}

}  // namespace

void bind_cuda_layer(py::module_& module) {
  module.def("cuda_rows", &cuda_rows);
  module.def("cuda_attend", &cuda_attend);
  module.def("cuda_attend_moments", &cuda_attend_moments);
}
