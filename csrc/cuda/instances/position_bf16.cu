// One dtype a file, so that builds run in parallel.
#include "cuda/position/position_dispatch.cuh"

namespace ela::cuda {

extern const PositionKernels kBFloat16PositionKernels = position_kernels_of<__nv_bfloat16>();

}  // namespace ela::cuda
