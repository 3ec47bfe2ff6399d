// What follows the retrieval o in a residual block: out = x + mask * act(norm(o)), and its backward.
//
// Bytes: o and x are read once and out is written; the norm's statistics come from the launch that wrote o. Backward:
// dout and o are read for two sums a channel, read again for the gradient of o, which is written; with given statistics
// no sum is needed for that gradient, and one pass does both. Rows of planar maps are single channels.
#pragma once

#include "cuda/common/join.cuh"
#include "cuda/common/parameter.cuh"
#include "cuda/norm/norm.h"

namespace ela::cuda {

struct NormParams {
  Grid grid;
  const float* statistics_ptr;  // [2, C]
  Parameter gamma, beta;        // [C] or absent
  Parameter mask;               // [B] or absent
  float eps;
  bool relu;
};

struct NormForwardParams {
  NormParams norm;
  int64_t o_batch, o_inner;
  int64_t x_batch, x_inner;
  int64_t out_batch, out_inner;
  const void* o_ptr;  // maps, [B, C, N] or [B, N, C]
  const void* x_ptr;
  void* out_ptr;
};

struct NormBackwardParams {
  NormParams norm;
  int64_t o_batch, o_inner;
  int64_t dout_batch, dout_inner;
  int64_t also_batch, also_inner;
  int64_t gradient_batch, gradient_inner;
  const void* o_ptr;  // maps, [B, C, N] or [B, N, C]
  const void* dout_ptr;
  const void* also_ptr;    // or null
  void* gradient_ptr;      // of o
  const float* moved_ptr;  // [2, C], means over batch and space of g, and of g * (o - mean) / variance; null: not moved
  float* partial_ptr;      // [2, batch * chunks, C], sums of g and of g * (o - mean)
  int64_t products_at;     // where the second half of the sums begins
};

// What the norm is for the channels of a thread's vectors: one for each element, all the same in planar maps.
template <int kVec>
struct NormAt {
  float mean[kVec], scale[kVec], shift[kVec];
  float factor;
};

// The channel of an element. A thread outside of the map gets the last one.
__device__ inline int channel_of(const Grid& g, const Place& place, int e) {
  return smaller(place.channel + (g.interleaved ? e : 0), g.channels - 1);
}

template <int kVec>
__device__ inline NormAt<kVec> norm_at(const NormParams& p, const Place& place) {
  NormAt<kVec> at;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const int c = channel_of(p.grid, place, e);
    at.mean[e] = __ldg(p.statistics_ptr + c);
    at.scale[e] = 1.0f / sqrtf(__ldg(p.statistics_ptr + p.grid.channels + c) + p.eps);
    if (p.gamma.data != nullptr) at.scale[e] *= load_parameter(p.gamma, c);
    at.shift[e] = p.beta.data == nullptr ? 0.0f : load_parameter(p.beta, c);
  }
  at.factor = p.mask.data == nullptr ? 1.0f : load_parameter(p.mask, place.sample);
  return at;
}

template <class T, int kVec>
__device__ inline void norm_forward_block(const NormForwardParams& p, unsigned item) {
  constexpr int kUnroll = kDotsUnroll<kVec>;
  const Place place = place_of<kVec>(p.norm.grid, item);
  const T* o = static_cast<const T*>(p.o_ptr) + place.start(p.o_batch, p.o_inner);
  const T* x = static_cast<const T*>(p.x_ptr) + place.start(p.x_batch, p.x_inner);
  T* out = static_cast<T*>(p.out_ptr) + place.start(p.out_batch, p.out_inner);
  const int64_t o_stride = place.stride(p.o_inner);
  const int64_t x_stride = place.stride(p.x_inner);
  const int64_t out_stride = place.stride(p.out_inner);
  const NormAt<kVec> at = norm_at<kVec>(p.norm, place);
  for (int left = place.count; left > 0; left -= kUnroll) {
    Raw<T, kVec> raw_o[kUnroll] = {}, raw_x[kUnroll] = {};
    load_vectors<T, kVec>(o, o_stride, left, raw_o);
    load_vectors<T, kVec>(x, x_stride, left, raw_x);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= left) continue;
      float a[kVec], b[kVec];
      unpack<T, kVec>(raw_o[u], a);
      unpack<T, kVec>(raw_x[u], b);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        float z = (a[e] - at.mean[e]) * at.scale[e] + at.shift[e];
        if (p.norm.relu && z < 0) z = 0;  // a NaN stays one
        b[e] += at.factor * z;
      }
      store_vector<T, kVec>(out + u * out_stride, b);
    }
    o += kUnroll * o_stride;
    x += kUnroll * x_stride;
    out += kUnroll * out_stride;
  }
}

// Writes the block's sums of g and of g * (o - mean). `shared`: see join_rows.
template <int kVec>
__device__ inline void write_norm_sums(const NormBackwardParams& p, const Place& place, const float (&sum)[kVec],
                                       const float (&product)[kVec], float* shared) {
  const Grid& g = p.norm.grid;
  const auto write = [&](int channel, const Pairs<1>& found) {
    const int64_t chunks = g.interleaved ? g.outer : g.inner;
    const int64_t at = (place.sample * chunks + place.chunk) * g.channels + channel;
    p.partial_ptr[at] = found.first[0];
    p.partial_ptr[p.products_at + at] = found.second[0];
  };
  if (g.interleaved) {
    Pairs<kVec> pairs = {};
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      pairs.first[e] = sum[e];
      pairs.second[e] = product[e];
    }
    join_strip<JoinSums, kVec>(g, place, pairs, shared, write);
    return;
  }
  Pairs<1> pairs = {};
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    pairs.first[0] += sum[e];
    pairs.second[0] += product[e];
  }
  join_rows<JoinSums>(g, place, pairs, shared, write);
}

template <class T, int kVec, bool kSums, bool kWrites>
__device__ inline void norm_backward_block(const NormBackwardParams& p, unsigned item, float* shared) {
  // Fewer at a time where sums and gradients wait in registers together.
  constexpr int kUnroll = kSums && kWrites ? kForwardUnroll<kVec> : kDotsUnroll<kVec>;
  const Grid& g = p.norm.grid;
  const Place place = place_of<kVec>(g, item);
  const T* o = static_cast<const T*>(p.o_ptr) + place.start(p.o_batch, p.o_inner);
  const T* dout = static_cast<const T*>(p.dout_ptr) + place.start(p.dout_batch, p.dout_inner);
  const int64_t o_stride = place.stride(p.o_inner);
  const int64_t dout_stride = place.stride(p.dout_inner);
  const int64_t also_stride = place.stride(p.also_inner);
  const int64_t gradient_stride = place.stride(p.gradient_inner);
  int64_t also_offset = place.start(p.also_batch, p.also_inner);
  T* gradient = static_cast<T*>(p.gradient_ptr) + place.start(p.gradient_batch, p.gradient_inner);
  const NormAt<kVec> at = norm_at<kVec>(p.norm, place);
  [[maybe_unused]] float by_one[kVec] = {}, by_value[kVec] = {};
  if (kWrites && p.moved_ptr != nullptr) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const int c = channel_of(g, place, e);
      by_one[e] = __ldg(p.moved_ptr + c);
      by_value[e] = __ldg(p.moved_ptr + g.channels + c);
    }
  }
  [[maybe_unused]] float sum[kVec] = {}, product[kVec] = {};
  for (int left = place.count; left > 0; left -= kUnroll) {
    Raw<T, kVec> raw_o[kUnroll] = {}, raw_dout[kUnroll] = {};
    load_vectors<T, kVec>(o, o_stride, left, raw_o);
    load_vectors<T, kVec>(dout, dout_stride, left, raw_dout);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= left) continue;
      float a[kVec], b[kVec];
      unpack<T, kVec>(raw_o[u], a);
      unpack<T, kVec>(raw_dout[u], b);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const float distance = a[e] - at.mean[e];
        b[e] *= at.factor;
        if (p.norm.relu && distance * at.scale[e] + at.shift[e] <= 0) b[e] = 0;
        if constexpr (kSums) {
          sum[e] += b[e];
          product[e] += b[e] * distance;
        }
        if constexpr (kWrites) b[e] = at.scale[e] * (b[e] - (by_one[e] + distance * by_value[e]));
      }
      if constexpr (kWrites) {
        Raw<T, kVec> raw_also = {};
        if (p.also_ptr != nullptr) {
          raw_also = load_vector<T, kVec>(static_cast<const T*>(p.also_ptr) + also_offset + u * also_stride);
        }
        unpack<T, kVec>(raw_also, a);
#pragma unroll
        for (int e = 0; e < kVec; ++e) b[e] += a[e];
        store_vector<T, kVec>(gradient + u * gradient_stride, b);
      }
    }
    o += kUnroll * o_stride;
    dout += kUnroll * dout_stride;
    also_offset += kUnroll * also_stride;
    gradient += kUnroll * gradient_stride;
  }
  if constexpr (kSums) write_norm_sums<kVec>(p, place, sum, product, shared);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kBlock, kBlocksResident)
    layer_norm_fwd_kernel(const __grid_constant__ NormForwardParams p) {
  for (int64_t item = blockIdx.x; item < p.norm.grid.items; item += gridDim.x) {
    norm_forward_block<T, kVec>(p, static_cast<unsigned>(item));
  }
}

template <class T, int kVec, bool kSums, bool kWrites>
__global__ void __launch_bounds__(kBlock, kBlocksResidentWide)
    layer_norm_bwd_kernel(const __grid_constant__ NormBackwardParams p) {
  ELA_DYNAMIC_SHARED(float, shared);
  for (int64_t item = blockIdx.x; item < p.norm.grid.items; item += gridDim.x) {
    norm_backward_block<T, kVec, kSums, kWrites>(p, static_cast<unsigned>(item), shared);
    if constexpr (kSums) __syncthreads();
  }
}

}  // namespace ela::cuda
