// A block's piece of the maps: some positions with all their channels, and how the threads that share a position add up
// what they have of it. The device's side of position_plan.h, for planar and interleaved maps.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/position/position_plan.h"

namespace ela::cuda {

struct MapStrides {
  int64_t batch, inner;
};

// One position of a tile.
struct Spot {
  int64_t sample, position;
  bool is_there;

  // Of planes [B, depth, N].
  __device__ int64_t in_planes(int64_t depth, int64_t positions) const { return sample * depth * positions + position; }
};

// The `i`-th position of a tile of `count`.
template <bool kInterleaved>
__device__ inline Spot spot_of(const PositionGrid& g, int64_t tile, int count, int i) {
  Spot s;
  if constexpr (kInterleaved) {
    const int64_t at = tile * count + i;
    s.sample = at / g.positions;
    s.position = at - s.sample * g.positions;
    s.is_there = s.sample < g.samples;
  } else {
    s.sample = tile / g.in_sample;
    s.position = (tile - s.sample * g.in_sample) * count + i;
    s.is_there = s.position < g.positions;
  }
  return s;
}

template <class T_, int kVec_, bool kInterleaved_, int kVectors_ = kPositionVectors<kVec_>>
struct PositionTile {
  using T = T_;
  static constexpr int kVec = kVec_;
  static constexpr bool kInterleaved = kInterleaved_;
  static constexpr int kVectors = kVectors_;                // of a map that a thread takes at a time
  static constexpr int kSlots = kInterleaved ? 1 : kVec;    // positions of a thread
  static constexpr int kFactors = kInterleaved ? kVec : 1;  // channels of a vector
  static constexpr int kOwn = kVectors * kFactors;          // channels of a thread
  using Vectors = Raw<T, kVec>[kVectors];
  using Numbers = float[kVectors][kVec];

  const PositionGrid& grid;
  int64_t tile;
  int lanes, count;  // of a team; positions of the tile
  int rounds;        // over the channels
  int x, y;          // team of the thread, and its place in it
  Spot spot;         // the thread's first position

  __device__ PositionTile(const PositionGrid& g, int64_t tile) : grid(g), tile(tile) {
    lanes = 1 << g.team_log2;
    const int teams = kBlock >> g.team_log2;
    count = teams * kSlots;
    rounds = ceil_div(g.channels, lanes * kOwn);
    y = kInterleaved ? threadIdx.x & (lanes - 1) : threadIdx.x / teams;
    x = kInterleaved ? threadIdx.x >> g.team_log2 : threadIdx.x & (teams - 1);
    spot = spot_of<kInterleaved>(g, tile, count, x * kSlots);
  }

  __device__ int channel(int round, int r) const { return ((round * kVectors + r) * lanes + y) * kFactors; }
  __device__ bool holds(int round, int r) const { return spot.is_there && channel(round, r) < grid.channels; }

  // Where the thread's first vector of a round lies, and how far they lie apart.
  __device__ int64_t start(const MapStrides& s, int round) const {
    const int64_t c = channel(round, 0);
    return spot.sample * s.batch + (kInterleaved ? spot.position * s.inner + c : c * s.inner + spot.position);
  }
  __device__ int64_t stride(const MapStrides& s) const {
    return kInterleaved ? int64_t{lanes} * kVec : lanes * s.inner;
  }

  // Zeros where there is nothing.
  __device__ void load(const void* map, const MapStrides& s, int round, Vectors& to) const {
    const T* at = static_cast<const T*>(map) + start(s, round);
    const int64_t step = stride(s);
#pragma unroll
    for (int r = 0; r < kVectors; ++r) {
      to[r] = {};
      if (holds(round, r)) to[r] = load_vector<T, kVec>(at + r * step);
    }
  }

  __device__ void store(void* map, const MapStrides& s, int round, int r, const float (&from)[kVec]) const {
    if (holds(round, r)) store_vector<T, kVec>(static_cast<T*>(map) + start(s, round) + r * stride(s), from);
  }

  // A vector's factors of a row [C].
  __device__ void factors(const float* row, int round, int r, float (&to)[kFactors]) const {
    const int c = channel(round, r);
    if constexpr (kFactors >= 4) {
#pragma unroll
      for (int e = 0; e < kFactors; e += 4) {
        float part[4] = {};
        if (c < grid.channels) unpack<float, 4>(load_vector<float, 4>(row + c + e), part);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[e + i] = part[i];
      }
    } else {
      to[0] = c < grid.channels ? load_scalar(row + c) : 0;
    }
  }

  // Numbers of the thread's positions, of a plane: `at` points at the first one's.
  __device__ void load_plane(const float* at, float (&to)[kSlots]) const {
    if constexpr (kSlots >= 4) {
#pragma unroll
      for (int e = 0; e < kSlots; e += 4) {
        float4 part = {};
        if (spot.is_there) part = *reinterpret_cast<const float4*>(at + e);
        to[e] = part.x, to[e + 1] = part.y, to[e + 2] = part.z, to[e + 3] = part.w;
      }
    } else {
      to[0] = spot.is_there ? *at : 0;
    }
  }
};

// What belongs to element e of a thread's vectors: its channel's factor, and its position's slot.
template <class Tile>
__device__ constexpr int factor_of(int e) {
  return Tile::kInterleaved ? e : 0;
}
template <class Tile>
__device__ constexpr int slot_of(int e) {
  return Tile::kInterleaved ? 0 : e;
}

// u = row * query, with which a key is multiplied.
template <class Tile>
__device__ inline void load_direction(const Tile& tile, const float* row, const void* query, const MapStrides& strides,
                                      int round, typename Tile::Numbers& u) {
  typename Tile::Vectors q;
  if (query != nullptr) tile.load(query, strides, round, q);
#pragma unroll
  for (int r = 0; r < Tile::kVectors; ++r) {
    float by[Tile::kFactors], of[Tile::kVec];
    tile.factors(row, round, r, by);
    if (query != nullptr) unpack<typename Tile::T, Tile::kVec>(q[r], of);
#pragma unroll
    for (int e = 0; e < Tile::kVec; ++e) {
      u[r][e] = by[factor_of<Tile>(e)];
      if (query != nullptr) u[r][e] *= of[e];
    }
  }
}

// Adds a thread's part of <x, y> at each of its positions.
template <class Tile>
__device__ inline void add_products(const typename Tile::Numbers& x, const typename Tile::Vectors& y,
                                    float (&sum)[Tile::kSlots]) {
#pragma unroll
  for (int r = 0; r < Tile::kVectors; ++r) {
    float of[Tile::kVec];
    unpack<typename Tile::T, Tile::kVec>(y[r], of);
#pragma unroll
    for (int e = 0; e < Tile::kVec; ++e) sum[slot_of<Tile>(e)] += x[r][e] * of[e];
  }
}

template <int kSlots>
__device__ inline void write_slots(float* to, const float (&from)[kSlots]) {
  if constexpr (kSlots >= 4) {
#pragma unroll
    for (int e = 0; e < kSlots; e += 4) {
      *reinterpret_cast<float4*>(to + e) = {from[e], from[e + 1], from[e + 2], from[e + 3]};
    }
  } else {
    to[0] = from[0];
  }
}

template <int kSlots>
__device__ inline void read_slots(const float* from, float (&to)[kSlots]) {
  if constexpr (kSlots >= 4) {
#pragma unroll
    for (int e = 0; e < kSlots; e += 4) {
      const float4 part = *reinterpret_cast<const float4*>(from + e);
      to[e] = part.x, to[e + 1] = part.y, to[e + 2] = part.z, to[e + 3] = part.w;
    }
  } else {
    to[0] = from[0];
  }
}

// Who makes numbers of a position's sums, and keeps what goes on from one to the next: where the team lies in one warp
// all its lanes, with one and the same result, otherwise a thread for each position.
template <class Tile>
struct Maker {
  int64_t at;   // of its position in planes [B, depth, N]
  bool writes;  // whether what it makes for memory is its to write

  __device__ Maker(const Tile& tile, int64_t depth) {
    const bool is_own = team_warps(tile) == 1;
    const Spot spot = is_own ? tile.spot : spot_of<Tile::kInterleaved>(tile.grid, tile.tile, tile.count, threadIdx.x);
    at = spot.in_planes(depth, tile.grid.positions);
    writes = spot.is_there && (is_own ? tile.y == 0 : static_cast<int>(threadIdx.x) < tile.count);
  }

  // Warps that have a part of a position. One only where a thread has one position.
  __device__ static int team_warps(const Tile& tile) {
    if constexpr (Tile::kInterleaved) return ceil_div(tile.lanes, kWarp);
    const int across = kBlock / tile.lanes;
    return kBlock / larger(across, kWarp);
  }
};

// Adds `in` up over the lanes of each team, in a fixed order, lets the position's maker make `out` of the sums by
// make(sums, out), and gives that to the whole team. All threads of a block call it; what they read of `scratch` from
// the call before may be overwritten. `scratch`: team_floats(in, out).
template <int kIn, int kOut, class Tile, class Make>
__device__ inline void reduce_team(const Tile& tile, float (&in)[kIn][Tile::kSlots], float (&out)[kOut][Tile::kSlots],
                                   float* scratch, const Make& make) {
  constexpr int kSlots = Tile::kSlots;
  const int teams = kBlock / tile.lanes;
  const int low = Tile::kInterleaved ? 1 : teams;
  const int end = Tile::kInterleaved ? smaller(tile.lanes, kWarp) : kWarp;
#pragma unroll
  for (int bit = 1; bit < kWarp; bit *= 2) {
    if (bit < low || bit >= end) continue;
#pragma unroll
    for (int i = 0; i < kIn; ++i) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) in[i][s] += __shfl_xor_sync(kFullMask, in[i][s], bit);
    }
  }
  const int warps = Maker<Tile>::team_warps(tile);
  const bool is_shared = kSlots != 1 || warps != 1;
  bool makes = true;
  float sums[kIn], made[kOut];
#pragma unroll
  for (int i = 0; i < kIn; ++i) sums[i] = in[i][0];
  if (is_shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    // Of the warps that have the same positions, which one this is.
    const int of_team = Tile::kInterleaved ? warp & (warps - 1) : warp / larger(teams / kWarp, 1);
    if (lane < (Tile::kInterleaved ? 1 : teams)) {
#pragma unroll
      for (int i = 0; i < kIn; ++i) {
        write_slots<kSlots>(scratch + (of_team * kIn + i) * tile.count + tile.x * kSlots, in[i]);
      }
    }
    __syncthreads();
    makes = static_cast<int>(threadIdx.x) < tile.count;
    if (makes) {
      const float* parts = scratch + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kIn; ++i) sums[i] = 0;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
#pragma unroll
        for (int i = 0; i < kIn; ++i) sums[i] += parts[(w * kIn + i) * tile.count];
      }
    }
  }
  if (makes) make(sums, made);
  if (is_shared) {
    float* results = scratch + warps * kIn * tile.count;
    if (makes) {
#pragma unroll
      for (int i = 0; i < kOut; ++i) results[i * tile.count + threadIdx.x] = made[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOut; ++i) read_slots<kSlots>(results + i * tile.count + tile.x * kSlots, out[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kOut; ++i) out[i][0] = made[i];
  }
}

}  // namespace ela::cuda
