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

namespace ela::ELA_ISA {

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

// The key of depth t, and where the gradients go, from a channel and position on; null where one is not wanted. Of a
// key that is the value itself, both parts go to dvalue.
template <class T>
struct PositionRuns {
  const T* key;
  T *dvalue, *dkey;
};

template <class T>
inline PositionRuns<T> runs_of(const PositionBackwardParams& g, const PositionTile& at, int64_t t, int64_t c,
                               int64_t n) {
  const bool interleaved = g.call.shape.interleaved;
  return {lane_of<T>(key_map(g.call, t), at, interleaved, c, n),
          lane_of<T>(gradient_map(g.dvalues, t), at, interleaved, c, n),
          lane_of<T>(gradient_map(g.dkeys, t), at, interleaved, c, n)};
}

// Writes a vector of both gradients, `i` elements on; returns what it adds to du.
template <class T, class Lanes>
inline Vec<T> write_gradients(const PositionRuns<T>& to, int64_t i, bool is_own, Vec<T> alpha, Vec<T> beta,
                              Vec<T> weight, Vec<T> u, Vec<T> d, Lanes lanes) {
  const Vec<T> k = load_n(to.key + i, lanes);
  const Vec<T> dkey = alpha * u - beta * k;
  if (to.dvalue != nullptr) store_n(to.dvalue + i, is_own ? weight * d + dkey : weight * d, lanes);
  if (to.dkey != nullptr) store_n(to.dkey + i, dkey, lanes);
  return alpha * k;
}

// kCount vectors of channels at one position, from channel c on.
template <class T, int kCount, class Lanes>
inline void gradients_of_channels(const PositionBackwardParams& g, const PositionTile& at, int64_t i, int64_t c,
                                  Acc<T>* partial, Lanes lanes) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  const int64_t step = p.shape.positions, n = at.first + i;
  const A *weights = plane_at<A>(p.weights, p.shape, p.depth, at, 0) + i, *alphas = coefficient_at<A>(g, 0, at, 0) + i,
          *betas = coefficient_at<A>(g, 1, at, 0) + i;
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
    const Vec<T> alpha = broadcast<T>(normal_factor(alphas[t * step])),
                 beta = broadcast<T>(normal_factor(betas[t * step])),
                 weight = broadcast<T>(normal_factor(weights[t * step]));
    const PositionRuns<T> to = runs_of<T>(g, at, t, c, n);
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

// kCount depths, from t on, of one channel at the positions of a planar tile; du is added up in `sum`.
template <class T, int kCount>
inline void gradients_of_depths(const PositionBackwardParams& g, const PositionTile& at, int64_t c, int64_t t,
                                Acc<T>* sum) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  const int64_t step = p.shape.positions;
  const A *weights = plane_at<A>(p.weights, p.shape, p.depth, at, t), *alphas = coefficient_at<A>(g, 0, at, t),
          *betas = coefficient_at<A>(g, 1, at, t);
  const T* d = g.dout == nullptr ? nullptr : lane_of<T>(*g.dout, at, false, c, at.first);
  const T* q = lane_of<T>(p.query, at, false, c, at.first);
  const A by = static_cast<const A*>(p.row)[c];
  const bool is_own = p.keys == nullptr;
  PositionRuns<T> to[kCount];
  for (int j = 0; j < kCount; ++j) to[j] = runs_of<T>(g, at, t + j, c, at.first);
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    const Vec<T> u = q == nullptr ? broadcast<T>(by) : by * load_n(q + i, lanes);
    const Vec<T> dout = d == nullptr ? Vec<T>{} : load_n(d + i, lanes);
    Vec<T> du = t == 0 ? Vec<T>{} : load_n(sum + i, lanes);
    for (int j = 0; j < kCount; ++j) {
      // The next channel's run, on another page: the processor guesses none of these, and there are T of them. Measured
      // with 24 maps of 28 x 28: a fifth of the backward.
      if (to[j].dvalue != nullptr) __builtin_prefetch(to[j].dvalue + g.dvalues[t + j].inner + i, 1);
      du += write_gradients<T>(to[j], i, is_own, load_n(alphas + j * step + i, lanes),
                               load_n(betas + j * step + i, lanes), load_n(weights + j * step + i, lanes), u, dout,
                               lanes);
    }
    store_n(sum + i, du, lanes);
  });
}

// The second pass over a tile: all gradients of maps, and the item's part of drow in `partial` [C].
template <class T>
inline void position_gradient_tile(const PositionBackwardParams& g, const PositionTile& at, Acc<T>* partial) {
  using A = Acc<T>;
  const PositionParams& p = g.call;
  const Shape& s = p.shape;
  if (s.interleaved) {
    constexpr int64_t wide = kPositionVectors * kLanes<T>;
    for (int64_t i = 0; i < at.count; ++i) {
      int64_t c = 0;
      for (; c + wide <= s.channels; c += wide) {
        gradients_of_channels<T, kPositionVectors>(g, at, i, c, partial, Count<kLanes<T>>{});
      }
      for_vectors<T>(s.channels - c,
                     [&](int64_t k, auto lanes) { gradients_of_channels<T, 1>(g, at, i, c + k, partial, lanes); });
    }
    return;
  }
  alignas(ELA_VECTOR_BYTES) A sum[kPositionTile];
  for (int64_t c = 0; c < s.channels; ++c) {
    int64_t t = 0;
    for (; t + kPositionDepths <= p.depth; t += kPositionDepths) {
      gradients_of_depths<T, kPositionDepths>(g, at, c, t, sum);
    }
    for (; t < p.depth; ++t) gradients_of_depths<T, 1>(g, at, c, t, sum);
    const T* q = lane_of<T>(p.query, at, false, c, at.first);
    T* dq = lane_of<T>(g.dquery, at, false, c, at.first);
    const A by = static_cast<const A*>(p.row)[c];
    Vec<T> total{};
    for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
      const Vec<T> du = load_n(sum + i, lanes);
      if (dq != nullptr) store_n(dq + i, du * by, lanes);
      total += q == nullptr ? du : du * load_n(q + i, lanes);
    });
    partial[c] += sum_lanes<T>(total);
  }
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
    if (g.needs_maps) position_gradient_tile<T>(g, at, partial);
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

// dv = sum_m w_m dout_m + alpha_m u_m - beta_m v of the layers that retrieved v.
template <class T>
void position_gather_kernel(const PositionGatherParams& g, int threads) {
  using A = Acc<T>;
  const Shape& s = g.shape;
  for_position_tiles<T>(s, 1, threads, [&](const PositionTile& at) {
    const auto plane = [&](const PositionSource& m, const void* planes, int64_t n) {
      return static_cast<const A*>(planes) + at.b * m.batch + n;
    };
    // A vector of one layer's part; the coefficients are of one position or of as many as there are lanes.
    const auto part = [&](const PositionSource& m, int64_t c, int64_t n, Vec<T> w, Vec<T> alpha, Vec<T> by,
                          auto lanes) {
      if (m.query.data != nullptr) by *= load_n(lane_of<T>(m.query, at, s.interleaved, c, n), lanes);
      const Vec<T> towards = alpha * by;
      if (m.dout.data == nullptr) return towards;
      return towards + w * load_n(lane_of<T>(m.dout, at, s.interleaved, c, n), lanes);
    };
    if (s.interleaved) {
      for (int64_t n = at.first; n < at.first + at.count; ++n) {
        A shrink = 0;
        for (int64_t i = 0; i < g.count; ++i) shrink += *plane(g.sources[i], g.sources[i].beta, n);
        for_vectors<T>(s.channels, [&](int64_t c, auto lanes) {
          Vec<T> sum = -shrink * load_n(lane_of<T>(g.value, at, true, c, n), lanes);
          for (int64_t i = 0; i < g.count; ++i) {
            const PositionSource& m = g.sources[i];
            const A w = normal_factor(*plane(m, m.weights, n)), alpha = normal_factor(*plane(m, m.alpha, n));
            sum += part(m, c, n, broadcast<T>(w), broadcast<T>(alpha), load_n(static_cast<const A*>(m.row) + c, lanes),
                        lanes);
          }
          store_n(lane_of<T>(g.dvalue, at, true, c, n), sum, lanes);
        });
      }
      return;
    }
    alignas(ELA_VECTOR_BYTES) A shrink[kPositionTile], sum[kPositionTile];
    for (int64_t k = 0; k < at.count; ++k) {
      shrink[k] = 0;
      for (int64_t i = 0; i < g.count; ++i) shrink[k] += *plane(g.sources[i], g.sources[i].beta, at.first + k);
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      for_vectors<T>(at.count, [&](int64_t k, auto lanes) {
        const T* v = lane_of<T>(g.value, at, false, c, at.first + k);
        store_n(sum + k, -load_n(shrink + k, lanes) * load_n(v, lanes), lanes);
      });
      for (int64_t i = 0; i < g.count; ++i) {
        const PositionSource& m = g.sources[i];
        const Vec<T> by = broadcast<T>(static_cast<const A*>(m.row)[c]);
        const A *weights = plane(m, m.weights, at.first), *alphas = plane(m, m.alpha, at.first);
        for_vectors<T>(at.count, [&](int64_t k, auto lanes) {
          const Vec<T> of_layer =
              part(m, c, at.first + k, load_n(weights + k, lanes), load_n(alphas + k, lanes), by, lanes);
          store_n(sum + k, load_n(sum + k, lanes) + of_layer, lanes);
        });
      }
      T* to = lane_of<T>(g.dvalue, at, false, c, at.first);
      for_vectors<T>(at.count, [&](int64_t k, auto lanes) { store_n(to + k, load_n(sum + k, lanes), lanes); });
    }
  });
}

}  // namespace ela::ELA_ISA
