// From an attention that makes its own query and key, or from a call for the rows alone, to launches. As in
// attention_dispatch.cuh, the usual depths have small parameter blocks on the 16-byte path alone.
#pragma once

#include "cuda/attention/attention_dispatch.cuh"
#include "cuda/layer/layer_attention.cuh"
#include "cuda/layer/layer_attention.h"

namespace ela::cuda {

inline bool is_valid(const RowsCall& c) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return c.shape.batch >= 1 && c.shape.channels < kMaxChannels && c.shape.positions >= 1 && c.groups >= 1 &&
         c.groups < kMost && c.size >= 1 && c.size < kMost && c.sums != nullptr && c.key_filter.data != nullptr &&
         (c.query == nullptr) == (c.query_filter.data == nullptr);
}

inline RowsParams params_of(const RowsCall& c) {
  RowsParams p;
  p.sums_ptr = c.sums;
  p.query_filter = c.query_filter;
  p.key_filter = c.key_filter;
  p.mean_ptr = c.mean;
  p.query_ptr = c.query;
  p.key_ptr = c.key;
  p.items = c.shape.batch * ceil_div<int64_t>(c.shape.channels, kRowChannels);
  p.channels = static_cast<int>(c.shape.channels);
  p.groups = static_cast<int>(c.groups);
  p.size = static_cast<int>(c.size);
  p.positions = static_cast<float>(c.shape.positions);
  // Few lanes to a channel, so that those beside each other read whole sectors of 32 bytes.
  p.shares_log2 = log2_of(power_of_two(ceil_div<int64_t>(c.groups, 4), 1, 4));
  return p;
}

template <class T>
cudaError_t launch_rows(const RowsCall& c, void* stream) {
  const RowsParams p = params_of(c);
  const int64_t held = smaller<int64_t>(kRowTile, kRowChannels + 2 * (c.size / 2));
  return launch(&layer_rows_fwd_kernel<T>, p, p.items, 4 * held, stream);
}

template <class T>
int rows(const Target& target, const RowsCall& c) {
  if (!is_valid(c)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  return finish(launch_rows<T>(c, target.stream));
}

template <class T, int kVec, bool kHeadEach, bool kMoments, bool kLeavesOut, int kMax>
cudaError_t launch_attend(const AttendCall& c, const AttendPlan& plan, void* stream) {
  if (plan.aggregate.grid.items > kMaxItems) return cudaErrorInvalidConfiguration;
  const Shape& s = c.rows.shape;
  AttendParams<kMoments, kMax> p;
  fill_maps(p, plan.aggregate, c.forward.values, c.forward.out);
  fill(p.attention, c.forward.attention);
  p.rows = params_of(c.rows);
  p.origin = plan.origin;
  p.source_count = static_cast<int>(c.forward.values.count);
  p.scratch_at = static_cast<int>(plan.scratch_at);
  p.moments_ptr = c.moments;
  p.squares_at = parts_count(s, parts_of(plan.aggregate.grid, kVec)) / 2;
  p.tolerance = c.forward.attention.tolerance;
  p.list_at = static_cast<int>(plan.shared_bytes / 4);
  const int64_t shared_bytes = plan.shared_bytes + (kLeavesOut ? list_bytes(p.source_count) : 0);
  return launch(&layer_attend_fwd_kernel<T, kVec, kHeadEach, kMoments, kLeavesOut, kMax>, p, plan.aggregate.grid.items,
                shared_bytes, stream);
}

template <class T, int kVec, bool kHeadEach, bool kMoments, int kMax>
cudaError_t launch_attend(const AttendCall& c, const AttendPlan& plan, void* stream) {
  if (c.forward.attention.tolerance > 0) {
    return launch_attend<T, kVec, kHeadEach, kMoments, true, kMaxDepth>(c, plan, stream);
  }
  return launch_attend<T, kVec, kHeadEach, kMoments, false, kMax>(c, plan, stream);
}

template <class T, int kVec, bool kHeadEach, int kMax>
cudaError_t launch_attend(const Target& target, const AttendCall& c, bool gapless, Parts* parts) {
  const AttendPlan plan = plan_attend(c.rows.shape, gapless, kVec, sizeof(T), c.forward.values.count, c.rows.groups,
                                      c.rows.size, c.moments != nullptr);
  if (plan.origin != Origin::kLaunch) {
    const cudaError_t code = launch_rows<T>(c.rows, target.stream);
    if (code != cudaSuccess) return code;
  }
  if (plan.origin == Origin::kWeights) {
    const int code = kernels_for(kDType<T>)->weights(target, c.forward.attention);
    if (code != cudaSuccess) return static_cast<cudaError_t>(code);
  }
  if (c.moments == nullptr) return launch_attend<T, kVec, kHeadEach, false, kMax>(c, plan, target.stream);
  *parts = parts_of(plan.aggregate.grid, kVec);
  return launch_attend<T, kVec, kHeadEach, true, kMax>(c, plan, target.stream);
}

template <class T>
int attend(const Target& target, const AttendCall& c, Parts* parts) {
  const ForwardCall& f = c.forward;
  const Shape& s = f.attention.shape;
  if (!is_valid(c.rows) || c.rows.query == nullptr || !is_valid(f.attention) ||
      f.values.count != f.attention.keys.count + (c.has_residual ? 1 : 0)) {
    return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  constexpr int kVec = kFullVector<T>;
  Alignment alignment(s, kVec);
  alignment.see(f.values);
  alignment.see(f.out.data, f.out.batch, f.out.inner);
  const bool gapless = alignment.gapless();
  // The moments are of channels, whose rows then begin where a vector does.
  const bool vectors = alignment.vectors() && (s.interleaved || c.moments == nullptr || s.positions % kVec == 0);
  if (!vectors) return finish(launch_attend<T, 1, false, kMaxDepth>(target, c, gapless, parts));
  if (s.interleaved && s.head_dim() % kVec != 0) {
    return finish(launch_attend<T, kVec, true, kMaxDepth>(target, c, gapless, parts));
  }
  if (f.attention.keys.count <= kUsualDepth) {
    return finish(launch_attend<T, kVec, false, kUsualDepth>(target, c, gapless, parts));
  }
  return finish(launch_attend<T, kVec, false, kMaxDepth>(target, c, gapless, parts));
}

template <class T>
constexpr RowsKernels rows_kernels_of() {
  return {&rows<T>, &attend<T>};
}

}  // namespace ela::cuda
