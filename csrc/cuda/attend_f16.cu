// One dtype a file, so that builds run in parallel.
#include "cuda/attend_dispatch.cuh"

namespace ela::cuda {

extern const RowsKernels kFloat16RowsKernels = rows_kernels_of<__half>();

}  // namespace ela::cuda
