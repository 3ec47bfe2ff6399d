// Query and key of a layer from the sums over space that its producer leaves.
//
// Bytes: `groups` numbers a channel read, three written; a hundredth of a map or less. The rows are made in the launch
// of the attention where each of its blocks can afford to sum its channels anew (see layer_attention_plan.h), so that
// they cost no launch; a kernel of its own makes them for the other attentions, and for a layer that retrieves nothing.
// Both give the same bits: sums are added in an order that `groups` decides, filters from the first tap to the last.
#pragma once

#include "cuda/common/parameter.cuh"

namespace ela::cuda {

struct RowsParams {
  const float* sums_ptr;  // [B, groups, C]; null where the rows are in memory already
  Parameter query_filter;
  Parameter key_filter;
  void* mean_ptr;   // [B, C]
  void* query_ptr;  // [B, C] or null
  void* key_ptr;    // [B, C]
  int64_t items;    // blocks of the kernel that makes the rows alone
  int channels, groups, size;
  float positions;
  int shares_log2;  // lanes that share the sums of a channel
};

// Channels of a block of the kernel that makes the rows alone, and means that it holds at a time.
constexpr int kRowChannels = 64;
constexpr int kRowTile = 1024;
static_assert(kRowChannels <= kBlock, "a thread for each channel");

// The means of `count` channels from `first` on, zero for those that do not exist, rounded as they are stored: what the
// backward reads is what the filters saw. Ends without a barrier.
template <class T>
__device__ inline void block_means(const RowsParams& p, int64_t b, int first, int count, float* means) {
  const int span = kWarp >> p.shares_log2;  // channels of a warp, which lie together
  const int shares = 1 << p.shares_log2;
  const int lane = threadIdx.x % kWarp;
  const int share = lane / span;
  const float* sums = p.sums_ptr + b * p.groups * p.channels;
  // Every thread takes every round: a shuffle needs its whole warp.
#pragma unroll 1
  for (int begin = 0; begin < count; begin += kWarps * span) {
    const int i = begin + (threadIdx.x / kWarp) * span + (lane & (span - 1));
    const int c = first + i;
    float sum = 0;
    if (i < count && c >= 0 && c < p.channels) {
#pragma unroll 2
      for (int g = share; g < p.groups; g += shares) sum += __ldg(sums + int64_t{g} * p.channels + c);
    }
#pragma unroll 1
    for (int step = span; step < kWarp; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
    if (i < count && share == 0) means[i] = to_float(from_float<T>(sum / p.positions));
  }
}

// Query and own key of a block's heads in shared memory, rounded as they are stored.
struct BlockRows {
  const float* query;
  const float* key;
};

// The rows of `count` channels from `first` on; `scratch` has room for 3 * (count + size) numbers. Those
// from the channel `owned` on are written out. Ends with a barrier.
template <class T>
__device__ inline BlockRows block_rows(const RowsParams& p, int64_t b, int first, int count, float* scratch,
                                       int owned) {
  const int halo = p.size / 2;
  float* means = scratch;
  float* query = means + count + 2 * halo;
  float* key = query + count;
  float* query_filter = key + count;
  float* key_filter = query_filter + p.size;
  // Not unrolled, here and below: the maps' first reads wait in registers meanwhile, and there are few left.
#pragma unroll 1
  for (int tap = threadIdx.x; tap < p.size; tap += kBlock) {
    query_filter[tap] = load_parameter(p.query_filter, tap);
    key_filter[tap] = load_parameter(p.key_filter, tap);
  }
  block_means<T>(p, b, first - halo, count + 2 * halo, means);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kBlock) {
    float from_query = 0, from_key = 0;
#pragma unroll 1
    for (int tap = 0; tap < p.size; ++tap) {
      from_query += query_filter[tap] * means[i + tap];
      from_key += key_filter[tap] * means[i + tap];
    }
    const T q = from_float<T>(from_query);
    const T k = from_float<T>(from_key);
    query[i] = to_float(q);
    key[i] = to_float(k);
    if (first + i < owned) continue;
    const int64_t at = b * p.channels + first + i;
    static_cast<T*>(p.mean_ptr)[at] = from_float<T>(means[i + halo]);
    static_cast<T*>(p.query_ptr)[at] = q;
    static_cast<T*>(p.key_ptr)[at] = k;
  }
  __syncthreads();
  return {query, key};
}

// The rows alone: kRowChannels of a sample by each block, whatever the size of the filters, since no more than kRowTile
// means are held at a time.
template <class T>
__global__ void __launch_bounds__(kBlock) layer_rows_fwd_kernel(const __grid_constant__ RowsParams p) {
  ELA_DYNAMIC_SHARED(float, means);
  const int blocks = ceil_div(p.channels, kRowChannels);
  const int halo = p.size / 2;
  const int i = threadIdx.x;
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    const int64_t b = item / blocks;
    const int first = static_cast<int>(item - b * blocks) * kRowChannels;
    const int count = smaller(kRowChannels, p.channels - first);
    const int all = count + 2 * halo;
    float query = 0, key = 0;
    for (int done = 0; done < all; done += kRowTile) {
      const int held = smaller(kRowTile, all - done);
      block_means<T>(p, b, first - halo + done, held, means);
      __syncthreads();
      if (i < count) {
        for (int tap = larger(0, done - i); tap < smaller(p.size, done + held - i); ++tap) {
          const float mean = means[i + tap - done];
          if (p.query_ptr != nullptr) query += load_parameter(p.query_filter, tap) * mean;
          key += load_parameter(p.key_filter, tap) * mean;
          if (tap == halo) static_cast<T*>(p.mean_ptr)[b * p.channels + first + i] = from_float<T>(mean);
        }
      }
      __syncthreads();
    }
    if (i >= count) continue;
    const int64_t at = b * p.channels + first + i;
    if (p.query_ptr != nullptr) static_cast<T*>(p.query_ptr)[at] = from_float<T>(query);
    static_cast<T*>(p.key_ptr)[at] = from_float<T>(key);
  }
}

}  // namespace ela::cuda
