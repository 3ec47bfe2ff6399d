// The CUDA kernels of a residual block's end; left out of a build without nvcc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cuda_views.h"
#include "binding/named.h"
#include "cuda/norm/norm.h"

namespace py = pybind11;
using ela::binding::def_group;
using ela::binding::def_named;

namespace {

using ela::cuda::NormBackwardCall;
using ela::cuda::NormCall;
using ela::cuda::NormForwardCall;
using ela::cuda::NormKernels;
using ela::cuda::StatisticsCall;
using namespace ela::cuda::binding;

const NormKernels& kernels_for(int dtype) {
  const NormKernels* kernels = ela::cuda::norm_kernels_for(checked_dtype(dtype));
  require(kernels != nullptr, "dtype: not served by the CUDA kernels");
  return *kernels;
}

struct Norm {
  int64_t statistics;
  Small gamma, beta, mask;
  double eps;
  bool relu;

  template <class Visit>
  void fields(Visit visit) {
    visit("statistics", statistics), visit("gamma", gamma), visit("beta", beta), visit("mask", mask);
    visit("eps", eps), visit("relu", relu);
  }
};

NormCall norm_call(const Sizes& sizes, const Norm& n) {
  present(n.statistics, "statistics");
  return {shape_of(sizes),
          address<float>(n.statistics),
          parameter(n.gamma),
          parameter(n.beta),
          parameter(n.mask),
          static_cast<float>(n.eps),
          n.relu};
}

// `chunks` and `span`: what cuda_attend returned with the moments.
int cuda_norm_statistics(const Where& where, const Sizes& sizes, int64_t chunks, int64_t span, int64_t moments,
                         int64_t statistics) {
  present(moments, "moments"), present(statistics, "statistics");
  const StatisticsCall call = {shape_of(sizes), {chunks, span}, address<float>(moments), address<float>(statistics)};
  py::gil_scoped_release unlocked;
  return ela::cuda::norm_statistics(target(where), call);
}

int cuda_norm_forward(const Where& where, int dtype, const Sizes& sizes, const Norm& norm, const View& o, const View& x,
                      const View& out) {
  const NormKernels& kernels = kernels_for(dtype);
  require(o[0] != 0 && x[0] != 0 && out[0] != 0, "maps: an address is missing");
  const NormForwardCall call = {norm_call(sizes, norm), map(o), map(x), map(out)};
  py::gil_scoped_release unlocked;
  return kernels.forward(target(where), call);
}

int cuda_norm_backward(const Where& where, int dtype, const Sizes& sizes, const Norm& norm, const View& o,
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
  return kernels.backward(target(where), call);
}

int64_t cuda_norm_partials(int dtype, const Sizes& sizes) {
  return ela::cuda::norm_partials(shape_of(sizes), element_size(dtype));
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Norm> : ela::binding::GroupCaster<Norm> {};

}  // namespace pybind11::detail

void bind_cuda_norm(py::module_& module) {
  def_group<Norm>(module, "cuda_norm");
  def_named(module, "cuda_norm_statistics", &cuda_norm_statistics,
            "where, *, sizes, chunks, span, moments, statistics");
  def_named(module, "cuda_norm_forward", &cuda_norm_forward, "where, dtype, *, sizes, norm, o, x, out");
  def_named(module, "cuda_norm_backward", &cuda_norm_backward,
            "where, dtype, *, sizes, norm, o, dout, also, gradient, dgamma, dbeta, partial, moved");
  def_named(module, "cuda_norm_partials", &cuda_norm_partials, "dtype, *, sizes");
}
