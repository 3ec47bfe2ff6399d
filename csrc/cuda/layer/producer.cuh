// v = depthwise 3x3 convolution of x, and the sums over space of x for its mean.
//
// Bytes: x is read once and v written once; the rows and columns beside a tile are read again, from the caches.
#pragma once

#include "cuda/layer/producer_tile.cuh"

namespace ela::cuda {

constexpr int kForwardBlocks = 4;  // of a multiprocessor: 64 registers a thread

struct ProducerParams {
  ProducerGrid grid;
  MapView x, v;
  Parameter wv;     // [C, 3, 3]
  float* sums_ptr;  // [B, groups, C]
  int outer_bytes;  // of a tile with neighbours, in shared memory
};

// Walks down `rows` rows of a column of x: calls store(v) for one after the other and returns the sum of the column.
template <class T, class Store>
__device__ inline float convolve_column(const float* taps, NeighboursWalk<T> x, bool has_above, int rows,
                                        bool has_below, const Store& store) {
  float tap[kTaps];
#pragma unroll
  for (int k = 0; k < kTaps; ++k) tap[k] = taps[k];
  const auto plus = [&tap](float sum, int k, const Neighbours& n) {
    return sum + tap[k] * n.left + tap[k + 1] * n.center + tap[k + 2] * n.right;
  };
  Neighbours n = x.next(has_above);
  // What the rows read so far give to the present row, and to the one before it.
  float here = plus(0, 0, n);
  n = x.next();
  float sum = n.center;
  float before = plus(here, 3, n);
  here = plus(0, 0, n);
#pragma unroll 2
  for (int row = 1; row < rows; ++row) {
    n = x.next();
    sum += n.center;
    store(plus(before, 6, n));
    before = plus(here, 3, n);
    here = plus(0, 0, n);
  }
  n = x.next(has_below);
  store(plus(before, 6, n));
  return sum;
}

// Shared memory: the threads' sums, the taps, a zero, a tile of x with neighbours, and one of v.
template <class T>
int64_t producer_shared_bytes(const ProducerGrid& g) {
  return 4 * kBlock + taps_bytes(g.lines) + kZeroBytes + tile_bytes<T>(g.outer_elements()) +
         tile_bytes<T>(g.inner_elements());
}

template <class T, int kVec>
__device__ inline void produce_tile(const ProducerParams& p, unsigned item, float* sums) {
  const ProducerGrid& g = p.grid;
  float* taps = sums + kBlock;
  unsigned char* memory = reinterpret_cast<unsigned char*>(taps) + taps_bytes(g.lines);
  T* x_tile = reinterpret_cast<T*>(memory + kZeroBytes);
  T* v_tile = reinterpret_cast<T*>(memory + kZeroBytes + p.outer_bytes);
  const Tile t = tile_of(g, item);
  const int64_t sample = t.first_sample;
  load_box<T, kVec>(g, t, t.outer, p.x, sample, x_tile);
  load_taps(t, p.wv, taps);
  if (threadIdx.x == 0) x_tile[-1] = from_float<T>(0);
  const int x_phase = phase_of<kVec>(g, t, t.outer, sample, p.x.batch);
  const int v_phase = phase_of<kVec>(g, t, t.inner, sample, p.v.batch);
  wait_for_copies();
  __syncthreads();
  float sum = 0;
  for_columns(g, t, [&](const Column& c) {
    const ColumnPlace place = column_place(g, t, c, v_phase);
    T* v = v_tile + place.first;
    const auto store = [&](float value) { *v = from_float<T>(value), v += place.step; };
    sum += convolve_column(taps + c.line * kTaps, NeighboursWalk<T>(g, t, c, x_phase, x_tile), c.begin > 0,
                           c.end - c.begin, c.end < g.height, store);
  });
  sums[threadIdx.x] = sum;
  __syncthreads();
  store_box<T, kVec>(g, t, t.inner, p.v, sample, v_tile);
  float* out = p.sums_ptr + (sample * t.groups + t.group) * g.channels + t.first_line;
  sum_lines(g, t, 1, sums, [&](int, int line, float total) { out[line] = total; });
}

template <class T, int kVec>
__global__ void __launch_bounds__(kBlock, kForwardBlocks)
    layer_producer_fwd_kernel(const __grid_constant__ ProducerParams p) {
  ELA_DYNAMIC_SHARED(float, memory);
  for (int64_t item = blockIdx.x; item < p.grid.items; item += gridDim.x) {
    produce_tile<T, kVec>(p, static_cast<unsigned>(item), memory);
    __syncthreads();
  }
}

}  // namespace ela::cuda
