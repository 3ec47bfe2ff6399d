// Mean and variance of a map over batch and space, of every channel.
//
// Least bytes: the map is read once, right after it is written. Statistics are partial means and sums of squared
// distances, joined in double in a fixed order; none is a difference of two large sums.
#pragma once

#include "cpu/any_order.h"
#include "cpu/depthwise.h"

namespace ela::ELA_ISA {

// Blocks of positions with partial sums of their own: all of a plane, or some rows of interleaved channels.
inline int64_t stat_blocks(const ImageShape& s) { return s.interleaved ? ceil_div(s.height, kRowsAtOnce) : 1; }

inline int64_t stat_count(const ImageShape& s, int64_t block) {
  if (!s.interleaved) return s.positions();
  const int64_t rows = s.height - block * kRowsAtOnce;
  return (rows < kRowsAtOnce ? rows : kRowsAtOnce) * s.width;
}

// Calls planar(b, c) for every plane, or interleaved(b, block, first position, last position) for every block.
template <class Planar, class Interleaved>
inline void for_stat_blocks(const ImageShape& s, int threads, Planar planar, Interleaved interleaved) {
  const int64_t blocks = stat_blocks(s);
  for_part(s, s.interleaved ? blocks : s.channels, threads, [&](int64_t begin, int64_t end) {
    if (!s.interleaved) {
      for (PlaneIndex at(begin, end, s.channels); at.is_there(); at.step()) planar(at.b, at.c);
      return;
    }
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks;
      const int64_t first = block * kRowsAtOnce * s.width;
      interleaved(item / blocks, block, first, first + stat_count(s, block));
    }
  });
}

// Positions whose distances from one origin are summed. The first of them is an origin that may lie far from the
// others, so there are few of them; after that it is the mean so far. Then what the sums cancel is small beside the
// variance.
inline int64_t stat_chunk(int64_t first, int64_t last, bool is_first) {
  const int64_t length = is_first ? 32 : 1024;
  return last - first < length ? last : first + length;
}

// Takes `more` positions into mean and squares of the `count` before them: distances from the mean before have the mean
// `distance`, and `square` is the sum of their squared distances from that.
template <class V, class A>
inline void join_chunk(V* mean, V* squares, V distance, V square, A count, A more) {
  *mean += distance * (more / (count + more));
  *squares += square + distance * distance * (count * more / (count + more));
}

// Partial means and sums of squared distances from them, [2, B, blocks, C].
template <class T>
void statistics_kernel(const StatisticsParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const int64_t blocks = stat_blocks(s);
  A* means = static_cast<A*>(p.partials);
  A* squares = means + s.batch * blocks * s.channels;
  for_stat_blocks(
      s, threads,
      [&](int64_t b, int64_t c) {
        const T* o = planar_at<T>(p.o, b, c, 0);
        A mean = load_one<T>(o, 0), total = 0;
        for (int64_t first = 0, last; first < s.positions(); first = last) {
          last = stat_chunk(first, s.positions(), first == 0);
          Vec<T> sum{}, square{};
          for_any_order<T>(last - first, [&](auto at) {
            const Vec<T> d = at.clear(at.load(o + first) - mean);
            sum += d;
            square += d * d;
          });
          const A more = static_cast<A>(last - first);
          const A distance = sum_lanes<T>(sum) / more;
          join_chunk(&mean, &total, distance, sum_lanes<T>(square) - more * distance * distance, static_cast<A>(first),
                     more);
        }
        means[b * s.channels + c] = mean;
        squares[b * s.channels + c] = total;
      },
      [&](int64_t b, int64_t block, int64_t begin, int64_t end) {
        for_vectors<T>(s.channels, [&](int64_t c, int n) {
          Vec<T> mean = load_n(interleaved_at<T>(p.o, b, begin, c), n), total{};
          for (int64_t first = begin, last; first < end; first = last) {
            last = stat_chunk(first, end, first == begin);
            Vec<T> sum{}, square{};
            for (int64_t position = first; position < last; ++position) {
              const Vec<T> d = load_n(interleaved_at<T>(p.o, b, position, c), n) - mean;
              sum += d;
              square += d * d;
            }
            const A more = static_cast<A>(last - first);
            const Vec<T> distance = sum / more;
            join_chunk(&mean, &total, distance, square - more * distance * distance, static_cast<A>(first - begin),
                       more);
          }
          const int64_t at = (b * blocks + block) * s.channels + c;
          store_n(means + at, mean, n);
          store_n(squares + at, total, n);
        });
      });
}

// Joins the partial statistics to mean and (biased) variance of every channel.
template <class T>
void join_statistics(const StatisticsParams& p) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const int64_t blocks = stat_blocks(s);
  const A* means = static_cast<const A*>(p.partials);
  const A* squares = means + s.batch * blocks * s.channels;
  for (int64_t c = 0; c < s.channels; ++c) {
    double count = 0, mean = 0, square = 0;
    for (int64_t i = 0; i < s.batch * blocks; ++i) {
      const double more = static_cast<double>(stat_count(s, i % blocks));
      const double distance = means[i * s.channels + c] - mean;
      mean += distance * more / (count + more);
      square += squares[i * s.channels + c] + distance * distance * count * more / (count + more);
      count += more;
    }
    static_cast<A*>(p.mean)[c] = static_cast<A>(mean);
    static_cast<A*>(p.variance)[c] = static_cast<A>(square > 0 || square != square ? square / count : 0);
  }
}

}  // namespace ela::ELA_ISA
