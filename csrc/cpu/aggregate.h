// The weighted sum over depth. Chunk outside, depth inside: the running sum of a chunk stays in the first-level
// cache while each source streams past, so every source is read once and nothing is concatenated.
//
// The sum is stored through the caches. Stores past them (measured, AVX-512, 2 threads) brought the forward alone from
// 70 to 95 % of a read probe at three maps of 26 MB, and made a whole stage 3 to 8 % slower: the map is read next.
#pragma once

#include "cpu/any_order.h"
#include "cpu/maps.h"
#include "cpu/norm.h"
#include "cpu/retained.h"

namespace ela::ELA_ISA {

constexpr int64_t kChunk = 2048;  // elements; measured, see benchmarks/

// Calls body(Count<streams>{}), with a number of sources that is known when it is compiled.
template <class Body>
inline void by_streams(int streams, Body body) {
  static_assert(kStreams == 4, "one case for each number of sources");
  switch (streams) {
    case 1:
      return body(Count<1>{});
    case 2:
      return body(Count<2>{});
    case 3:
      return body(Count<3>{});
    default:
      return body(Count<4>{});
  }
}

// Rows of contiguous elements: a head is one row where its channels follow each other without gaps in every map,
// and head_dim rows otherwise.
struct RowPlan {
  int64_t rows, length, chunks;
};

inline RowPlan plan_rows(const Shape& s, bool gapless) {
  RowPlan plan;
  plan.rows = gapless ? 1 : s.head_dim();
  plan.length = gapless ? s.head_dim() * s.positions : s.positions;
  plan.chunks = ceil_div(plan.length, kChunk);
  return plan;
}

inline bool is_gapless(const Shape& s, const MapView& map) { return map.inner == s.positions; }

// What the last of the calls that add up a sum does with it: where it stores it, and what it adds to it. A PlaneEnd
// stands for this where the sum goes through the end of a block at once.
template <class T, class Out>
struct Stored {
  static constexpr bool kEndsBlock = false;
  Out* out;  // in the type of the map, or in order in the accumulation type; null for a call that is not the last
  const T* residual;
};

// sum (+)= factor_0 v_0 + ... over `count` elements of J sources of type V.
template <class T, int J, class V, class Ending>
inline void add_sources(Acc<T>* sum, const V* const* v, const Acc<T>* factor, int64_t count, bool first,
                        const Ending& ending) {
  // Copies, which no store can change: they stay in registers.
  Acc<T> by[J];
  const V* from[J];
  for (int j = 0; j < J; ++j) by[j] = factor[j], from[j] = v[j];
  const auto added = [=](auto at) {
    Vec<T> x = by[0] * at.load(from[0]);
    x = settled(x);  // the same bits in whole vectors and in parts, and whatever the sum ends in
    for (int j = 1; j < J; ++j) x += by[j] * at.load(from[j]);
    return first ? x : x + at.load(static_cast<const Acc<T>*>(sum));
  };
  if constexpr (Ending::kEndsBlock) {
    map_any_order<T>(count, ending.out, [=, end = ending](auto at) { return end.of(added(at), at); });
  } else if (ending.out == nullptr) {
    for_any_order<T>(count, [=](auto at) { at.store(sum, added(at)); });
  } else if (ending.residual == nullptr) {
    map_any_order<T>(count, ending.out, added);
  } else {
    map_any_order<T>(count, ending.out,
                     [=, residual = ending.residual](auto at) { return added(at) + at.load(residual); });
  }
}

template <class T, class V, class Ending>
inline void add_some(int j, Acc<T>* sum, const V* const* v, const Acc<T>* factor, int64_t count, bool first,
                     const Ending& ending) {
  static_assert(kStreams == 4, "one case for each number of sources");
  switch (j) {
    case 1:
      return add_sources<T, 1>(sum, v, factor, count, first, ending);
    case 2:
      return add_sources<T, 2>(sum, v, factor, count, first, ending);
    case 3:
      return add_sources<T, 3>(sum, v, factor, count, first, ending);
    default:
      return add_sources<T, 4>(sum, v, factor, count, first, ending);
  }
}

// A sum over no source.
template <class T, class Out>
inline void add_nothing(int64_t count, Out* out, const T* residual) {
  if (residual == nullptr) {
    map_any_order<T>(count, out, [](auto) { return Vec<T>{}; });
  } else {
    map_any_order<T>(count, out, [=](auto at) { return at.load(residual); });
  }
}

// Calls body(c, offset, begin, count) for the planes that `count` elements of a head reach into, from `offset` of
// channel `c` on: `begin` of them come before that plane's.
template <class Body>
inline void for_planes(int64_t positions, int64_t c, int64_t offset, int64_t count, Body body) {
  c += offset / positions, offset %= positions;
  for (int64_t begin = 0; begin < count;) {
    const int64_t some = positions - offset < count - begin ? positions - offset : count - begin;
    body(c, offset, begin, some);
    begin += some, offset = 0, ++c;
  }
}

template <class T, class V>
void aggregate_planar(const AggregateParams& p, int threads) {
  using A = Acc<T>;
  const Shape& s = p.shape;
  const bool has_residual = p.residual.data != nullptr, is_stored = p.out.data != nullptr;
  bool gapless = (!is_stored || is_gapless(s, p.out)) && (!has_residual || is_gapless(s, p.residual));
  for (int64_t j = 0; j < p.sources; ++j) gapless = gapless && is_gapless(s, p.maps[j]);
  const RowPlan plan = plan_rows(s, gapless);
  // A sum in the accumulation type, which has to be rounded to no other, ends in registers (measured with AVX-512:
  // inference of blocks in float takes 0.93 to 0.95 of what it takes by way of the cache).
  const bool ends_at_once = kIsWide<T> && p.norm != nullptr && !is_stored;
  const int64_t per_head = plan.rows * plan.chunks;
  for_part(s, s.heads * per_head, threads, [&](int64_t begin, int64_t end) {
    alignas(ELA_VECTOR_BYTES) A sum[kChunk];
    // A sum that is not stored is rounded all the same: whether it is stored changes no number.
    alignas(ELA_VECTOR_BYTES) T ended[kChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / per_head;
      const int64_t b = head / s.heads;
      const int64_t c = head % s.heads * s.head_dim() + item % per_head / plan.chunks;
      const int64_t offset = item % plan.chunks * kChunk;
      const int64_t count = plan.length - offset < kChunk ? plan.length - offset : kChunk;
      T* out = is_stored ? const_cast<T*>(planar_at<T>(p.out, b, c, offset)) : ended;
      const T* residual = has_residual ? planar_at<T>(p.residual, b, c, offset) : nullptr;
      const auto add = [&](const Streams<A>& at, bool is_first, bool is_last) {
        const V* v[kStreams];
        for (int i = 0; i < at.count; ++i) v[i] = planar_at<V>(p.maps[at.source[i]], b, c, offset);
        if constexpr (kIsWide<T>) {
          if (is_last && ends_at_once) {
            return for_planes(s.positions, c, offset, count, [&](int64_t of, int64_t from, int64_t begin, int64_t n) {
              const V* here[kStreams];
              for (int i = 0; i < at.count; ++i) here[i] = v[i] + begin;
              add_some<T>(at.count, sum + begin, here, at.factor, n, is_first, PlaneEnd<T>(*p.norm, b, of, from));
            });
          }
        }
        add_some<T>(at.count, sum, v, at.factor, count, is_first, Stored<T, T>{is_last ? out : nullptr, residual});
      };
      const auto column = [&](int64_t j) { return p.columns[j]; };
      const bool is_any_read = for_retained<A>(p.sources, column, head, add);
      if (!is_any_read) add_nothing<T>(count, out, residual);
      if (p.norm == nullptr || (is_any_read && ends_at_once)) continue;
      for_planes(s.positions, c, offset, count, [&](int64_t of, int64_t from, int64_t begin, int64_t n) {
        end_plane<T>(*p.norm, b, of, from, n, out + begin);
      });
    }
  });
}

// Interleaved maps: neighbouring elements belong to different heads, so the weights are laid out by channel first,
// [B, sources, C], and then read as vectors; zero for what is left out. `column(j)` is the ColumnView of source j.
template <class T, class Column>
void expand_columns(const Shape& s, int64_t sources, Column column, Acc<T>* expanded, int threads) {
  using A = Acc<T>;
  const int64_t head_dim = s.head_dim();
  for_part(s, sources, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const ColumnView view = column(item % sources);
      A* row = expanded + item * s.channels;
      for (int64_t g = 0; g < s.heads; ++g) {
        const int64_t head = item / sources * s.heads + g;
        const A factor = is_left_out<A>(view, head) ? 0 : factor_at<A>(view, head);
        for (int64_t i = 0; i < head_dim; ++i) *row++ = factor;
      }
    }
  });
}

// Some positions of some channels of interleaved maps.
struct Patch {
  int64_t b, first_row, rows, c, count;
};

template <class T>
inline Run<const T> run_at(const MapView& map, const Patch& patch) {
  return {interleaved_at<T>(map, patch.b, patch.first_row, patch.c), map.inner};
}

// Adds some sources at a patch to `sums`; the last ones store to `out` instead, or to `ended` where it has no address.
// `expanded` is as expand_columns() gives it.
template <bool kMasked, class T, class V>
inline void add_patch(const AggregateParams& p, const Patch& patch, const Streams<Acc<T>>& at, bool is_first,
                      bool is_last, const Acc<T>* expanded, Acc<T>* sums, T* ended) {
  using A = Acc<T>;
  Run<const V> v[kStreams];
  const A* weights[kStreams];
  for (int k = 0; k < at.count; ++k) {
    v[k] = run_at<V>(p.maps[at.source[k]], patch);
    weights[k] = expanded + (patch.b * p.sources + at.source[k]) * p.shape.channels + patch.c;
  }
  by_streams(at.count, [&](auto streams) {
    for (int64_t row = 0; row < patch.rows; ++row) {
      A* sum = sums + row * patch.count;
      T* out = p.out.data != nullptr ? writable(run_at<T>(p.out, patch)).at(row) : ended + row * patch.count;
      const T* residual = p.residual.data == nullptr ? nullptr : run_at<T>(p.residual, patch).at(row);
      for_vectors<T>(patch.count, [&](int64_t i, auto n) {
        const auto term = [&](int k) {
          const Vec<T> weight = load_n(weights[k] + i, n);
          return weight * where_retained<kMasked, T>(load_n(v[k].at(row) + i, n), weight);
        };
        Vec<T> x = term(0);
        for (int k = 1; k < streams; ++k) x += term(k);
        if (!is_first) x += load_n(sum + i, n);
        if (is_last) {
          if (residual != nullptr) x += load_n(residual + i, n);
          store_n(out + i, x, n);
        } else {
          store_n(sum + i, x, n);
        }
      });
      if (is_last && p.norm != nullptr) {
        end_position<T>(*p.norm, patch.b, patch.first_row + row, patch.c, patch.count, out);
      }
    }
  });
}

// The same where no source is read.
template <class T>
inline void add_nothing(const AggregateParams& p, const Patch& patch, T* ended) {
  for (int64_t row = 0; row < patch.rows; ++row) {
    T* out = p.out.data != nullptr ? writable(run_at<T>(p.out, patch)).at(row) : ended + row * patch.count;
    add_nothing<T>(patch.count, out, p.residual.data == nullptr ? nullptr : run_at<T>(p.residual, patch).at(row));
    if (p.norm != nullptr) end_position<T>(*p.norm, patch.b, patch.first_row + row, patch.c, patch.count, out);
  }
}

template <class T, class V>
void aggregate_interleaved(const AggregateParams& p, int threads) {
  using A = Acc<T>;
  const Shape& s = p.shape;
  A* expanded = static_cast<A*>(p.workspace);
  const auto column = [&](int64_t j) { return p.columns[j]; };
  expand_columns<T>(s, p.sources, column, expanded, threads);
  const LeftOut left_out =
      count_left_out<A>(s, p.sources, column, expanded + s.batch * p.sources * s.channels, threads);
  const int64_t strip = s.channels < kChunk ? s.channels : kChunk;
  const int64_t strips = ceil_div(s.channels, strip);
  const int64_t rows = kChunk / strip;
  const int64_t blocks = ceil_div(s.positions, rows);
  for_part(s, blocks * strips, threads, [&](int64_t begin, int64_t end) {
    alignas(ELA_VECTOR_BYTES) A sums[kChunk];
    alignas(ELA_VECTOR_BYTES) T ended[kChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / (blocks * strips);
      const int64_t first_row = item / strips % blocks * rows, c = item % strips * strip;
      const Patch patch = {b, first_row, s.positions - first_row < rows ? s.positions - first_row : rows, c,
                           s.channels - c < strip ? s.channels - c : strip};
      const auto add = left_out.any(b, p.sources) ? add_patch<true, T, V> : add_patch<false, T, V>;
      const bool is_any_read =
          left_out.for_read<A>(b, p.sources, [&](const Streams<A>& at, bool is_first, bool is_last) {
            add(p, patch, at, is_first, is_last, expanded, sums, ended);
          });
      if (!is_any_read) add_nothing<T>(p, patch, ended);
    }
  });
}

// Sources of type V, the sum and the residual of type T: of one accumulation type, hence of as many lanes.
template <class T, class V = T>
void aggregate_kernel(const AggregateParams& p, int threads) {
  if (p.shape.interleaved) {
    aggregate_interleaved<T, V>(p, threads);
  } else {
    aggregate_planar<T, V>(p, threads);
  }
}

inline int64_t aggregate_workspace(const Shape& s, int64_t sources) {
  return s.interleaved ? s.batch * sources * (s.channels + 1) : 0;
}

}  // namespace ela::ELA_ISA
