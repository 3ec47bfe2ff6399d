// Attention over depth at every position: score_t = r_t * <u, k_t> of T keys, their softmax over t, and the sum of the
// T values by it. r_t is the inverse root mean square of the key, or 1; the key is the value itself, or given.
//
// Least bytes: a tile of positions with all their channels, of all T values, stays in second-level cache. The first
// pass over it reads the values from memory for the scores, the second from cache for the sum. So T maps are read and
// one is written, whatever T is, and of the weights [B, T, N], C times smaller, no more is kept for the backward: what
// it needs besides it works out again while the values pass by.
#pragma once

#include <math.h>

#include "cpu/exponential.h"
#include "cpu/lines.h"
#include "cpu/maps.h"
#include "cpu/parallel.h"
#include "cpu/weights.h"

namespace ela::ELA_ISA {

constexpr int64_t kPositionTileBytes = 1024 * 1024;  // of all maps that a tile reads twice
constexpr int64_t kPositionTile = 256;               // positions of a planar tile at most: sums of a run, on the stack
constexpr int64_t kPositionBlockElements = 32 * 1024;  // of a map to one item of work, and one partial sum of drow
constexpr int kPositionDepths = 4;                     // of a planar map that are summed before the sum is stored
constexpr int kPositionVectors = 4;                    // of channels whose sums are in registers at a time

// Positions to one item of work: by the shape alone.
inline int64_t position_block(const Shape& s) {
  int64_t positions = kPositionBlockElements / s.channels;
  if (!s.interleaved) positions = ceil_div(positions, 64) * 64;
  if (positions > s.positions) positions = s.positions;
  return positions < 1 ? 1 : positions;
}
inline int64_t position_blocks(const Shape& s) { return ceil_div(s.positions, position_block(s)); }

// Positions of a tile that reads `maps` maps twice.
template <class T>
inline int64_t position_tile(const Shape& s, int64_t maps) {
  int64_t positions = kPositionTileBytes / (maps * s.channels * static_cast<int64_t>(sizeof(T)));
  if (positions > kPositionTile) positions = kPositionTile;
  if (s.interleaved) return positions < 1 ? 1 : positions;
  // A line of cache at least, since no less is read.
  constexpr int64_t line = 64 / sizeof(T);
  return positions < line ? line : positions / line * line;
}

// A tile: positions [first, first + count) of sample b, which belong to an item of work.
struct PositionTile {
  int64_t item, b, first, count;
};

// Calls body(tile) for all tiles. Which positions make an item does not depend on the number of threads.
template <class T, class Body>
inline void for_position_tiles(const Shape& s, int64_t maps, int threads, Body body) {
  const int64_t blocks = position_blocks(s), block = position_block(s), step = position_tile<T>(s, maps);
  parallel_for(s.batch * blocks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * block;
      const int64_t last = first + block < s.positions ? first + block : s.positions;
      for (int64_t at = first; at < last; at += step) {
        body(PositionTile{item, item / blocks, at, at + step < last ? step : last - at});
      }
    }
  });
}

// Of planes [B, depth, N] in the accumulation type: where the tile's positions of depth t begin.
template <class A>
inline A* plane_at(const void* planes, const Shape& s, int64_t depth, const PositionTile& at, int64_t t) {
  return static_cast<A*>(const_cast<void*>(planes)) + (at.b * depth + t) * s.positions + at.first;
}

inline const MapView& key_map(const PositionParams& p, int64_t t) {
  return p.keys == nullptr ? p.values[t] : p.keys[t];
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

// The sums over the channels of one position of an interleaved map, or of a run of positions of a planar one.
template <class A>
struct PositionSums {
  A *scores, *squares, *dots;  // `dots` null: they are not wanted
};

// <u, k>, <k, k> and <dout, v> at each position of a tile of an interleaved map.
template <class T, bool kMapQuery, bool kDots>
inline void sum_interleaved(const PositionParams& p, const MapView& key, const MapView& value, const MapView& dout,
                            const PositionTile& at, const PositionSums<Acc<T>>& to) {
  using A = Acc<T>;
  const A* row = static_cast<const A*>(p.row);
  const bool is_own = p.keys == nullptr;
  for (int64_t i = 0; i < at.count; ++i) {
    const int64_t n = at.first + i;
    const T* k = interleaved_at<T>(key, at.b, n, 0);
    const T* v = kDots && !is_own ? interleaved_at<T>(value, at.b, n, 0) : k;
    const T* d = kDots ? interleaved_at<T>(dout, at.b, n, 0) : nullptr;
    const T* q = kMapQuery ? interleaved_at<T>(p.query, at.b, n, 0) : nullptr;
    Vec<T> score{}, square{}, dot{};
    for_vectors<T>(p.shape.channels, [&](int64_t c, auto lanes) {
      const Vec<T> x = load_n(k + c, lanes);
      Vec<T> u = load_n(row + c, lanes);
      if constexpr (kMapQuery) u *= load_n(q + c, lanes);
      score += u * x;
      square += x * x;
      if constexpr (kDots) dot += load_n(d + c, lanes) * (is_own ? x : load_n(v + c, lanes));
    });
    to.scores[i] = sum_lanes<T>(score), to.squares[i] = sum_lanes<T>(square);
    if constexpr (kDots) to.dots[i] = sum_lanes<T>(dot);
  }
}

// The same of a planar one, where a vector is of positions.
template <class T, bool kMapQuery, bool kDots>
inline void sum_planar(const PositionParams& p, const MapView& key, const MapView& value, const MapView& dout,
                       const PositionTile& at, const PositionSums<Acc<T>>& to) {
  using A = Acc<T>;
  const A* row = static_cast<const A*>(p.row);
  const bool is_own = p.keys == nullptr;
  alignas(ELA_VECTOR_BYTES) A score[kPositionTile], square[kPositionTile], dot[kDots ? kPositionTile : 1];
  for (int64_t i = 0; i < at.count; ++i) {
    score[i] = square[i] = 0;
    if constexpr (kDots) dot[i] = 0;
  }
  for (int64_t c = 0; c < p.shape.channels; ++c) {
    const T* k = planar_at<T>(key, at.b, c, at.first);
    const T* v = kDots && !is_own ? planar_at<T>(value, at.b, c, at.first) : k;
    const T* d = kDots ? planar_at<T>(dout, at.b, c, at.first) : nullptr;
    const T* q = kMapQuery ? planar_at<T>(p.query, at.b, c, at.first) : nullptr;
    const A factor = row[c];
    for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
      const Vec<T> x = load_n(k + i, lanes);
      Vec<T> u = x * factor;
      if constexpr (kMapQuery) u *= load_n(q + i, lanes);
      store_n(score + i, load_n(score + i, lanes) + u, lanes);
      store_n(square + i, load_n(square + i, lanes) + x * x, lanes);
      if constexpr (kDots) {
        const Vec<T> y = is_own ? x : load_n(v + i, lanes);
        store_n(dot + i, load_n(dot + i, lanes) + load_n(d + i, lanes) * y, lanes);
      }
    });
  }
  for (int64_t i = 0; i < at.count; ++i) {
    to.scores[i] = score[i], to.squares[i] = square[i];
    if constexpr (kDots) to.dots[i] = dot[i];
  }
}

template <class T, bool kMapQuery, bool kDots>
inline void position_sums_of(const PositionParams& p, int64_t t, const MapView& dout, const PositionTile& at,
                             const PositionSums<Acc<T>>& to) {
  p.shape.interleaved ? sum_interleaved<T, kMapQuery, kDots>(p, key_map(p, t), p.values[t], dout, at, to)
                      : sum_planar<T, kMapQuery, kDots>(p, key_map(p, t), p.values[t], dout, at, to);
}
// Of depth t; `dout` may be null.
template <class T>
inline void position_sums(const PositionParams& p, int64_t t, const MapView* dout, const PositionTile& at,
                          const PositionSums<Acc<T>>& to) {
  const MapView none = {};
  if (p.query.data != nullptr) {
    dout != nullptr ? position_sums_of<T, true, true>(p, t, *dout, at, to)
                    : position_sums_of<T, true, false>(p, t, none, at, to);
  } else {
    dout != nullptr ? position_sums_of<T, false, true>(p, t, *dout, at, to)
                    : position_sums_of<T, false, false>(p, t, none, at, to);
  }
}

// In place: <u, k> becomes the score, and <k, k> the inverse root mean square.
template <class T>
inline void finish_scores(const PositionParams& p, int64_t count, Acc<T>* scores, Acc<T>* squares) {
  using A = Acc<T>;
  if (!p.normed) return;
  const A channels = static_cast<A>(p.shape.channels), eps = static_cast<A>(p.eps);
  for (int64_t i = 0; i < count; ++i) {
    const A inverse = 1 / sqrt(squares[i] / channels + eps);
    squares[i] = inverse, scores[i] *= inverse;
  }
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

// Adds w_t v_t of kCount depths, from t on, of one channel at the positions of a planar tile.
template <class T, int kCount>
inline void add_depths(const PositionParams& p, const PositionTile& at, int64_t c, int64_t t, const Acc<T>* weights,
                       Acc<T>* sum) {
  const int64_t step = p.shape.positions;
  const T* v[kCount];
  for (int j = 0; j < kCount; ++j) v[j] = planar_at<T>(p.values[t + j], at.b, c, at.first);
  const Acc<T>* w = weights + t * step;
  for_vectors<T>(at.count, [&](int64_t i, auto lanes) {
    Vec<T> total = t == 0 ? Vec<T>{} : load_n(sum + i, lanes);
    for (int j = 0; j < kCount; ++j) total += load_n(w + j * step + i, lanes) * load_n(v[j] + i, lanes);
    store_n(sum + i, total, lanes);
  });
}

// out = sum_t w_t v_t at the positions of a tile.
template <class T>
inline void aggregate_position_tile(const PositionForwardParams& f, const PositionTile& at) {
  using A = Acc<T>;
  const PositionParams& p = f.call;
  const int64_t step = p.shape.positions;
  const A* weights = plane_at<A>(p.weights, p.shape, p.depth, at, 0);
  if (!p.shape.interleaved) {
    alignas(ELA_VECTOR_BYTES) A sum[kPositionTile];
    for (int64_t c = 0; c < p.shape.channels; ++c) {
      int64_t t = 0;
      for (; t + kPositionDepths <= p.depth; t += kPositionDepths) {
        add_depths<T, kPositionDepths>(p, at, c, t, weights, sum);
      }
      for (; t < p.depth; ++t) add_depths<T, 1>(p, at, c, t, weights, sum);
      T* out = const_cast<T*>(planar_at<T>(f.out, at.b, c, at.first));
      for_vectors<T>(at.count, [&](int64_t i, auto lanes) { store_n(out + i, load_n(sum + i, lanes), lanes); });
    }
    return;
  }
  constexpr int64_t wide = kPositionVectors * kLanes<T>;
  for (int64_t i = 0; i < at.count; ++i) {
    const int64_t n = at.first + i;
    T* out = const_cast<T*>(interleaved_at<T>(f.out, at.b, n, 0));
    int64_t c = 0;
    for (; c + wide <= p.shape.channels; c += wide) {
      Vec<T> sum[kPositionVectors] = {};
      for (int64_t t = 0; t < p.depth; ++t) {
        const T* v = interleaved_at<T>(p.values[t], at.b, n, c);
        const A w = normal_factor(weights[t * step + i]);
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
