// Where a block and a thread work: the device's side of plan.h, the same for planar and interleaved maps.
//
// The vectors of a thread lie `stride` elements apart in every map, so a kernel's body knows nothing of the two forms:
// it walks `count` vectors from `start(map)`.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/plan.h"

namespace ela::cuda {

static_assert(kBlock == kPlanThreads && kWarp == kPlanWarp, "plan.h is written for these blocks");

struct Place {
  int64_t sample;
  unsigned chunk;                  // of the row (planar) or of the positions (interleaved)
  int first_channel, end_channel;  // those that the block touches
  int64_t inner, element;          // of the thread's first vector: inner strides, and elements beyond
  int inner_step, element_step;
  int count;    // vectors of the thread, 0 where it has none
  int most;     // vectors of the thread that has most of them: the same for the whole block
  int channel;  // of the thread's vectors

  // The first channel of each head lies in one block of the sample alone.
  __device__ bool owns(int head, int head_dim) const { return chunk == 0 && head * head_dim >= first_channel; }

  __device__ int64_t start(int64_t batch_stride, int64_t inner_stride) const {
    return sample * batch_stride + inner * inner_stride + element;
  }
  __device__ int64_t stride(int64_t inner_stride) const { return int64_t{inner_step} * inner_stride + element_step; }
};

template <int kVec>
__device__ inline Place place_of(const Grid& g, unsigned item) {
  Place p;
  const int across = 1 << g.across_log2;
  const int along = kBlock >> g.across_log2;
  const int x = threadIdx.x & (across - 1);
  const int y = threadIdx.x >> g.across_log2;
  const unsigned group = item / g.inner;
  const unsigned in_group = item - group * g.inner;
  const unsigned sample = group / g.outer;
  const unsigned in_sample = group - sample * g.outer;
  p.sample = sample;
  const int step = g.interleaved ? along : across;
  const int lane = g.interleaved ? y : x;
  int channels;
  if (g.interleaved) {
    p.chunk = in_sample;
    channels = across * kVec;
    p.first_channel = static_cast<int>(in_group) * channels;
    p.channel = p.first_channel + x * kVec;
  } else {
    p.chunk = in_group;
    channels = along * g.row_channels;
    p.first_channel = static_cast<int>(in_sample) * channels;
    p.channel = p.first_channel + y * g.row_channels;
  }
  p.end_channel = smaller(p.first_channel + channels, g.channels);
  const int64_t begin = int64_t{p.chunk} * (step * g.per_thread);
  const int64_t first = begin + lane;  // the thread's first vector of the row, or position
  const int64_t most = smaller<int64_t>(ceil_div<int64_t>(g.length - begin, step), g.per_thread);
  p.most = static_cast<int>(most);
  // Thread 0 has the most; others have one less where the last round is not full.
  p.count = p.channel >= g.channels ? 0 : p.most - (first + (most - 1) * step >= g.length ? 1 : 0);
  p.inner = g.interleaved ? first : p.channel;
  p.element = g.interleaved ? p.channel : first * kVec;
  p.inner_step = g.interleaved ? along : 0;
  p.element_step = g.interleaved ? 0 : across * kVec;
  return p;
}

// The heads that the block touches.
struct Heads {
  int first, count;
};

__device__ inline Heads heads_of(const Grid& g, const Place& p) {
  const int first = p.first_channel / g.head_dim;
  return {first, (p.end_channel - 1) / g.head_dim - first + 1};
}

// The heads, counted from the block's first, of the elements of a thread's vectors: one for all where kHeads is 1.
// A thread outside of the map gets the block's last head, whose weights exist.
template <int kHeads>
__device__ inline void heads_of_vector(const Place& p, const Heads& heads, int head_dim, int (&head)[kHeads]) {
#pragma unroll
  for (int i = 0; i < kHeads; ++i) head[i] = smaller((p.channel + i) / head_dim - heads.first, heads.count - 1);
}

// The first `left` of a thread's next vectors, or all of them.
template <class T, int kVec, int kUnroll>
__device__ inline void load_vectors(const T* map, int64_t stride, int left, Raw<T, kVec> (&x)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (u < left) x[u] = load_vector<T, kVec>(map + u * stride);
  }
}

}  // namespace ela::cuda
