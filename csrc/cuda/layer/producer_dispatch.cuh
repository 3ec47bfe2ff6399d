// From a call of a layer's producer to its launches. Two instances of each kernel: 16-byte vectors, and single
// elements.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/layer/producer.cuh"
#include "cuda/layer/producer.h"
#include "cuda/layer/producer_backward.cuh"
#include "cuda/layer/producer_filters.cuh"

namespace ela::cuda {

inline bool is_valid(const ImageShape& s) {
  return s.batch >= 1 && s.channels >= 1 && s.channels < kMaxChannels && s.height >= 1 && s.height < kMaxSide &&
         s.width >= 1 && s.width < kMaxSide;
}

// Whether the tiles of every map of a call can be read in vectors of 16 bytes. A stride that no address is computed
// with does not count.
class TileAlignment {
 public:
  TileAlignment(const ImageShape& s, const ProducerGrid& g, int64_t vec) : shape_(s), vec_(vec), rows_(g.rows + 2) {
    // A planar tile has to be one run of elements.
    fits_ = s.interleaved ? s.channels % vec == 0 : g.tiles_across == 1;
  }

  void see(const MapView& map) {
    if (map.data == nullptr) return;
    fits_ = fits_ && reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
    if (shape_.interleaved) {
      fits_ = fits_ && (shape_.batch == 1 || map.batch % vec_ == 0);
      fits_ = fits_ && (shape_.positions() == 1 || map.inner % vec_ == 0);
      fits_ = fits_ && map.inner * shape_.width * rows_ < (int64_t{1} << 31);
      return;
    }
    // A run may begin within a vector, but at the same place in all maps.
    fits_ = fits_ && (shape_.channels == 1 || map.inner == shape_.positions());
    if (batch_ < 0) batch_ = map.batch;
    fits_ = fits_ && (shape_.batch == 1 || (map.batch - batch_) % vec_ == 0);
  }

  bool vectors() const { return fits_; }
  // A batch stride that says where in a vector the runs of all maps begin.
  int64_t batch() const { return batch_ < 0 ? 0 : batch_; }

 private:
  ImageShape shape_;
  int64_t vec_, rows_;
  int64_t batch_ = -1;
  bool fits_;
};

template <class T>
int producer_forward(const Target& target, const ProducerCall& c) {
  if (!is_valid(c.shape)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  constexpr int kVec = kFullVector<T>;
  ProducerParams p;
  p.grid = plan_producer(c.shape, sizeof(T), false);
  if (p.grid.items > kMaxItems) return finish(cudaErrorInvalidConfiguration);
  p.x = c.x;
  p.v = c.v;
  p.wv = c.wv;
  p.sums_ptr = c.sums;
  p.outer_bytes = static_cast<int>(tile_bytes<T>(p.grid.outer_elements()));
  TileAlignment alignment(c.shape, p.grid, kVec);
  alignment.see(c.x);
  alignment.see(c.v);
  const auto kernel = alignment.vectors() ? &layer_producer_fwd_kernel<T, kVec> : &layer_producer_fwd_kernel<T, 1>;
  return finish(launch(kernel, p, p.grid.items, producer_shared_bytes<T>(p.grid), target.stream));
}

template <class T>
cudaError_t launch_tiles(const ProducerBackwardCall& c, const ProducerPartials& partials, const ProducerGrid& grid,
                         void* stream) {
  constexpr int kVec = kFullVector<T>;
  ProducerBackwardParams p;
  p.grid = grid;
  p.dv = c.dv;
  p.x = c.dwv == nullptr ? MapView{} : c.x;
  p.residual = c.dx.data == nullptr ? MapView{} : c.residual;
  p.dx = c.dx;
  p.wants_wq = c.dwq != nullptr;
  p.wants_wk = c.dwk != nullptr;
  p.chunks = partials.chunks;
  p.tile_items = c.dx.data != nullptr || c.dwv != nullptr ? grid.items : 0;
  p.items = p.tile_items + (p.wants_wq || p.wants_wk ? ceil_div<int64_t>(p.chunks, kWarps) : 0);
  if (p.items > kMaxItems) return cudaErrorInvalidConfiguration;
  p.filter_size = static_cast<int>(c.filter_size);
  p.outer_bytes = static_cast<int>(backward_outer_bytes<T>(grid));
  p.inner_bytes = static_cast<int>(tile_bytes<T>(grid.inner_elements()));
  p.positions = static_cast<float>(c.shape.positions());
  p.wv = c.wv;
  p.dquery_ptr = c.dquery;
  p.dkey_ptr = c.dkey;
  p.wq = c.wq;
  p.wk = c.wk;
  p.mean_ptr = c.mean;
  p.taps_ptr = c.dwv == nullptr ? nullptr : c.workspace;
  p.filters_ptr = c.workspace + partials.taps(c.shape.channels);
  TileAlignment alignment(c.shape, grid, kVec);
  for (const MapView& map : {p.dv, p.x, p.residual, p.dx}) alignment.see(map);
  p.phase_batch = alignment.batch();
  const auto kernel = alignment.vectors() ? &layer_producer_bwd_kernel<T, kVec> : &layer_producer_bwd_kernel<T, 1>;
  return launch(kernel, p, p.items, producer_backward_shared_bytes<T>(grid), stream);
}

inline bool is_valid(const ProducerBackwardCall& c) {
  const bool wants_filters = c.dwv != nullptr || c.dwq != nullptr || c.dwk != nullptr;
  return is_valid(c.shape) && c.filter_size >= 1 && c.filter_size <= kMaxFilterSize &&
         (c.dquery == nullptr || c.wq.data != nullptr) && (c.dkey == nullptr || c.wk.data != nullptr) &&
         (c.dwv == nullptr || c.dv.data != nullptr) && (c.dwq == nullptr || c.dquery != nullptr) &&
         (c.dwk == nullptr || c.dkey != nullptr) && (!wants_filters || c.workspace != nullptr);
}

template <class T>
int producer_backward(const Target& target, const ProducerBackwardCall& c) {
  if (!is_valid(c)) return cudaErrorInvalidValue;
  const bool wants_filters = c.dwv != nullptr || c.dwq != nullptr || c.dwk != nullptr;
  if (c.dx.data == nullptr && !wants_filters) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  const ProducerGrid grid = plan_producer(c.shape, sizeof(T), true);
  const ProducerPartials partials = producer_partials(grid);
  const cudaError_t code = launch_tiles<T>(c, partials, grid, target.stream);
  if (code != cudaSuccess || !wants_filters) return finish(code);
  return finish(launch_filter_sums(c, partials, target.stream));
}

template <class T>
constexpr ProducerKernels producer_kernels_of() {
  return {&producer_forward<T>, &producer_backward<T>};
}

}  // namespace ela::cuda
