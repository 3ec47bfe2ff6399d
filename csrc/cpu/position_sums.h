// The sums over the channels of attention over depth at every position: <u, k>, <k, k> and, in the backward, <dout, v>.
#pragma once

#include "cpu/lines.h"
#include "cpu/position_tiles.h"
#include "cpu/square_root.h"
#include "cpu/sum_rows.h"

namespace ela::ELA_ISA {

// Where they go, one for each position of a tile.
template <class A>
struct PositionSums {
  A *scores, *squares, *dots;  // `dots` null: they are not wanted
};

// Vectors of the three sums over some channels, whose lanes are yet to be added up where they are channels.
template <class T>
struct PartialSums {
  Vec<T> score{}, square{}, dot{};
};

// A position of an interleaved map, or the channels of a planar map from a position on; null where there is none.
template <class T>
struct PositionReads {
  const T *key, *value, *dout, *query;
};

template <class T, bool kMapQuery, bool kDots, class Lanes>
inline void add_products(const PositionReads<T>& from, int64_t i, Vec<T> u, Lanes lanes, PartialSums<T>& to) {
  const Vec<T> x = load_n(from.key + i, lanes);
  if constexpr (kMapQuery) u *= load_n(from.query + i, lanes);
  to.score += u * x;
  to.square += x * x;
  if constexpr (kDots) {
    const Vec<T> v = from.value == from.key ? x : load_n(from.value + i, lanes);
    to.dot += load_n(from.dout + i, lanes) * v;
  }
}

// At each position of a tile of an interleaved map.
template <class T, bool kMapQuery, bool kDots>
inline void sum_interleaved(const PositionParams& p, const MapView& key, const MapView& value, const MapView& dout,
                            const PositionTile& at, const PositionSums<Acc<T>>& to) {
  using A = Acc<T>;
  constexpr int kL = kLanes<T>;
  const A* row = static_cast<const A*>(p.row);
  const int64_t channels = p.shape.channels;
  // Vectors of as many positions as a vector has lanes: their lanes are added up for all at once.
  alignas(ELA_VECTOR_BYTES) A score[kL * kL], square[kL * kL], dot[kDots ? kL * kL : 1];
  for_vectors<T>(at.count, [&](int64_t first, auto count) {
    for (int i = 0; i < count; ++i) {
      const int64_t n = at.first + first + i;
      const PositionReads<T> from = {interleaved_at<T>(key, at.b, n, 0), interleaved_at<T>(value, at.b, n, 0),
                                     kDots ? interleaved_at<T>(dout, at.b, n, 0) : nullptr,
                                     kMapQuery ? interleaved_at<T>(p.query, at.b, n, 0) : nullptr};
      PartialSums<T> even, odd;
      int64_t c = 0;
      for (; c + 2 * kL <= channels; c += 2 * kL) {
        add_products<T, kMapQuery, kDots>(from, c, load_n(row + c, kL), Count<kL>{}, even);
        add_products<T, kMapQuery, kDots>(from, c + kL, load_n(row + c + kL, kL), Count<kL>{}, odd);
      }
      for_vectors<T>(channels - c, [&](int64_t k, auto lanes) {
        add_products<T, kMapQuery, kDots>(from, c + k, load_n(row + c + k, lanes), lanes, even);
      });
      store_n(score + i * kL, even.score + odd.score, kL);
      store_n(square + i * kL, even.square + odd.square, kL);
      if constexpr (kDots) store_n(dot + i * kL, even.dot + odd.dot, kL);
    }
    for (int i = count; i < kL; ++i) {
      store_n(score + i * kL, Vec<T>{}, kL), store_n(square + i * kL, Vec<T>{}, kL);
      if constexpr (kDots) store_n(dot + i * kL, Vec<T>{}, kL);
    }
    store_n(to.scores + first, sum_rows<T>(score), count);
    store_n(to.squares + first, sum_rows<T>(square), count);
    if constexpr (kDots) store_n(to.dots + first, sum_rows<T>(dot), count);
  });
}

// The same of kVectors vectors of positions of a planar map, from the i-th of the tile on.
template <class T, bool kMapQuery, bool kDots, int kVectors, class Lanes>
inline void sum_planar_vectors(const PositionParams& p, const MapView& key, const MapView& value, const MapView& dout,
                               const PositionTile& at, int64_t i, Lanes lanes, const PositionSums<Acc<T>>& to) {
  using A = Acc<T>;
  constexpr int kL = kLanes<T>;
  const A* row = static_cast<const A*>(p.row);
  const int64_t n = at.first + i;
  constexpr int64_t kAhead = 16;  // channels: each on another page, so that the processor guesses none
  PartialSums<T> sums[kVectors];
  for (int64_t c = 0; c < p.shape.channels; ++c) {
    const PositionReads<T> from = {planar_at<T>(key, at.b, c, n), planar_at<T>(value, at.b, c, n),
                                   kDots ? planar_at<T>(dout, at.b, c, n) : nullptr,
                                   kMapQuery ? planar_at<T>(p.query, at.b, c, n) : nullptr};
    const Vec<T> u = broadcast<T>(row[c]);
    for (int v = 0; v < kVectors; ++v) {
      if (begins_line<T>(v * kL)) fetch_ahead(from.key + kAhead * key.inner + v * kL);
    }
    for (int v = 0; v < kVectors; ++v) add_products<T, kMapQuery, kDots>(from, v * kL, u, lanes, sums[v]);
  }
  for (int v = 0; v < kVectors; ++v) {
    store_n(to.scores + i + v * kL, sums[v].score, lanes);
    store_n(to.squares + i + v * kL, sums[v].square, lanes);
    if constexpr (kDots) store_n(to.dots + i + v * kL, sums[v].dot, lanes);
  }
}

template <class T, bool kMapQuery, bool kDots>
inline void sum_planar(const PositionParams& p, const MapView& key, const MapView& value, const MapView& dout,
                       const PositionTile& at, const PositionSums<Acc<T>>& to) {
  constexpr int64_t wide = kPositionVectors * kLanes<T>;
  int64_t i = 0;
  for (; i + wide <= at.count; i += wide) {
    sum_planar_vectors<T, kMapQuery, kDots, kPositionVectors>(p, key, value, dout, at, i, Count<kLanes<T>>{}, to);
  }
  for_vectors<T>(at.count - i, [&](int64_t k, auto lanes) {
    sum_planar_vectors<T, kMapQuery, kDots, 1>(p, key, value, dout, at, i + k, lanes, to);
  });
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
  for_vectors<T>(count, [&](int64_t i, auto lanes) {
    const Vec<T> inverse = 1 / square_roots(load_n(squares + i, lanes) / channels + eps);
    store_n(squares + i, inverse, lanes);
    store_n(scores + i, load_n(scores + i, lanes) * inverse, lanes);
  });
}

}  // namespace ela::ELA_ISA
