// Partial results of each channel brought together: moments to statistics, and the sums of the backward. For any dtype
// of the maps.
//
// Bytes: two floats for each part of a channel, a hundredth of a map or less; the launch is what it costs.
#pragma once

#include "cuda/common/join.cuh"
#include "cuda/common/parameter.cuh"
#include "cuda/norm/norm.h"

namespace ela::cuda {

// Channels of a block: neighbours, that make a whole sector of 32 bytes. The other threads take other parts.
constexpr int kPartChannelsLog2 = 3;
constexpr int kPartChannels = 1 << kPartChannelsLog2;

// Calls `write(c, pairs)` once for each of the channels, with what `load(part, c)` gives for every part, in an order
// that the number of parts decides. `shared` has room for 3 * kWarps * kPartChannels numbers.
template <class Join, class Load, class Write>
__device__ inline void join_parts(int channels, int64_t parts, float* shared, const Load& load, const Write& write) {
  constexpr int kShares = kBlock / kPartChannels;
  constexpr int kStride = kWarps * kPartChannels;
  const int in_block = threadIdx.x % kPartChannels;
  const int warp = threadIdx.x / kWarp;
  for (int64_t first = int64_t{blockIdx.x} * kPartChannels; first < channels; first += gridDim.x * kPartChannels) {
    const int c = static_cast<int>(first) + in_block;
    Pairs<1> found = {};
    if (c < channels) {
#pragma unroll 4
      for (int64_t part = threadIdx.x / kPartChannels; part < parts; part += kShares) Join::join(found, load(part, c));
    }
    join_lanes<Join>(found, kPartChannelsLog2);
    if (threadIdx.x % kWarp < kPartChannels) {
      float* slot = shared + warp * kPartChannels + in_block;
      slot[0] = found.count;
      slot[kStride] = found.first[0];
      slot[2 * kStride] = found.second[0];
    }
    __syncthreads();
    if (threadIdx.x < kPartChannels && c < channels) {
      const float* slot = shared + in_block;
      write(c, join_warps<Join>(slot, slot + kStride, slot + 2 * kStride, kPartChannels, kPartChannels, kWarps));
    }
    __syncthreads();
  }
}

struct StatisticsParams {
  const float* moments_ptr;  // [2, parts, C]: means, and sums of squared distances from them
  float* statistics_ptr;     // [2, C]
  int channels;
  int64_t parts, chunks, span, positions;  // see Parts
};

__global__ void __launch_bounds__(kBlock) layer_norm_statistics_kernel(const __grid_constant__ StatisticsParams p) {
  ELA_DYNAMIC_SHARED(float, shared);
  const auto load = [&](int64_t part, int c) {
    const int64_t at = part * p.channels + c;
    const int64_t count = smaller(p.positions - part % p.chunks * p.span, p.span);
    const Pairs<1> pairs = {
        static_cast<float>(count), {__ldg(p.moments_ptr + at)}, {__ldg(p.moments_ptr + p.parts * p.channels + at)}};
    return pairs;
  };
  join_parts<JoinMoments>(p.channels, p.parts, shared, load, [&](int c, const Pairs<1>& found) {
    p.statistics_ptr[c] = found.first[0];
    p.statistics_ptr[p.channels + c] = found.second[0] / found.count;
  });
}

struct NormSumsParams {
  const float* partial_ptr;     // [2, parts, C]
  const float* statistics_ptr;  // [2, C]
  float* moved_ptr;             // [2, C], as layer_norm_bwd_kernel reads it, or null
  void* dgamma_ptr;             // [C] or null
  void* dbeta_ptr;              // [C] or null
  DType dgamma_dtype, dbeta_dtype;
  int channels;
  int64_t parts;
  float count;  // numbers of a channel
  float eps;
};

__global__ void __launch_bounds__(kBlock) layer_norm_sums_kernel(const __grid_constant__ NormSumsParams p) {
  ELA_DYNAMIC_SHARED(float, shared);
  const auto load = [&](int64_t part, int c) {
    const int64_t at = part * p.channels + c;
    const Pairs<1> pairs = {0, {__ldg(p.partial_ptr + at)}, {__ldg(p.partial_ptr + p.parts * p.channels + at)}};
    return pairs;
  };
  join_parts<JoinSums>(p.channels, p.parts, shared, load, [&](int c, const Pairs<1>& found) {
    const float sum = found.first[0], product = found.second[0];
    const float inverse = 1.0f / sqrtf(__ldg(p.statistics_ptr + p.channels + c) + p.eps);
    if (p.dgamma_ptr != nullptr) store_parameter(p.dgamma_ptr, p.dgamma_dtype, c, product * inverse);
    if (p.dbeta_ptr != nullptr) store_parameter(p.dbeta_ptr, p.dbeta_dtype, c, sum);
    if (p.moved_ptr != nullptr) {
      p.moved_ptr[c] = sum / p.count;
      p.moved_ptr[p.channels + c] = product * inverse * inverse / p.count;
    }
  });
}

}  // namespace ela::cuda
