// Which maps a weighted sum reads: those whose weight is not below what its column leaves out.
#pragma once

#include "cpu/maps.h"
#include "cpu/weights.h"

namespace ela::ELA_ISA {

constexpr int kStreams = 4;  // sources read side by side, to load and store the running sum less often

// Some sources, and their factors for one head.
template <class A>
struct Streams {
  int count = 0;
  int64_t source[kStreams];
  A factor[kStreams];
};

template <class A>
inline bool is_left_out(const ColumnView& column, int64_t item) {
  return static_cast<const A*>(column.data)[item * column.stride] < static_cast<A>(column.least);
}

// Calls body(streams, is_first, is_last) for the sources that retained(j) names, kStreams at a time; returns whether
// there is one.
template <class A, class Retained, class Factor, class Body>
inline bool for_streams(int64_t sources, Retained retained, Factor factor, Body body) {
  Streams<A> at;
  bool is_first = true;
  for (int64_t j = 0; j < sources; ++j) {
    if (!retained(j)) continue;
    if (at.count == kStreams) {
      body(at, is_first, false);
      is_first = false, at.count = 0;
    }
    at.source[at.count] = j;
    at.factor[at.count++] = factor(j);
  }
  if (at.count > 0) body(at, is_first, true);
  return at.count > 0;
}

// The sources of the head `item`; `column(j)` is the ColumnView of source j.
template <class A, class Column, class Body>
inline bool for_retained(int64_t sources, Column column, int64_t item, Body body) {
  return for_streams<A>(
      sources, [&](int64_t j) { return !is_left_out<A>(column(j), item); },
      [&](int64_t j) { return factor_at<A>(column(j), item); }, body);
}

// Interleaved maps: the heads [first, last) of some neighbouring channels, numbered through the batch.
struct HeadRange {
  int64_t first, last;
};

inline HeadRange heads_of(const Shape& s, int64_t b, int64_t c, int64_t count) {
  const int64_t head_dim = s.head_dim();
  return {b * s.heads + c / head_dim, b * s.heads + (c + count - 1) / head_dim + 1};
}

// The sources that any of the heads retains. Their factors are not asked for: neighbouring heads have others.
template <class A, class Column, class Body>
inline bool for_retained(int64_t sources, Column column, HeadRange heads, Body body) {
  const auto is_retained = [&](int64_t j) {
    const ColumnView view = column(j);
    bool retained = false;
    for (int64_t item = heads.first; item < heads.last && !retained; ++item) retained = !is_left_out<A>(view, item);
    return retained;
  };
  return for_streams<A>(sources, is_retained, [](int64_t) { return A{}; }, body);
}

template <class A, class Column>
inline bool is_any_left_out(int64_t sources, Column column, HeadRange heads) {
  for (int64_t j = 0; j < sources; ++j) {
    const ColumnView view = column(j);
    for (int64_t item = heads.first; item < heads.last; ++item) {
      if (is_left_out<A>(view, item)) return true;
    }
  }
  return false;
}

template <class Column>
inline bool has_tolerance(int64_t sources, Column column) {
  for (int64_t j = 0; j < sources; ++j) {
    if (column(j).least > 0) return true;
  }
  return false;
}

// Where something is left out, interleaved channels go by runs of a cache line or two, which begin at multiples of
// this.
constexpr int64_t kRun = 32;

// Whether a run may have channels of several heads: then what one of them retains and another leaves out is masked.
inline bool is_run_shared(const Shape& s) { return s.head_dim() % kRun != 0; }

// Calls body(c, count) for the runs of `count` channels from c on, which is a multiple of kRun.
template <class Body>
inline void for_runs(int64_t c, int64_t count, Body body) {
  for (int64_t i = 0; i < count; i += kRun) body(c + i, count - i < kRun ? count - i : kRun);
}

// x where the weight that it is multiplied with is not zero, which stands for one that is left out; zero elsewhere.
template <bool kMasked, class T>
inline Vec<T> where_retained(Vec<T> x, Vec<T> weight) {
  if constexpr (!kMasked) return x;
  return keep<T>(x, bits_of<Bits<T>>(weight != Vec<T>{}));
}

}  // namespace ela::ELA_ISA
