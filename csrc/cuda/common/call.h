// What the CUDA kernels are called with: raw pointers, sizes, strides and a stream. No CUDA header and no PyTorch is
// needed to call them. Every function returns a CUDA error code, 0 for success, allocates nothing and waits for
// nothing, so that calls can be captured into a CUDA graph.
#pragma once

#include <cstdint>

#include "views.h"

namespace ela::cuda {

// Addresses go to a kernel by value; a deeper call is refused, never cut short.
constexpr int kMaxDepth = 256;

// Channels are counted in 32 bits, with room for the blocks that reach past the last one.
constexpr int64_t kMaxChannels = int64_t{1} << 27;

// All maps of one list lie alike: one batch and one inner stride, in elements (see MapView).
struct MapList {
  const void* const* data;
  int64_t count, batch, inner;
};

struct Target {
  int device;
  void* stream;  // cudaStream_t
};

}  // namespace ela::cuda
