// The attention of a whole layer in one launch: query and own key from the producer's sums, scores, weights,
// divergence, the aggregation with a residual, and the moments of what is written. See aggregate.cuh for the way
// through the maps.
//
// Bytes: as the forward's; the residual is one more map read, with the weight 1. The sums are read again by every block
// for the channels of its heads, from the caches; layer_attention_plan.h says when that is too much, and rows, or
// rows and weights, come from launches before this one.
#pragma once

#include "cuda/attention/aggregate.cuh"
#include "cuda/layer/layer_attention_plan.h"
#include "cuda/layer/rows.cuh"

namespace ela::cuda {

template <bool kHasMoments, int kMaxDepth>
struct AttendParams {
  Grid grid;
  int64_t map_batch, map_inner;
  int64_t out_batch, out_inner;
  void* out_ptr;  // as the values
  AttentionParams<kMaxDepth> attention;
  RowsParams rows;
  Origin origin;
  int source_count;    // values, and the residual after them
  int scratch_at;      // floats of shared memory before the scratch space
  float* moments_ptr;  // [2, batch * chunks, C]
  int64_t squares_at;  // where the second half of the moments begins
  const void* map_ptr[kMaxDepth + 1];
  float tolerance;
  int list_at;  // floats of shared memory before the list of what is retained
  static constexpr bool kMoments = kHasMoments;
  __device__ int sources() const { return source_count; }
  // The residual has a weight of 1, and no tolerance is above that.
  __device__ float tolerance_of(int) const { return tolerance; }
};

template <class T, bool kMoments, int kMaxDepth>
__device__ inline void prepare_weights(const AttendParams<kMoments, kMaxDepth>& p, const Place& place,
                                       const Heads& heads, float* weights) {
  const Grid& g = p.grid;
  const int depth = p.attention.depth;
  const int64_t first = place.sample * g.heads + heads.first;
  if (p.source_count > depth) {
    for (int i = threadIdx.x; i < heads.count; i += kBlock) weights[depth * heads.count + i] = 1;
  }
  if constexpr (kMoments) {
    if (p.origin == Origin::kWeights) {
      for (int k = threadIdx.x; k < heads.count * depth; k += kBlock) {
        const int j = k / heads.count;
        weights[k] = p.attention.weights_ptr[(first + (k - j * heads.count)) * depth + j];
      }
      __syncthreads();
      return;
    }
  }
  if (p.origin == Origin::kLaunch) {
    const int channel = heads.first * g.head_dim;
    // The first head may begin in the block before.
    const int owned = place.owns(heads.first, g.head_dim) ? channel : channel + g.head_dim;
    const BlockRows rows = block_rows<T>(p.rows, place.sample, channel, heads.count * g.head_dim,
                                         weights + p.scratch_at, place.chunk == 0 ? owned : g.channels);
    block_scores<T>(p.attention, first, heads.count, weights, rows);
  } else {
    block_scores<T>(p.attention, first, heads.count, weights);
  }
  block_softmax(p.attention, first, heads.count, weights,
                [&](int i) { return place.owns(heads.first + i, g.head_dim); });
}

template <class T, int kVec, bool kHeadEach, bool kMoments, bool kLeavesOut, int kMaxDepth>
__global__ void __launch_bounds__(kBlock, kHeadEach || kMoments ? kBlocksResidentWide : kBlocksResident)
    layer_attend_fwd_kernel(const __grid_constant__ AttendParams<kMoments, kMaxDepth> p) {
  // As aggregate_items, with a counter that takes one register.
  for (unsigned item = blockIdx.x;; item += gridDim.x) {
    aggregate_block<T, kVec, kHeadEach, kLeavesOut>(p, item);
    if (p.grid.items - item <= gridDim.x) return;
    __syncthreads();
  }
}

}  // namespace ela::cuda
