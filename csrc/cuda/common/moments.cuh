// Moments of what a block writes, for the norm that will read it: partial means of each channel, and sums of squared
// distances from them.
#pragma once

#include "cuda/common/join.cuh"

namespace ela::cuda {

// A thread's own: sums of distances from the first number that it sees, and of their squares. That is one of n numbers,
// so its squared distance from their mean is at most n times their variance: what cancels in `pairs` costs an error
// of n roundings at worst, n being the few numbers of a thread.
template <int kVec>
struct Observed {
  float origin[kVec], sum[kVec], square[kVec];

  // Planar: all elements of a vector are of one channel, and are measured from one number.
  __device__ void start(const float (&x)[kVec], bool interleaved) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) origin[e] = interleaved ? x[e] : x[0];
  }

  __device__ void see(const float (&x)[kVec]) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const float distance = x[e] - origin[e];
      sum[e] += distance;
      square[e] += distance * distance;
    }
  }
};

// Mean and sum of squared distances from it, of `count` numbers.
template <int kChannels>
__device__ inline void set_moments(Pairs<kChannels>& x, int e, float origin, float sum, float square) {
  const float mean = sum / larger(x.count, 1.0f);
  const float left = square - sum * mean;
  x.first[e] = origin + mean;
  x.second[e] = left < 0 ? 0 : left;  // a NaN stays one
}

// Writes the moments of the block's channels. `shared`: see join_rows.
template <int kVec, class Params>
__device__ inline void write_moments(const Params& p, const Place& place, const Observed<kVec>& x, float* shared) {
  const Grid& g = p.grid;
  const auto write = [&](int channel, const Pairs<1>& found) {
    const int64_t chunks = g.interleaved ? g.outer : g.inner;
    const int64_t at = (place.sample * chunks + place.chunk) * g.channels + channel;
    p.moments_ptr[at] = found.first[0];
    p.moments_ptr[p.squares_at + at] = found.second[0];
  };
  if (g.interleaved) {
    Pairs<kVec> pairs;
    pairs.count = static_cast<float>(place.count);
#pragma unroll
    for (int e = 0; e < kVec; ++e) set_moments(pairs, e, x.origin[e], x.sum[e], x.square[e]);
    join_strip<JoinMoments, kVec>(g, place, pairs, shared, write);
    return;
  }
  float sum = 0, square = 0;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    sum += x.sum[e];
    square += x.square[e];
  }
  Pairs<1> pairs;
  pairs.count = static_cast<float>(place.count * kVec);
  set_moments(pairs, 0, x.origin[0], sum, square);
  join_rows<JoinMoments>(g, place, pairs, shared, write);
}

}  // namespace ela::cuda
