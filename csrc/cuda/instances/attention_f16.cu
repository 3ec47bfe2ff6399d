// One dtype a file, so that builds run in parallel.
#include "cuda/attention/attention_dispatch.cuh"

namespace ela::cuda {

extern const Kernels kFloat16Kernels = kernels_of<__half>();

}  // namespace ela::cuda
