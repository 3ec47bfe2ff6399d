// The CUDA kernels of a residual block's end; left out of a build without nvcc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cuda_views.h"
#include "cuda/norm/norm.h"

namespace py = pybind11;

namespace {

using ela::cuda::NormBackwardCall;
using ela::cuda::NormCall;
using ela::cuda::NormForwardCall;
using ela::cuda::NormKernels;
using ela::cuda::StatisticsCall;
using namespace ela::cuda::binding;

// Statistics; gamma, beta and mask; eps; whether there is a ReLU.
using Norm = std::tuple<int64_t, Small, Small, Small, double, bool>;

const NormKernels& kernels_for(int dtype) {
  const NormKernels* kernels = ela::cuda::norm_kernels_for(checked_dtype(dtype));
  require(kernels != nullptr, "dtype: not served by the CUDA kernels");
  return *kernels;
}

NormCall norm_call(const Sizes& sizes, const Norm& norm) {
  const auto& [statistics, gamma, beta, mask, eps, relu] = norm;
  present(statistics, "statistics");
  return {shape_of(sizes),
          address<float>(statistics),
          parameter(gamma),
          parameter(beta),
          parameter(mask),
          static_cast<float>(eps),
          relu};
}

// `parts`: what cuda_attend returned with the moments.
int cuda_norm_statistics(int device, int64_t stream, const Sizes& sizes, const std::array<int64_t, 2>& parts,
                         int64_t moments, int64_t statistics) {
  present(moments, "moments"), present(statistics, "statistics");
  const StatisticsCall call = {
      shape_of(sizes), {parts[0], parts[1]}, address<float>(moments), address<float>(statistics)};
  py::gil_scoped_release unlocked;
  return ela::cuda::norm_statistics({device, address(stream)}, call);
}

int cuda_norm_forward(int device, int64_t stream, int dtype, const Sizes& sizes, const Norm& norm, const View& o,
                      const View& x, const View& out) {
  const NormKernels& kernels = kernels_for(dtype);
  require(o[0] != 0 && x[0] != 0 && out[0] != 0, "maps: an address is missing");
  const NormForwardCall call = {norm_call(sizes, norm), map(o), map(x), map(out)};
  py::gil_scoped_release unlocked;
  return kernels.forward({device, address(stream)}, call);
}

int cuda_norm_backward(int device, int64_t stream, int dtype, const Sizes& sizes, const Norm& norm, const View& o,
                       const View& dout, const View& also, const View& gradient, int64_t dgamma, int64_t dbeta,
                       int64_t partial, int64_t moved) {
  const NormKernels& kernels = kernels_for(dtype);
  const NormCall shared = norm_call(sizes, norm);
  require(o[0] != 0 && dout[0] != 0 && gradient[0] != 0, "maps: an address is missing");
  require((dgamma == 0 || shared.gamma.data != nullptr) && (dbeta == 0 || shared.beta.data != nullptr),
          "gradients of parameters that are not there");
  require((partial == 0) == (dgamma == 0 && dbeta == 0 && moved == 0), "partial: needed for sums, and only for them");
  const NormBackwardCall call = {shared,
                                 map(o),
                                 map(dout),
                                 map(also),
                                 map(gradient),
                                 address(dgamma),
                                 address(dbeta),
                                 address<float>(partial),
                                 address<float>(moved)};
  py::gil_scoped_release unlocked;
  return kernels.backward({device, address(stream)}, call);
}

int64_t cuda_norm_partials(int dtype, const Sizes& sizes) {
  return ela::cuda::norm_partials(shape_of(sizes), element_size(dtype));
}

}  // namespace

void bind_cuda_norm(py::module_& module) {
  module.def("cuda_norm_statistics", &cuda_norm_statistics);
  module.def("cuda_norm_forward", &cuda_norm_forward);
  module.def("cuda_norm_backward", &cuda_norm_backward);
  module.def("cuda_norm_partials", &cuda_norm_partials);
}
