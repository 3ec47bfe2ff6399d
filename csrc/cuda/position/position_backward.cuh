// The gradients of attention over depth at every position. With w_t the weights, s_t = r_t <u, k_t> the scores and ds_t
// their gradients:
//
//   ds_t = w_t (g_t - sum_j w_j g_j) + dkl (w_t sum_j p_j - p_t),   g_t = <dout, v_t> + dweights_t
//   dv_t = w_t dout                                                 of the sum
//   dk_t = alpha_t u - beta_t k_t,   alpha_t = ds_t r_t,   beta_t = ds_t r_t^2 s_t / C    (r = 1, beta = 0 without
//   norm) du   = sum_t alpha_t k_t
//
// Bytes: T maps and dout have to be read, and in the push form T maps to be written. That is what is written; the maps
// are read twice, since every <dout, v_t> comes before the first gradient: the second time by the same block, from
// cache where that holds its tile of all of them. Beside the maps [B, T, N] numbers are written and read three times, C
// times fewer, and a row of C numbers from each block.
#pragma once

#include "cuda/position/position_forward.cuh"

namespace ela::cuda {

template <int kMaxDepth>
struct PositionBackwardParams {
  PositionParams<kMaxDepth> call;
  MapStrides dout_strides, dquery_strides, dvalue_strides, dkey_strides;
  const void* dout_ptr;         // as the values, or null
  const float* dweights_ptr;    // [B, depth, N] or null
  const float* dkl_ptr;         // [B, N] or null
  float* planes_ptr;            // [3, B, depth, N]: <dout, v>, score and r at first, then alpha and beta
  int64_t plane;                // elements of one
  float* row_parts_ptr;         // [items, C] or null
  void* dquery_ptr;             // as the values, or null
  float* dprev_ptr;             // [B, prev_depth, N] or null
  bool has_maps;                // whether anything of the maps' channels is wanted
  void* dvalue_ptr[kMaxDepth];  // as the values, or null
  void* dkey_ptr[kMaxDepth];
};

// <dout, v>, score and r of every depth to the planes.
template <bool kKeys, class Tile, int kMaxDepth>
__device__ inline void write_sums(const PositionBackwardParams<kMaxDepth>& g, const Tile& tile, float* scratch) {
  constexpr int kMaps = kSumMaps<Tile::kInterleaved>, kSlots = Tile::kSlots;
  const PositionParams<kMaxDepth>& p = g.call;
  const Maker<Tile> maker(tile, p.depth);
  float* planes = g.planes_ptr + maker.at;
  const bool has_dout = g.dout_ptr != nullptr;
#pragma unroll 1
  for (int t = 0; t < p.depth; t += kMaps) {
    const int count = smaller(p.depth - t, kMaps);
    float in[3 * kMaps][kSlots] = {};
#pragma unroll 1
    for (int round = 0; round < tile.rounds; ++round) {
      typename Tile::Vectors k[kMaps];
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (i < count) tile.load(p.template key<kKeys>(t + i), p.template strides_of_keys<kKeys>(), round, k[i]);
      }
      typename Tile::Numbers u;
      load_direction(tile, p.row_ptr, p.query_ptr, p.query_strides, round, u);
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (i < count) add_score<Tile>(u, k[i], in[3 * i], in[3 * i + 1]);
      }
      if (!has_dout) continue;
      typename Tile::Vectors d;
      tile.load(g.dout_ptr, g.dout_strides, round, d);
#pragma unroll
      for (int r = 0; r < Tile::kVectors; ++r) unpack<typename Tile::T, Tile::kVec>(d[r], u[r]);
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (i >= count) continue;
        if constexpr (kKeys) tile.load(p.value_ptr[t + i], p.value_strides, round, k[i]);
        add_products<Tile>(u, k[i], in[3 * i + 2]);
      }
    }
    float none[1][kSlots];
    reduce_team(tile, in, none, scratch, [&](const float (&sums)[3 * kMaps], float (&made)[1]) {
      made[0] = 0;
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (!maker.writes || i >= count) continue;
        const float inverse = p.inverse_root(sums[3 * i + 1]);
        float* to = planes + (t + i) * p.grid.positions;
        to[0] = sums[3 * i + 2];
        to[g.plane] = sums[3 * i] * inverse;
        to[2 * g.plane] = inverse;
      }
    });
  }
}

// alpha and beta in the place of the sums, and the gradient of the previous weights: a warp for each position.
template <class Tile, int kMaxDepth>
__device__ inline void make_coefficients(const PositionBackwardParams<kMaxDepth>& g, const Tile& tile) {
  const PositionParams<kMaxDepth>& p = g.call;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = p.grid.positions;
  const float per_channel = 1 / static_cast<float>(p.grid.channels);
  for (int i = threadIdx.x / kWarp; i < tile.count; i += kWarps) {
    const Spot spot = spot_of<Tile::kInterleaved>(p.grid, tile.tile, tile.count, i);
    if (!spot.is_there) continue;
    const int64_t first = spot.in_planes(p.depth, step);
    const int64_t first_prev = spot.in_planes(p.prev_depth, step);
    float* planes = g.planes_ptr + first;
    const float* weights = p.weights_ptr + first;
    const auto arrived = [&](int t) {
      const float of_out = planes[t * step];
      return g.dweights_ptr == nullptr ? of_out : of_out + load_scalar(g.dweights_ptr + first + t * step);
    };
    float mean = 0, mass = 0, dkl = 0;
    for (int t = lane; t < p.depth; t += kWarp) mean += load_scalar(weights + t * step) * arrived(t);
    mean = sum_warp(mean);
    if (g.dkl_ptr != nullptr) {
      dkl = load_scalar(g.dkl_ptr + spot.sample * step + spot.position);
      for (int t = lane; t < p.prev_depth; t += kWarp) mass += load_scalar(p.prev_ptr + first_prev + t * step);
      mass = sum_warp(mass);
    }
    float log_sum = 0;  // of the exponentials of the scores
    if (g.dprev_ptr != nullptr) {
      float highest = -INFINITY, total = 0;
      for (int t = lane; t < p.depth; t += kWarp) highest = fmaxf(highest, planes[g.plane + t * step]);
      highest = max_warp(highest);
      for (int t = lane; t < p.depth; t += kWarp) total += expf(planes[g.plane + t * step] - highest);
      log_sum = highest + logf(sum_warp(total));
    }
    for (int t = lane; t < p.depth; t += kWarp) {
      const float weight = load_scalar(weights + t * step);
      const float score = planes[g.plane + t * step];
      const float inverse = planes[2 * g.plane + t * step];
      float dscore = weight * (arrived(t) - mean);
      if (g.dkl_ptr != nullptr) {
        dscore += dkl * mass * weight;
        if (t < p.prev_depth) {
          const float prev = load_scalar(p.prev_ptr + first_prev + t * step);
          dscore -= dkl * prev;
          if (g.dprev_ptr != nullptr) {
            g.dprev_ptr[first_prev + t * step] = prev == 0 ? 0 : dkl * (logf(prev) + 1 - (score - log_sum));
          }
        }
      }
      const float towards = dscore * inverse;
      planes[t * step] = towards;
      planes[g.plane + t * step] = p.normed ? towards * inverse * score * per_channel : 0;
    }
  }
}

// Adds a round's part of the row's gradient up over the positions of the tile, and to what tiles before left.
// `scratch`: kOwn * kBlock floats, which no thread may still be reading.
template <class Tile>
__device__ inline void add_row_parts(const Tile& tile, int round, const float (&own)[Tile::kOwn], bool is_first,
                                     float* parts, float* scratch) {
#pragma unroll
  for (int j = 0; j < Tile::kOwn; ++j) scratch[j * kBlock + threadIdx.x] = own[j];
  __syncthreads();
  const int teams = kBlock / tile.lanes;
  for (int k = threadIdx.x; k < Tile::kOwn * tile.lanes; k += kBlock) {
    const int j = k / tile.lanes, y = k - j * tile.lanes;
    const int c =
        ((round * Tile::kVectors + j / Tile::kFactors) * tile.lanes + y) * Tile::kFactors + j % Tile::kFactors;
    if (c >= tile.grid.channels) continue;
    const float* of = scratch + j * kBlock + (Tile::kInterleaved ? y : y * teams);
    const int step = Tile::kInterleaved ? tile.lanes : 1;
    float sum = is_first ? 0 : parts[c];
    for (int x = 0; x < teams; ++x) sum += of[x * step];
    parts[c] = sum;
  }
  __syncthreads();
}

// The gradients of maps, and the row's in parts.
template <bool kKeys, class Tile, int kMaxDepth>
__device__ inline void write_gradients(const PositionBackwardParams<kMaxDepth>& g, const Tile& tile, bool is_first,
                                       float* row_parts, float* scratch) {
  using T = typename Tile::T;
  constexpr int kSlots = Tile::kSlots, kVec = Tile::kVec, kVectors = Tile::kVectors;
  constexpr int kMaps = kGradientMaps<kKeys>;
  const PositionParams<kMaxDepth>& p = g.call;
  const int64_t step = p.grid.positions;
  const int64_t first = tile.spot.in_planes(p.depth, step);
#pragma unroll 1
  for (int round = 0; round < tile.rounds; ++round) {
    typename Tile::Numbers u, du = {};
    typename Tile::Vectors d = {};
    load_direction(tile, p.row_ptr, p.query_ptr, p.query_strides, round, u);
    if (g.dout_ptr != nullptr) tile.load(g.dout_ptr, g.dout_strides, round, d);
#pragma unroll 1
    for (int t = 0; t < p.depth; t += kMaps) {
      typename Tile::Vectors k[kMaps];
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (t + i < p.depth) tile.load(p.template key<kKeys>(t + i), p.template strides_of_keys<kKeys>(), round, k[i]);
      }
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
        if (t + i >= p.depth) continue;
        float w[kSlots], alpha[kSlots], beta[kSlots];
        const int64_t at = first + (t + i) * step;
        tile.load_plane(p.weights_ptr + at, w);
        tile.load_plane(g.planes_ptr + at, alpha);
        tile.load_plane(g.planes_ptr + g.plane + at, beta);
#pragma unroll
        for (int r = 0; r < kVectors; ++r) {
          float of[kVec], dout[kVec];
          unpack<T, kVec>(k[i][r], of);
          unpack<T, kVec>(d[r], dout);
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const int s = slot_of<Tile>(e);
            du[r][e] += alpha[s] * of[e];
            of[e] = alpha[s] * u[r][e] - beta[s] * of[e];
            dout[e] = kKeys ? w[s] * dout[e] : w[s] * dout[e] + of[e];
          }
          if (g.dvalue_ptr[t + i] != nullptr) tile.store(g.dvalue_ptr[t + i], g.dvalue_strides, round, r, dout);
          if constexpr (kKeys) {
            if (g.dkey_ptr[t + i] != nullptr) tile.store(g.dkey_ptr[t + i], g.dkey_strides, round, r, of);
          }
        }
      }
    }
    float own[Tile::kOwn] = {};
    typename Tile::Vectors q = {};
    if (p.query_ptr != nullptr) tile.load(p.query_ptr, p.query_strides, round, q);
#pragma unroll
    for (int r = 0; r < kVectors; ++r) {
      float by[Tile::kFactors], of[kVec], dq[kVec];
      tile.factors(p.row_ptr, round, r, by);
      unpack<T, kVec>(q[r], of);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        dq[e] = du[r][e] * by[factor_of<Tile>(e)];
        own[r * Tile::kFactors + factor_of<Tile>(e)] += p.query_ptr == nullptr ? du[r][e] : du[r][e] * of[e];
      }
      if (g.dquery_ptr != nullptr) tile.store(g.dquery_ptr, g.dquery_strides, round, r, dq);
    }
    if (row_parts != nullptr) add_row_parts(tile, round, own, is_first, row_parts, scratch);
  }
}

template <class T, int kVec, bool kInterleaved, bool kKeys, int kMaxDepth>
__global__ void __launch_bounds__(kBlock, kPositionResident)
    position_bwd_kernel(const __grid_constant__ PositionBackwardParams<kMaxDepth> g) {
  ELA_DYNAMIC_SHARED(float, scratch);
  const PositionGrid& grid = g.call.grid;
  for (int64_t item = blockIdx.x; item < grid.items; item += gridDim.x) {
    float* row_parts = g.row_parts_ptr == nullptr ? nullptr : g.row_parts_ptr + item * grid.channels;
    for (int i = 0; i < grid.run && item * grid.run + i < grid.tiles; ++i) {
      const PositionTile<T, kVec, kInterleaved> tile(grid, item * grid.run + i);
      write_sums<kKeys>(g, tile, scratch);
      __syncthreads();
      make_coefficients(g, tile);
      __syncthreads();
      if (!g.has_maps) continue;
      const PositionTile<T, kVec, kInterleaved, kGradientVectors<kVec>> narrow(grid, item * grid.run + i);
      write_gradients<kKeys>(g, narrow, i == 0, row_parts, scratch);
    }
  }
}

}  // namespace ela::cuda
