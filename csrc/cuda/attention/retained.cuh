// The maps that a block reads: all of them, or those that a tolerance retains for some head of the block.
//
// Bytes: a map that is left out is not read, which is what a tolerance is for. Weights come first then, so that no read
// is issued before they are known. What one head leaves out and another one of the block retains is read, and counts
// as zero for the first whatever it is: the choice is between numbers, never a product with zero.
#pragma once

#include "cuda/common/place.cuh"

namespace ela::cuda {

// Their number is asked of the parameters wherever it is needed: to hold it would cost a register.
struct AllMaps {
  static constexpr bool kLeavesOut = false;
  template <class Params>
  __device__ static int count(const Params& p) {
    return p.sources();
  }
  __device__ int operator[](int i) const { return i; }
};

struct ListedMaps {
  int listed;
  const int* list;  // ascending, in shared memory
  static constexpr bool kLeavesOut = true;
  template <class Params>
  __device__ int count(const Params&) const {
    return listed;
  }
  __device__ int operator[](int i) const { return list[i]; }
};

// In shared memory in the place of a weight that is below its tolerance: no softmax gives it.
constexpr float kLeftOut = -INFINITY;

// flags[j] = 0 for every map; ends with a barrier.
__device__ inline void clear_flags(int* flags, int maps) {
  for (int j = threadIdx.x; j < maps; j += kBlock) flags[j] = 0;
  __syncthreads();
}

// From flags[j], whether map j is retained, not waited for, to the list of those that are, in their place; one more
// number takes their count. Ends with a barrier.
__device__ inline ListedMaps list_flagged(int* flags, int maps) {
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const unsigned before = (1u << threadIdx.x) - 1;
    int count = 0;
    // A list is never ahead of the flags that it is made of, and the vote needs those of a round.
    for (int begin = 0; begin < maps; begin += kWarp) {
      const int j = begin + static_cast<int>(threadIdx.x);
      const bool retained = j < maps && flags[j] != 0;
      const unsigned found = __ballot_sync(kFullMask, retained);
      if (retained) flags[count + __popc(found & before)] = j;
      count += __popc(found);
    }
    if (threadIdx.x == 0) flags[maps] = count;
  }
  __syncthreads();
  return {flags[maps], flags};
}

// The maps that some head retains, from weights[j * heads + i] in shared memory, where those that are below
// tolerance_of(j) become kLeftOut.
template <class ToleranceOf>
__device__ inline ListedMaps list_retained(float* weights, int heads, int maps, int* flags,
                                           const ToleranceOf& tolerance_of) {
  clear_flags(flags, maps);
  for (int k = threadIdx.x; k < heads * maps; k += kBlock) {
    const int j = k / heads;
    // A NaN is below nothing.
    if (weights[k] < tolerance_of(j)) {
      weights[k] = kLeftOut;
    } else {
      flags[j] = 1;
    }
  }
  return list_flagged(flags, maps);
}

}  // namespace ela::cuda
