// One dtype a file, so that builds run in parallel.
#include "cuda/layer/producer_dispatch.cuh"

namespace ela::cuda {

extern const ProducerKernels kFloat32ProducerKernels = producer_kernels_of<float>();

}  // namespace ela::cuda
