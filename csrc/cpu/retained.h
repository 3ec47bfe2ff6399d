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
  return column.least > 0 && static_cast<const A*>(column.data)[item * column.stride] < static_cast<A>(column.least);
}

// Calls body(streams, is_first, is_last) for the sources of which is_read(j), kStreams at a time; returns whether there
// is one.
template <class A, class IsRead, class Factor, class Body>
inline bool for_streams(int64_t sources, IsRead is_read, Factor factor, Body body) {
  Streams<A> at;
  bool is_first = true;
  for (int64_t j = 0; j < sources; ++j) {
    if (!is_read(j)) continue;
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

// Those that the head `item` retains; `column(j)` is the ColumnView of source j.
template <class A, class Column, class Body>
inline bool for_retained(int64_t sources, Column column, int64_t item, Body body) {
  return for_streams<A>(
      sources, [&](int64_t j) { return !is_left_out<A>(column(j), item); },
      [&](int64_t j) { return factor_at<A>(column(j), item); }, body);
}

// Interleaved maps: neighbouring channels are of different heads. A source is read where any head of the sample retains
// it, and counts as zero for those that do not. (Measured, AVX2, 23 maps of [4, 1024, 14, 14] of which 28 % are left
// out: with a list for each line of 16 channels, those maps took 1.7 times as long as whole. The hardware foresees
// whole positions; single lines of memory it does not, and lines that are left out among others it reads all the same.)
struct LeftOut {
  int64_t heads;
  const int32_t* counts;  // [B, sources]: how many heads leave a source out; null where nothing has to

  bool any(int64_t b, int64_t sources) const {
    for (int64_t j = 0; counts != nullptr && j < sources; ++j) {
      if (counts[b * sources + j] != 0) return true;
    }
    return false;
  }

  bool is_read(int64_t b, int64_t sources, int64_t j) const {
    return counts == nullptr || counts[b * sources + j] < heads;
  }

  // Calls body(streams, is_first, is_last) for what is read; the streams have no factors, since heads have others.
  template <class A, class Body>
  bool for_read(int64_t b, int64_t sources, Body body) const {
    return for_streams<A>(
        sources, [&](int64_t j) { return is_read(b, sources, j); }, [](int64_t) { return A{}; }, body);
  }
};

// `memory` is of batch * sources.
template <class A, class Column>
inline LeftOut count_left_out(const Shape& s, int64_t sources, Column column, void* memory, int threads) {
  bool may_leave_out = false;
  for (int64_t j = 0; j < sources; ++j) may_leave_out = may_leave_out || column(j).least > 0;
  if (!may_leave_out) return {s.heads, nullptr};
  int32_t* counts = static_cast<int32_t*>(memory);
  for_part(s, sources, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const ColumnView view = column(item % sources);
      counts[item] = 0;
      for (int64_t g = 0; g < s.heads; ++g) counts[item] += is_left_out<A>(view, item / sources * s.heads + g);
    }
  });
  return {s.heads, counts};
}

// x where the weight that it is multiplied with is not zero, which stands for one that is left out; zero elsewhere.
template <bool kMasked, class T>
inline Vec<T> where_retained(Vec<T> x, Vec<T> weight) {
  if constexpr (!kMasked) return x;
  return keep<T>(x, bits_of<Bits<T>>(weight != Vec<T>{}));
}

}  // namespace ela::ELA_ISA
