// Numbers of each channel, brought together from the threads of a block in a fixed order, one result for each channel
// that the block touches. A planar block's rows are single channels here.
#pragma once

#include "cuda/common/channel_plan.h"
#include "cuda/common/place.cuh"

namespace ela::cuda {

// Two numbers for each of kChannels channels, and how many elements each stands for.
template <int kChannels>
struct Pairs {
  float count;
  float first[kChannels], second[kChannels];
};

// Means, and sums of squared distances from them, by Chan's formula: no difference of large sums is taken.
struct JoinMoments {
  template <int kChannels>
  __device__ static void join(Pairs<kChannels>& x, const Pairs<kChannels>& y) {
    const float together = x.count + y.count;
    const float share = y.count / larger(together, 1.0f);
#pragma unroll
    for (int e = 0; e < kChannels; ++e) {
      const float distance = y.first[e] - x.first[e];
      x.first[e] += distance * share;
      x.second[e] += y.second[e] + distance * distance * (x.count * share);
    }
    x.count = together;
  }
};

struct JoinSums {
  template <int kChannels>
  __device__ static void join(Pairs<kChannels>& x, const Pairs<kChannels>& y) {
#pragma unroll
    for (int e = 0; e < kChannels; ++e) {
      x.first[e] += y.first[e];
      x.second[e] += y.second[e];
    }
  }
};

// Lanes that lie 2^low_log2, ..., kWarp / 2 apart. The first lane of each run has the result.
template <class Join, int kChannels>
__device__ inline void join_lanes(Pairs<kChannels>& x, int low_log2) {
#pragma unroll
  for (int bit = 0; (1 << bit) < kWarp; ++bit) {
    if (bit < low_log2) continue;
    Pairs<kChannels> y;
    y.count = __shfl_xor_sync(kFullMask, x.count, 1 << bit);
#pragma unroll
    for (int e = 0; e < kChannels; ++e) {
      y.first[e] = __shfl_xor_sync(kFullMask, x.first[e], 1 << bit);
      y.second[e] = __shfl_xor_sync(kFullMask, x.second[e], 1 << bit);
    }
    Join::join(x, y);
  }
}

// What some neighbouring warps left for one channel, added up from the first to the last.
template <class Join>
__device__ inline Pairs<1> join_warps(const float* counts, const float* first, const float* second, int stride,
                                      int count_stride, int warps) {
  Pairs<1> sum = {counts[0], {first[0]}, {second[0]}};
  for (int w = 1; w < warps; ++w) {
    const Pairs<1> next = {counts[w * count_stride], {first[w * stride]}, {second[w * stride]}};
    Join::join(sum, next);
  }
  return sum;
}

// Planar: a thread's numbers are of its row. `write(channel, pairs)` is called once for each channel of the block.
// `shared` has room for join_floats() numbers, which no thread may still be reading.
template <class Join, class Write>
__device__ inline void join_rows(const Grid& g, const Place& place, Pairs<1> x, float* shared, const Write& write) {
  join_lanes<Join>(x, 0);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    shared[warp] = x.count;
    shared[kWarps + warp] = x.first[0];
    shared[2 * kWarps + warp] = x.second[0];
  }
  __syncthreads();
  const int along = kBlock >> g.across_log2;
  const int warps = kWarps / along;
  const int row = threadIdx.x;
  if (row >= along || place.first_channel + row >= g.channels) return;
  const float* counts = shared + row * warps;
  write(place.first_channel + row, join_warps<Join>(counts, counts + kWarps, counts + 2 * kWarps, 1, 1, warps));
}

// Interleaved: a thread's numbers are of the channels of its vector.
template <class Join, int kVec, class Write>
__device__ inline void join_strip(const Grid& g, const Place& place, Pairs<kVec> x, float* shared, const Write& write) {
  join_lanes<Join>(x, g.across_log2);
  const int across = 1 << g.across_log2;
  const int channels = across * kVec;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  float* first = shared + kWarps * across;
  float* second = first + kWarps * channels;
  if (lane < across) {
    shared[warp * across + lane] = x.count;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      first[warp * channels + lane * kVec + e] = x.first[e];
      second[warp * channels + lane * kVec + e] = x.second[e];
    }
  }
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= channels || place.first_channel + c >= g.channels) return;
  write(place.first_channel + c, join_warps<Join>(shared + c / kVec, first + c, second + c, channels, across, kWarps));
}

}  // namespace ela::cuda
