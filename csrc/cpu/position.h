// Attention over depth at every position: score_t = r_t * <u, k_t> of T keys, their softmax over t, and the sum of the
// T values by it. r_t is the inverse root mean square of the key, or 1; the key is the value itself, or given.
//
// Least bytes: a tile of positions with all their channels, of all T values, stays in second-level cache. The first
// pass over it reads the values from memory for the scores, the second from cache for the sum; or both of four values
// at a time, whose sum is rescaled where a later score is higher. So T maps are read and one is written, whatever T is,
// and of the weights [B, T, N], C times smaller, no more is kept for the backward: what it needs besides it works out
// again while the values pass by.
#pragma once

#include <math.h>

#include "cpu/aggregate.h"
#include "cpu/exponential.h"
#include "cpu/position_sums.h"
#include "cpu/weights.h"

namespace ela::ELA_ISA {

// normal_factor() of each lane.
template <class T>
inline Vec<T> normal_factors(Vec<T> x) {
  constexpr Acc<T> kLeast =
      sizeof(Acc<T>) == sizeof(float) ? static_cast<Acc<T>>(0x1p-126) : static_cast<Acc<T>>(0x1p-1022);
  return ((x < kLeast) & (x > -kLeast)) ? Vec<T>{} : x;
}

// Largest score and logarithm of the sum of exponentials of some positions.
template <class T>
struct Normaliser {
  Vec<T> highest, log_sum, inverse_sum;
};

// `scores` and what lies `step` elements on, T times. Lanes beyond n hold what nobody reads.
template <class T>
inline Normaliser<T> normaliser(const Acc<T>* scores, int64_t step, int64_t depth, int n, bool needs_log) {
  using A = Acc<T>;
  Vec<T> highest = load_n(scores, n);
  for (int64_t t = 1; t < depth; ++t) {
    const Vec<T> score = load_n(scores + t * step, n);
    // A NaN stays: a comparison with one is false, in either order.
    highest = ((score > highest) | (score != score)) ? score : highest;
  }
  Vec<T> sum{};
  for (int64_t t = 0; t < depth; ++t) sum += exp_down_to<-87>(load_n(scores + t * step, n) - highest);
  Normaliser<T> found = {highest, {}, 1 / sum};
  for (int i = 0; needs_log && i < n; ++i) found.log_sum[i] = static_cast<A>(log(static_cast<double>(sum[i])));
  return found;
}

// Weights in the place of scores, and the divergence from the previous weights.
template <class T>
inline void position_softmax(const PositionForwardParams& f, const PositionTile& at) {
  using A = Acc<T>;
  const PositionParams& p = f.call;
  const int64_t step = p.shape.positions;
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    A* scores = plane_at<A>(p.weights, p.shape, p.depth, at, 0) + i;
    const bool wants_kl = f.kl != nullptr;
    const Normaliser<T> by = normaliser<T>(scores, step, p.depth, lanes, wants_kl);
    if (wants_kl) {
      A* kl = static_cast<A*>(f.kl) + at.b * step + at.first + i;
      for (int k = 0; k < lanes; ++k) {
        double sum = 0;
        for (int64_t t = 0; t < p.prev_depth; ++t) {
          const A prev = plane_at<A>(p.prev, p.shape, p.prev_depth, at, t)[i + k];
          const A log_weight = scores[t * step + k] - by.highest[k] - by.log_sum[k];
          if (prev != 0) sum += prev * (logarithm(prev) - log_weight);
        }
        kl[k] = static_cast<A>(sum);
      }
    }
    for (int64_t t = 0; t < p.depth; ++t) {
      const Vec<T> e = exp_down_to<-87>(load_n(scores + t * step, lanes) - by.highest);
      store_n(scores + t * step, e * by.inverse_sum, lanes);
    }
  });
}

// Adds w_t v_t of kDepths depths, from t on, of kChannels channels at the positions of a planar tile.
template <class T, int kDepths, int kChannels>
inline void add_depths(const PositionParams& p, const PositionTile& at, int64_t c, int64_t t, const Acc<T>* weights,
                       Acc<T>* sums) {
  const int64_t step = p.shape.positions;
  const T *v[kChannels][kDepths], *ahead[kChannels][kDepths];
  for (int k = 0; k < kChannels; ++k) {
    for (int j = 0; j < kDepths; ++j) {
      const MapView& key = key_map(p, t + j);
      v[k][j] = planar_at<T>(p.values[t + j], at.b, c + k, at.first);
      ahead[k][j] = planar_at<T>(key, at.b, c + k, at.first) + to_next_tile(p.shape, key, at);
    }
  }
  const Acc<T>* w = weights + t * step;
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    Vec<T> weight[kDepths];
    for (int j = 0; j < kDepths; ++j) weight[j] = load_n(w + j * step + i, lanes);
    for (int k = 0; k < kChannels; ++k) {
      Acc<T>* sum = sums + k * kPositionTile + i;
      Vec<T> total = t == 0 ? Vec<T>{} : load_n(sum, lanes);
      for (int j = 0; j < kDepths; ++j) {
        if (begins_line<T>(i)) fetch_ahead(ahead[k][j] + i);
        total += weight[j] * load_n(v[k][j] + i, lanes);
      }
      store_n(sum, total, lanes);
    }
  });
}

template <class T, int kChannels>
inline void aggregate_planar(const PositionForwardParams& f, const PositionTile& at, int64_t c) {
  using A = Acc<T>;
  const PositionParams& p = f.call;
  const A* weights = plane_at<A>(p.weights, p.shape, p.depth, at, 0);
  alignas(ELA_VECTOR_BYTES) A sums[kChannels * kPositionTile];
  int64_t t = 0;
  for (; t + kPositionDepths <= p.depth; t += kPositionDepths) {
    add_depths<T, kPositionDepths, kChannels>(p, at, c, t, weights, sums);
  }
  for (; t < p.depth; ++t) add_depths<T, 1, kChannels>(p, at, c, t, weights, sums);
  for (int k = 0; k < kChannels; ++k) {
    T* out = const_cast<T*>(planar_at<T>(f.out, at.b, c + k, at.first));
    const A* sum = sums + k * kPositionTile;
    for_vectors<T>(at.count, [&](int64_t i, auto lanes) { store_n(out + i, load_n(sum + i, lanes), lanes); });
  }
}

// Of a planar tile, some depths at a time: the highest score yet, and the sum of exponentials of scores less that. The
// result is that of the depths yet, so that it is never larger than the largest value: what was there before is
// multiplied with what is kept of it.
template <class T>
struct RunningSoftmax {
  alignas(ELA_VECTOR_BYTES) Acc<T> highest[kPositionTile], total[kPositionTile], kept[kPositionTile];
  alignas(ELA_VECTOR_BYTES) Acc<T> factors[kPositionDepths * kPositionTile];
};

// Takes the scores of `some` depths, from t on: the factors of their values, and of the result before them.
template <class T>
inline void take_scores(const PositionParams& p, const PositionTile& at, int64_t t, int some, RunningSoftmax<T>& to) {
  using A = Acc<T>;
  const int64_t step = p.shape.positions;
  const A* scores = plane_at<A>(p.weights, p.shape, p.depth, at, t);
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    const Vec<T> lowest = Vec<T>{} - static_cast<A>(INFINITY);
    const Vec<T> before = t == 0 ? lowest : load_n(to.highest + i, kLanes<T>);
    Vec<T> highest = before;
    for (int j = 0; j < some; ++j) {
      const Vec<T> score = load_n(scores + j * step + i, lanes);
      highest = ((score > highest) | (score != score)) ? score : highest;
    }
    // Where none is above minus infinity yet, there is no distance from the highest.
    const Vec<T> from = highest == lowest ? Vec<T>{} : highest;
    const Vec<T> kept = t == 0 ? Vec<T>{} : exp_down_to<-87>(before - from) * load_n(to.total + i, kLanes<T>);
    Vec<T> total = kept, factor[kPositionDepths];
    for (int j = 0; j < some; ++j) total += factor[j] = exp_down_to<-87>(load_n(scores + j * step + i, lanes) - from);
    store_n(to.highest + i, highest, kLanes<T>), store_n(to.total + i, total, kLanes<T>);
    const Vec<T> divisor = total == Vec<T>{} ? Vec<T>{} + 1 : total;
    const Vec<T> by = 1 / (t + some < p.depth ? divisor : total);
    store_n(to.kept + i, kept * by, kLanes<T>);
    for (int j = 0; j < some; ++j) store_n(to.factors + j * kPositionTile + i, factor[j] * by, kLanes<T>);
  });
}

// Adds kDepths depths, from t on, of kChannels channels to the result.
template <class T, int kDepths, int kChannels>
inline void add_running(const PositionForwardParams& f, const PositionTile& at, int64_t c, int64_t t,
                        RunningSoftmax<T>& by) {
  const PositionParams& p = f.call;
  const T* v[kChannels][kDepths];
  T* out[kChannels];
  for (int k = 0; k < kChannels; ++k) {
    for (int j = 0; j < kDepths; ++j) v[k][j] = planar_at<T>(p.values[t + j], at.b, c + k, at.first);
    out[k] = const_cast<T*>(planar_at<T>(f.out, at.b, c + k, at.first));
  }
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    const Vec<T> kept = load_n(by.kept + i, kLanes<T>);
    Vec<T> factor[kDepths];
    for (int j = 0; j < kDepths; ++j) factor[j] = load_n(by.factors + j * kPositionTile + i, kLanes<T>);
    for (int k = 0; k < kChannels; ++k) {
      Vec<T> total = t == 0 ? Vec<T>{} : kept * load_n(out[k] + i, lanes);
      for (int j = 0; j < kDepths; ++j) total += factor[j] * load_n(v[k][j] + i, lanes);
      store_n(out[k] + i, total, lanes);
    }
  });
}

template <class T, int kDepths>
inline void add_running(const PositionForwardParams& f, const PositionTile& at, int64_t t, RunningSoftmax<T>& by) {
  const int64_t channels = f.call.shape.channels;
  int64_t c = 0;
  for (; c + kPositionChannels <= channels; c += kPositionChannels) {
    add_running<T, kDepths, kPositionChannels>(f, at, c, t, by);
  }
  for (; c < channels; ++c) add_running<T, kDepths, 1>(f, at, c, t, by);
}

// A planar tile of more depths than are read twice before the next ones are read: it is as long whatever the depth.
// Measured in float32 with AVX-512, of what a tile that keeps all depths in cache takes: 12 maps of 28 x 28 and 64
// channels 79 %, of 7 x 7 and 512 channels 83 %, 24 of 14 x 14 and 256 channels 77 %.
template <class T>
inline void position_running_tile(const PositionForwardParams& f, const PositionTile& at) {
  using A = Acc<T>;
  const PositionParams& p = f.call;
  alignas(ELA_VECTOR_BYTES) A squares[kPositionTile];
  RunningSoftmax<T> by;
  for (int64_t first = 0; first < p.depth; first += kPositionDepths) {
    const int some = static_cast<int>(p.depth - first < kPositionDepths ? p.depth - first : kPositionDepths);
    for (int64_t t = first; t < first + some; ++t) {
      A* scores = plane_at<A>(p.weights, p.shape, p.depth, at, t);
      position_sums<T>(p, t, nullptr, at, {scores, squares, nullptr});
      finish_scores<T>(p, at.count, scores, squares);
    }
    take_scores<T>(p, at, first, some, by);
    by_streams(some, [&](auto depths) { add_running<T, decltype(depths)::value>(f, at, first, by); });
  }
  position_softmax<T>(f, at);
}

// out = sum_t w_t v_t at the positions of a tile.
template <class T>
inline void aggregate_position_tile(const PositionForwardParams& f, const PositionTile& at) {
  using A = Acc<T>;
  const PositionParams& p = f.call;
  const int64_t step = p.shape.positions;
  const A* weights = plane_at<A>(p.weights, p.shape, p.depth, at, 0);
  if (!p.shape.interleaved) {
    int64_t c = 0;
    for (; c + kPositionChannels <= p.shape.channels; c += kPositionChannels) {
      aggregate_planar<T, kPositionChannels>(f, at, c);
    }
    for (; c < p.shape.channels; ++c) aggregate_planar<T, 1>(f, at, c);
    return;
  }
  constexpr int64_t wide = kPositionVectors * kLanes<T>;
  // One position in three is fetched ahead: the sum alone takes less time than memory does. Measured: all of them make
  // the forward slower than none, these a tenth faster.
  constexpr int64_t kFetched = 3;
  for (int64_t i = 0; i < at.count; ++i) {
    const int64_t n = at.first + i;
    T* out = const_cast<T*>(interleaved_at<T>(f.out, at.b, n, 0));
    int64_t c = 0;
    for (; c + wide <= p.shape.channels; c += wide) {
      Vec<T> sum[kPositionVectors] = {};
      for (int64_t t = 0; t < p.depth; ++t) {
        const T* v = interleaved_at<T>(p.values[t], at.b, n, c);
        const A w = normal_factor(weights[t * step + i]);
        if (i % kFetched == 0) {
          const T* ahead = interleaved_at<T>(key_map(p, t), at.b, n, c) + to_next_tile(p.shape, key_map(p, t), at);
          for (int k = 0; k < kPositionVectors; ++k) {
            if (begins_line<T>(k * kLanes<T>)) fetch_ahead(ahead + k * kLanes<T>);
          }
        }
        for (int k = 0; k < kPositionVectors; ++k) sum[k] += w * Memory<T>::load(v + k * kLanes<T>);
      }
      for (int k = 0; k < kPositionVectors; ++k) Memory<T>::store(out + c + k * kLanes<T>, sum[k]);
    }
    for_vectors<T>(p.shape.channels - c, [&](int64_t k, auto lanes) {
      Vec<T> sum{};
      for (int64_t t = 0; t < p.depth; ++t) {
        const A w = normal_factor(weights[t * step + i]);
        sum += w * load_n(interleaved_at<T>(p.values[t], at.b, n, c + k), lanes);
      }
      store_n(out + c + k, sum, lanes);
    });
  }
}

template <class T>
void position_forward_kernel(const PositionForwardParams& f, int threads) {
  using A = Acc<T>;
  const PositionParams& p = f.call;
  // In half precision the sums would be as large as the values, and are not in the result.
  if constexpr (kIsWide<T> && sizeof(T) == sizeof(float)) {
    if (!p.shape.interleaved && p.depth > kPositionDepths) {
      return for_position_tiles<T>(p.shape, kPositionDepths + 1, threads,
                                   [&](const PositionTile& at) { position_running_tile<T>(f, at); });
    }
  }
  const int64_t maps = p.depth * (p.keys == nullptr ? 1 : 2);
  for_position_tiles<T>(p.shape, maps, threads, [&](const PositionTile& at) {
    alignas(ELA_VECTOR_BYTES) A squares[kPositionTile];
    for (int64_t t = 0; t < p.depth; ++t) {
      A* scores = plane_at<A>(p.weights, p.shape, p.depth, at, t);
      position_sums<T>(p, t, nullptr, at, {scores, squares, nullptr});
      finish_scores<T>(p, at.count, scores, squares);
    }
    position_softmax<T>(f, at);
    aggregate_position_tile<T>(f, at);
  });
}

}  // namespace ela::ELA_ISA
