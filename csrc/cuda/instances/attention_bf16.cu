// One dtype a file, so that builds run in parallel.
#include "cuda/attention/attention_dispatch.cuh"

namespace ela::cuda {

extern const Kernels kBFloat16Kernels = kernels_of<__nv_bfloat16>();

}  // namespace ela::cuda
