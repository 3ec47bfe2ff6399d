// One dtype a file, so that builds run in parallel.
#include "cuda/norm/norm_dispatch.cuh"

namespace ela::cuda {

extern const NormKernels kFloat32NormKernels = norm_kernels_of<float>();

}  // namespace ela::cuda
