// The partial sums of the filters' gradients, added up in a fixed order.
#include "cuda/common/launch.cuh"
#include "cuda/layer/producer_filters.cuh"
#include "cuda/layer/producer_tile.cuh"

namespace ela::cuda {

struct FiltersBackwardParams {
  int64_t column_items, items;  // blocks that add up columns of the taps' partial sums, and all
  int64_t parts, chunks;
  int channels, filter_size;
  DType wv_dtype, wq_dtype, wk_dtype;
  const float* taps_ptr;     // [parts, 9, C]
  const float* filters_ptr;  // [2, filter_size, chunks]
  void* dwv_ptr;             // [C, 3, 3]
  void *dwq_ptr, *dwk_ptr;   // [filter_size] or null
};

__global__ void __launch_bounds__(kBlock) layer_filters_bwd_kernel(const __grid_constant__ FiltersBackwardParams p) {
  ELA_DYNAMIC_SHARED(float, sums);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t columns = int64_t{kTaps} * p.channels;
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    float sum = 0;
    if (item < p.column_items) {
      const int64_t column = item * kWarp + lane;
      if (column < columns) {
#pragma unroll 4
        for (int64_t part = warp; part < p.parts; part += kWarps) sum += p.taps_ptr[part * columns + column];
      }
      sums[threadIdx.x] = sum;
      __syncthreads();
      if (warp == 0 && column < columns) {
        for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + lane];
        const int64_t tap = column / p.channels;
        store_parameter(p.dwv_ptr, p.wv_dtype, (column - tap * p.channels) * kTaps + tap, sum);
      }
      __syncthreads();
      continue;
    }
    const int64_t row = (item - p.column_items) * kWarps + warp;
    if (row >= 2 * p.filter_size) continue;
    const bool of_query = row < p.filter_size;
    void* out = of_query ? p.dwq_ptr : p.dwk_ptr;
    if (out == nullptr) continue;
#pragma unroll 4
    for (int64_t chunk = lane; chunk < p.chunks; chunk += kWarp) sum += p.filters_ptr[row * p.chunks + chunk];
    sum = sum_warp(sum);
    if (lane == 0) store_parameter(out, of_query ? p.wq_dtype : p.wk_dtype, row % p.filter_size, sum);
  }
}

cudaError_t launch_filter_sums(const ProducerBackwardCall& c, const ProducerPartials& partials, void* stream) {
  FiltersBackwardParams p;
  const bool has_rows = c.dwq != nullptr || c.dwk != nullptr;
  p.column_items = c.dwv == nullptr ? 0 : ceil_div<int64_t>(kTaps * c.shape.channels, kWarp);
  p.items = p.column_items + (has_rows ? ceil_div<int64_t>(2 * c.filter_size, kWarps) : 0);
  p.parts = partials.parts;
  p.chunks = partials.chunks;
  p.channels = static_cast<int>(c.shape.channels);
  p.filter_size = static_cast<int>(c.filter_size);
  p.wv_dtype = c.wv.dtype;
  p.wq_dtype = c.wq.dtype;
  p.wk_dtype = c.wk.dtype;
  p.taps_ptr = c.workspace;
  p.filters_ptr = c.workspace + partials.taps(c.shape.channels);
  p.dwv_ptr = c.dwv;
  p.dwq_ptr = c.dwq;
  p.dwk_ptr = c.dwk;
  return launch(&layer_filters_bwd_kernel, p, p.items, 4 * kBlock, stream);
}

}  // namespace ela::cuda
