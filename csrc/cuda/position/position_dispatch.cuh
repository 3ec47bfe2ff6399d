// From a call to its launch: which instance of a kernel, with which plan and which parameters.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/position/position.h"
#include "cuda/position/position_backward.cuh"
#include "cuda/position/position_gather.cuh"

namespace ela::cuda {

constexpr int kUsualPositionDepth = 32;

inline MapStrides strides_of(const MapView& map) { return {map.batch, map.inner}; }
inline MapStrides strides_of(const MapList& maps) { return {maps.batch, maps.inner}; }

// Whether all maps can be read in vectors of 16 bytes, and beside them of interleaved ones the rows, of planar ones the
// planes. A stride that no address is computed with does not count.
class PositionAlignment {
 public:
  PositionAlignment(const Shape& s, int64_t vec) : shape_(s), vec_(vec) {
    fits_ = (s.interleaved ? s.channels : s.positions) % vec == 0;
  }
  void see_row(const void* row) { see_address(shape_.interleaved ? row : nullptr); }
  void see_plane(const void* plane) { see_address(shape_.interleaved ? nullptr : plane); }
  void see(const void* data, int64_t batch, int64_t inner) {
    if (data == nullptr) return;
    see_address(data);
    const bool one_row = (shape_.interleaved ? shape_.positions : shape_.channels) == 1;
    fits_ = fits_ && (shape_.batch == 1 || batch % vec_ == 0) && (one_row || inner % vec_ == 0);
  }
  void see(const MapView& map) { see(map.data, map.batch, map.inner); }
  void see(const MapList& maps) {
    for (int64_t i = 0; i < maps.count; ++i) see(maps.data[i], maps.batch, maps.inner);
  }
  void see(const PositionCall& c) {
    see_row(c.row), see_plane(c.weights);
    see(c.query), see(c.values), see(c.keys);
  }
  bool vectors() const { return fits_; }

 private:
  void see_address(const void* data) { fits_ = fits_ && reinterpret_cast<uintptr_t>(data) % 16 == 0; }

  Shape shape_;
  int64_t vec_;
  bool fits_;
};

inline bool is_valid(const Shape& s) {
  return s.batch >= 1 && s.positions >= 1 && s.heads == 1 && s.channels >= 1 && s.channels < kMaxChannels;
}

inline bool is_valid(const PositionCall& c) {
  const int64_t depth = c.values.count;
  return is_valid(c.shape) && depth >= 1 && depth <= kMaxDepth && (c.keys.count == 0 || c.keys.count == depth) &&
         (c.prev == nullptr || (c.prev_depth >= 1 && c.prev_depth <= depth));
}

inline cudaError_t checked(const PositionGrid& g) {
  return g.tiles > kMaxItems ? cudaErrorInvalidConfiguration : cudaSuccess;
}

template <int kMax>
void fill(PositionParams<kMax>& p, const PositionCall& c, const PositionGrid& grid) {
  p.grid = grid;
  p.normed = c.normed;
  p.eps = c.eps;
  p.depth = static_cast<int>(c.values.count);
  p.prev_depth = c.prev == nullptr ? 0 : static_cast<int>(c.prev_depth);
  p.key_count = static_cast<int>(c.keys.count);
  p.query_strides = strides_of(c.query);
  p.value_strides = strides_of(c.values);
  p.key_strides = strides_of(c.keys);
  p.row_ptr = c.row;
  p.query_ptr = c.query.data;
  p.prev_ptr = c.prev;
  p.weights_ptr = c.weights;
  for (int t = 0; t < p.depth; ++t) {
    p.value_ptr[t] = c.values.data[t];
    p.key_ptr[t] = p.key_count == 0 ? nullptr : c.keys.data[t];
  }
}

template <class T, int kVec, bool kInterleaved, bool kHeld, int kMax>
cudaError_t launch_forward(const PositionForwardCall& c, const PositionGrid& grid, void* stream) {
  PositionForwardParams<kMax> p;
  fill(p.call, c.call, grid);
  p.out_strides = strides_of(c.out);
  p.out_ptr = c.out.data;
  p.kl_ptr = c.call.prev == nullptr ? nullptr : c.kl;
  constexpr int kMaps = kHeld ? kHeldMaps<kVec, kInterleaved> : kRoundMaps;
  const int64_t shared = team_floats(grid, kInterleaved, kVec, 2 * kMaps, kMaps + 1);
  return launch(&position_fwd_kernel<T, kVec, kInterleaved, kHeld, kMax>, p, grid.items, 4 * shared, stream);
}

template <class T, int kVec, bool kInterleaved>
cudaError_t launch_forward(const PositionForwardCall& c, void* stream) {
  const PositionGrid grid = plan_positions(c.call.shape, kVec, sizeof(T));
  if (checked(grid) != cudaSuccess) return checked(grid);
  if (!grid.is_held || c.call.keys.count != 0) {
    return launch_forward<T, kVec, kInterleaved, false, kMaxDepth>(c, grid, stream);
  }
  if constexpr (kVec > 1) {
    if (c.call.values.count <= kUsualPositionDepth) {
      return launch_forward<T, kVec, kInterleaved, true, kUsualPositionDepth>(c, grid, stream);
    }
  }
  return launch_forward<T, kVec, kInterleaved, true, kMaxDepth>(c, grid, stream);
}

// Calls launch(vec, interleaved), both as types.
template <class T, class Launch>
cudaError_t by_form(const PositionAlignment& alignment, const Shape& s, const Launch& launch) {
  using Full = std::integral_constant<int, kFullVector<T>>;
  using Single = std::integral_constant<int, 1>;
  if (alignment.vectors()) {
    return s.interleaved ? launch(Full(), std::true_type()) : launch(Full(), std::false_type());
  }
  return s.interleaved ? launch(Single(), std::true_type()) : launch(Single(), std::false_type());
}

template <class T>
int position_forward(const Target& target, const PositionForwardCall& c) {
  if (!is_valid(c.call)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  PositionAlignment alignment(c.call.shape, kFullVector<T>);
  alignment.see(c.call);
  alignment.see(c.out);
  return finish(by_form<T>(alignment, c.call.shape, [&](auto vec, auto interleaved) {
    return launch_forward<T, decltype(vec)::value, decltype(interleaved)::value>(c, target.stream);
  }));
}

template <class T, int kVec, bool kInterleaved, bool kKeys, int kMax>
cudaError_t launch_backward(const PositionBackwardCall& c, const PositionGrid& grid, void* stream) {
  PositionBackwardParams<kMax> p;
  fill(p.call, c.call, grid);
  p.dout_strides = strides_of(c.dout);
  p.dquery_strides = strides_of(c.dquery);
  p.dvalue_strides = strides_of(c.dvalues);
  p.dkey_strides = strides_of(c.dkeys);
  p.dout_ptr = c.dout.data;
  p.dweights_ptr = c.dweights;
  p.dkl_ptr = c.dkl;
  p.planes_ptr = c.planes;
  p.plane = c.call.shape.batch * c.call.values.count * c.call.shape.positions;
  p.row_parts_ptr = c.row_parts;
  p.dquery_ptr = c.dquery.data;
  p.dprev_ptr = c.dprev;
  p.has_maps = c.row_parts != nullptr || c.dquery.data != nullptr || c.dvalues.count + c.dkeys.count != 0;
  for (int t = 0; t < p.call.depth; ++t) {
    p.dvalue_ptr[t] = c.dvalues.count == 0 ? nullptr : const_cast<void*>(c.dvalues.data[t]);
    p.dkey_ptr[t] = c.dkeys.count == 0 ? nullptr : const_cast<void*>(c.dkeys.data[t]);
  }
  constexpr int kMaps = kSumMaps<kInterleaved>;
  constexpr int64_t kRowParts = PositionTile<T, kVec, kInterleaved, kGradientVectors<kVec>>::kOwn * kBlock;
  const int64_t sums = team_floats(grid, kInterleaved, kVec, 3 * kMaps, 1);
  const int64_t shared = larger<int64_t>(sums, c.row_parts == nullptr ? 0 : kRowParts);
  return launch(&position_bwd_kernel<T, kVec, kInterleaved, kKeys, kMax>, p, grid.items, 4 * shared, stream);
}

inline bool is_valid(const PositionBackwardCall& c) {
  const int64_t depth = c.call.values.count;
  return is_valid(c.call) && c.planes != nullptr && (c.dvalues.count == 0 || c.dvalues.count == depth) &&
         (c.dkeys.count == 0 || (c.dkeys.count == depth && c.call.keys.count == depth)) &&
         (c.dquery.data == nullptr || c.call.query.data != nullptr) && (c.dkl == nullptr || c.call.prev != nullptr) &&
         (c.dprev == nullptr || c.dkl != nullptr);
}

// `parts`: how many rows of partial sums are written.
template <class T>
int position_backward(const Target& target, const PositionBackwardCall& c, int64_t* parts) {
  if (!is_valid(c)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  PositionAlignment alignment(c.call.shape, kFullVector<T>);
  alignment.see(c.call);
  alignment.see(c.dout), alignment.see(c.dquery), alignment.see(c.dvalues), alignment.see(c.dkeys);
  alignment.see_plane(c.planes);
  alignment.see_plane(c.planes + c.call.shape.batch * c.call.values.count * c.call.shape.positions);
  return finish(by_form<T>(alignment, c.call.shape, [&](auto vec, auto interleaved) {
    constexpr int kVec = decltype(vec)::value;
    constexpr bool kInterleaved = decltype(interleaved)::value;
    const PositionGrid grid = plan_position_runs(c.call.shape, kVec, sizeof(T));
    *parts = grid.items;
    if (checked(grid) != cudaSuccess) return checked(grid);
    if (c.call.keys.count != 0) {
      return launch_backward<T, kVec, kInterleaved, true, kMaxDepth>(c, grid, target.stream);
    }
    if constexpr (kVec > 1) {
      if (c.call.values.count <= kUsualPositionDepth) {
        return launch_backward<T, kVec, kInterleaved, false, kUsualPositionDepth>(c, grid, target.stream);
      }
    }
    return launch_backward<T, kVec, kInterleaved, false, kMaxDepth>(c, grid, target.stream);
  }));
}

template <class T, int kVec, bool kInterleaved, int kMax>
cudaError_t launch_gather(const PositionGatherCall& c, const PositionGrid& grid, void* stream) {
  const Shape& s = c.shape;
  PositionGatherParams<kMax> p;
  p.grid = grid;
  p.sources = static_cast<int>(c.douts.count);
  p.value_strides = strides_of(c.value);
  p.dvalue_strides = strides_of(c.dvalue);
  p.dout_strides = strides_of(c.douts);
  p.query_strides = strides_of(c.queries);
  p.carry_strides = {s.channels * s.positions, s.interleaved ? s.channels : s.positions};
  p.value_ptr = c.value.data;
  p.dvalue_ptr = c.dvalue.data;
  p.carried_ptr = c.carried;
  p.carry_ptr = c.carry;
  for (int m = 0; m < p.sources; ++m) {
    p.dout_ptr[m] = c.douts.data[m];
    p.query_ptr[m] = c.queries.data[m];
    p.weights_ptr[m] = static_cast<const float*>(c.weights[m]);
    p.alpha_ptr[m] = static_cast<const float*>(c.alphas[m]);
    p.beta_ptr[m] = static_cast<const float*>(c.betas[m]);
    p.row_ptr[m] = static_cast<const float*>(c.rows[m]);
    p.batch[m] = c.batches[m];
  }
  return launch(&position_gather_kernel<T, kVec, kInterleaved, kMax>, p, grid.items, 0, stream);
}

template <class T>
int position_gather(const Target& target, const PositionGatherCall& c) {
  const int64_t sources = c.douts.count;
  if (!is_valid(c.shape) || sources < 1 || sources > kMaxDepth || c.queries.count != sources) {
    return cudaErrorInvalidValue;
  }
  const DeviceGuard guard(target.device);
  if (guard.code() != cudaSuccess) return finish(guard.code());
  PositionAlignment alignment(c.shape, kFullVector<T>);
  alignment.see(c.value), alignment.see(c.dvalue), alignment.see(c.douts), alignment.see(c.queries);
  for (int64_t m = 0; m < sources; ++m) {
    alignment.see_row(c.rows[m]);
    alignment.see_plane(c.weights[m]), alignment.see_plane(c.alphas[m]), alignment.see_plane(c.betas[m]);
  }
  return finish(by_form<T>(alignment, c.shape, [&](auto vec, auto interleaved) {
    constexpr int kVec = decltype(vec)::value;
    constexpr bool kInterleaved = decltype(interleaved)::value;
    const PositionGrid grid = plan_positions(c.shape, kVec, sizeof(T));
    if (checked(grid) != cudaSuccess) return checked(grid);
    if constexpr (kVec > 1) {
      if (sources <= kUsualPositionDepth) {
        return launch_gather<T, kVec, kInterleaved, kUsualPositionDepth>(c, grid, target.stream);
      }
    }
    return launch_gather<T, kVec, kInterleaved, kMaxDepth>(c, grid, target.stream);
  }));
}

template <class T>
constexpr PositionKernels position_kernels_of() {
  return {&position_forward<T>, &position_backward<T>, &position_gather<T>};
}

}  // namespace ela::cuda
