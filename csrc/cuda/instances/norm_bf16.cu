// One dtype a file, so that builds run in parallel.
#include "cuda/norm/norm_dispatch.cuh"

namespace ela::cuda {

extern const NormKernels kBFloat16NormKernels = norm_kernels_of<__nv_bfloat16>();

}  // namespace ela::cuda
