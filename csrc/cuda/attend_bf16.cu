// One dtype a file, so that builds run in parallel.
#include "cuda/attend_dispatch.cuh"

namespace ela::cuda {

extern const RowsKernels kBFloat16RowsKernels = rows_kernels_of<__nv_bfloat16>();

}  // namespace ela::cuda
