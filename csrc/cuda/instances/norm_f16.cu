// One dtype a file, so that builds run in parallel.
#include "cuda/norm/norm_dispatch.cuh"

namespace ela::cuda {

extern const NormKernels kFloat16NormKernels = norm_kernels_of<__half>();

}  // namespace ela::cuda
