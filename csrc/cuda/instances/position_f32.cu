// One dtype a file, so that builds run in parallel.
#include "cuda/position/position_dispatch.cuh"

namespace ela::cuda {

extern const PositionKernels kFloat32PositionKernels = position_kernels_of<float>();

}  // namespace ela::cuda
