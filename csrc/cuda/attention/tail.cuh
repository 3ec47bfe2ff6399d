// From the dot products <dout, v_j> to the gradients of scores, query, keys and previous weights.
//
// Bytes: the partial sums, and a row of query and keys; small beside the maps, so the launch is what it costs. A team
// of threads (a warp, or more for wide heads) serves one head. Partial sums are added in an order that the shape alone
// decides.
#pragma once

#include "cuda/attention/attention_plan.h"
#include "cuda/attention/scores.cuh"

namespace ela::cuda {

template <int kMaxDepth>
struct TailParams {
  int64_t items;  // heads of all samples
  int team_log2;
  int depth_span_log2;    // lanes of a warp that take a depth each, the others take other partial sums
  int channel_span_log2;  // threads of a team that take a channel each, the others take other depths
  bool has_dkeys;
  bool is_given;  // the weights are given: what is wanted is their gradient alone
  Partials partials;
  const float* partial_ptr;   // see Partials; null without dout
  const float* dweights_ptr;  // [B, G, depth] or null
  const float* dkl_ptr;       // [B, G] or null
  float* dscores_ptr;         // [B, G, depth]
  void* dquery_ptr;           // [B, C] or null
  float* dprev_ptr;           // [B, G, prev_depth] or null
  AttentionParams<kMaxDepth> attention;
  void* dkey_ptr[kMaxDepth];  // [B, C] or null
};

// totals[j] = what this warp's share of the partial sums of a head adds up to.
template <int kMaxDepth>
__device__ inline void sum_partials(const TailParams<kMaxDepth>& p, int64_t item, int warp, int warps, float* totals) {
  const int lane = threadIdx.x % kWarp;
  const int span = 1 << p.depth_span_log2;
  const int share = lane >> p.depth_span_log2;
  const int shares = kWarp >> p.depth_span_log2;
  const int depth = p.attention.depth;
  const int64_t b = item / p.attention.heads;
  const int64_t h = item - b * p.attention.heads;
  const int64_t slots = p.partials.outer * p.partials.inner;
  for (int begin = 0; begin < depth; begin += span) {
    const int j = begin + (lane & (span - 1));
    float sum = 0;
    if (p.partial_ptr != nullptr && item < p.items && j < depth) {
#pragma unroll 4
      for (int64_t s = warp * shares + share; s < slots; s += warps * shares) {
        const int64_t o = s / p.partials.inner;
        const int64_t i = s - o * p.partials.inner;
        const int64_t at = ((b * p.partials.outer + o) * p.attention.heads + h) * p.partials.inner + i;
        sum += p.partial_ptr[at * depth + j];
      }
    }
    for (int step = span; step < kWarp; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
    if (share == 0 && j < depth) totals[j] = sum;
  }
}

// dscores of one head, by every warp of its team alike: through the softmax, then the divergence's own part,
// d kl / d s = mass of prev * weights - prev. `totals` holds a row for each warp of the team.
template <int kMaxDepth>
__device__ inline void scores_gradient(const TailParams<kMaxDepth>& p, int64_t item, bool writes, int warps,
                                       const float* totals, float* dscores) {
  const AttentionParams<kMaxDepth>& a = p.attention;
  const int lane = threadIdx.x % kWarp;
  const bool inside = item < p.items;
  const bool has_kl = p.dkl_ptr != nullptr && a.prev_ptr != nullptr;
  const auto total_at = [&](int j) {
    float total = p.dweights_ptr == nullptr ? 0.0f : p.dweights_ptr[item * a.depth + j];
    for (int w = 0; w < warps; ++w) total += totals[w * a.depth + j];
    return total;
  };
  if (p.is_given) {
    for (int j = lane; inside && writes && j < a.depth; j += kWarp) p.dscores_ptr[item * a.depth + j] = total_at(j);
    return;
  }
  float mean = 0;
  float mass = 0;
  if (inside) {
    for (int j = lane; j < a.depth; j += kWarp) mean += a.weights_ptr[item * a.depth + j] * total_at(j);
    if (has_kl) {
      for (int j = lane; j < a.prev_depth; j += kWarp) mass += a.prev_ptr[item * a.prev_depth + j];
    }
  }
  mean = sum_warp(mean);
  mass = sum_warp(mass);
  if (!inside || !writes) return;
  for (int j = lane; j < a.depth; j += kWarp) {
    const float weight = a.weights_ptr[item * a.depth + j];
    float dscore = weight * (total_at(j) - mean);
    if (has_kl) {
      const float dkl = p.dkl_ptr[item];
      dscore += dkl * mass * weight;
      if (j < a.prev_depth) dscore -= dkl * a.prev_ptr[item * a.prev_depth + j];
    }
    dscore *= a.scale;
    dscores[j] = dscore;
    p.dscores_ptr[item * a.depth + j] = dscore;
  }
}

// dq = sum_j dscores_j k_j and dk_j = dscores_j q of one head, by its team; `t` counts the team's threads.
template <class T, int kMaxDepth>
__device__ inline void row_gradients(const TailParams<kMaxDepth>& p, int64_t item, int t, const float* dscores) {
  const AttentionParams<kMaxDepth>& a = p.attention;
  const int span = 1 << p.channel_span_log2;
  const int share = t >> p.channel_span_log2;
  const int shares = (1 << p.team_log2) >> p.channel_span_log2;
  const int64_t b = item / a.heads;
  const int64_t first = (item - b * a.heads) * a.head_dim;
  const int64_t row = b * a.heads * a.head_dim;  // of the gradients, [B, C] without gaps
  for (int begin = 0; begin < a.head_dim; begin += span) {
    const int i = begin + (t & (span - 1));
    float sum = 0;
    if (item < p.items && i < a.head_dim) {
      const int64_t c = first + i;
      const float query = load_scalar(static_cast<const T*>(a.query_ptr) + b * a.query_batch + c);
      const int64_t key_at = b * a.key_batch + c;
#pragma unroll 4
      for (int j = share; j < a.depth; j += shares) {
        sum += dscores[j] * load_scalar(static_cast<const T*>(a.key_ptr[j]) + key_at);
        if (p.has_dkeys && p.dkey_ptr[j] != nullptr) {
          static_cast<T*>(p.dkey_ptr[j])[row + c] = from_float<T>(dscores[j] * query);
        }
      }
    }
    for (int step = span; step < kWarp; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
    if (share == 0 && item < p.items && i < a.head_dim && p.dquery_ptr != nullptr) {
      static_cast<T*>(p.dquery_ptr)[row + first + i] = from_float<T>(sum);
    }
  }
}

// d kl / d prev_j = log prev_j + 1 - log weights_j, zero where prev is: from the scores and never from a rounded
// weight.
template <class T, int kMaxDepth>
__device__ inline void prev_gradient(const TailParams<kMaxDepth>& p, int64_t first, int count, float* scores) {
  const AttentionParams<kMaxDepth>& a = p.attention;
  block_scores<T>(a, first, count, scores);
  __syncthreads();
  for (int i = threadIdx.x / kWarp; i < count; i += kWarps) {
    const int64_t item = first + i;
    const float log_sum = shift_scores(scores + i, count, a.depth);
    for (int j = threadIdx.x % kWarp; j < a.prev_depth; j += kWarp) {
      const float prev = a.prev_ptr[item * a.prev_depth + j];
      const float log_weight = scores[j * count + i] - log_sum;
      p.dprev_ptr[item * a.prev_depth + j] = prev == 0 ? 0.0f : p.dkl_ptr[item] * (logf(prev) + 1 - log_weight);
    }
  }
}

// Shared memory: totals [kWarps, depth], then dscores [teams, depth], then scores [depth, teams] for prev_gradient.
template <class T, int kMaxDepth>
__global__ void __launch_bounds__(kBlock)
    layer_attention_bwd_tail_kernel(const __grid_constant__ TailParams<kMaxDepth> p) {
  ELA_DYNAMIC_SHARED(float, totals);
  const int depth = p.attention.depth;
  const int teams = kBlock >> p.team_log2;
  const int team = threadIdx.x >> p.team_log2;
  const int t = threadIdx.x & ((1 << p.team_log2) - 1);
  const int warps = (1 << p.team_log2) / kWarp;
  float* dscores = totals + kWarps * depth;
  float* scores = dscores + teams * depth;
  for (int64_t first = int64_t{blockIdx.x} * teams; first < p.items; first += int64_t{gridDim.x} * teams) {
    const int64_t item = first + team;
    sum_partials(p, item, t / kWarp, warps, totals + (threadIdx.x / kWarp) * depth);
    __syncthreads();
    scores_gradient(p, item, t < kWarp, warps, totals + team * warps * depth, dscores + team * depth);
    __syncthreads();
    if (!p.is_given) row_gradients<T>(p, item, t, dscores + team * depth);
    if (p.dprev_ptr != nullptr) {
      prev_gradient<T>(p, first, static_cast<int>(smaller<int64_t>(p.items - first, teams)), scores);
    }
    __syncthreads();
  }
}

}  // namespace ela::cuda
