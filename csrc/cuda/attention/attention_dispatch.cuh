// From a call to its launches: which instance of a kernel, with which plan and which parameters.
//
// Few instances on purpose, since each is compiled for every architecture: the usual depths have small parameter blocks
// on the 16-byte path alone. Deep histories, single elements, vectors that span heads and tolerances take the large
// ones.
#pragma once

#include "cuda/attention/aggregate.cuh"
#include "cuda/attention/attention.h"
#include "cuda/attention/attention_plan.h"
#include "cuda/attention/dots.cuh"
#include "cuda/attention/tail.cuh"
#include "cuda/common/launch.cuh"

namespace ela::cuda {

constexpr int kUsualDepth = 32;

inline bool is_valid(const WeightsCall& c) {
  return c.keys.count >= 1 && c.keys.count <= kMaxDepth && c.shape.batch * c.shape.heads >= 1 &&
         c.shape.channels < kMaxChannels && (c.prev == nullptr || c.prev_depth <= c.keys.count);
}

template <int kMax>
void fill(AttentionParams<kMax>& p, const WeightsCall& c) {
  p.query_ptr = c.query;
  p.query_batch = c.query_batch;
  p.key_batch = c.keys.batch;
  p.prev_ptr = c.prev;
  p.weights_ptr = c.weights;
  p.kl_ptr = c.prev == nullptr ? nullptr : c.kl;
  p.scale = c.scale;
  p.depth = static_cast<int>(c.keys.count);
  p.prev_depth = c.prev == nullptr ? 0 : static_cast<int>(c.prev_depth);
  p.heads = static_cast<int>(c.shape.heads);
  p.head_dim = static_cast<int>(c.shape.head_dim());
  p.lanes_log2 = log2_of(lanes_per_dot(c.shape.head_dim()));
  for (int j = 0; j < p.depth; ++j) p.key_ptr[j] = c.keys.data[j];
}

template <class T, int kMax>
cudaError_t launch_weights(const WeightsCall& c, void* stream) {
  WeightsParams<kMax> p;
  fill(p.attention, c);
  p.items = c.shape.batch * c.shape.heads;
  p.heads_per_block = kWarps;
  return launch(&layer_attention_fwd_weights_kernel<T, kMax>, p, ceil_div<int64_t>(p.items, kWarps),
                4 * kWarps * c.keys.count, stream);
}

template <class T>
int weights(const Target& target, const WeightsCall& c) {
  if (!is_valid(c)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  if (c.keys.count <= kUsualDepth) return finish(launch_weights<T, kUsualDepth>(c, target.stream));
  return finish(launch_weights<T, kMaxDepth>(c, target.stream));
}

template <class Params>
void fill_maps(Params& p, const AggregatePlan& plan, const MapList& maps, const MapView& out) {
  p.grid = plan.grid;
  p.map_batch = maps.batch;
  p.map_inner = maps.inner;
  p.out_ptr = out.data;
  p.out_batch = out.batch;
  p.out_inner = out.inner;
  for (int64_t j = 0; j < maps.count; ++j) p.map_ptr[j] = maps.data[j];
}

template <class T, int kVec, bool kHeadEach, bool kLeavesOut, int kMax>
cudaError_t launch_forward(const ForwardCall& c, bool gapless, void* stream) {
  const AggregatePlan plan = plan_aggregate(c.attention.shape, gapless, kVec, c.values.count);
  if (plan.grid.items > kMaxItems) return cudaErrorInvalidConfiguration;
  ForwardParams<kMax> p;
  fill_maps(p, plan, c.values, c.out);
  fill(p.attention, c.attention);
  p.tolerance = c.attention.tolerance;
  p.list_at = static_cast<int>(plan.shared_bytes / 4);
  const int64_t shared_bytes = plan.shared_bytes + (kLeavesOut ? list_bytes(c.values.count) : 0);
  return launch(&layer_attention_fwd_kernel<T, kVec, kHeadEach, kLeavesOut, kMax>, p, plan.grid.items, shared_bytes,
                stream);
}

template <class T, int kVec, bool kHeadEach, int kMax>
cudaError_t launch_forward(const ForwardCall& c, bool gapless, void* stream) {
  if (c.attention.tolerance > 0) return launch_forward<T, kVec, kHeadEach, true, kMaxDepth>(c, gapless, stream);
  return launch_forward<T, kVec, kHeadEach, false, kMax>(c, gapless, stream);
}

template <class T>
int forward(const Target& target, const ForwardCall& c) {
  const Shape& s = c.attention.shape;
  if (!is_valid(c.attention) || c.values.count != c.attention.keys.count || s.positions < 1) {
    return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  constexpr int kVec = kFullVector<T>;
  Alignment alignment(s, kVec);
  alignment.see(c.values);
  alignment.see(c.out.data, c.out.batch, c.out.inner);
  const bool gapless = alignment.gapless();
  if (!alignment.vectors()) return finish(launch_forward<T, 1, false, kMaxDepth>(c, gapless, target.stream));
  if (s.interleaved && s.head_dim() % kVec != 0) {
    return finish(launch_forward<T, kVec, true, kMaxDepth>(c, gapless, target.stream));
  }
  if (c.values.count <= kUsualDepth) {
    return finish(launch_forward<T, kVec, false, kUsualDepth>(c, gapless, target.stream));
  }
  return finish(launch_forward<T, kVec, false, kMaxDepth>(c, gapless, target.stream));
}

template <int kMax>
void fill(GatherKeyParams<kMax>& p, const GatherCall& c) {
  p.dkey_ptr = c.dkey;
  p.query_batch = c.queries.batch;
  p.batch = c.shape.batch;
  p.channels = static_cast<int>(c.shape.channels);
  p.heads = static_cast<int>(c.shape.heads);
  p.head_dim = static_cast<int>(c.shape.head_dim());
  p.sources = c.dkey == nullptr ? 0 : static_cast<int>(c.queries.count);
  for (int m = 0; m < p.sources; ++m) {
    p.query_ptr[m] = c.queries.data[m];
    p.score_ptr[m] = static_cast<const float*>(c.dscores.data[m]);
    p.score_stride[m] = static_cast<int>(c.dscores.strides[m]);
  }
}

template <class T, int kMax>
cudaError_t launch_gather_key(const GatherCall& c, void* stream) {
  GatherKeyParams<kMax> p;
  fill(p, c);
  return launch(&layer_attention_bwd_gather_key_kernel<T, kMax>, p, ceil_div<int64_t>(p.batch * p.channels, kBlock), 0,
                stream);
}

inline bool leaves_out(const GatherCall& c) {
  bool found = false;
  for (int64_t m = 0; m < c.douts.count; ++m) found = found || c.tolerances[m] > 0;
  return found;
}

template <class T, int kVec, bool kHeadEach, bool kLeavesOut, int kMax>
cudaError_t launch_gather(const GatherCall& c, bool gapless, void* stream) {
  const AggregatePlan plan = plan_aggregate(c.shape, gapless, kVec, c.douts.count);
  if (plan.grid.items > kMaxItems) return cudaErrorInvalidConfiguration;
  GatherParams<kLeavesOut, kMax> p;
  fill_maps(p, plan, c.douts, c.dvalue);
  fill(p.key, c);
  p.source_count = static_cast<int>(c.douts.count);
  for (int m = 0; m < p.source_count; ++m) {
    p.weight_ptr[m] = static_cast<const float*>(c.weights.data[m]);
    p.weight_stride[m] = static_cast<int>(c.weights.strides[m]);
    if constexpr (kLeavesOut) p.tolerance[m] = c.tolerances[m];
  }
  p.list_at = static_cast<int>(plan.shared_bytes / 4);
  const int64_t shared_bytes = plan.shared_bytes + (kLeavesOut ? list_bytes(c.douts.count) : 0);
  return launch(&layer_attention_bwd_gather_kernel<T, kVec, kHeadEach, kLeavesOut, kMax>, p, plan.grid.items,
                shared_bytes, stream);
}

template <class T, int kVec, bool kHeadEach, int kMax>
cudaError_t launch_gather(const GatherCall& c, bool gapless, void* stream) {
  if (leaves_out(c)) return launch_gather<T, kVec, kHeadEach, true, kMaxDepth>(c, gapless, stream);
  return launch_gather<T, kVec, kHeadEach, false, kMax>(c, gapless, stream);
}

template <class T>
int gather(const Target& target, const GatherCall& c) {
  const Shape& s = c.shape;
  const int64_t depth = larger(c.dkey == nullptr ? 0 : c.queries.count, c.dvalue.data == nullptr ? 0 : c.douts.count);
  if (depth < 1 || depth > kMaxDepth || s.batch < 1 || s.channels >= kMaxChannels) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  if (c.dvalue.data == nullptr) {
    if (depth <= kUsualDepth) return finish(launch_gather_key<T, kUsualDepth>(c, target.stream));
    return finish(launch_gather_key<T, kMaxDepth>(c, target.stream));
  }
  if (c.douts.count < 1 || s.positions < 1) return finish(cudaErrorInvalidValue);
  constexpr int kVec = kFullVector<T>;
  Alignment alignment(s, kVec);
  alignment.see(c.douts);
  alignment.see(c.dvalue.data, c.dvalue.batch, c.dvalue.inner);
  const bool gapless = alignment.gapless();
  if (!alignment.vectors()) return finish(launch_gather<T, 1, false, kMaxDepth>(c, gapless, target.stream));
  if (s.interleaved && s.head_dim() % kVec != 0) {
    return finish(launch_gather<T, kVec, true, kMaxDepth>(c, gapless, target.stream));
  }
  if (depth <= kUsualDepth) return finish(launch_gather<T, kVec, false, kUsualDepth>(c, gapless, target.stream));
  return finish(launch_gather<T, kVec, false, kMaxDepth>(c, gapless, target.stream));
}

template <class T, int kVec, bool kPush, bool kLeavesOut, int kMax>
cudaError_t launch_dots(const BackwardCall& c, const DotsPlan& plan, void* stream) {
  if (plan.grid.items > kMaxItems) return cudaErrorInvalidConfiguration;
  DotsParams<kPush, kMax> p;
  p.grid = plan.grid;
  p.value_batch = c.values.batch;
  p.value_inner = c.values.inner;
  p.dout_batch = c.dout.batch;
  p.dout_inner = c.dout.inner;
  p.dvalue_batch = c.dvalues.batch;
  p.dvalue_inner = c.dvalues.inner;
  p.dout_ptr = c.dout.data;
  p.weights_ptr = c.attention.weights;
  p.partial_ptr = c.workspace;
  p.depth = static_cast<int>(c.values.count);
  p.fold_log2 = log2_of(plan.fold);
  p.slots = plan.slots;
  for (int j = 0; j < p.depth; ++j) {
    p.value_ptr[j] = c.values.data[j];
    if constexpr (kPush) p.dvalue_ptr[j] = const_cast<void*>(c.dvalues.data[j]);
  }
  p.tolerance = c.attention.tolerance;
  p.list_at = kWarps * plan.slots * p.depth;
  const int64_t shared_bytes = int64_t{4} * p.list_at + (kLeavesOut ? list_bytes(p.depth) : 0);
  return launch(&layer_attention_bwd_dots_kernel<T, kVec, kPush, kLeavesOut, kMax>, p, plan.grid.items, shared_bytes,
                stream);
}

template <class T, int kVec, bool kPush, int kMax>
cudaError_t launch_dots(const BackwardCall& c, const DotsPlan& plan, void* stream) {
  if (c.attention.tolerance > 0) return launch_dots<T, kVec, kPush, true, kMaxDepth>(c, plan, stream);
  return launch_dots<T, kVec, kPush, false, kMax>(c, plan, stream);
}

template <class T, int kVec, int kMax>
cudaError_t launch_dots(const BackwardCall& c, const DotsPlan& plan, void* stream) {
  if (c.dvalues.count != 0) return launch_dots<T, kVec, true, kMax>(c, plan, stream);
  return launch_dots<T, kVec, false, kMax>(c, plan, stream);
}

// Chooses the instance and its plan; `partials` says where bwd_tail finds the sums.
template <class T>
cudaError_t launch_dots(const BackwardCall& c, Partials* partials, void* stream) {
  const Shape& s = c.attention.shape;
  constexpr int kVec = kFullVector<T>;
  Alignment alignment(s, kVec);
  alignment.see(c.values);
  alignment.see(c.dvalues);
  alignment.see(c.dout.data, c.dout.batch, c.dout.inner);
  const bool vectors = alignment.vectors() && (!s.interleaved || s.head_dim() % kVec == 0);
  const DotsPlan plan = plan_dots(s, alignment.gapless(), vectors ? kVec : 1, sizeof(T), c.values.count);
  *partials = plan.partials;
  if (!vectors) return launch_dots<T, 1, kMaxDepth>(c, plan, stream);
  if (c.values.count <= kUsualDepth) return launch_dots<T, kVec, kUsualDepth>(c, plan, stream);
  return launch_dots<T, kVec, kMaxDepth>(c, plan, stream);
}

template <class T, int kMax>
cudaError_t launch_tail(const BackwardCall& c, const Partials& partials, void* stream) {
  const Shape& s = c.attention.shape;
  const int64_t depth = c.attention.keys.count;
  TailParams<kMax> p;
  fill(p.attention, c.attention);
  // Wide heads have long rows to sum and many channels: a whole block, where a warp serves a narrow one.
  const int64_t team = power_of_two(ceil_div<int64_t>(s.head_dim(), 2), kWarp, kBlock);
  p.items = s.batch * s.heads;
  p.team_log2 = log2_of(team);
  p.depth_span_log2 = log2_of(power_of_two(depth, 1, kWarp));
  p.channel_span_log2 = log2_of(team == kWarp ? power_of_two(s.head_dim(), 1, kWarp) : team);
  p.has_dkeys = c.dkeys.count != 0;
  p.is_given = c.attention.is_given;
  p.partials = partials;
  p.partial_ptr = c.dout.data == nullptr ? nullptr : c.workspace;
  p.dweights_ptr = c.dweights;
  p.dkl_ptr = c.dkl;
  p.dscores_ptr = c.dscores;
  p.dquery_ptr = c.dquery;
  p.dprev_ptr = c.dprev;
  for (int64_t j = 0; j < c.dkeys.count; ++j) p.dkey_ptr[j] = const_cast<void*>(c.dkeys.data[j]);
  const int64_t teams = kBlock / team;
  return launch(&layer_attention_bwd_tail_kernel<T, kMax>, p, ceil_div(p.items, teams),
                4 * depth * (kWarps + 2 * teams), stream);
}

inline bool is_valid(const BackwardCall& c) {
  const int64_t depth = c.attention.keys.count;
  const bool reads_maps = c.dout.data != nullptr;
  return is_valid(c.attention) && (c.dkeys.count == 0 || c.dkeys.count == depth) &&
         (c.dvalues.count == 0 || (c.dvalues.count == depth && reads_maps)) &&
         (!reads_maps || (c.values.count == depth && c.workspace != nullptr && c.attention.shape.positions >= 1)) &&
         (c.dprev == nullptr || (c.attention.prev != nullptr && c.dkl != nullptr));
}

template <class T>
int backward(const Target& target, const BackwardCall& c) {
  if (!is_valid(c)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  Partials partials = {0, 1};
  if (c.dout.data != nullptr) {
    const cudaError_t code = launch_dots<T>(c, &partials, target.stream);
    if (code != cudaSuccess) return finish(code);
  }
  if (c.attention.keys.count <= kUsualDepth) return finish(launch_tail<T, kUsualDepth>(c, partials, target.stream));
  return finish(launch_tail<T, kMaxDepth>(c, partials, target.stream));
}

template <class T>
constexpr Kernels kernels_of() {
  return {&weights<T>, &forward<T>, &backward<T>, &gather<T>};
}

}  // namespace ela::cuda
