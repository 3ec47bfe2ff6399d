// out = sum_j weight_j * map_j: the forward, with the weights from the scores, and the gather of a value's gradient,
// with the weights from columns of earlier weights.
//
// Bytes: each map is read once and `out` is written once; there is nothing to save beyond that, so the kernel is built
// to keep enough reads in flight. The first maps' reads are issued before the scores and wait in registers while those
// are computed; then kForwardMaps maps are read side by side. With a tolerance the weights come first, and maps that
// they leave out are not read (see retained.cuh).
#pragma once

#include "cuda/attention/retained.cuh"
#include "cuda/attention/scores.cuh"
#include "cuda/common/moments.cuh"
#include "cuda/common/place.cuh"

namespace ela::cuda {

template <int kMaxDepth>
struct ForwardParams {
  Grid grid;
  int64_t map_batch, map_inner;
  int64_t out_batch, out_inner;
  void* out_ptr;  // as the values
  AttentionParams<kMaxDepth> attention;
  const void* map_ptr[kMaxDepth];  // values, [B, C, N] or [B, N, C]
  float tolerance;
  int list_at;  // floats of shared memory before the list of what is retained
  static constexpr bool kMoments = false;
  __device__ int sources() const { return attention.depth; }
  __device__ float tolerance_of(int) const { return tolerance; }
};

template <int kMaxDepth>
struct GatherKeyParams {
  void* dkey_ptr;  // [B, C] or null
  int64_t query_batch;
  int64_t batch;
  int channels, heads, head_dim;
  int sources;
  const void* query_ptr[kMaxDepth];   // [B, C]
  const float* score_ptr[kMaxDepth];  // a column of [B, G, t]
  int score_stride[kMaxDepth];
};

template <bool kLeavesOut, int kMaxDepth>
struct GatherParams {
  Grid grid;
  int64_t map_batch, map_inner;
  int64_t out_batch, out_inner;
  void* out_ptr;  // dvalue, as the maps
  int source_count;
  const void* map_ptr[kMaxDepth];      // output gradients, [B, C, N] or [B, N, C]
  const float* weight_ptr[kMaxDepth];  // a column of [B, G, t]
  int weight_stride[kMaxDepth];
  GatherKeyParams<kMaxDepth> key;
  int list_at;                                  // floats of shared memory before the list of what is retained
  float tolerance[kLeavesOut ? kMaxDepth : 1];  // of each source
  static constexpr bool kMoments = false;
  __device__ int sources() const { return source_count; }
  __device__ float tolerance_of(int m) const { return tolerance[m]; }
};

// dkey[b, c] = sum_m dscores_m[b, g(c)] * query_m[b, c]
template <class T, int kMaxDepth>
__device__ inline void gather_key(const GatherKeyParams<kMaxDepth>& p, int64_t b, int c) {
  const int64_t head = b * p.heads + c / p.head_dim;
  const int64_t offset = b * p.query_batch + c;
  float sum = 0;
#pragma unroll 4
  for (int m = 0; m < p.sources; ++m) {
    sum += p.score_ptr[m][head * p.score_stride[m]] * load_scalar(static_cast<const T*>(p.query_ptr[m]) + offset);
  }
  static_cast<T*>(p.dkey_ptr)[b * p.channels + c] = from_float<T>(sum);
}

// The weights of the block's heads to shared memory, weights[j * heads.count + i]; ends with a barrier.
template <class T, int kMaxDepth>
__device__ inline void prepare_weights(const ForwardParams<kMaxDepth>& p, const Place& place, const Heads& heads,
                                       float* weights) {
  const int64_t first = place.sample * p.grid.heads + heads.first;
  block_weights<T>(p.attention, first, heads.count, weights,
                   [&](int i) { return place.owns(heads.first + i, p.grid.head_dim); });
}

template <class T, bool kLeavesOut, int kMaxDepth>
__device__ inline void prepare_weights(const GatherParams<kLeavesOut, kMaxDepth>& p, const Place& place,
                                       const Heads& heads, float* weights) {
  const int64_t first = place.sample * p.grid.heads + heads.first;
  for (int k = threadIdx.x; k < heads.count * p.source_count; k += kBlock) {
    const int m = k / heads.count;
    weights[k] = p.weight_ptr[m][(first + (k - m * heads.count)) * p.weight_stride[m]];
  }
  if (p.key.dkey_ptr != nullptr && place.chunk == 0) {
    const int end = (heads.first + heads.count) * p.grid.head_dim;
    for (int c = heads.first * p.grid.head_dim + threadIdx.x; c < end; c += kBlock) {
      if (place.owns(c / p.grid.head_dim, p.grid.head_dim)) gather_key<T>(p.key, place.sample, c);
    }
  }
  __syncthreads();
}

// What a thread holds of the maps that it reads side by side.
template <class T, int kVec>
using MapStep = Raw<T, kVec>[kForwardMaps][kForwardUnroll<kVec>];

// Reads the step's vectors of the maps from the `first` on, of which `count` are left; of a thread's vectors `left`
// exist. kAll: the step is full, which spares a branch for each map.
template <bool kAll, class T, int kVec, class Params, class Maps>
__device__ inline void load_maps(const Params& p, const Maps& maps, int first, int count, int64_t offset,
                                 int64_t stride, int left, MapStep<T, kVec>& step) {
#pragma unroll
  for (int i = 0; i < kForwardMaps; ++i) {
    if (!kAll && i >= count) continue;
    const T* map = static_cast<const T*>(p.map_ptr[maps[first + i]]) + offset;
#pragma unroll
    for (int u = 0; u < kForwardUnroll<kVec>; ++u) {
      if (u < left) step[i][u] = load_vector<T, kVec>(map + u * stride);
    }
  }
}

template <class T, int kVec, class Params, class Maps>
__device__ inline void load_step(const Params& p, const Maps& maps, int first, int64_t offset, int64_t stride, int left,
                                 MapStep<T, kVec>& step) {
  const int count = maps.count(p) - first;
  if (count >= kForwardMaps) {
    load_maps<true, T, kVec>(p, maps, first, count, offset, stride, left, step);
  } else if (count > 0) {
    load_maps<false, T, kVec>(p, maps, first, count, offset, stride, left, step);
  }
}

// sum += weight * map for the maps of the step, the `first` and those after it, of which `count` are left. `weights`
// points at the first one's, and where maps are listed at those of all maps.
template <bool kAll, class T, int kVec, int kHeads, class Maps>
__device__ inline void add_maps(const MapStep<T, kVec>& step, const float* weights, int heads,
                                const int (&head)[kHeads], const Maps& maps, int first, int count,
                                float (&sum)[kForwardUnroll<kVec>][kVec]) {
#pragma unroll
  for (int i = 0; i < kForwardMaps; ++i) {
    if (!kAll && i >= count) continue;
    float weight[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) weight[h] = weights[(Maps::kLeavesOut ? maps[first + i] : i) * heads + head[h]];
#pragma unroll
    for (int u = 0; u < kForwardUnroll<kVec>; ++u) {
      float x[kVec];
      unpack<T, kVec>(step[i][u], x);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (Maps::kLeavesOut && weight[kHeads == 1 ? 0 : e] == kLeftOut) continue;
        sum[u][e] += weight[kHeads == 1 ? 0 : e] * x[e];
      }
    }
  }
}

// The maps that the block reads, when its weights are known.
template <bool kLeavesOut, class Params>
__device__ inline auto maps_of(const Params& p, const Heads& heads, float* weights) {
  if constexpr (kLeavesOut) {
    return list_retained(weights, heads.count, p.sources(), reinterpret_cast<int*>(weights + p.list_at),
                         [&](int j) { return p.tolerance_of(j); });
  } else {
    return AllMaps();
  }
}

template <class T, int kVec, bool kHeadEach, bool kLeavesOut, class Params>
__device__ inline void aggregate_block(const Params& p, unsigned item) {
  constexpr int kUnroll = kForwardUnroll<kVec>;
  ELA_DYNAMIC_SHARED(float, weights);
  const Place place = place_of<kVec>(p.grid, item);
  const int64_t stride = place.stride(p.map_inner);
  const int64_t out_stride = place.stride(p.out_inner);
  int64_t offset = place.start(p.map_batch, p.map_inner);
  T* out = static_cast<T*>(p.out_ptr) + place.start(p.out_batch, p.out_inner);
  MapStep<T, kVec> step = {};
  if constexpr (!kLeavesOut) load_step<T, kVec>(p, AllMaps(), 0, offset, stride, place.count, step);
  const Heads heads = heads_of(p.grid, place);
  prepare_weights<T>(p, place, heads, weights);
  const auto maps = maps_of<kLeavesOut>(p, heads, weights);
  if constexpr (kLeavesOut) load_step<T, kVec>(p, maps, 0, offset, stride, place.count, step);
  int head[kHeadEach ? kVec : 1];
  heads_of_vector(place, heads, p.grid.head_dim, head);
  [[maybe_unused]] Observed<kVec> observed = {};
  for (int left = place.count; left > 0; left -= kUnroll) {
    float sum[kUnroll][kVec] = {};
    for (int j = 0; j < maps.count(p); j += kForwardMaps) {
      const int count = maps.count(p) - j;
      if (count >= kForwardMaps) {
        add_maps<true, T, kVec>(step, kLeavesOut ? weights : weights + j * heads.count, heads.count, head, maps, j,
                                count, sum);
      } else {
        add_maps<false, T, kVec>(step, kLeavesOut ? weights : weights + j * heads.count, heads.count, head, maps, j,
                                 count, sum);
      }
      // After the last maps of these vectors come the first maps of the next.
      const bool last = count <= kForwardMaps;
      if (last) offset += kUnroll * stride;
      load_step<T, kVec>(p, maps, last ? 0 : j + kForwardMaps, offset, stride, last ? left - kUnroll : left, step);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= left) continue;
      if constexpr (Params::kMoments) {
        // What will be read is what is rounded.
#pragma unroll
        for (int e = 0; e < kVec; ++e) sum[u][e] = to_float(from_float<T>(sum[u][e]));
        if (u == 0 && left == place.count) observed.start(sum[0], p.grid.interleaved);
        observed.see(sum[u]);
      }
      store_vector<T, kVec>(out + u * out_stride, sum[u]);
    }
    out += kUnroll * out_stride;
  }
  if constexpr (Params::kMoments) write_moments<kVec>(p, place, observed, weights + p.scratch_at);
}

template <class T, int kVec, bool kHeadEach, bool kLeavesOut, class Params>
__device__ inline void aggregate_items(const Params& p) {
  // A grid has fewer blocks than items only beyond 2^31 of them.
  for (int64_t item = blockIdx.x; item < p.grid.items; item += gridDim.x) {
    aggregate_block<T, kVec, kHeadEach, kLeavesOut>(p, static_cast<unsigned>(item));
    __syncthreads();
  }
}

template <class T, int kVec, bool kHeadEach, bool kLeavesOut, int kMaxDepth>
__global__ void __launch_bounds__(kBlock, kHeadEach ? kBlocksResidentWide : kBlocksResident)
    layer_attention_fwd_kernel(const __grid_constant__ ForwardParams<kMaxDepth> p) {
  aggregate_items<T, kVec, kHeadEach, kLeavesOut>(p);
}

template <class T, int kVec, bool kHeadEach, bool kLeavesOut, int kMaxDepth>
__global__ void __launch_bounds__(kBlock, kHeadEach ? kBlocksResidentWide : kBlocksResident)
    layer_attention_bwd_gather_kernel(const __grid_constant__ GatherParams<kLeavesOut, kMaxDepth> p) {
  aggregate_items<T, kVec, kHeadEach, kLeavesOut>(p);
}

// A key's gradient alone: one thread an element.
template <class T, int kMaxDepth>
__global__ void __launch_bounds__(kBlock)
    layer_attention_bwd_gather_key_kernel(const __grid_constant__ GatherKeyParams<kMaxDepth> p) {
  const int64_t elements = p.batch * p.channels;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < elements; i += int64_t{gridDim.x} * kBlock) {
    const int64_t b = i / p.channels;
    gather_key<T>(p, b, static_cast<int>(i - b * p.channels));
  }
}

// scores -> softmax -> divergence alone: no map is read.
template <int kMaxDepth>
struct WeightsParams {
  int64_t items;  // heads of all samples
  int heads_per_block;
  AttentionParams<kMaxDepth> attention;
};

template <class T, int kMaxDepth>
__global__ void __launch_bounds__(kBlock)
    layer_attention_fwd_weights_kernel(const __grid_constant__ WeightsParams<kMaxDepth> p) {
  ELA_DYNAMIC_SHARED(float, weights);
  for (int64_t first = int64_t{blockIdx.x} * p.heads_per_block; first < p.items;
       first += int64_t{gridDim.x} * p.heads_per_block) {
    const int count = static_cast<int>(smaller<int64_t>(p.items - first, p.heads_per_block));
    block_weights<T>(p.attention, first, count, weights, [](int) { return true; });
  }
}

}  // namespace ela::cuda
