// <dout, v_j> per head for every depth j, as partial sums; in the push form also dv_j = weight_j * dout.
//
// Bytes: dout and each value are read once, in the push form each dv is written once; the partial sums are about a
// hundredth of that or less, except that there is one number at least for each head and depth. A thread keeps its
// vectors of dout in registers while the depths pass. No sum is added up by atomics: every partial sum belongs to one
// place in the workspace, and bwd_tail adds them in a fixed order. With a tolerance a value that every head of a block
// leaves out is not read (see retained.cuh); the sums of what a head leaves out are written as zeros, and in the push
// form its dv.
#pragma once

#include "cuda/attention/attention_plan.h"
#include "cuda/attention/retained.cuh"
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
  const float* weights_ptr;  // [B, G, depth], read in the push form and with a tolerance
  float* partial_ptr;        // see Partials
  int depth;
  int fold_log2, slots;
  const void* value_ptr[kMaxDepth];         // [B, C, N] or [B, N, C]
  void* dvalue_ptr[kPush ? kMaxDepth : 1];  // as the values; null where none is wanted
  float tolerance;
  int list_at;  // floats of shared memory before the list of what is retained
  __device__ int sources() const { return depth; }
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

template <class T, int kVec, int kUnroll, class Params, class Maps>
__device__ inline void load_values(const Params& p, const Maps& maps, int j, int64_t offset, int64_t stride, int left,
                                   Raw<T, kVec> (&step)[kDotsMaps][kUnroll]) {
#pragma unroll
  for (int i = 0; i < kDotsMaps; ++i) {
    if (j + i >= maps.count(p)) continue;
    load_vectors<T, kVec>(static_cast<const T*>(p.value_ptr[maps[j + i]]) + offset, stride, left, step[i]);
  }
}

// Writes weight * x; zeros, whatever x is, where that weight is below the tolerance.
template <bool kLeavesOut, class T, int kVec, int kUnroll>
__device__ inline void store_scaled(T* out, int64_t stride, float weight, float tolerance,
                                    const Raw<T, kVec> (&x)[kUnroll], int left) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (u >= left) continue;
    float a[kVec];
    unpack<T, kVec>(x[u], a);
#pragma unroll
    for (int e = 0; e < kVec; ++e) a[e] = kLeavesOut && weight < tolerance ? 0.0f : a[e] * weight;
    store_vector<T, kVec>(out + u * stride, a);
  }
}

// The values that some head of the block retains.
template <bool kPush, int kMaxDepth>
__device__ inline ListedMaps list_values(const DotsParams<kPush, kMaxDepth>& p, const Place& place, int* flags) {
  const Heads heads = heads_of(p.grid, place);
  const float* weights = p.weights_ptr + (place.sample * p.grid.heads + heads.first) * p.depth;
  clear_flags(flags, p.depth);
  for (int k = threadIdx.x; k < heads.count * p.depth; k += kBlock) {
    // A NaN is below nothing.
    if (!(load_scalar(weights + k) < p.tolerance)) flags[k % p.depth] = 1;
  }
  return list_flagged(flags, p.depth);
}

// Zeros to a thread's vectors of every dv that the whole block leaves out.
template <class T, int kVec, int kMaxDepth>
__device__ inline void write_zeros(const DotsParams<true, kMaxDepth>& p, const ListedMaps& maps, int64_t offset,
                                   int64_t stride, int count) {
  const float zeros[kVec] = {};
  int listed = 0;
  for (int j = 0; j < p.depth; ++j) {
    if (listed < maps.count(p) && maps[listed] == j) {
      ++listed;
      continue;
    }
    if (p.dvalue_ptr[j] == nullptr) continue;
    T* dvalue = static_cast<T*>(p.dvalue_ptr[j]) + offset;
    for (int i = 0; i < count; ++i) store_vector<T, kVec>(dvalue + i * stride, zeros);
  }
}

// Writes the block's partial sums from those of its warps, sums[(warp * depth + j) * slots + slot]; zeros where
// left_out(j, channel) says so of the head of a channel, whose sums need not be there.
template <int kVec, class LeftOut>
__device__ inline void write_partials(const Grid& g, const Place& place, const float* sums, float* partial_ptr,
                                      int depth, int fold_log2, int slots, const LeftOut& left_out) {
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
    if (!left_out(j, static_cast<int>(first + place_in_block) * (g.interleaved ? kVec << fold_log2 : g.row_channels))) {
      for (int w = group * group_warps; w < (group + 1) * group_warps; ++w) sum += sums[(w * depth + j) * slots + slot];
    }
    const int64_t at = g.interleaved ? (place.sample * g.outer + place.chunk) * per_sample + first + place_in_block
                                     : (place.sample * per_sample + first + place_in_block) * g.inner + place.chunk;
    partial_ptr[at * depth + j] = sum;
  }
}

template <bool kLeavesOut, bool kPush, int kMaxDepth>
__device__ inline auto values_of(const DotsParams<kPush, kMaxDepth>& p, const Place& place, float* sums) {
  if constexpr (kLeavesOut) {
    return list_values(p, place, reinterpret_cast<int*>(sums + p.list_at));
  } else {
    return AllMaps();
  }
}

template <class T, int kVec, bool kPush, bool kLeavesOut, int kMaxDepth>
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
  const auto maps = values_of<kLeavesOut>(p, place, sums);
  if constexpr (kLeavesOut && kPush) write_zeros<T, kVec>(p, maps, dvalue_offset, dvalue_stride, place.count);
  const int lane = threadIdx.x % kWarp;
  const int in_strip = lane & ((1 << p.grid.across_log2) - 1);
  const bool keeps_sum =
      p.grid.interleaved ? lane == in_strip && (in_strip & ((1 << p.fold_log2) - 1)) == 0 : lane == 0;
  const int slot = p.grid.interleaved ? in_strip >> p.fold_log2 : 0;
  float* warp_sums = sums + (threadIdx.x / kWarp) * p.depth * p.slots + slot;
  int left = place.count;
  Raw<T, kVec> x[kUnroll] = {};
  Raw<T, kVec> step[kDotsMaps][kUnroll] = {};
  if (!kLeavesOut || maps.count(p) > 0) load_vectors<T, kVec>(dout, dout_stride, left, x);
  load_values<T, kVec>(p, maps, 0, offset, stride, left, step);
  // Every thread takes every round, with vectors or without: a shuffle needs its whole warp.
  for (int done = 0; done < place.most; done += kUnroll) {
    for (int j = 0; j < maps.count(p); j += kDotsMaps) {
      float dot[kDotsMaps];
#pragma unroll
      for (int i = 0; i < kDotsMaps; ++i) dot[i] = dot_vectors<T, kVec, kUnroll>(x, step[i], left);
      if constexpr (kPush) {
#pragma unroll
        for (int i = 0; i < kDotsMaps; ++i) {
          if (j + i >= maps.count(p) || p.dvalue_ptr[maps[j + i]] == nullptr) continue;
          T* dvalue = static_cast<T*>(p.dvalue_ptr[maps[j + i]]) + dvalue_offset;
          const float* weight = kLeavesOut ? weights + maps[j + i] : weights + j + i;
          store_scaled<kLeavesOut, T, kVec, kUnroll>(dvalue, dvalue_stride, load_scalar(weight), p.tolerance, x, left);
        }
      }
      // After the last maps of these vectors come the first maps of the next; read while the sums are folded.
      const bool last = j + kDotsMaps >= maps.count(p);
      if (last) {
        left -= kUnroll;
        offset += kUnroll * stride;
        dout += kUnroll * dout_stride;
        dvalue_offset += kUnroll * dvalue_stride;
        load_vectors<T, kVec>(dout, dout_stride, left, x);
      }
      load_values<T, kVec>(p, maps, last ? 0 : j + kDotsMaps, offset, stride, left, step);
      fold_warp(dot, p.fold_log2, p.grid.across_log2);
#pragma unroll
      for (int i = 0; i < kDotsMaps; ++i) {
        if (!keeps_sum || j + i >= maps.count(p)) continue;
        float* sum = warp_sums + maps[j + i] * p.slots;
        *sum = done == 0 ? dot[i] : *sum + dot[i];
      }
    }
  }
  __syncthreads();
  write_partials<kVec>(p.grid, place, sums, p.partial_ptr, p.depth, p.fold_log2, p.slots,
                       [&]([[maybe_unused]] int j, [[maybe_unused]] int channel) {
                         if constexpr (kLeavesOut) {
                           const int64_t head = place.sample * p.grid.heads + channel / p.grid.head_dim;
                           return load_scalar(p.weights_ptr + head * p.depth + j) < p.tolerance;
                         } else {
                           return false;
                         }
                       });
}

template <class T, int kVec, bool kPush, bool kLeavesOut, int kMaxDepth>
__global__ void __launch_bounds__(kBlock, kPush ? kBlocksResidentWide : kBlocksResident)
    layer_attention_bwd_dots_kernel(const __grid_constant__ DotsParams<kPush, kMaxDepth> p) {
  ELA_DYNAMIC_SHARED(float, sums);
  for (int64_t item = blockIdx.x; item < p.grid.items; item += gridDim.x) {
    dots_block<T, kVec, kPush, kLeavesOut>(p, static_cast<unsigned>(item), sums);
    __syncthreads();
  }
}

}  // namespace ela::cuda
