// The gradient of one layer: <dout, v_j> per head for every j in one read of the values (with dv_j = a_j dout written
// in the same pass where the push form asks for it), then the gradients of scores, query, keys and previous weights.
//
// Dot products are cut into blocks by the shape alone and their partial sums added in a fixed order, in double, so
// that the same call gives the same bits on any number of threads.
#pragma once

#include "cpu/aggregate.h"
#include "cpu/sum_rows.h"

namespace ela::ELA_ISA {

constexpr int64_t kBlockChunks = 8;  // planar: chunks to one partial sum
constexpr int64_t kBlockElements =
    32 * 1024;                    // interleaved: elements of dout to one partial sum, in second-level cache
constexpr int64_t kStrip = 1024;  // interleaved: channels to one running sum

// Partial sums [B, G, blocks, depth] (planar) or [B, blocks, depth, G] (interleaved).
struct Partials {
  int64_t blocks, batch, head, block, depth;
  int64_t size;
};

inline int64_t interleaved_rows(const Shape& s) {
  const int64_t rows = kBlockElements / s.channels;
  return rows < 1 ? 1 : rows;
}

inline Partials plan_partials(const Shape& s, int64_t depth) {
  Partials q;
  if (s.interleaved) {
    q.blocks = ceil_div(s.positions, interleaved_rows(s));
    q = {q.blocks, q.blocks * depth * s.heads, 1, depth * s.heads, s.heads, 0};
  } else {
    // Gaps between channels never change the number of blocks by much; the larger count serves both.
    const int64_t rows = plan_rows(s, false).rows * plan_rows(s, false).chunks;
    const int64_t flat = plan_rows(s, true).chunks;
    q.blocks = ceil_div(rows > flat ? rows : flat, kBlockChunks);
    q = {q.blocks, s.heads * q.blocks * depth, q.blocks * depth, depth, 1, 0};
  }
  q.size = s.batch * q.batch;
  return q;
}

// sums_j += sum_i x_i y_i for J rows y of type V, and (where dv is given) dv_j = factor_j x.
template <class T, int J, class V>
inline void dot_sources(const Acc<T>* x, const V* const* v, const Acc<T>* factor, T* const* dv, int64_t count,
                        Acc<T>* const* sums) {
  Vec<T> sum[J][2] = {};  // two to a source hide the latency of the multiply-add
  for_any_order<T>(count, [&](auto at) {
    const Vec<T> d = at.load(x);
    for (int j = 0; j < J; ++j) sum[j][at.half] += d * at.load(v[j]);
  });
  Vec<T> both[J];
  for (int j = 0; j < J; ++j) both[j] = sum[j][0] + sum[j][1];
  Acc<T> found[J];
  sum_each<T, J>(both, found);
  for (int j = 0; j < J; ++j) {
    *sums[j] += found[j];
    if (dv[j] == nullptr) continue;
    const Acc<T> by = factor[j];
    map_any_order<T>(count, dv[j], [=](auto at) { return by * at.load(x); });
  }
}

// The weights of one depth.
template <class A>
inline ColumnView weight_column(const WeightsParams& p, int64_t j) {
  return {static_cast<const A*>(p.weights) + j, p.depth, p.tolerance, p.is_given};
}

// A chunk of dout in the accumulation type: itself, or widened once for all depths, in the order that dot_sources
// reads.
inline const float* widened(const float* x, float*, int64_t) { return x; }
inline const double* widened(const double* x, double*, int64_t) { return x; }
template <class T>
inline const float* widened(const T* x, float* buffer, int64_t count) {
  for_any_order<T>(count, [=](auto at) { at.store(buffer, at.load(x)); });
  return buffer;
}

// Where a map's channels begin that belong to a head, and how far it is to those of the next.
template <class T>
struct Heads {
  T* first;
  int64_t step;
  T* of(int64_t head) const { return first == nullptr ? nullptr : first + head * step; }
};
template <class T>
inline Heads<T> heads_of(const MapView& map, const Shape& s, int64_t b, int64_t g) {
  if (map.data == nullptr) return {nullptr, 0};
  const int64_t step = s.head_dim() * map.inner;
  return {const_cast<T*>(planar_at<T>(map, b, 0, g * step)), step};
}

// Heads that are one chunk each, of `length` elements, and leave nothing out: several at a time, source by source. Of a
// plane of 7 x 7, what belongs to a head and a source takes longer than the products.
template <class T, class V>
void dots_of_heads(const BackwardParams& p, const Partials& q, int64_t length, Acc<T>* partials, int threads) {
  using A = Acc<T>;
  const Shape& s = p.forward.shape;
  const int64_t depth = p.forward.depth, at_once = kChunk / length;
  for_part(s, s.heads, threads, [&](int64_t begin, int64_t end) {
    alignas(ELA_VECTOR_BYTES) A buffer[kIsWide<T> ? 1 : kChunk];
    for (int64_t item = begin, some; item < end; item += some) {
      const int64_t b = item / s.heads, g = item % s.heads;
      some = s.heads - g < end - item ? s.heads - g : end - item;
      if (some > at_once) some = at_once;
      A* const sums = partials + item * q.blocks * depth;
      for (int64_t i = 0; i < some * q.blocks * depth; ++i) sums[i] = 0;
      const Heads<T> dout = heads_of<T>(*p.dout, s, b, g);
      Heads<const A> x = {buffer, length};
      if constexpr (kIsWide<T>) {
        x = {dout.first, dout.step};
      } else {
        for (int64_t h = 0; h < some; ++h) widened(dout.of(h), buffer + h * length, length);
      }
      for (int64_t first = 0; first < depth; first += kStreams) {
        const int count = static_cast<int>(depth - first < kStreams ? depth - first : kStreams);
        Heads<V> v[kStreams];
        Heads<T> dv[kStreams] = {};
        for (int k = 0; k < count; ++k) {
          v[k] = heads_of<V>(p.values[first + k], s, b, g);
          if (p.dvalues != nullptr) dv[k] = heads_of<T>(p.dvalues[first + k], s, b, g);
        }
        by_streams(count, [&](auto streams) {
          for (int64_t h = 0; h < some; ++h) {
            const V* from[streams];
            T* to[streams];
            A factor[streams], *sum[streams];
            for (int k = 0; k < streams; ++k) {
              from[k] = v[k].of(h), to[k] = dv[k].of(h), sum[k] = sums + h * q.blocks * depth + first + k;
              factor[k] = to[k] == nullptr ? 0 : factor_at<A>(weight_column<A>(p.forward, first + k), item + h);
            }
            dot_sources<T, decltype(streams)::value>(x.of(h), from, factor, to, length, sum);
          }
        });
      }
    }
  });
}

template <class T, class V = T>
void dots_planar(const BackwardParams& p, const Partials& q, Acc<T>* partials, int threads) {
  using A = Acc<T>;
  const Shape& s = p.forward.shape;
  const int64_t depth = p.forward.depth;
  bool gapless = is_gapless(s, *p.dout);
  for (int64_t j = 0; j < depth; ++j) {
    gapless = gapless && is_gapless(s, p.values[j]);
    if (p.dvalues != nullptr && p.dvalues[j].data != nullptr) gapless = gapless && is_gapless(s, p.dvalues[j]);
  }
  const RowPlan plan = plan_rows(s, gapless);
  const int64_t units = plan.rows * plan.chunks;
  if (units == 1 && p.forward.tolerance <= 0) return dots_of_heads<T, V>(p, q, plan.length, partials, threads);
  const auto column = [&](int64_t j) { return weight_column<A>(p.forward, j); };
  const T* const no_residual = nullptr;
  for_part(s, s.heads * q.blocks, threads, [&](int64_t begin, int64_t end) {
    alignas(ELA_VECTOR_BYTES) A buffer[kChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / q.blocks;
      const int64_t b = head / s.heads;
      const int64_t first_unit = item % q.blocks * kBlockChunks;
      const int64_t last_unit = first_unit + kBlockChunks < units ? first_unit + kBlockChunks : units;
      A* sums = partials + item * depth;
      for (int64_t j = 0; j < depth; ++j) sums[j] = 0;
      for (int64_t unit = first_unit; unit < last_unit; ++unit) {
        const int64_t c = head % s.heads * s.head_dim() + unit / plan.chunks;
        const int64_t offset = unit % plan.chunks * kChunk;
        const int64_t count = plan.length - offset < kChunk ? plan.length - offset : kChunk;
        const A* x = widened(planar_at<T>(*p.dout, b, c, offset), buffer, count);
        const auto gradient = [&](int64_t j) {
          const bool wanted = p.dvalues != nullptr && p.dvalues[j].data != nullptr;
          return wanted ? const_cast<T*>(planar_at<T>(p.dvalues[j], b, c, offset)) : nullptr;
        };
        for_retained<A>(depth, column, head, [&](const Streams<A>& at, bool, bool) {
          const V* v[kStreams];
          T* dv[kStreams];
          A* to[kStreams];
          for (int i = 0; i < at.count; ++i) {
            const int64_t j = at.source[i];
            v[i] = planar_at<V>(p.values[j], b, c, offset), dv[i] = gradient(j), to[i] = sums + j;
          }
          by_streams(at.count,
                     [&](auto streams) { dot_sources<T, decltype(streams)::value>(x, v, at.factor, dv, count, to); });
        });
        for (int64_t j = 0; p.dvalues != nullptr && j < depth; ++j) {
          if (gradient(j) == nullptr || !is_left_out<A>(column(j), head)) continue;
          add_nothing<T>(count, gradient(j), no_residual);
        }
      }
    }
  });
}

// Adds the products of `rows` positions of J sources to their running sums [J, kStrip], and (where dv is given) writes
// dv_j = weight_j * dout. One position after the other: with four at a time, which load and store the sums less often,
// a map from memory took twice as long.
template <bool kMasked, class T, int J, class V>
inline void multiply_rows(Run<const T> x, const Run<const V>* v, const Run<T>* dv, const Acc<T>* const* weights,
                          int64_t rows, int64_t count, Acc<T>* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    for_vectors<T>(count, [&](int64_t i, auto n) {
      const Vec<T> d = load_n(x.at(row) + i, n);
      for (int j = 0; j < J; ++j) {
        Acc<T>* sum = sums + j * kStrip + i;
        store_n(sum, load_n(sum, n) + d * load_n(v[j].at(row) + i, n), n);
      }
    });
    for (int j = 0; j < J; ++j) {
      if (dv[j].data == nullptr) continue;
      for_vectors<T>(count, [&](int64_t i, auto n) {
        const Vec<T> weight = load_n(weights[j] + i, n);
        store_n(dv[j].at(row) + i, weight * where_retained<kMasked, T>(load_n(x.at(row) + i, n), weight), n);
      });
    }
  }
}

template <class A>
inline A sum_run(const A* x, int64_t count) {
  Vec<A> sum{};
  for_vectors<A>(count, [&](int64_t i, int n) { sum += load_n(x + i, n); });
  return sum_lanes<A>(sum);
}

// <dout, v_j> per head of some sources at a patch, added to by_head[j * heads + g].
template <bool kMasked, class T, class V>
inline void add_dots(const BackwardParams& p, const Patch& patch, const Streams<Acc<T>>& at, const Acc<T>* expanded,
                     Acc<T>* sums, Acc<T>* by_head) {
  using A = Acc<T>;
  const Shape& s = p.forward.shape;
  const int64_t depth = p.forward.depth, head_dim = s.head_dim();
  Run<const V> v[kStreams];
  Run<T> dv[kStreams] = {};
  const A* weights[kStreams] = {};
  for (int k = 0; k < at.count; ++k) {
    const int64_t j = at.source[k];
    v[k] = run_at<V>(p.values[j], patch);
    if (p.dvalues != nullptr && p.dvalues[j].data != nullptr) dv[k] = writable(run_at<T>(p.dvalues[j], patch));
    if (expanded != nullptr) weights[k] = expanded + (patch.b * depth + j) * s.channels + patch.c;
  }
  for (int64_t k = 0; k < at.count * kStrip; ++k) sums[k] = 0;
  by_streams(at.count, [&](auto streams) {
    multiply_rows<kMasked, T, decltype(streams)::value>(run_at<T>(*p.dout, patch), v, dv, weights, patch.rows,
                                                        patch.count, sums);
  });
  // A head may straddle two strips; its two parts meet in by_head.
  for (int k = 0; k < at.count; ++k) {
    int64_t g = patch.c / head_dim;
    for (int64_t i = 0; i < patch.count; ++g) {
      const int64_t next = (g + 1) * head_dim - patch.c, stop = next < patch.count ? next : patch.count;
      const A* sum = sums + k * kStrip + i;
      // What another head retains was read for this one too.
      if (!kMasked || !is_left_out<A>(weight_column<A>(p.forward, at.source[k]), patch.b * s.heads + g)) {
        by_head[at.source[k] * s.heads + g] += stop - i == 1 ? *sum : sum_run(sum, stop - i);
      }
      i = stop;
    }
  }
}

// Writes the gradients of the values that no head retains.
template <class T>
inline void clear_gradients(const BackwardParams& p, const Patch& patch, const LeftOut& left_out) {
  const T* const no_residual = nullptr;
  for (int64_t j = 0; p.dvalues != nullptr && j < p.forward.depth; ++j) {
    if (p.dvalues[j].data == nullptr || left_out.is_read(patch.b, p.forward.depth, j)) continue;
    const Run<T> dv = writable(run_at<T>(p.dvalues[j], patch));
    for (int64_t row = 0; row < patch.rows; ++row) add_nothing<T>(patch.count, dv.at(row), no_residual);
  }
}

template <class T, class V = T>
void dots_interleaved(const BackwardParams& p, const Partials& q, Acc<T>* partials, const Acc<T>* expanded,
                      const LeftOut& left_out, int threads) {
  using A = Acc<T>;
  const Shape& s = p.forward.shape;
  const int64_t depth = p.forward.depth, rows = interleaved_rows(s);
  for_part(s, q.blocks, threads, [&](int64_t begin, int64_t end) {
    alignas(ELA_VECTOR_BYTES) A sums[kStreams * kStrip];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / q.blocks;
      const int64_t first_row = item % q.blocks * rows;
      const int64_t some = first_row + rows < s.positions ? rows : s.positions - first_row;
      A* by_head = partials + item * depth * s.heads;
      for (int64_t i = 0; i < depth * s.heads; ++i) by_head[i] = 0;
      const auto add = left_out.any(b, depth) ? add_dots<true, T, V> : add_dots<false, T, V>;
      left_out.for_read<A>(b, depth, [&](const Streams<A>& at, bool, bool) {
        for (int64_t c = 0; c < s.channels; c += kStrip) {
          const int64_t count = s.channels - c < kStrip ? s.channels - c : kStrip;
          add(p, {b, first_row, some, c, count}, at, expanded, sums, by_head);
        }
      });
      clear_gradients<T>(p, {b, first_row, some, 0, s.channels}, left_out);
    }
  });
}

// The partial sums, and the gradients of the values; `expanded` is of aggregate_workspace() elements.
template <class T, class V>
void read_values(const BackwardParams& p, const Partials& q, Acc<T>* partials, Acc<T>* expanded, int threads) {
  using A = Acc<T>;
  const WeightsParams& f = p.forward;
  const Shape& s = f.shape;
  if (!s.interleaved) return dots_planar<T, V>(p, q, partials, threads);
  const auto column = [&](int64_t j) { return weight_column<A>(f, j); };
  if (p.dvalues != nullptr) expand_columns<T>(s, f.depth, column, expanded, threads);
  const LeftOut left_out = count_left_out<A>(s, f.depth, column, expanded + s.batch * f.depth * s.channels, threads);
  dots_interleaved<T, V>(p, q, partials, expanded, left_out, threads);
}

// `sum` and the partial sums of <dout, v_j> of the head `item`, which is one of the sample item / heads.
template <class A>
inline double with_dots(double sum, const Shape& s, const Partials& q, const A* partials, int64_t item, int64_t j) {
  const A* start = partials + item / s.heads * q.batch + item % s.heads * q.head + j * q.depth;
  for (int64_t block = 0; block < q.blocks; ++block) sum += start[block * q.block];
  return sum;
}

// Values of type V; the gradients are of type T.
template <class T, class V = T>
void backward_kernel(const BackwardParams& p, int threads) {
  using A = Acc<T>;
  const WeightsParams& f = p.forward;
  const Shape& s = f.shape;
  const Partials q = plan_partials(s, f.depth);
  // The workspace: sums over all blocks in double, scratch scores, partial sums, weights by channel.
  double* totals = static_cast<double*>(p.workspace);
  A* scratch = reinterpret_cast<A*>(totals + s.batch * s.heads * f.depth);
  A* partials = scratch + s.batch * s.heads * f.depth;
  A* expanded = partials + q.size;
  if (p.dout != nullptr) read_values<T, V>(p, q, partials, expanded, threads);
  for_part(s, s.heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      double* total = totals + item * f.depth;
      for (int64_t j = 0; j < f.depth; ++j) {
        total[j] = p.dweights == nullptr ? 0.0 : static_cast<const A*>(p.dweights)[item * f.depth + j];
        if (p.dout != nullptr) total[j] = with_dots(total[j], s, q, partials, item, j);
      }
      A* dscores = static_cast<A*>(p.dscores) + item * f.depth;
      scores_gradient<T>(p, item, total, dscores);
      query_and_key_gradients<T>(p, item, dscores);
      if (p.dprev != nullptr) prev_gradient<T>(p, item, scratch + item * f.depth);
    }
  });
}

// Of a sum by weights that are given: of those and of the values, which are of one type.
template <class T>
void mix_backward_kernel(const BackwardParams& p, int threads) {
  using A = Acc<T>;
  const WeightsParams& f = p.forward;
  const Shape& s = f.shape;
  const Partials q = plan_partials(s, f.depth);
  A* partials = static_cast<A*>(p.workspace);
  read_values<T, T>(p, q, partials, partials + q.size, threads);
  for_part(s, s.heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      A* dweights = static_cast<A*>(p.dscores) + item * f.depth;
      for (int64_t j = 0; j < f.depth; ++j) dweights[j] = static_cast<A>(with_dots(0.0, s, q, partials, item, j));
    }
  });
}

// In accumulation elements; `totals` are doubles, hence two floats each.
inline int64_t backward_workspace(const Shape& s, int64_t depth) {
  const int64_t scores = s.batch * s.heads * depth;
  return 3 * scores + plan_partials(s, depth).size + aggregate_workspace(s, depth);
}

}  // namespace ela::ELA_ISA
