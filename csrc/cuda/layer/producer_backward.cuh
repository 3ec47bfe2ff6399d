// What value, query and key send back to x and to the filters.
//
// Bytes: dv, x and the residual gradient are read once and dx is written once; the rows and columns beside a tile are
// read again, from the caches. The taps' gradients are sums over space and batch: each block adds up those of its tiles
// and leaves a partial sum, and a second launch adds these in a fixed order. Blocks after those of the tiles do the
// same for the two filters over the channels.
#pragma once

#include "cuda/layer/producer_tile.cuh"

namespace ela::cuda {

constexpr int kBackwardBlocks = 3;  // of a multiprocessor: 80 registers a thread

struct ProducerBackwardParams {
  ProducerGrid grid;
  MapView dv, x, residual, dx;  // data null: absent or not wanted; x null where no gradient of the taps is
  int64_t tile_items, items;    // blocks that work on tiles, and all
  int64_t chunks;               // partial sums of each tap of query and key
  int filter_size;
  int outer_bytes, inner_bytes;  // of a tile with and without neighbours, in shared memory
  int64_t phase_batch;           // see TileAlignment
  float positions;               // of a map
  bool wants_wq, wants_wk;
  Parameter wv;                       // [C, 3, 3]
  const void *dquery_ptr, *dkey_ptr;  // [B, C] or null
  Parameter wq, wk;                   // [filter_size]
  const void* mean_ptr;               // [B, C]
  float* taps_ptr;                    // [parts, 9, C] or null
  float* filters_ptr;                 // [2, filter_size, chunks]
};

constexpr int kTileBytes = ceil_div(static_cast<int>(sizeof(Tile)), 16) * 16;

// Shared memory: where the tile is, the taps, the mean's gradients, a zero, a tile of dv with neighbours (later the
// threads' sums), one of x and one of dx, which holds the residual gradient first.
template <class T>
int64_t backward_outer_bytes(const ProducerGrid& g) {
  return larger<int64_t>(tile_bytes<T>(g.outer_elements()), 4 * kTaps * kBlock);
}

__host__ __device__ constexpr int means_bytes(int lines) { return ceil_div(4 * lines, 16) * 16; }

template <class T>
int64_t producer_backward_shared_bytes(const ProducerGrid& g) {
  return kTileBytes + taps_bytes(g.lines) + means_bytes(g.lines) + kZeroBytes + backward_outer_bytes<T>(g) +
         2 * tile_bytes<T>(g.inner_elements());
}

// What a row's gradient [B, C] gives the mean of one channel through the filter that made the row.
template <class T>
__device__ inline float turned(const void* drow, const Parameter& filter, int64_t sample, int channel, int channels,
                               int size) {
  const T* row = static_cast<const T*>(drow) + sample * channels;
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < size; ++i) {
    const int at = channel - i + size / 2;
    if (at >= 0 && at < channels) sum += load_parameter(filter, i) * load_scalar(row + at);
  }
  return sum;
}

// Walks down `rows` rows of a column of dv: calls store(dx) for one after the other, which begins at `offset`, and adds
// <dv, shifted x> to sums. x() gives the column's own one after the other.
template <class T, class X, class Store>
__device__ inline void convolve_column_back(const float* taps, NeighboursWalk<T> dv, bool has_above, int rows,
                                            bool has_below, float offset, const X& x, const Store& store,
                                            float (&sums)[kTaps]) {
  float tap[kTaps];
#pragma unroll
  for (int k = 0; k < kTaps; ++k) tap[k] = taps[k];
  // A tap's output lies on the other side of its input: left and right change places, and so do above and below.
  const auto plus = [&tap](float sum, int k, const Neighbours& n) {
    return sum + tap[k] * n.right + tap[k + 1] * n.center + tap[k + 2] * n.left;
  };
  const auto add = [&sums](int k, float x_of_row, const Neighbours& n) {
    sums[k] += x_of_row * n.right, sums[k + 1] += x_of_row * n.center, sums[k + 2] += x_of_row * n.left;
  };
  float x_here = x();
  Neighbours n = dv.next(has_above);
  // What the rows read so far give to the present row, and to the one before it.
  float here = plus(offset, 6, n);
  add(6, x_here, n);
  n = dv.next();
  add(3, x_here, n);
  float before = plus(here, 3, n);
  here = plus(offset, 6, n);
#pragma unroll 2
  for (int row = 1; row < rows; ++row) {
    const float x_below = x();
    add(6, x_below, n);
    n = dv.next();
    add(0, x_here, n);
    add(3, x_below, n);
    store(plus(before, 0, n));
    before = plus(here, 3, n);
    here = plus(offset, 6, n);
    x_here = x_below;
  }
  n = dv.next(has_below);
  add(0, x_here, n);
  store(plus(before, 0, n));
}

template <class T, int kVec>
__device__ inline void produce_back_tile(const ProducerBackwardParams& p, unsigned item, unsigned char* shared) {
  const ProducerGrid& g = p.grid;
  // In shared memory: held in registers throughout, it would leave too few for the sums.
  const Tile& t = *reinterpret_cast<const Tile*>(shared);
  if (threadIdx.x == 0) *reinterpret_cast<Tile*>(shared) = tile_of(g, item);
  __syncthreads();
  float* taps = reinterpret_cast<float*>(shared + kTileBytes);
  float* means = taps + taps_bytes(g.lines) / 4;
  unsigned char* memory = reinterpret_cast<unsigned char*>(means) + means_bytes(g.lines) + kZeroBytes;
  T* dv_tile = reinterpret_cast<T*>(memory);
  T* x_tile = reinterpret_cast<T*>(memory + p.outer_bytes);
  T* dx_tile = reinterpret_cast<T*>(memory + p.outer_bytes + p.inner_bytes);
  load_taps(t, p.wv, taps);
  float sums[kTaps] = {};
  for (int i = 0; i < t.samples; ++i) {
    const int64_t sample = t.first_sample + i;
    if (p.dv.data != nullptr) load_box<T, kVec>(g, t, t.outer, p.dv, sample, dv_tile);
    if (p.x.data != nullptr) load_box<T, kVec>(g, t, t.inner, p.x, sample, x_tile);
    if (p.residual.data != nullptr) load_box<T, kVec>(g, t, t.inner, p.residual, sample, dx_tile);
    if (threadIdx.x == 0) dv_tile[-1] = from_float<T>(0);
    if (p.dx.data != nullptr) {
      for (int line = threadIdx.x; line < t.lines; line += kBlock) {
        const int channel = t.first_line + line;
        float sum = 0;
        if (p.dquery_ptr != nullptr) sum += turned<T>(p.dquery_ptr, p.wq, sample, channel, g.channels, p.filter_size);
        if (p.dkey_ptr != nullptr) sum += turned<T>(p.dkey_ptr, p.wk, sample, channel, g.channels, p.filter_size);
        means[line] = sum / p.positions;
      }
    }
    // The same for every map of the call.
    const int outer_phase = phase_of<kVec>(g, t, t.outer, sample, p.phase_batch);
    const int inner_phase = phase_of<kVec>(g, t, t.inner, sample, p.phase_batch);
    wait_for_copies();
    __syncthreads();
    for_columns(g, t, [&](const Column& c) {
      const ColumnPlace place = column_place(g, t, c, inner_phase);
      const T* x_at = x_tile + place.first;
      T* dx_at = dx_tile + place.first;
      const auto store = [&](float dx) {
        if (p.residual.data != nullptr) dx += to_float(*dx_at);
        *dx_at = from_float<T>(dx);
        dx_at += place.step;
      };
      const float offset = p.dx.data == nullptr ? 0 : means[c.line];
      const int rows = c.end - c.begin;
      if (p.dv.data == nullptr) {
#pragma unroll 1
        for (int row = 0; row < rows; ++row) store(offset);
        return;
      }
      const auto x = [&] {
        const float value = p.x.data == nullptr ? 0 : to_float(*x_at);
        x_at += place.step;
        return value;
      };
      convolve_column_back(taps + c.line * kTaps, NeighboursWalk<T>(g, t, c, outer_phase, dv_tile), c.begin > 0, rows,
                           c.end < g.height, offset, x, store, sums);
    });
    __syncthreads();
    if (p.dx.data != nullptr) {
      store_box<T, kVec>(g, t, t.inner, p.dx, sample, dx_tile);
      __syncthreads();
    }
  }
  if (p.taps_ptr == nullptr) return;
  float* all_sums = reinterpret_cast<float*>(dv_tile);
#pragma unroll
  for (int k = 0; k < kTaps; ++k) all_sums[k * kBlock + threadIdx.x] = sums[k];
  __syncthreads();
  const int64_t part = t.first_sample / g.samples * t.groups + t.group;
  float* out = p.taps_ptr + part * kTaps * g.channels + t.first_line;
  sum_lines(g, t, kTaps, all_sums, [&](int k, int line, float total) { out[int64_t{k} * g.channels + line] = total; });
}

// <drow, shifted mean> over the elements of a chunk, for every tap, by one warp.
template <class T>
__device__ inline void filter_partials(const ProducerBackwardParams& p, const void* drow_ptr, int64_t chunk,
                                       float* partials) {
  constexpr int kEach = kFilterChunk / kWarp;
  const ProducerGrid& g = p.grid;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = chunk * kFilterChunk + lane;
  const int64_t elements = g.batch * g.channels;
  const T* mean = static_cast<const T*>(p.mean_ptr);
  float drow[kEach];
  int channel[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int64_t at = first + e * kWarp;
    drow[e] = at < elements ? load_scalar(static_cast<const T*>(drow_ptr) + at) : 0;
    channel[e] = at < elements ? static_cast<int>(at % g.channels) : -p.filter_size;
  }
#pragma unroll 1
  for (int i = 0; i < p.filter_size; ++i) {
    const int shift = i - p.filter_size / 2;
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int shifted = channel[e] + shift;
      if (shifted >= 0 && shifted < g.channels) sum += drow[e] * load_scalar(mean + first + e * kWarp + shift);
    }
    sum = sum_warp(sum);
    if (lane == 0) partials[i * p.chunks + chunk] = sum;
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kBlock, kBackwardBlocks)
    layer_producer_bwd_kernel(const __grid_constant__ ProducerBackwardParams p) {
  ELA_DYNAMIC_SHARED(unsigned char, memory);
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    if (item < p.tile_items) {
      produce_back_tile<T, kVec>(p, static_cast<unsigned>(item), memory);
      __syncthreads();
      continue;
    }
    const int64_t chunk = (item - p.tile_items) * kWarps + threadIdx.x / kWarp;
    if (chunk >= p.chunks) continue;
    if (p.wants_wq) filter_partials<T>(p, p.dquery_ptr, chunk, p.filters_ptr);
    if (p.wants_wk) filter_partials<T>(p, p.dkey_ptr, chunk, p.filters_ptr + p.filter_size * p.chunks);
  }
}

}  // namespace ela::cuda
