// <dout, v_j> per head for every depth j, as partial sums; in the push form also dv_j = weight_j * dout.
//
// Bytes: dout and each value are read once, in the push form each dv is written once; the partial sums are about a
// hundredth of that or less, except that there is one number at least for each head and depth. A thread keeps its
// vectors of dout in registers while the depths pass. No sum is added up by atomics: every partial sum belongs to one
// place in the workspace, and bwd_tail adds them in a fixed order.
#pragma once

#include "cuda/attention/attention_plan.h"
#include "cuda/common/place.cuh"

namespace ela::cuda {

// Single elements (kVec = 1) are read wherever rows do not lie on 16 bytes, and in interleaved maps also where a vector
// would span heads: a sum for each of its elements would take kVec times the shared memory and as many shuffles.
template <bool kPush, int kMaxDepth>
struct DotsParams {
  Grid grid;
  int64_t value_batch, value_inner;
  int64_t dout_batch, dout_inner;
  int64_t dvalue_batch, dvalue_inner;
  const void* dout_ptr;      // as the values
  const float* weights_ptr;  // [B, G, depth], read in the push form
  float* partial_ptr;        // see Partials
  int depth;
  int fold_log2, slots;
  const void* value_ptr[kMaxDepth];         // [B, C, N] or [B, N, C]
  void* dvalue_ptr[kPush ? kMaxDepth : 1];  // as the values; null where none is wanted
};

// Adds up the lanes of a warp that share a slot, for several numbers at once: runs of 2^fold_log2 lanes, and lanes that
// lie 2^across_log2 apart.
template <int kNumbers>
__device__ inline void fold_warp(float (&x)[kNumbers], int fold_log2, int across_log2) {
#pragma unroll
  for (int bit = 0; (1 << bit) < kWarp; ++bit) {
    if (bit >= fold_log2 && bit < across_log2) continue;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) x[i] += __shfl_xor_sync(kFullMask, x[i], 1 << bit);
  }
}

template <class T, int kVec, int kUnroll>
__device__ inline float dot_vectors(const Raw<T, kVec> (&x)[kUnroll], const Raw<T, kVec> (&y)[kUnroll], int left) {
  float sum = 0;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (u >= left) continue;
    float a[kVec], b[kVec];
    unpack<T, kVec>(x[u], a);
    unpack<T, kVec>(y[u], b);
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum += a[e] * b[e];
  }
  return sum;
}

template <class T, int kVec, int kUnroll, class Params>
__device__ inline void load_values(const Params& p, int j, int64_t offset, int64_t stride, int left,
                                   Raw<T, kVec> (&step)[kDotsMaps][kUnroll]) {
#pragma unroll
  for (int i = 0; i < kDotsMaps; ++i) {
    if (j + i >= p.depth) continue;
    load_vectors<T, kVec>(static_cast<const T*>(p.value_ptr[j + i]) + offset, stride, left, step[i]);
  }
}

template <class T, int kVec, int kUnroll>
__device__ inline void store_scaled(T* out, int64_t stride, float weight, const Raw<T, kVec> (&x)[kUnroll], int left) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (u >= left) continue;
    float a[kVec];
    unpack<T, kVec>(x[u], a);
#pragma unroll
    for (int e = 0; e < kVec; ++e) a[e] *= weight;
    store_vector<T, kVec>(out + u * stride, a);
  }
}

// Writes the block's partial sums from those of its warps, sums[(warp * depth + j) * slots + slot].
template <int kVec>
__device__ inline void write_partials(const Grid& g, const Place& place, const float* sums, float* partial_ptr,
                                      int depth, int fold_log2, int slots) {
  const int along = kBlock >> g.across_log2;
  // Planar: the warps of a row. Interleaved: every warp holds a part of every slot.
  const int groups = g.interleaved ? 1 : along;
  const int group_warps = kWarps / groups;
  const int64_t per_sample = g.interleaved ? g.channels / (kVec << fold_log2) : g.rows;
  const int64_t first =
      g.interleaved ? place.first_channel / (kVec << fold_log2) : place.first_channel / g.row_channels;
  for (int k = threadIdx.x; k < groups * slots * depth; k += kBlock) {
    const int place_in_block = k / depth;  // a group (planar) or a slot (interleaved)
    const int j = k - place_in_block * depth;
    const int group = g.interleaved ? 0 : place_in_block;
    const int slot = g.interleaved ? place_in_block : 0;
    if (first + place_in_block >= per_sample) continue;
    float sum = 0;
    for (int w = group * group_warps; w < (group + 1) * group_warps; ++w) sum += sums[(w * depth + j) * slots + slot];
    const int64_t at = g.interleaved ? (place.sample * g.outer + place.chunk) * per_sample + first + place_in_block
                                     : (place.sample * per_sample + first + place_in_block) * g.inner + place.chunk;
    partial_ptr[at * depth + j] = sum;
  }
}

template <class T, int kVec, bool kPush, int kMaxDepth>
__device__ inline void dots_block(const DotsParams<kPush, kMaxDepth>& p, unsigned item, float* sums) {
  constexpr int kUnroll = kDotsUnroll<kVec>;
  const Place place = place_of<kVec>(p.grid, item);
  const int64_t stride = place.stride(p.value_inner);
  const int64_t dout_stride = place.stride(p.dout_inner);
  int64_t offset = place.start(p.value_batch, p.value_inner);
  const T* dout = static_cast<const T*>(p.dout_ptr) + place.start(p.dout_batch, p.dout_inner);
  int64_t dvalue_offset = 0, dvalue_stride = 0;
  [[maybe_unused]] const float* weights = nullptr;
  if constexpr (kPush) {
    int head[1];
    const Heads heads = heads_of(p.grid, place);
    heads_of_vector(place, heads, p.grid.head_dim, head);
    dvalue_offset = place.start(p.dvalue_batch, p.dvalue_inner);
    dvalue_stride = place.stride(p.dvalue_inner);
    weights = p.weights_ptr + (place.sample * p.grid.heads + heads.first + head[0]) * p.depth;
  }
  const int lane = threadIdx.x % kWarp;
  const int in_strip = lane & ((1 << p.grid.across_log2) - 1);
  const bool keeps_sum =
      p.grid.interleaved ? lane == in_strip && (in_strip & ((1 << p.fold_log2) - 1)) == 0 : lane == 0;
  const int slot = p.grid.interleaved ? in_strip >> p.fold_log2 : 0;
  float* warp_sums = sums + (threadIdx.x / kWarp) * p.depth * p.slots + slot;
  int left = place.count;
  Raw<T, kVec> x[kUnroll] = {};
  Raw<T, kVec> step[kDotsMaps][kUnroll] = {};
  load_vectors<T, kVec>(dout, dout_stride, left, x);
  load_values<T, kVec>(p, 0, offset, stride, left, step);
  // Every thread takes every round, with vectors or without: a shuffle needs its whole warp.
  for (int done = 0; done < place.most; done += kUnroll) {
    for (int j = 0; j < p.depth; j += kDotsMaps) {
      float dot[kDotsMaps];
#pragma unroll
      for (int i = 0; i < kDotsMaps; ++i) dot[i] = dot_vectors<T, kVec, kUnroll>(x, step[i], left);
      if constexpr (kPush) {
#pragma unroll
        for (int i = 0; i < kDotsMaps; ++i) {
          if (j + i >= p.depth || p.dvalue_ptr[j + i] == nullptr) continue;
          T* dvalue = static_cast<T*>(p.dvalue_ptr[j + i]) + dvalue_offset;
          store_scaled<T, kVec, kUnroll>(dvalue, dvalue_stride, load_scalar(weights + j + i), x, left);
        }
      }
      // After the last maps of these vectors come the first maps of the next; read while the sums are folded.
      const bool last = j + kDotsMaps >= p.depth;
      if (last) {
        left -= kUnroll;
        offset += kUnroll * stride;
        dout += kUnroll * dout_stride;
        dvalue_offset += kUnroll * dvalue_stride;
        load_vectors<T, kVec>(dout, dout_stride, left, x);
      }
      load_values<T, kVec>(p, last ? 0 : j + kDotsMaps, offset, stride, left, step);
      fold_warp(dot, p.fold_log2, p.grid.across_log2);
#pragma unroll
      for (int i = 0; i < kDotsMaps; ++i) {
        if (!keeps_sum || j + i >= p.depth) continue;
        float* sum = warp_sums + (j + i) * p.slots;
        *sum = done == 0 ? dot[i] : *sum + dot[i];
      }
    }
  }
  __syncthreads();
  write_partials<kVec>(p.grid, place, sums, p.partial_ptr, p.depth, p.fold_log2, p.slots);
}

template <class T, int kVec, bool kPush, int kMaxDepth>
__global__ void __launch_bounds__(kBlock, kPush ? kBlocksResidentWide : kBlocksResident)
    layer_attention_bwd_dots_kernel(const __grid_constant__ DotsParams<kPush, kMaxDepth> p) {
  ELA_DYNAMIC_SHARED(float, sums);
  for (int64_t item = blockIdx.x; item < p.grid.items; item += gridDim.x) {
    dots_block<T, kVec, kPush>(p, static_cast<unsigned>(item), sums);
    __syncthreads();
  }
}

}  // namespace ela::cuda
