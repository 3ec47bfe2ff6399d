// Where a block and a thread work: the device's side of plan.h, the same for planar and interleaved maps.
//
// The vectors of a thread lie `stride` elements apart in every map, so a kernel's body knows nothing of the two forms:
// it walks `count` vectors from `start(map)`.
#pragma once

#include "cuda/device.cuh"
#include "cuda/plan.h"

namespace ela::cuda {

static_assert(kBlock == kPlanThreads && kWarp == kPlanWarp, "plan.h is written for these blocks");

struct Place {
  int64_t sample;
  int64_t chunk;           // of the row (planar) or of the positions (interleaved)
  int first_channel;       // the first that the block touches
  int first_head, heads;   // those that the block touches
  int64_t inner, element;  // of the thread's first vector: inner strides, and elements beyond
  int64_t inner_step, element_step;
  int count;    // vectors of the thread, 0 where it has none
  int most;     // vectors of the thread that has most of them: the same for the whole block
  int channel;  // of the thread's vectors

  // The first channel of each head lies in one block of the sample alone.
  __device__ bool owns(int head, int head_dim) const { return chunk == 0 && head * head_dim >= first_channel; }

  __device__ int64_t start(int64_t batch_stride, int64_t inner_stride) const {
    return sample * batch_stride + inner * inner_stride + element;
  }
  __device__ int64_t stride(int64_t inner_stride) const { return inner_step * inner_stride + element_step; }
};

template <int kVec>
__device__ inline Place place_of(const Grid& g, int64_t item) {
  Place p;
  const int x = threadIdx.x & ((1 << g.across_log2) - 1);
  const int y = threadIdx.x >> g.across_log2;
  const int across = 1 << g.across_log2;
  const int along = kBlock >> g.across_log2;
  const int64_t group = item / g.inner;
  const int64_t in_group = item - group * g.inner;
  p.sample = group / g.outer;
  const int64_t in_sample = group - p.sample * g.outer;
  int end_channel;
  int64_t first;  // the thread's first vector of `length`
  bool inside;
  if (g.interleaved) {
    p.chunk = in_sample;
    p.first_channel = static_cast<int>(in_group) * across * kVec;
    end_channel = smaller(p.first_channel + across * kVec, g.channels);
    p.channel = p.first_channel + x * kVec;
    inside = p.channel < g.channels;
    first = p.chunk * along * g.per_thread + y;
    p.inner = first;
    p.element = p.channel;
    p.inner_step = along;
    p.element_step = 0;
  } else {
    p.chunk = in_group;
    const int row = static_cast<int>(in_sample) * along + y;
    p.first_channel = static_cast<int>(in_sample) * along * g.row_channels;
    end_channel = smaller(p.first_channel + along * g.row_channels, g.channels);
    p.channel = row * g.row_channels;
    inside = row < g.rows;
    first = p.chunk * across * g.per_thread + x;
    p.inner = p.channel;
    p.element = first * kVec;
    p.inner_step = 0;
    p.element_step = across * kVec;
  }
  const int step = g.interleaved ? along : across;
  const int64_t left = g.length - first;
  const int64_t most_left = g.length - p.chunk * step * g.per_thread;
  p.count = !inside || left <= 0 ? 0 : static_cast<int>(smaller<int64_t>(ceil_div<int64_t>(left, step), g.per_thread));
  p.most = static_cast<int>(smaller<int64_t>(ceil_div<int64_t>(most_left, step), g.per_thread));
  p.first_head = p.first_channel / g.head_dim;
  p.heads = (end_channel - 1) / g.head_dim - p.first_head + 1;
  return p;
}

// The heads, counted from the block's first, of the elements of a thread's vectors: one for all where kHeads is 1.
// A thread outside of the map gets the block's last head, whose weights exist.
template <int kHeads>
__device__ inline void heads_of(const Place& p, int head_dim, int (&head)[kHeads]) {
#pragma unroll
  for (int i = 0; i < kHeads; ++i) head[i] = smaller((p.channel + i) / head_dim - p.first_head, p.heads - 1);
}

}  // namespace ela::cuda
