// The gradient of a value, gathered from what the layers that retrieved it left:
//
//   dv = sum_m w_m dout_m + alpha_m u_m - beta_m v
#pragma once

#include "cpu/position_backward.h"

namespace ela::ELA_ISA {

// Of a plane of one layer: from a position of sample b on.
template <class A>
inline const A* plane_of(const PositionSource& m, const void* planes, int64_t b, int64_t n) {
  return static_cast<const A*>(planes) + b * m.batch + n;
}

// Adds one layer's part to `sum`, from a channel and position on.
template <class T, class Lanes>
inline void add_part(Vec<T>& sum, const T* dout, const T* query, int64_t i, Vec<T> weight, Vec<T> alpha, Vec<T> u,
                     Lanes lanes) {
  if (query != nullptr) u *= load_n(query + i, lanes);
  sum += alpha * u;
  if (dout != nullptr) sum += weight * load_n(dout + i, lanes);
}

// kVectors vectors of channels at one position of an interleaved map. The layers' factors are `step` elements apart.
template <class T, int kVectors, class Lanes>
inline void gather_channels(const PositionGatherParams& g, const PositionTile& at, int64_t n, int64_t c, Acc<T> shrink,
                            const Acc<T>* factors, Lanes lanes) {
  using A = Acc<T>;
  // A processor follows no more than some runs of memory, and there are as many as layers.
  constexpr int64_t kAhead = 2 * kPositionVectors * kLanes<T>;
  const T* value = lane_of<T>(g.value, at, true, c, n);
  Vec<T> sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = -shrink * load_n(value + v * kLanes<T>, lanes);
  for (int64_t i = 0; i < g.count; ++i) {
    const PositionSource& m = g.sources[i];
    const Vec<T> weight = broadcast<T>(factors != nullptr ? factors[i * 2 * kLanes<T>]
                                                          : normal_factor(*plane_of<A>(m, m.weights, at.b, n)));
    const Vec<T> alpha = broadcast<T>(factors != nullptr ? factors[(i * 2 + 1) * kLanes<T>]
                                                         : normal_factor(*plane_of<A>(m, m.alpha, at.b, n)));
    const T *dout = lane_of<T>(m.dout, at, true, c, n), *query = lane_of<T>(m.query, at, true, c, n);
    const A* row = static_cast<const A*>(m.row) + c;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t k = v * kLanes<T>;
      if (dout != nullptr && begins_line<T>(k)) fetch_ahead(dout + k + kAhead);
      add_part<T>(sum[v], dout, query, k, weight, alpha, load_n(row + k, lanes), lanes);
    }
  }
  T* to = lane_of<T>(g.dvalue, at, true, c, n);
  for (int v = 0; v < kVectors; ++v) store_n(to + v * kLanes<T>, sum[v], lanes);
}

// A vector of positions of an interleaved map.
template <class T>
inline void gather_positions(const PositionGatherParams& g, const PositionTile& at, int64_t n, int count) {
  using A = Acc<T>;
  constexpr int kL = kLanes<T>;
  constexpr int64_t wide = kPositionVectors * kL;
  alignas(ELA_VECTOR_BYTES) A copied[kPositionFactors * 2 * kL], shrink[kL];
  const bool is_copied = g.count <= kPositionFactors;
  Vec<T> total{};
  for (int64_t i = 0; i < g.count; ++i) {
    const PositionSource& m = g.sources[i];
    total += load_n(plane_of<A>(m, m.beta, at.b, n), count);
    if (!is_copied) continue;
    store_n(copied + i * 2 * kL, normal_factors<T>(load_n(plane_of<A>(m, m.weights, at.b, n), count)), kL);
    store_n(copied + (i * 2 + 1) * kL, normal_factors<T>(load_n(plane_of<A>(m, m.alpha, at.b, n), count)), kL);
  }
  store_n(shrink, total, kL);
  for (int k = 0; k < count; ++k) {
    const A* factors = is_copied ? copied + k : nullptr;
    int64_t c = 0;
    for (; c + wide <= g.shape.channels; c += wide) {
      gather_channels<T, kPositionVectors>(g, at, n + k, c, shrink[k], factors, Count<kL>{});
    }
    for_vectors<T>(g.shape.channels - c, [&](int64_t j, auto lanes) {
      gather_channels<T, 1>(g, at, n + k, c + j, shrink[k], factors, lanes);
    });
  }
}

// Adds the parts of kDepths layers, from the first on, to kChannels channels at the positions of a planar tile.
template <class T, int kDepths, int kChannels>
inline void gather_layers(const PositionGatherParams& g, const PositionTile& at, int64_t c, int64_t first,
                          Acc<T>* sums) {
  using A = Acc<T>;
  const A *weights[kDepths], *alphas[kDepths], *rows[kDepths];
  const T *douts[kDepths], *queries[kDepths];
  for (int j = 0; j < kDepths; ++j) {
    const PositionSource& m = g.sources[first + j];
    weights[j] = plane_of<A>(m, m.weights, at.b, at.first), alphas[j] = plane_of<A>(m, m.alpha, at.b, at.first);
    rows[j] = static_cast<const A*>(m.row) + c;
    douts[j] = lane_of<T>(m.dout, at, false, c, at.first), queries[j] = lane_of<T>(m.query, at, false, c, at.first);
  }
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    Vec<T> weight[kDepths], alpha[kDepths];
    for (int j = 0; j < kDepths; ++j)
      weight[j] = load_n(weights[j] + i, lanes), alpha[j] = load_n(alphas[j] + i, lanes);
    for (int k = 0; k < kChannels; ++k) {
      A* to = sums + k * kPositionTile + i;
      Vec<T> sum = load_n(to, lanes);
      for (int j = 0; j < kDepths; ++j) {
        const PositionSource& m = g.sources[first + j];
        const T* dout = douts[j] == nullptr ? nullptr : douts[j] + k * m.dout.inner;
        const T* query = queries[j] == nullptr ? nullptr : queries[j] + k * m.query.inner;
        if (dout != nullptr && begins_line<T>(i)) fetch_ahead(dout + kChannels * m.dout.inner + i);
        add_part<T>(sum, dout, query, i, weight[j], alpha[j], broadcast<T>(rows[j][k]), lanes);
      }
      store_n(to, sum, lanes);
    }
  });
}

template <class T, int kChannels>
inline void gather_planar(const PositionGatherParams& g, const PositionTile& at, int64_t c, const Acc<T>* shrink) {
  using A = Acc<T>;
  alignas(ELA_VECTOR_BYTES) A sums[kChannels * kPositionTile];
  for (int k = 0; k < kChannels; ++k) {
    const T* value = lane_of<T>(g.value, at, false, c + k, at.first);
    for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
      store_n(sums + k * kPositionTile + i, -load_n(shrink + i, lanes) * load_n(value + i, lanes), lanes);
    });
  }
  int64_t i = 0;
  for (; i + kPositionDepths <= g.count; i += kPositionDepths)
    gather_layers<T, kPositionDepths, kChannels>(g, at, c, i, sums);
  for (; i < g.count; ++i) gather_layers<T, 1, kChannels>(g, at, c, i, sums);
  for (int k = 0; k < kChannels; ++k) {
    T* to = lane_of<T>(g.dvalue, at, false, c + k, at.first);
    for_vectors<T>(at.count,
                   [&](int64_t n, auto lanes) { store_n(to + n, load_n(sums + k * kPositionTile + n, lanes), lanes); });
  }
}

template <class T>
void position_gather_kernel(const PositionGatherParams& g, int threads) {
  using A = Acc<T>;
  const Shape& s = g.shape;
  for_position_tiles<T>(s, 1, threads, [&](const PositionTile& at) {
    if (s.interleaved) {
      for_vectors<T>(at.count, [&](int64_t i, int count) { gather_positions<T>(g, at, at.first + i, count); });
      return;
    }
    alignas(ELA_VECTOR_BYTES) A shrink[kPositionTile];
    for_vectors<T>(at.count, [&](int64_t n, auto lanes) {
      Vec<T> total{};
      for (int64_t i = 0; i < g.count; ++i) {
        total += load_n(plane_of<A>(g.sources[i], g.sources[i].beta, at.b, at.first + n), lanes);
      }
      store_n(shrink + n, total, lanes);
    });
    int64_t c = 0;
    for (; c + kPositionChannels <= s.channels; c += kPositionChannels)
      gather_planar<T, kPositionChannels>(g, at, c, shrink);
    for (; c < s.channels; ++c) gather_planar<T, 1>(g, at, c, shrink);
  });
}

}  // namespace ela::ELA_ISA
