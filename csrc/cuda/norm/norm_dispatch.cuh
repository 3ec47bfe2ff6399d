// From a call of the norm to its launches: the 16-byte path where every row allows it, single elements elsewhere.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/norm/norm.cuh"
#include "cuda/norm/norm_parts.h"

namespace ela::cuda {

inline bool is_valid(const NormCall& c) {
  return c.shape.batch >= 1 && c.shape.channels >= 1 && c.shape.channels < kMaxChannels && c.shape.positions >= 1 &&
         c.statistics != nullptr;
}

inline NormParams params_of(const NormCall& c, const Grid& grid) {
  return {grid, c.statistics, c.gamma, c.beta, c.mask, c.eps, c.relu};
}

// Rows are single channels, gaps or not.
inline Alignment norm_alignment(const NormCall& c, int64_t vec) {
  Shape s = c.shape;
  s.heads = s.channels;
  return {s, vec};
}

template <class T, int kVec>
cudaError_t launch_norm_forward(const NormForwardCall& c, void* stream) {
  NormForwardParams p;
  p.norm = params_of(c.norm, plan_norm(c.norm.shape, kVec, sizeof(T)));
  if (p.norm.grid.items > kMaxItems) return cudaErrorInvalidConfiguration;
  p.o_batch = c.o.batch;
  p.o_inner = c.o.inner;
  p.x_batch = c.x.batch;
  p.x_inner = c.x.inner;
  p.out_batch = c.out.batch;
  p.out_inner = c.out.inner;
  p.o_ptr = c.o.data;
  p.x_ptr = c.x.data;
  p.out_ptr = c.out.data;
  return launch(&layer_norm_fwd_kernel<T, kVec>, p, p.norm.grid.items, 0, stream);
}

template <class T>
int norm_forward(const Target& target, const NormForwardCall& c) {
  if (!is_valid(c.norm)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  constexpr int kVec = kFullVector<T>;
  Alignment alignment = norm_alignment(c.norm, kVec);
  for (const MapView& map : {c.o, c.x, c.out}) alignment.see(map.data, map.batch, map.inner);
  if (alignment.vectors()) return finish(launch_norm_forward<T, kVec>(c, target.stream));
  return finish(launch_norm_forward<T, 1>(c, target.stream));
}

template <class T, int kVec, bool kSums, bool kWrites>
cudaError_t launch_norm_pass(const NormBackwardParams& p, void* stream) {
  const int64_t shared = kSums ? 4 * join_floats(p.norm.grid, kVec) : 0;
  return launch(&layer_norm_bwd_kernel<T, kVec, kSums, kWrites>, p, p.norm.grid.items, shared, stream);
}

// The sums first where the statistics move with o; else one pass does all that has to do with maps.
template <class T, int kVec>
cudaError_t launch_norm_backward(const NormBackwardCall& c, void* stream) {
  NormBackwardParams p;
  p.norm = params_of(c.norm, plan_norm(c.norm.shape, kVec, sizeof(T)));
  if (p.norm.grid.items > kMaxItems) return cudaErrorInvalidConfiguration;
  p.o_batch = c.o.batch;
  p.o_inner = c.o.inner;
  p.dout_batch = c.dout.batch;
  p.dout_inner = c.dout.inner;
  p.also_batch = c.also.batch;
  p.also_inner = c.also.inner;
  p.gradient_batch = c.gradient.batch;
  p.gradient_inner = c.gradient.inner;
  p.o_ptr = c.o.data;
  p.dout_ptr = c.dout.data;
  p.also_ptr = c.also.data;
  p.gradient_ptr = c.gradient.data;
  p.moved_ptr = c.moved;
  p.partial_ptr = c.partial;
  const int64_t floats = parts_count(c.norm.shape, parts_of(p.norm.grid, kVec));
  p.products_at = floats / 2;
  if (c.partial == nullptr) return launch_norm_pass<T, kVec, false, true>(p, stream);
  const cudaError_t code = c.moved == nullptr ? launch_norm_pass<T, kVec, true, true>(p, stream)
                                              : launch_norm_pass<T, kVec, true, false>(p, stream);
  if (code != cudaSuccess) return code;
  const int summed = launch_norm_sums(c, floats / (2 * c.norm.shape.channels), stream);
  if (summed != cudaSuccess || c.moved == nullptr) return static_cast<cudaError_t>(summed);
  return launch_norm_pass<T, kVec, false, true>(p, stream);
}

template <class T>
int norm_backward(const Target& target, const NormBackwardCall& c) {
  const bool has_sums = c.moved != nullptr || c.dgamma != nullptr || c.dbeta != nullptr;
  if (!is_valid(c.norm) || has_sums != (c.partial != nullptr)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  constexpr int kVec = kFullVector<T>;
  Alignment alignment = norm_alignment(c.norm, kVec);
  for (const MapView& map : {c.o, c.dout, c.also, c.gradient}) alignment.see(map.data, map.batch, map.inner);
  if (alignment.vectors()) return finish(launch_norm_backward<T, kVec>(c, target.stream));
  return finish(launch_norm_backward<T, 1>(c, target.stream));
}

template <class T>
constexpr NormKernels norm_kernels_of() {
  return {&norm_forward<T>, &norm_backward<T>};
}

}  // namespace ela::cuda
