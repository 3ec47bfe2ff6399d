// out = sum_t w_t v_t at every position, w the softmax over depth of the scores.
//
// Bytes: T maps have to be read and one to be written, and where keys are given another T read. That is what is moved
// with given keys, which are read for the scores and the values for the sum; and of values that are their own keys
// where the threads of a block hold all channels of its positions (kHeld): a value stays in registers from its score to
// the sum, which is kept with a running softmax. That is up to 4096 channels of interleaved maps in half precision and
// 2048 in float32, and up to 256 of planar ones. More channels are taken in rounds, and the values read twice, the
// second time from cache where that holds a block's tile of all of them. Beside the maps [B, T, N] numbers are written
// twice and read, C times fewer.
#pragma once

#include <math.h>

#include "cuda/position/position_tile.cuh"

namespace ela::cuda {

template <int kMaxDepth>
struct PositionParams {
  PositionGrid grid;
  bool normed;
  float eps;
  int depth, prev_depth, key_count;
  MapStrides query_strides, value_strides, key_strides;
  const float* row_ptr;   // [C]
  const void* query_ptr;  // as the values, or null
  const float* prev_ptr;  // [B, prev_depth, N] or null
  float* weights_ptr;     // [B, depth, N]
  const void* value_ptr[kMaxDepth];
  const void* key_ptr[kMaxDepth];

  template <bool kKeys>
  __device__ const void* key(int t) const {
    return kKeys ? key_ptr[t] : value_ptr[t];
  }
  template <bool kKeys>
  __device__ const MapStrides& strides_of_keys() const {
    return kKeys ? key_strides : value_strides;
  }
  __device__ float inverse_root(float squares) const {
    return normed ? 1 / sqrtf(squares / static_cast<float>(grid.channels) + eps) : 1;
  }
};

template <int kMaxDepth>
struct PositionForwardParams {
  PositionParams<kMaxDepth> call;
  MapStrides out_strides;
  void* out_ptr;
  float* kl_ptr;  // [B, N] or null
};

// The softmax's running maximum and sum of exponentials.
struct Running {
  float highest = -INFINITY, total = 0;

  // The exponentials of some scores; returns the factor of what was summed before.
  template <int kCount>
  __device__ float see(const float (&scores)[kCount], int count, float (&e)[kCount]) {
    float now = highest;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) now = fmaxf(now, scores[i]);
    }
    // Nothing finite yet: the distance of two infinities would be a NaN.
    const float from = now == -INFINITY ? 0 : now;
    const float shrink = highest == -INFINITY ? 0 : expf(highest - from);
    highest = now;
    total *= shrink;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      e[i] = i < count ? expf(scores[i] - from) : 0;
      total += e[i];
    }
    return shrink;
  }
};

// A thread's parts of <u, k> and <k, k>.
template <class Tile>
__device__ inline void add_score(const typename Tile::Numbers& u, const typename Tile::Vectors& k,
                                 float (&product)[Tile::kSlots], float (&square)[Tile::kSlots]) {
#pragma unroll
  for (int r = 0; r < Tile::kVectors; ++r) {
    float of[Tile::kVec];
    unpack<typename Tile::T, Tile::kVec>(k[r], of);
#pragma unroll
    for (int e = 0; e < Tile::kVec; ++e) {
      product[slot_of<Tile>(e)] += u[r][e] * of[e];
      square[slot_of<Tile>(e)] += of[e] * of[e];
    }
  }
}

// The same of `count` depths from t on, which follow each other in `in`.
template <class Tile, int kMaxDepth>
__device__ inline void add_scores(const PositionParams<kMaxDepth>& p, const Tile& tile, int t, int count, int round,
                                  const typename Tile::Numbers& u, float (&in)[2 * kRoundMaps][Tile::kSlots]) {
  typename Tile::Vectors k[kRoundMaps];
#pragma unroll
  for (int i = 0; i < kRoundMaps; ++i) {
    if (i >= count) continue;
    if (p.key_count != 0) {
      tile.load(p.key_ptr[t + i], p.key_strides, round, k[i]);
    } else {
      tile.load(p.value_ptr[t + i], p.value_strides, round, k[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRoundMaps; ++i) {
    if (i < count) add_score<Tile>(u, k[i], in[2 * i], in[2 * i + 1]);
  }
}

// Scores of `count` depths, from t on, to memory in the place of weights.
template <int kMaps, class Tile, int kMaxDepth>
__device__ inline void make_scores(const PositionParams<kMaxDepth>& p, const Maker<Tile>& maker, int t, int count,
                                   const float (&sums)[2 * kMaps], float (&scores)[kMaps]) {
  float* to = p.weights_ptr + maker.at;
#pragma unroll
  for (int i = 0; i < kMaps; ++i) {
    scores[i] = sums[2 * i] * p.inverse_root(sums[2 * i + 1]);
    if (maker.writes && i < count) to[(t + i) * p.grid.positions] = scores[i];
  }
}

// Those of the values from t on that there are, in one round.
template <class Tile, int kMaxDepth, int kMaps>
__device__ inline void load_values(const PositionParams<kMaxDepth>& p, const Tile& tile, int t,
                                   typename Tile::Vectors (&v)[kMaps]) {
#pragma unroll
  for (int i = 0; i < kMaps; ++i) {
    if (t + i < p.depth) tile.load(p.value_ptr[t + i], p.value_strides, 0, v[i]);
  }
}

// Scores and the sum by them, of values that are their own keys and of all channels at a time.
template <class Tile, int kMaxDepth>
__device__ inline void attend_held(const PositionForwardParams<kMaxDepth>& f, const Tile& tile, float* scratch) {
  constexpr int kSlots = Tile::kSlots, kVec = Tile::kVec;
  constexpr int kMaps = kHeldMaps<kVec, Tile::kInterleaved>;
  constexpr bool kIsAhead = kMaps == 1;
  const PositionParams<kMaxDepth>& p = f.call;
  const Maker<Tile> maker(tile, p.depth);
  Running running;
  typename Tile::Numbers u, sum = {};
  // Of planar maps one number a vector, as a rule: read again from cache, it needs no registers in between.
  if (Tile::kInterleaved) load_direction(tile, p.row_ptr, p.query_ptr, p.query_strides, 0, u);
  typename Tile::Vectors v[kMaps];
  if (kIsAhead) load_values(p, tile, 0, v);
#pragma unroll 1
  for (int t = 0; t < p.depth; t += kMaps) {
    const int count = smaller(p.depth - t, kMaps);
    if (!kIsAhead) load_values(p, tile, t, v);
    if (!Tile::kInterleaved) load_direction(tile, p.row_ptr, p.query_ptr, p.query_strides, 0, u);
    float in[2 * kMaps][kSlots] = {};
#pragma unroll
    for (int i = 0; i < kMaps; ++i) {
      if (i < count) add_score<Tile>(u, v[i], in[2 * i], in[2 * i + 1]);
    }
    typename Tile::Vectors next[kIsAhead ? kMaps : 1];
    if constexpr (kIsAhead) load_values(p, tile, t + kMaps, next);  // on their way while sums are brought together
    float out[kMaps + 1][kSlots];
    reduce_team(tile, in, out, scratch, [&](const float (&sums)[2 * kMaps], float (&made)[kMaps + 1]) {
      float scores[kMaps], e[kMaps];
      make_scores<kMaps>(p, maker, t, count, sums, scores);
      made[kMaps] = running.see(scores, count, e);
#pragma unroll
      for (int i = 0; i < kMaps; ++i) made[i] = e[i];
    });
#pragma unroll
    for (int r = 0; r < Tile::kVectors; ++r) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[r][e] *= out[kMaps][slot_of<Tile>(e)];
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (i >= count) continue;
        float of[kVec];
        unpack<typename Tile::T, kVec>(v[i][r], of);
#pragma unroll
        for (int e = 0; e < kVec; ++e) sum[r][e] += out[i][slot_of<Tile>(e)] * of[e];
      }
    }
    if constexpr (kIsAhead) memcpy(v, next, sizeof(v));
  }
  float none[1][kSlots] = {}, inverse[1][kSlots];
  reduce_team(tile, none, inverse, scratch, [&](const float (&)[1], float (&made)[1]) { made[0] = 1 / running.total; });
#pragma unroll
  for (int r = 0; r < Tile::kVectors; ++r) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum[r][e] *= inverse[0][slot_of<Tile>(e)];
    tile.store(f.out_ptr, f.out_strides, 0, r, sum[r]);
  }
}

// Scores alone, in rounds over the channels.
template <class Tile, int kMaxDepth>
__device__ inline void write_scores(const PositionParams<kMaxDepth>& p, const Tile& tile, float* scratch) {
  constexpr int kMaps = kRoundMaps, kSlots = Tile::kSlots;
  const Maker<Tile> maker(tile, p.depth);
#pragma unroll 1
  for (int t = 0; t < p.depth; t += kMaps) {
    const int count = smaller(p.depth - t, kMaps);
    float in[2 * kMaps][kSlots] = {};
#pragma unroll 1
    for (int round = 0; round < tile.rounds; ++round) {
      typename Tile::Numbers u;
      load_direction(tile, p.row_ptr, p.query_ptr, p.query_strides, round, u);
      add_scores(p, tile, t, count, round, u, in);
    }
    float out[kMaps][kSlots];
    reduce_team(tile, in, out, scratch, [&](const float (&sums)[2 * kMaps], float (&made)[kMaps]) {
      make_scores<kMaps>(p, maker, t, count, sums, made);
    });
  }
}

// Weights in the place of the tile's scores, and the divergence: a warp for each position.
template <class Tile, int kMaxDepth>
__device__ inline void finish_weights(const PositionForwardParams<kMaxDepth>& f, const Tile& tile) {
  const PositionParams<kMaxDepth>& p = f.call;
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < tile.count; i += kWarps) {
    const Spot spot = spot_of<Tile::kInterleaved>(p.grid, tile.tile, tile.count, i);
    if (!spot.is_there) continue;
    float* scores = p.weights_ptr + spot.in_planes(p.depth, p.grid.positions);
    float highest = -INFINITY, total = 0;
    for (int t = lane; t < p.depth; t += kWarp) highest = fmaxf(highest, scores[t * p.grid.positions]);
    highest = max_warp(highest);
    for (int t = lane; t < p.depth; t += kWarp) total += expf(scores[t * p.grid.positions] - highest);
    total = sum_warp(total);
    if (f.kl_ptr != nullptr) {
      const float* was = p.prev_ptr + spot.in_planes(p.prev_depth, p.grid.positions);
      const float log_total = logf(total);
      float kl = 0;
      for (int t = lane; t < p.prev_depth; t += kWarp) {
        const float prev = load_scalar(was + t * p.grid.positions);
        if (prev != 0) kl += prev * (logf(prev) - (scores[t * p.grid.positions] - highest - log_total));
      }
      kl = sum_warp(kl);
      if (lane == 0) f.kl_ptr[spot.sample * p.grid.positions + spot.position] = kl;
    }
    for (int t = lane; t < p.depth; t += kWarp) {
      float* at = scores + t * p.grid.positions;
      *at = expf(*at - highest) / total;
    }
  }
}

// The sum by weights that are there, in rounds over the channels.
template <class Tile, int kMaxDepth>
__device__ inline void aggregate_rounds(const PositionForwardParams<kMaxDepth>& f, const Tile& tile) {
  constexpr int kMaps = kRoundMaps, kSlots = Tile::kSlots, kVec = Tile::kVec;
  const PositionParams<kMaxDepth>& p = f.call;
  const float* weights = p.weights_ptr + tile.spot.in_planes(p.depth, p.grid.positions);
#pragma unroll 1
  for (int round = 0; round < tile.rounds; ++round) {
    typename Tile::Numbers sum = {};
#pragma unroll 1
    for (int t = 0; t < p.depth; t += kMaps) {
      typename Tile::Vectors v[kMaps];
      const int count = smaller(p.depth - t, kMaps);
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (i < count) tile.load(p.value_ptr[t + i], p.value_strides, round, v[i]);
      }
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (i >= count) continue;
        float w[kSlots];
        tile.load_plane(weights + (t + i) * p.grid.positions, w);
#pragma unroll
        for (int r = 0; r < Tile::kVectors; ++r) {
          float of[kVec];
          unpack<typename Tile::T, kVec>(v[i][r], of);
#pragma unroll
          for (int e = 0; e < kVec; ++e) sum[r][e] += w[slot_of<Tile>(e)] * of[e];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Tile::kVectors; ++r) tile.store(f.out_ptr, f.out_strides, round, r, sum[r]);
  }
}

template <class T, int kVec, bool kInterleaved, bool kHeld, int kMaxDepth>
__global__ void __launch_bounds__(kBlock, kPositionResident)
    position_fwd_kernel(const __grid_constant__ PositionForwardParams<kMaxDepth> f) {
  ELA_DYNAMIC_SHARED(float, scratch);
  for (int64_t item = blockIdx.x; item < f.call.grid.items; item += gridDim.x) {
    const PositionTile<T, kVec, kInterleaved> tile(f.call.grid, item);
    if constexpr (kHeld) {
      attend_held(f, tile, scratch);
    } else {
      write_scores(f.call, tile, scratch);
    }
    __syncthreads();
    finish_weights(f, tile);
    if constexpr (!kHeld) {
      __syncthreads();
      aggregate_rounds(f, tile);
    }
  }
}

}  // namespace ela::cuda
