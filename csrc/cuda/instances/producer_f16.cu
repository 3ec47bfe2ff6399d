// One dtype a file, so that builds run in parallel.
#include "cuda/layer/producer_dispatch.cuh"

namespace ela::cuda {

extern const ProducerKernels kFloat16ProducerKernels = producer_kernels_of<__half>();

}  // namespace ela::cuda
