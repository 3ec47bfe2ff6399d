// One dtype a file, so that builds run in parallel.
#include "cuda/position/position_dispatch.cuh"

namespace ela::cuda {

extern const PositionKernels kFloat16PositionKernels = position_kernels_of<__half>();

}  // namespace ela::cuda
