// One dtype a file, so that builds run in parallel.
#include "cuda/layer/layer_attention_dispatch.cuh"

namespace ela::cuda {

extern const RowsKernels kFloat16RowsKernels = rows_kernels_of<__half>();

}  // namespace ela::cuda
