// A value's gradient from the layers that retrieved it: dv = sum_m w_m dout_m + alpha_m u_m - beta_m v.
//
// Bytes: each dout once, the query once where it is a map, the value once, and one map written.
#pragma once

#include "cuda/position/position_tile.cuh"

namespace ela::cuda {

template <int kMaxDepth>
struct PositionGatherParams {
  PositionGrid grid;
  int sources;
  MapStrides value_strides, dvalue_strides, dout_strides, query_strides, carry_strides;
  const void* value_ptr;
  void* dvalue_ptr;
  const float* carried_ptr;         // as the value, of float32, or null
  float* carry_ptr;                 // in place of dvalue, or null
  const void* dout_ptr[kMaxDepth];  // as the value, or null
  const void* query_ptr[kMaxDepth];
  const float* weights_ptr[kMaxDepth];  // [N] in the first sample, `batch` elements from one to the next
  const float* alpha_ptr[kMaxDepth];
  const float* beta_ptr[kMaxDepth];
  const float* row_ptr[kMaxDepth];  // [C]
  int64_t batch[kMaxDepth];
};

template <class T, int kVec, bool kInterleaved, int kMaxDepth>
__global__ void __launch_bounds__(kBlock, kPositionResident)
    position_gather_kernel(const __grid_constant__ PositionGatherParams<kMaxDepth> p) {
  using Tile = PositionTile<T, kVec, kInterleaved>;
  constexpr int kSlots = Tile::kSlots, kVectors = Tile::kVectors;
  for (int64_t item = blockIdx.x; item < p.grid.items; item += gridDim.x) {
    const Tile tile(p.grid, item);
#pragma unroll 1
    for (int round = 0; round < tile.rounds; ++round) {
      typename Tile::Numbers sum = {};
      float shrink[kSlots] = {};
#pragma unroll 1
      for (int m = 0; m < p.sources; ++m) {
        typename Tile::Vectors d = {};
        typename Tile::Numbers u;
        if (p.dout_ptr[m] != nullptr) tile.load(p.dout_ptr[m], p.dout_strides, round, d);
        float w[kSlots], alpha[kSlots], beta[kSlots];
        const int64_t at = tile.spot.sample * p.batch[m] + tile.spot.position;
        tile.load_plane(p.weights_ptr[m] + at, w);
        tile.load_plane(p.alpha_ptr[m] + at, alpha);
        tile.load_plane(p.beta_ptr[m] + at, beta);
        load_direction(tile, p.row_ptr[m], p.query_ptr[m], p.query_strides, round, u);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) shrink[s] += beta[s];
#pragma unroll
        for (int r = 0; r < kVectors; ++r) {
          float of[kVec];
          unpack<T, kVec>(d[r], of);
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const int s = slot_of<Tile>(e);
            sum[r][e] += w[s] * of[e] + alpha[s] * u[r][e];
          }
        }
      }
      typename Tile::Vectors v;
      tile.load(p.value_ptr, p.value_strides, round, v);
#pragma unroll
      for (int r = 0; r < kVectors; ++r) {
        float of[kVec];
        unpack<T, kVec>(v[r], of);
#pragma unroll
        for (int e = 0; e < kVec; ++e) sum[r][e] -= shrink[slot_of<Tile>(e)] * of[e];
        if (!tile.holds(round, r)) continue;
        const int64_t at = tile.start(p.carry_strides, round) + r * tile.stride(p.carry_strides);
        for (int e = 0; p.carried_ptr != nullptr && e < kVec; ++e) sum[r][e] += p.carried_ptr[at + e];
        for (int e = 0; p.carry_ptr != nullptr && e < kVec; ++e) p.carry_ptr[at + e] = sum[r][e];
        if (p.carry_ptr == nullptr) tile.store(p.dvalue_ptr, p.dvalue_strides, round, r, sum[r]);
      }
    }
  }
}

}  // namespace ela::cuda
