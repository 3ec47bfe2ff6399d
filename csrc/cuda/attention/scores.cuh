// Scores, softmax and divergence, by a whole block for some neighbouring heads at once.
//
// Bytes: a head reads its query once and a key's head_dim elements for each depth, and writes one weight for each.
// Every block that aggregates a part of a head computes its weights anew, from keys that lie in the cache by then: that
// is cheaper than a launch of its own, or than waiting for another block.
#pragma once

#include "cuda/common/device.cuh"

namespace ela::cuda {

// A query or key is [B, C]; `heads` and `head_dim` cut C.
template <int kMaxDepth>
struct AttentionParams {
  const void* query_ptr;  // [B, C]
  int64_t query_batch;
  int64_t key_batch;
  const float* prev_ptr;  // [B, G, prev_depth] or null
  float* weights_ptr;     // [B, G, depth]
  float* kl_ptr;          // [B, G] or null
  float scale;
  int depth, prev_depth;
  int heads, head_dim;
  int lanes_log2;                  // lanes that share one dot product
  const void* key_ptr[kMaxDepth];  // [B, C]
};

// Query and every key are where the parameters say; else `query` and `key`, of the block's heads in shared memory, are
// the query and the last key.
struct StoredRows {};

// scores[j * count + i] = scale * <q, k_j> of head first + i, heads counted over all samples. Ends without a barrier.
template <class T, int kMaxDepth, class Rows = StoredRows>
__device__ inline void block_scores(const AttentionParams<kMaxDepth>& p, int64_t first, int count, float* scores,
                                    const Rows& rows = {}) {
  const int lanes = 1 << p.lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int dots = count * p.depth;
  const int at_once = kBlock >> p.lanes_log2;
  // Every thread takes every round: a shuffle needs its whole warp.
  for (int begin = 0; begin < dots; begin += at_once) {
    const int dot = begin + (threadIdx.x >> p.lanes_log2);
    float sum = 0;
    if (dot < dots) {
      const int j = dot / count;
      const int64_t item = first + (dot - j * count);
      const int64_t b = item / p.heads;
      const int64_t c = (item - b * p.heads) * p.head_dim;
      const T* key = static_cast<const T*>(p.key_ptr[j]) + b * p.key_batch + c;
      if constexpr (std::is_same_v<Rows, StoredRows>) {
        const T* query = static_cast<const T*>(p.query_ptr) + b * p.query_batch + c;
#pragma unroll 4
        for (int i = lane; i < p.head_dim; i += lanes) sum += load_scalar(query + i) * load_scalar(key + i);
      } else {
        const float* query = rows.query + (dot - j * count) * p.head_dim;
        const float* own = rows.key + (dot - j * count) * p.head_dim;
        if (j == p.depth - 1) {
#pragma unroll 1
          for (int i = lane; i < p.head_dim; i += lanes) sum += query[i] * own[i];
        } else {
#pragma unroll 2
          for (int i = lane; i < p.head_dim; i += lanes) sum += query[i] * load_scalar(key + i);
        }
      }
    }
    sum = sum_lanes(sum, lanes);
    if (dot < dots && lane == 0) scores[dot] = p.scale * sum;
  }
}

// Softmax over the `depth` scores of one head by a warp, in place: scores minus their maximum. Returns the logarithm of
// the sum of their exponentials.
__device__ inline float shift_scores(float* scores, int stride, int depth) {
  const int lane = threadIdx.x % kWarp;
  float highest = -INFINITY;
  for (int j = lane; j < depth; j += kWarp) highest = fmaxf(highest, scores[j * stride]);
  highest = max_warp(highest);
  float sum = 0;
  for (int j = lane; j < depth; j += kWarp) {
    const float shifted = scores[j * stride] - highest;
    scores[j * stride] = shifted;
    sum += expf(shifted);
  }
  return logf(sum_warp(sum));
}

// From the scores of the heads first + i, in shared memory and not waited for, to weights[j * count + i] in their
// place, for every thread to read. Those that `owns(i)` names are written out, with their divergence. The logarithm of
// a weight is its score less the log-sum-exp, never the logarithm of a rounded weight.
template <int kMaxDepth, class Owns>
__device__ inline void block_softmax(const AttentionParams<kMaxDepth>& p, int64_t first, int count, float* weights,
                                     const Owns& owns) {
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < count; i += kWarps) {
    float* row = weights + i;
    const int64_t item = first + i;
    const bool write = owns(i);
    const float log_sum = shift_scores(row, count, p.depth);
    float kl = 0;
    for (int j = lane; j < p.depth; j += kWarp) {
      const float log_weight = row[j * count] - log_sum;
      const float weight = expf(log_weight);
      row[j * count] = weight;
      if (!write) continue;
      p.weights_ptr[item * p.depth + j] = weight;
      if (p.kl_ptr == nullptr || j >= p.prev_depth) continue;
      const float prev = p.prev_ptr[item * p.prev_depth + j];
      if (prev != 0) kl += prev * (logf(prev) - log_weight);
    }
    if (write && p.kl_ptr != nullptr) {
      kl = sum_warp(kl);
      if (lane == 0) p.kl_ptr[item] = kl;
    }
  }
  __syncthreads();
}

// Scores and what block_softmax makes of them, from rows in memory.
template <class T, int kMaxDepth, class Owns>
__device__ inline void block_weights(const AttentionParams<kMaxDepth>& p, int64_t first, int count, float* weights,
                                     const Owns& owns) {
  block_scores<T>(p, first, count, weights);
  block_softmax(p, first, count, weights, owns);
}

}  // namespace ela::cuda
