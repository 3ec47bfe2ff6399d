// The gradients of attention over depth at every position. With w_t the weights, s_t = r_t d_t the scores, d_t = <u,
// k_t> and ds_t their gradients:
//
//   ds_t = w_t (g_t - sum_j w_j g_j) + dkl (w_t sum_j p_j - p_t),   g_t = <dout, v_t> + dweights_t
//   dv_t = w_t dout                                                 of the sum
//   dk_t = alpha_t u - beta_t k_t,   alpha_t = ds_t r_t,   beta_t = ds_t r_t^2 s_t / C    (r = 1, beta = 0 without a
//   norm) du   = sum_t alpha_t k_t
//
// Push: all of it here, T maps and dout read from memory once, T maps written. Pull: alpha and beta [B, T, N] are left,
// and the gradient of a value is gathered once from the layers that retrieved it, each a dout, a w, an alpha and a u.
#pragma once

#include "cpu/position.h"
#include "cpu/stream.h"

namespace ela::ELA_ISA {

// Bytes of all gradients of maps from which on they are stored past the caches. Measured, reading all of them
// afterwards: less time from 8 MiB on, the same below.
constexpr int64_t kStreamedBytes = 8 * 1024 * 1024;

// Factors of a key's gradient at a position; those of depths lie `step` elements apart.
template <class A>
struct PositionFactors {
  const A *alpha, *beta, *weight;
  int64_t step;
};

// Planes of coefficients [3, B, T, N]: alpha, beta and what is worked in.
template <class A>
inline A* coefficient_at(const PositionBackwardParams& g, int which, const PositionTile& at, int64_t t) {
  const PositionParams& p = g.call;
  A* planes = static_cast<A*>(g.coefficients) + which * p.shape.batch * p.depth * p.shape.positions;
  return plane_at<A>(planes, p.shape, p.depth, at, t);
}

// From <dout, v>, <u, k> and r in the three planes: alpha and beta, and the gradient of the previous weights.
template <class T>
inline void position_coefficients(const PositionBackwardParams& g, const PositionTile& at) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  const int64_t step = p.shape.positions;
  const A per_channel = 1 / static_cast<A>(p.shape.channels);
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    A* alpha = coefficient_at<A>(g, 0, at, 0) + i;
    A* beta = coefficient_at<A>(g, 1, at, 0) + i;
    const A* inverse = coefficient_at<A>(g, 2, at, 0) + i;
    const A* weights = plane_at<A>(p.weights, p.shape, p.depth, at, 0) + i;
    const A* dweights = g.dweights == nullptr ? nullptr : plane_at<A>(g.dweights, p.shape, p.depth, at, 0) + i;
    const A* prev = p.prev == nullptr ? nullptr : plane_at<A>(p.prev, p.shape, p.prev_depth, at, 0) + i;
    const auto arrived = [&](int64_t t) {
      Vec<T> found{};
      if (g.dout != nullptr) found = load_n(alpha + t * step, lanes);
      if (dweights != nullptr) found += load_n(dweights + t * step, lanes);
      return found;
    };
    Vec<T> mean{}, mass{}, dkl{};
    for (int64_t t = 0; t < p.depth; ++t) mean += load_n(weights + t * step, lanes) * arrived(t);
    if (g.dkl != nullptr) {
      dkl = load_n(static_cast<const A*>(g.dkl) + at.b * step + at.first + i, lanes);
      for (int64_t t = 0; t < p.prev_depth; ++t) mass += load_n(prev + t * step, lanes);
    }
    if (g.dprev != nullptr) {
      const Normaliser<T> by = normaliser<T>(beta, step, p.depth, lanes, true);
      A* dprev = plane_at<A>(g.dprev, p.shape, p.prev_depth, at, 0) + i;
      for (int64_t t = 0; t < p.prev_depth; ++t) {
        for (int k = 0; k < lanes; ++k) {
          const A was = prev[t * step + k], log_weight = beta[t * step + k] - by.highest[k] - by.log_sum[k];
          dprev[t * step + k] = was == 0 ? 0 : dkl[k] * (logarithm(was) + 1 - log_weight);
        }
      }
    }
    for (int64_t t = 0; t < p.depth; ++t) {
      const Vec<T> weight = load_n(weights + t * step, lanes);
      Vec<T> dscore = weight * (arrived(t) - mean);
      if (g.dkl != nullptr) {
        dscore += dkl * mass * weight;
        if (t < p.prev_depth) dscore -= dkl * load_n(prev + t * step, lanes);
      }
      Vec<T> shrink{}, towards = dscore;
      if (p.normed) {
        const Vec<T> r = load_n(inverse + t * step, lanes);
        towards = dscore * r;
        shrink = towards * r * load_n(beta + t * step, lanes) * per_channel;
      }
      store_n(alpha + t * step, towards, lanes);
      store_n(beta + t * step, shrink, lanes);
    }
  });
}

inline MapView gradient_map(const MapView* maps, int64_t t) { return maps == nullptr ? MapView{} : maps[t]; }

template <class T>
inline T* lane_of(const MapView& map, const PositionTile& at, bool interleaved, int64_t c, int64_t n) {
  if (map.data == nullptr) return nullptr;
  return const_cast<T*>(interleaved ? interleaved_at<T>(map, at.b, n, c) : planar_at<T>(map, at.b, c, n));
}

// The key of depth t and where it lies in the next tile, and where the gradients go, from a channel and position on;
// null where one is not wanted. Of a key that is the value itself, both parts go to dvalue.
template <class T>
struct PositionRuns {
  const T *key, *ahead;
  T *dvalue, *dkey;
  bool streams_value, streams_key;
};

template <class T>
inline PositionRuns<T> runs_of(const PositionBackwardParams& g, const PositionTile& at, int64_t t, int64_t c, int64_t n,
                               bool streams) {
  const Shape& s = g.call.shape;
  // Parts of lines of several planar maps at a time would leave the processor's buffers before they are whole.
  constexpr bool kIsLine = kLanes<T> * sizeof(T) == 64;
  streams = streams && (s.interleaved || kIsLine);
  const MapView& key = key_map(g.call, t);
  const T* k = lane_of<T>(key, at, s.interleaved, c, n);
  T* dvalue = lane_of<T>(gradient_map(g.dvalues, t), at, s.interleaved, c, n);
  T* dkey = lane_of<T>(gradient_map(g.dkeys, t), at, s.interleaved, c, n);
  return {k,    k + to_next_tile(s, key, at),     dvalue,
          dkey, streams && is_streamable(dvalue), streams && is_streamable(dkey)};
}

// Part of a vector is stored through the caches.
template <class T>
inline void put(T* to, Vec<T> x, bool, int lanes) {
  store_n(to, x, lanes);
}
template <class T>
inline void put(T* to, Vec<T> x, bool streams, Count<kLanes<T>> lanes) {
  streams ? stream(to, x) : store_n(to, x, lanes);
}

// Writes a vector of both gradients, `i` elements on; returns what it adds to du.
template <class T, class Lanes>
inline Vec<T> write_gradients(const PositionRuns<T>& to, int64_t i, bool is_own, Vec<T> alpha, Vec<T> beta,
                              Vec<T> weight, Vec<T> u, Vec<T> d, Lanes lanes) {
  if (begins_line<T>(i)) fetch_ahead(to.ahead + i);
  const Vec<T> k = load_n(to.key + i, lanes);
  const Vec<T> dkey = alpha * u - beta * k;
  if (to.dvalue != nullptr) put(to.dvalue + i, is_own ? weight * d + dkey : weight * d, to.streams_value, lanes);
  if (to.dkey != nullptr) put(to.dkey + i, dkey, to.streams_key, lanes);
  return alpha * k;
}

// kCount vectors of channels at one position, from channel c on. Its factors of depth t are `step` elements apart.
template <class T, int kCount, class Lanes>
inline void gradients_of_channels(const PositionBackwardParams& g, const PositionTile& at, int64_t i, int64_t c,
                                  const PositionFactors<Acc<T>>& factors, Acc<T>* partial, bool streams, Lanes lanes) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  const int64_t n = at.first + i;
  const T* d = g.dout == nullptr ? nullptr : lane_of<T>(*g.dout, at, true, c, n);
  const T* q = lane_of<T>(p.query, at, true, c, n);
  T* dq = lane_of<T>(g.dquery, at, true, c, n);
  const A* row = static_cast<const A*>(p.row) + c;
  const bool is_own = p.keys == nullptr;
  Vec<T> u[kCount], dout[kCount], du[kCount];
  for (int v = 0; v < kCount; ++v) {
    u[v] = load_n(row + v * kLanes<T>, lanes);
    if (q != nullptr) u[v] *= load_n(q + v * kLanes<T>, lanes);
    dout[v] = d == nullptr ? Vec<T>{} : load_n(d + v * kLanes<T>, lanes);
    du[v] = Vec<T>{};
  }
  for (int64_t t = 0; t < p.depth; ++t) {
    const int64_t of = t * factors.step;
    const Vec<T> alpha = broadcast<T>(factors.alpha[of]), beta = broadcast<T>(factors.beta[of]),
                 weight = broadcast<T>(factors.weight[of]);
    const PositionRuns<T> to = runs_of<T>(g, at, t, c, n, streams);
    for (int v = 0; v < kCount; ++v) {
      du[v] += write_gradients<T>(to, v * kLanes<T>, is_own, alpha, beta, weight, u[v], dout[v], lanes);
    }
  }
  for (int v = 0; v < kCount; ++v) {
    const int64_t k = v * kLanes<T>;
    if (dq != nullptr) store_n(dq + k, du[v] * load_n(row + k, lanes), lanes);
    if (q != nullptr) du[v] *= load_n(q + k, lanes);
    store_n(partial + c + k, load_n(partial + c + k, lanes) + du[v], lanes);
  }
}

// All channels at a vector of positions of an interleaved tile.
template <class T>
inline void gradients_of_positions(const PositionBackwardParams& g, const PositionTile& at, int64_t first, int count,
                                   Acc<T>* partial, bool streams) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  constexpr int kL = kLanes<T>;
  constexpr int64_t wide = kPositionVectors * kL;
  alignas(ELA_VECTOR_BYTES) A copied[kPositionFactors * 3 * kL];
  const int64_t step = p.shape.positions;
  PositionFactors<A> factors = {coefficient_at<A>(g, 0, at, 0) + first, coefficient_at<A>(g, 1, at, 0) + first,
                                plane_at<A>(p.weights, p.shape, p.depth, at, 0) + first, step};
  if (p.depth <= kPositionFactors) {
    for (int64_t t = 0; t < p.depth; ++t) {
      store_n(copied + t * 3 * kL, normal_factors<T>(load_n(factors.alpha + t * step, count)), kL);
      store_n(copied + (t * 3 + 1) * kL, normal_factors<T>(load_n(factors.beta + t * step, count)), kL);
      store_n(copied + (t * 3 + 2) * kL, normal_factors<T>(load_n(factors.weight + t * step, count)), kL);
    }
    factors = {copied, copied + kL, copied + 2 * kL, 3 * kL};
  }
  for (int k = 0; k < count; ++k) {
    const PositionFactors<A> of = {factors.alpha + k, factors.beta + k, factors.weight + k, factors.step};
    int64_t c = 0;
    for (; c + wide <= p.shape.channels; c += wide) {
      gradients_of_channels<T, kPositionVectors>(g, at, first + k, c, of, partial, streams, Count<kL>{});
    }
    for_vectors<T>(p.shape.channels - c, [&](int64_t j, auto lanes) {
      gradients_of_channels<T, 1>(g, at, first + k, c + j, of, partial, streams, lanes);
    });
  }
}

// kDepths depths, from t on, of kChannels channels at the positions of a planar tile; du is added up in `sums`, a tile
// for each channel.
template <class T, int kDepths, int kChannels>
inline void gradients_of_depths(const PositionBackwardParams& g, const PositionTile& at, int64_t c, int64_t t,
                                Acc<T>* sums, bool streams) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  const int64_t step = p.shape.positions;
  const A *weights = plane_at<A>(p.weights, p.shape, p.depth, at, t), *alphas = coefficient_at<A>(g, 0, at, t),
          *betas = coefficient_at<A>(g, 1, at, t);
  const T *d[kChannels], *q[kChannels];
  const A* row = static_cast<const A*>(p.row) + c;
  const bool is_own = p.keys == nullptr;
  PositionRuns<T> to[kChannels][kDepths];
  for (int k = 0; k < kChannels; ++k) {
    d[k] = g.dout == nullptr ? nullptr : lane_of<T>(*g.dout, at, false, c + k, at.first);
    q[k] = lane_of<T>(p.query, at, false, c + k, at.first);
    for (int j = 0; j < kDepths; ++j) to[k][j] = runs_of<T>(g, at, t + j, c + k, at.first, streams);
  }
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    Vec<T> alpha[kDepths], beta[kDepths], weight[kDepths];
    for (int j = 0; j < kDepths; ++j) {
      alpha[j] = load_n(alphas + j * step + i, lanes), beta[j] = load_n(betas + j * step + i, lanes);
      weight[j] = load_n(weights + j * step + i, lanes);
    }
    for (int k = 0; k < kChannels; ++k) {
      const Vec<T> u = p.query.data == nullptr ? broadcast<T>(row[k]) : row[k] * load_n(q[k] + i, lanes);
      const Vec<T> dout = g.dout == nullptr ? Vec<T>{} : load_n(d[k] + i, lanes);
      A* sum = sums + k * kPositionTile + i;
      Vec<T> du = t == 0 ? Vec<T>{} : load_n(sum, lanes);
      for (int j = 0; j < kDepths; ++j) {
        // The next channels' run, on another page: the processor guesses none of these.
        if (to[k][j].dvalue != nullptr && !to[k][j].streams_value && begins_line<T>(i)) {
          __builtin_prefetch(to[k][j].dvalue + kChannels * g.dvalues[t + j].inner + i, 1);
        }
        du += write_gradients<T>(to[k][j], i, is_own, alpha[j], beta[j], weight[j], u, dout, lanes);
      }
      store_n(sum, du, lanes);
    }
  });
}

template <class T, int kChannels>
inline void planar_gradients(const PositionBackwardParams& g, const PositionTile& at, int64_t c, Acc<T>* partial,
                             bool streams) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  alignas(ELA_VECTOR_BYTES) A sums[kChannels * kPositionTile];
  int64_t t = 0;
  for (; t + kPositionDepths <= p.depth; t += kPositionDepths) {
    gradients_of_depths<T, kPositionDepths, kChannels>(g, at, c, t, sums, streams);
  }
  for (; t < p.depth; ++t) gradients_of_depths<T, 1, kChannels>(g, at, c, t, sums, streams);
  for (int k = 0; k < kChannels; ++k) {
    const T* q = lane_of<T>(p.query, at, false, c + k, at.first);
    T* dq = lane_of<T>(g.dquery, at, false, c + k, at.first);
    const A by = static_cast<const A*>(p.row)[c + k];
    Vec<T> total{};
    for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
      const Vec<T> du = load_n(sums + k * kPositionTile + i, lanes);
      if (dq != nullptr) store_n(dq + i, du * by, lanes);
      total += q == nullptr ? du : du * load_n(q + i, lanes);
    });
    partial[c + k] += sum_lanes<T>(total);
  }
}

// The second pass over a tile: all gradients of maps, and the item's part of drow in `partial` [C].
template <class T>
inline void position_gradient_tile(const PositionBackwardParams& g, const PositionTile& at, Acc<T>* partial,
                                   bool streams) {
  const PositionParams& p = g.call;
  const Shape& s = p.shape;
  if (s.interleaved) {
    for_vectors<T>(at.count,
                   [&](int64_t i, int count) { gradients_of_positions<T>(g, at, i, count, partial, streams); });
    return;
  }
  int64_t c = 0;
  for (; c + kPositionChannels <= s.channels; c += kPositionChannels) {
    planar_gradients<T, kPositionChannels>(g, at, c, partial, streams);
  }
  for (; c < s.channels; ++c) planar_gradients<T, 1>(g, at, c, partial, streams);
}

// Of all gradients of values and keys that are wanted.
template <class T>
inline int64_t gradient_bytes(const PositionBackwardParams& g) {
  int64_t maps = 0;
  for (int64_t t = 0; t < g.call.depth; ++t) {
    maps += (gradient_map(g.dvalues, t).data != nullptr) + (gradient_map(g.dkeys, t).data != nullptr);
  }
  const Shape& s = g.call.shape;
  return maps * s.batch * s.channels * s.positions * static_cast<int64_t>(sizeof(T));
}

template <class T>
void position_backward_kernel(const PositionBackwardParams& g, int threads) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  const int64_t channels = p.shape.channels;
  A* partials = static_cast<A*>(g.workspace);
  // Gradients of values are written once, and need not stay.
  const int64_t maps = p.depth * (p.keys == nullptr ? 1 : 2) + 1;
  const int64_t block = position_block(p.shape);
  const bool streams = gradient_bytes<T>(g) >= kStreamedBytes;
  for_position_tiles<T>(p.shape, maps, threads, [&](const PositionTile& at) {
    A* partial = partials + at.item * channels;
    if (at.first % block == 0) {
      for (int64_t c = 0; c < channels; ++c) partial[c] = 0;
    }
    for (int64_t t = 0; t < p.depth; ++t) {
      A *scores = coefficient_at<A>(g, 1, at, t), *inverse = coefficient_at<A>(g, 2, at, t);
      position_sums<T>(p, t, g.dout, at, {scores, inverse, coefficient_at<A>(g, 0, at, t)});
      finish_scores<T>(p, at.count, scores, inverse);
    }
    position_coefficients<T>(g, at);
    if (g.needs_maps) position_gradient_tile<T>(g, at, partial, streams);
    if (streams) end_streaming();
  });
  if (g.drow == nullptr) return;
  const int64_t items = p.shape.batch * position_blocks(p.shape);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t item = 0; item < items; ++item) sum += partials[item * channels + c];
    static_cast<A*>(g.drow)[c] = static_cast<A>(sum);
  }
}

// Accumulation elements.
inline int64_t position_workspace(const Shape& s) { return s.batch * position_blocks(s) * s.channels; }

}  // namespace ela::ELA_ISA
