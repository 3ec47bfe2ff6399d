// The CUDA kernels that make a layer's value from a feature map, and their backward; left out of a build without nvcc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cuda_views.h"
#include "binding/named.h"
#include "cuda/layer/producer.h"
#include "cuda/layer/producer_plan.h"

namespace py = pybind11;
using ela::binding::def_group;
using ela::binding::def_named;

namespace {

using ela::ImageShape;
using namespace ela::cuda::binding;

using ImageSizes = std::array<int64_t, 5>;  // B, C, H, W, interleaved

ImageShape image_of(const ImageSizes& s) {
  require(s[0] >= 1 && s[1] >= 1 && s[2] >= 1 && s[3] >= 1, "sizes: none may be zero");
  require(s[1] < ela::cuda::kMaxChannels && s[2] < ela::cuda::kMaxSide && s[3] < ela::cuda::kMaxSide,
          "sizes: more than the CUDA kernels count");
  return {s[0], s[1], s[2], s[3], s[4] != 0};
}

const ela::cuda::ProducerKernels& kernels_for(int dtype) {
  const auto* kernels = ela::cuda::producer_kernels_for(checked_dtype(dtype));
  require(kernels != nullptr, "dtype: not served by the CUDA kernels");
  return *kernels;
}

int64_t producer_groups(int dtype, const ImageSizes& sizes) {
  return ela::cuda::producer_groups(image_of(sizes), element_size(dtype));
}

int64_t producer_workspace(int dtype, const ImageSizes& sizes, int64_t filter_size) {
  return ela::cuda::producer_workspace(image_of(sizes), element_size(dtype), filter_size);
}

int producer_forward(const Where& where, int dtype, const ImageSizes& sizes, const View& x, const Small& wv,
                     const View& v, int64_t sums) {
  const auto& kernels = kernels_for(dtype);
  require(x[0] != 0 && wv[0] != 0 && v[0] != 0 && sums != 0, "x, wv, v and sums: no address");
  const ela::cuda::ProducerCall call = {image_of(sizes), map(x), parameter(wv), map(v), address<float>(sums)};
  py::gil_scoped_release unlocked;
  return kernels.forward(target(where), call);
}

// The gradients that are written; an address of 0 leaves one out.
struct Gradients {
  View dx;
  int64_t dwq, dwk, dwv;

  template <class Visit>
  void fields(Visit visit) {
    visit("dx", dx), visit("dwq", dwq), visit("dwk", dwk), visit("dwv", dwv);
  }
};

int producer_backward(const Where& where, int dtype, const ImageSizes& sizes, int64_t filter_size, const View& dv,
                      const View& x, const View& residual, const Small& wq, const Small& wk, const Small& wv,
                      int64_t dquery, int64_t dkey, int64_t mean, const Gradients& gradients, int64_t workspace) {
  const auto& [dx, dwq, dwk, dwv] = gradients;
  const auto& kernels = kernels_for(dtype);
  require(filter_size >= 1 && filter_size <= ela::cuda::kMaxFilterSize, "filter_size: not one of a filter");
  require(x[0] != 0 && wk[0] != 0 && wv[0] != 0 && mean != 0, "x, wk, wv and mean: no address");
  require(
      (dquery == 0 || wq[0] != 0) && (dwq == 0 || dquery != 0) && (dwk == 0 || dkey != 0) && (dwv == 0 || dv[0] != 0),
      "gradients of filters: they need that of what the filter made");
  require((dwq == 0 && dwk == 0 && dwv == 0) || workspace != 0, "gradients of filters: they need a workspace");
  const ela::cuda::ProducerBackwardCall call = {
      image_of(sizes), filter_size,   map(dv),         map(x),
      map(residual),   parameter(wv), address(dquery), address(dkey),
      parameter(wq),   parameter(wk), address(mean),   map(dx),
      address(dwv),    address(dwq),  address(dwk),    address<float>(workspace)};
  py::gil_scoped_release unlocked;
  return kernels.backward(target(where), call);
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<Gradients> : ela::binding::GroupCaster<Gradients> {};

}  // namespace pybind11::detail

void bind_cuda_producer(py::module_& module) {
  def_group<Gradients>(module, "cuda_producer_gradients");
  def_named(module, "cuda_producer_groups", &producer_groups, "dtype, *, sizes");
  def_named(module, "cuda_producer_workspace", &producer_workspace, "dtype, *, sizes, filter_size");
  def_named(module, "cuda_producer_forward", &producer_forward, "where, dtype, *, sizes, x, wv, v, sums");
  def_named(module, "cuda_producer_backward", &producer_backward,
            "where, dtype, *, sizes, filter_size, dv, x, residual, wq, wk, wv, dquery, dkey, mean, "
            "gradients, workspace");
}
