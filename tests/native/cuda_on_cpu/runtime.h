// What tests ask of the stand-in runtime beyond CUDA's own functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_cpu {

// The order in which blocks, and the threads of a block, come to run. 0: ascending, and 1: descending, each warp as far
// as it gets without the others. Any other number is a seed: even, whole warps in random order; odd, single threads in
// random order, each up to where it waits. A kernel's results must not depend on it.
void set_order(uint64_t order);

// Grids are cut to `blocks` along x, and kernels are told so: they have to walk on from there, as they would with more
// work than a grid has blocks for. 0 is no limit.
void limit_grid(unsigned blocks);

int device_now();

struct LaunchRecord {
  std::string kernel;
  dim3 grid, block;  // as launched, without the limit
  size_t shared;
};

// The launches since the last call.
std::vector<LaunchRecord> take_launches();

}  // namespace cuda_on_cpu
