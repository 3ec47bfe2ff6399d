// One dtype a file, so that builds run in parallel.
#include "cuda/layer/layer_attention_dispatch.cuh"

namespace ela::cuda {

extern const RowsKernels kBFloat16RowsKernels = rows_kernels_of<__nv_bfloat16>();

}  // namespace ela::cuda
