// The CUDA kernels of the attention over layers; left out of a build without nvcc.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/cuda_views.h"
#include "binding/named.h"
#include "cuda/attention/attention.h"
#include "cuda/attention/attention_plan.h"

namespace py = pybind11;
using ela::binding::def_group;
using ela::binding::def_named;

namespace {

using ela::cuda::BackwardCall;
using ela::cuda::ForwardCall;
using ela::cuda::GatherCall;
using ela::cuda::Kernels;
using ela::cuda::WeightsCall;
using namespace ela::cuda::binding;

const Kernels& kernels_for(int dtype) {
  const Kernels* kernels = ela::cuda::kernels_for(checked_dtype(dtype));
  require(kernels != nullptr, "dtype: not served by the CUDA kernels");
  return *kernels;
}

int cuda_weights(const Where& where, int dtype, const Sizes& sizes, const Attention& attention, int64_t kl) {
  const Kernels& kernels = kernels_for(dtype);
  const auto key_list = addresses(attention.keys);
  const WeightsCall call = weights_call(sizes, attention, key_list, kl);
  py::gil_scoped_release unlocked;
  return kernels.weights(target(where), call);
}

int cuda_forward(const Where& where, int dtype, const Sizes& sizes, const Attention& attention, int64_t kl,
                 const View& out) {
  const Kernels& kernels = kernels_for(dtype);
  const auto key_list = addresses(attention.keys);
  const auto value_list = addresses(attention.values);
  const Strides& strides = attention.value_strides;
  require(value_list.size() == key_list.size(), "values: one for each key");
  present(value_list, "values"), present(out[0], "out");
  const ForwardCall call = {weights_call(sizes, attention, key_list, kl),
                            {value_list.data(), length(value_list), strides[0], strides[1]},
                            map(out)};
  py::gil_scoped_release unlocked;
  return kernels.forward(target(where), call);
}

// One layer's own gradients. The push form asks for dkeys and dvalues here; the pull form gathers them.
int cuda_backward(const Where& where, int dtype, const Sizes& sizes, const Attention& attention, const View& dout,
                  int64_t dweights, int64_t dkl, int64_t dscores, int64_t dquery, const Ints& dkeys, int64_t dprev,
                  const Ints& dvalues, const Strides& dvalue_strides, int64_t workspace) {
  const Kernels& kernels = kernels_for(dtype);
  const auto key_list = addresses(attention.keys);
  const auto value_list = addresses(attention.values);
  const auto dkey_list = addresses(dkeys);
  const auto dvalue_list = addresses(dvalues);
  const Strides& strides = attention.value_strides;
  require(dout[0] == 0 || (value_list.size() == key_list.size() && workspace != 0),
          "dout: needs one value for each key, and a workspace");
  present(dscores, "dscores");
  if (dout[0] != 0) present(value_list, "values");
  require(dkey_list.empty() || dkey_list.size() == key_list.size(), "dkeys: one for each key, or none");
  require(dvalue_list.empty() || (dvalue_list.size() == key_list.size() && dout[0] != 0),
          "dvalues: one for each key, or none; they need dout");
  require(dprev == 0 || (attention.prev != 0 && dkl != 0), "dprev: needs previous weights and dkl");
  const BackwardCall call = {weights_call(sizes, attention, key_list, 0),
                             {value_list.data(), length(value_list), strides[0], strides[1]},
                             map(dout),
                             address<float>(dweights),
                             address<float>(dkl),
                             address<float>(dscores),
                             address(dquery),
                             {dkey_list.data(), length(dkey_list), sizes[1]},
                             address<float>(dprev),
                             {dvalue_list.data(), length(dvalue_list), dvalue_strides[0], dvalue_strides[1]},
                             address<float>(workspace)};
  py::gil_scoped_release unlocked;
  return kernels.backward(target(where), call);
}

// Of a sum by weights [B, G, depth] that are given: their gradient, and those of the values that have an address.
int cuda_mix_backward(const Where& where, int dtype, const Sizes& sizes, int64_t weights, const Ints& values,
                      const Strides& value_strides, const View& dout, int64_t dweights, const Ints& dvalues,
                      const Strides& dvalue_strides, int64_t workspace) {
  const Kernels& kernels = kernels_for(dtype);
  const auto value_list = addresses(values);
  const auto dvalue_list = addresses(dvalues);
  const std::vector<const void*> no_keys(value_list.size());
  require(!value_list.empty(), "values: at least one");
  require(dvalue_list.empty() || dvalue_list.size() == value_list.size(), "dvalues: one for each value, or none");
  present(weights, "weights"), present(value_list, "values"), present(dout[0], "dout");
  present(dweights, "dweights"), present(workspace, "workspace");
  WeightsCall given = {};
  given.shape = shape_of(sizes);
  given.keys = {no_keys.data(), length(no_keys), 0};
  given.weights = address<float>(weights);
  given.is_given = true;
  BackwardCall call = {};
  call.attention = given;
  call.values = {value_list.data(), length(value_list), value_strides[0], value_strides[1]};
  call.dout = map(dout);
  call.dscores = address<float>(dweights);
  call.dvalues = {dvalue_list.data(), length(dvalue_list), dvalue_strides[0], dvalue_strides[1]};
  call.workspace = address<float>(workspace);
  py::gil_scoped_release unlocked;
  return kernels.backward(target(where), call);
}

int cuda_gather(const Where& where, int dtype, const Sizes& sizes, const Ints& queries, int64_t query_stride,
                const Ints& score_columns, const Ints& score_strides, int64_t dkey, const Ints& douts,
                const Strides& dout_strides, const Ints& weight_columns, const Ints& weight_strides,
                const std::vector<double>& tolerances, const View& dvalue) {
  const Kernels& kernels = kernels_for(dtype);
  const auto query_list = addresses(queries);
  const auto score_list = addresses(score_columns);
  const auto dout_list = addresses(douts);
  const auto weight_list = addresses(weight_columns);
  require(dkey == 0 || (!query_list.empty() && query_list.size() == score_list.size() &&
                        score_list.size() == score_strides.size()),
          "queries: one column and stride each, at least one");
  require(dvalue[0] == 0 || (!dout_list.empty() && dout_list.size() == weight_list.size() &&
                             weight_list.size() == weight_strides.size() && weight_list.size() == tolerances.size()),
          "douts: one column of weights, stride and tolerance each, at least one");
  std::vector<float> least;
  least.reserve(tolerances.size());
  for (const double tolerance : tolerances) least.push_back(checked_tolerance(tolerance));
  if (dkey == 0 && dvalue[0] == 0) return 0;
  if (dkey != 0) present(query_list, "queries"), present(score_list, "columns of the scores");
  if (dvalue[0] != 0) present(dout_list, "douts"), present(weight_list, "columns of the weights");
  const GatherCall call = {shape_of(sizes),
                           {query_list.data(), length(query_list), query_stride},
                           {score_list.data(), score_strides.data(), length(score_list)},
                           address(dkey),
                           {dout_list.data(), length(dout_list), dout_strides[0], dout_strides[1]},
                           {weight_list.data(), weight_strides.data(), length(weight_list)},
                           least.data(),
                           map(dvalue)};
  py::gil_scoped_release unlocked;
  return kernels.gather(target(where), call);
}

int64_t cuda_backward_workspace(int dtype, const Sizes& sizes, int64_t depth) {
  return ela::cuda::backward_workspace(shape_of(sizes), element_size(dtype), depth);
}

}  // namespace

void bind_cuda_attention(py::module_& module) {
  module.attr("cuda_max_depth") = ela::cuda::kMaxDepth;
  def_group<Attention>(module, "cuda_attention");
  def_named(module, "cuda_weights", &cuda_weights, "where, dtype, *, sizes, attention, kl");
  def_named(module, "cuda_forward", &cuda_forward, "where, dtype, *, sizes, attention, kl, out");
  def_named(module, "cuda_backward", &cuda_backward,
            "where, dtype, *, sizes, attention, dout, dweights, dkl, dscores, dquery, dkeys, dprev, "
            "dvalues, dvalue_strides, workspace");
  def_named(
      module, "cuda_mix_backward", &cuda_mix_backward,
      "where, dtype, *, sizes, weights, values, value_strides, dout, dweights, dvalues, dvalue_strides, workspace");
  def_named(module, "cuda_gather", &cuda_gather,
            "where, dtype, *, sizes, queries, query_stride, score_columns, score_strides, dkey, "
            "douts, dout_strides, weight_columns, weight_strides, tolerances, dvalue");
  def_named(module, "cuda_backward_workspace", &cuda_backward_workspace, "dtype, *, sizes, depth");
}
