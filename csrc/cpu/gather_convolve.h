// The gradients of a layer's producer, of its input and of its taps: a value's gradient is gathered, as the aggregation
// gathers, a part of it that fits the cache at a time, and convolved at once, so that it is never stored.
#pragma once

#include "cpu/aggregate.h"
#include "cpu/depthwise.h"

namespace ela::ELA_ISA {

// `length` elements of dv from the plane of a channel on, all of one head: sum_m column_m * map_m.
template <class T>
inline void gather_planes(const GatherConvolveParams& p, int64_t b, int64_t c, int64_t length, Acc<T>* planes) {
  using A = Acc<T>;
  const int64_t head = b * p.heads + c / (p.shape.channels / p.heads);
  for (int64_t offset = 0; offset < length; offset += kChunk) {
    const int64_t count = length - offset < kChunk ? length - offset : kChunk;
    A* const to = planes + offset;
    const auto add = [&](const Streams<A>& at, bool is_first, bool is_last) {
      const T* source[kStreams];
      for (int i = 0; i < at.count; ++i) source[i] = planar_at<T>(p.maps[at.source[i]], b, c, offset);
      add_some<T>(at.count, to, source, at.factor, count, is_first, Stored<T, A>{is_last ? to : nullptr, nullptr});
    };
    const auto column = [&](int64_t j) { return p.columns[j]; };
    if (!for_retained<A>(p.sources, column, head, add)) add_nothing<T>(count, to, static_cast<const T*>(nullptr));
  }
}

// Planes that are gathered at once, as far as they follow each other in memory: several, where they are small.
inline int64_t planes_at_once(const ImageShape& s) { return s.positions() < kChunk ? kChunk / s.positions() : 1; }

template <bool kWantsTaps, class T>
void gather_convolve_planar(const GatherConvolveParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  A* partials = static_cast<A*>(p.workspace);            // [B, C, 9]
  A* buffers = partials + s.batch * s.channels * kTaps;  // one for each thread
  const int64_t head_dim = s.channels / p.heads;
  int64_t at_once = planes_at_once(s);
  for (int64_t j = 0; j < p.sources; ++j) at_once = p.maps[j].inner == s.positions() ? at_once : 1;
  for_part(s, s.channels, threads, [&](int64_t begin, int64_t end) {
    A* planes = buffers + thread_index() * planes_at_once(s) * s.positions();
    int64_t gathered = begin, first = begin;  // the planes [first, gathered) are in `planes`
    int64_t left_of_head = head_dim - begin % head_dim;
    for (PlaneIndex at(begin, end, s.channels); at.is_there(); at.step()) {
      const int64_t item = at.item, b = at.b, c = at.c;
      if (left_of_head == 0) left_of_head = head_dim;
      if (item == gathered) {
        int64_t count = left_of_head < at_once ? left_of_head : at_once;
        if (count > end - item) count = end - item;
        gather_planes<T>(p, b, c, count * s.positions(), planes);
        first = item, gathered = item + count;
      }
      --left_of_head;
      const A* plane = planes + (item - first) * s.positions();
      if (kWantsTaps) correlate_plane<T>(plane, at.of<T>(p.x), partials + item * kTaps, s.height, s.width);
      if (p.dx.data == nullptr) continue;
      Vec<T> tap[kTaps];
      load_taps<T>(p.taps, c, tap);
      const A offset = p.dmean == nullptr ? 0 : static_cast<const A*>(p.dmean)[item] / static_cast<A>(s.positions());
      const T* residual = p.residual.data == nullptr ? nullptr : planar_at<T>(p.residual, b, c, 0);
      convolve_plane_turned<T>(plane, tap, offset, residual, at.written_of<T>(p.dx), s.height, s.width);
    }
  });
}

// Small planes, a lane each.
template <bool kWantsTaps, class T>
void gather_convolve_small(const GatherConvolveParams& p, int threads) {
  using A = Acc<T>;
  constexpr int kL = kLanes<T>;
  const ImageShape& s = p.shape;
  const int64_t head_dim = s.channels / p.heads, positions = s.positions();
  bool gapless = true;
  for (int64_t j = 0; j < p.sources; ++j) gapless = gapless && p.maps[j].inner == positions;
  for_part(s, s.channels, threads, [&](int64_t begin, int64_t end) {
    LanePlanes<T> dv(s.height, s.width);
    alignas(ELA_VECTOR_BYTES) A planes_of[kSmallPlane * kL], x[kSmallPlane * kL];
    for_lanes<T>(begin, end, s.channels, [&](int64_t b, int64_t c, auto planes) {
      for (int64_t k = 0, some; k < planes; k += some) {
        const int64_t left_of_head = head_dim - (c + k) % head_dim;
        some = !gapless ? 1 : left_of_head < planes - k ? left_of_head : planes - k;
        gather_planes<T>(p, b, c + k, some * positions, planes_of + k * positions);
      }
      to_lanes<T>(planes_of, positions, planes, positions, dv.row(0));
      if (kWantsTaps) {
        Vec<T> sums[kTaps] = {};
        to_lanes<T>(planar_at<T>(p.x, b, c, 0), p.x.inner, planes, positions, x);
        for (int64_t r = 0; r < s.height; ++r) {
          const A* const row = x + r * dv.pitch;
          correlate_line<T>(
              s.width, dv.around(r), [=](int64_t w) { return load_n(row + w * kL, kL); }, lane_bits<T>(0, kL), r == 0,
              sums);
        }
        for (int k = 0; k < kTaps; ++k) store_n(x + (k % 3 * 3 + k / 3) * kL, sums[k], kL);
        A* const dtaps = static_cast<A*>(p.workspace) + (b * s.channels + c) * kTaps;
        from_lanes<T>(x, dtaps, kTaps, planes, kTaps, kAsItIs);
      }
      if (p.dx.data == nullptr) return;
      Vec<T> tap[kTaps], turned[kTaps], offset{};
      load_lane_taps<T>(p.taps, c, planes, tap);
      for (int k = 0; k < kTaps; ++k) turned[kTaps - 1 - k] = tap[k];
      if (p.dmean != nullptr) {
        offset = load_n(static_cast<const A*>(p.dmean) + b * s.channels + c, planes) / static_cast<A>(positions);
      }
      for (int64_t r = 0; r < s.height; ++r) {
        A* const row = planes_of + r * dv.pitch;
        convolve_line<T>(turned, offset, s.width, dv.around(r),
                         [=](int64_t w, Vec<T> out) { store_n(row + w * kL, out, kL); });
      }
      T* const dx = const_cast<T*>(planar_at<T>(p.dx, b, c, 0));
      if (p.residual.data == nullptr) return from_lanes<T>(planes_of, dx, p.dx.inner, planes, positions, kAsItIs);
      const T* const residual = planar_at<T>(p.residual, b, c, 0);
      from_lanes<T>(planes_of, dx, p.dx.inner, planes, positions,
                    [=, step = p.residual.inner](Vec<T> out, int k, int64_t i, auto n) {
                      return out + load_n(residual + k * step + i, n);
                    });
    });
  });
}

// Interleaved: dv of some rows, with one more above and below, and of a strip of channels, as [vectors of channels,
// positions, a vector]: what is gathered is read and written along the channels, and convolved along the positions.
// A strip is as wide as fits: its pieces of memory lie a position apart, and short ones are read without foresight.
constexpr int64_t kGatherElements = 16 * 1024;
constexpr int64_t kLeastStrip = 32;

inline int64_t gathered_positions(const ImageShape& s) {
  return (s.height < kRowsAtOnce + 2 ? s.height : kRowsAtOnce + 2) * s.width;
}
inline int64_t gathered_channels(const ImageShape& s) {
  const int64_t fitting = kGatherElements / gathered_positions(s) / kLeastStrip * kLeastStrip;
  const int64_t all = ceil_div(s.channels, kLeastStrip) * kLeastStrip;
  return fitting < kLeastStrip ? kLeastStrip : fitting < all ? fitting : all;
}
// And a row of zeros, which stands for those beyond the edges.
inline int64_t gathered_size(const ImageShape& s) {
  return gathered_positions(s) * gathered_channels(s) + s.width * kLeastStrip;
}

// dv (+)= weight_0 * map_0 + ... at `positions` positions, of J sources. What the convolution reads and writes is asked
// for meanwhile: it goes along the positions, where no hardware foresees it. (Into the second level: there it took 5.3
// ms for a stage of [8, 512, 16, 16], without 6.3, into the first level 6.)
template <bool kMasked, class T, int J>
inline void gather_sources(const Run<const T>* v, const Run<const T>* asked, const Acc<T>* const* weights,
                           int64_t positions, int64_t count, bool first, Acc<T>* rows) {
  constexpr int kAtOnce = 2;  // positions, for which the weights are loaded once
  const auto gather = [&](int64_t position, auto at_once) {
    for_vectors<T>(count, [&](int64_t i, auto n) {
      Acc<T>* sum = rows + i * positions + position * kLanes<T>;
      Vec<T> x[kAtOnce] = {};
      for (int k = 0; k < at_once; ++k) {
        __builtin_prefetch(asked[0].at(position + k) + i, 0, 2);
        __builtin_prefetch(asked[1].at(position + k) + i, 1, 2);
      }
      for (int k = 0; !first && k < at_once; ++k) x[k] = Memory<Acc<T>>::load(sum + k * kLanes<T>);
      for (int j = 0; j < J; ++j) {
        const Vec<T> weight = load_n(weights[j] + i, n);
        for (int k = 0; k < at_once; ++k) {
          x[k] += weight * where_retained<kMasked, T>(load_n(v[j].at(position + k) + i, n), weight);
        }
      }
      for (int k = 0; k < at_once; ++k) Memory<Acc<T>>::store(sum + k * kLanes<T>, x[k]);
    });
  };
  int64_t position = 0;
  for (; position + kAtOnce <= positions; position += kAtOnce) gather(position, Count<kAtOnce>{});
  if (position < positions) gather(position, Count<1>{});
}

template <bool kMasked, class T>
inline void gather_patch(const GatherConvolveParams& p, const Acc<T>* expanded, const Patch& patch,
                         const Streams<Acc<T>>& at, bool is_first, Acc<T>* rows) {
  Run<const T> v[kStreams];
  const Acc<T>* weights[kStreams];
  for (int k = 0; k < at.count; ++k) {
    v[k] = run_at<T>(p.maps[at.source[k]], patch);
    weights[k] = expanded + (patch.b * p.sources + at.source[k]) * p.shape.channels + patch.c;
  }
  const Run<const T> asked[] = {p.dtaps == nullptr ? v[0] : run_at<T>(p.x, patch),
                                p.dx.data == nullptr ? v[0] : run_at<T>(p.dx, patch)};
  by_streams(at.count, [&](auto streams) {
    gather_sources<kMasked, T, decltype(streams)::value>(v, asked, weights, patch.rows, patch.count, is_first, rows);
  });
}

template <class T>
inline void gather_rows(const GatherConvolveParams& p, const Acc<T>* expanded, const LeftOut& left_out,
                        const Patch& patch, Acc<T>* rows) {
  const auto gather = left_out.any(patch.b, p.sources) ? gather_patch<true, T> : gather_patch<false, T>;
  const bool is_any_read = left_out.for_read<Acc<T>>(
      patch.b, p.sources,
      [&](const Streams<Acc<T>>& at, bool is_first, bool) { gather(p, expanded, patch, at, is_first, rows); });
  for (int64_t i = 0; !is_any_read && i < patch.rows * gathered_channels(p.shape); ++i) rows[i] = 0;
}

// The three rows of gathered dv that a line needs.
template <class T>
struct GatheredRows {
  const Acc<T>* row[3];
  Triple<T> operator()(int64_t w) const {
    const auto load = [&](int a) { return Memory<Acc<T>>::load(row[a] + w * kLanes<T>); };
    return {load(0), load(1), load(2)};
  }
};

template <bool kWantsTaps, class T>
void gather_convolve_interleaved(const GatherConvolveParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const int64_t blocks = ceil_div(s.height, kRowsAtOnce);
  const A* taps = static_cast<const A*>(p.rows);
  A* partials = static_cast<A*>(p.workspace);                     // [B, blocks of rows, 9, C], in the order of dtaps
  A* weights = partials + s.batch * blocks * kTaps * s.channels;  // [B, sources, C]
  A* buffers = weights + s.batch * p.sources * (s.channels + 1);  // one for each thread
  const Shape flat = {s.batch, s.channels, p.heads, s.positions(), true, s.part};
  const auto column = [&](int64_t j) { return p.columns[j]; };
  expand_columns<T>(flat, p.sources, column, weights, threads);
  const LeftOut left_out =
      count_left_out<A>(flat, p.sources, column, weights + s.batch * p.sources * s.channels, threads);
  for_strips(s, gathered_channels(s), threads, [&](const ImageItem& at) {
    A* zeros = buffers + thread_index() * gathered_size(s);
    A* rows = zeros + s.width * kLeastStrip;
    for (int64_t i = 0; i < s.width * kLanes<T>; ++i) zeros[i] = 0;
    const int64_t above = at.first_row > 0 ? at.first_row - 1 : 0;
    const int64_t below = at.last_row < s.height ? at.last_row + 1 : s.height;
    const Patch patch = {at.b, above * s.width, (below - above) * s.width, at.c, at.count};
    gather_rows<T>(p, weights, left_out, patch, rows);
    for_vectors<T>(at.count, [&](int64_t i, auto n) {
      const int64_t c = at.c + i;
      const A* gathered = rows + i * (below - above) * s.width;
      const auto row = [&](int64_t r) {
        return r < 0 || r == s.height ? zeros : gathered + (r - above) * s.width * kLanes<T>;
      };
      Vec<T> turned[kTaps], offset{}, sums[kTaps] = {};
      for (int k = 0; k < kTaps; ++k) turned[kTaps - 1 - k] = load_n(taps + k * s.channels + c, n);
      if (p.dmean != nullptr) {
        offset = load_n(static_cast<const A*>(p.dmean) + at.b * s.channels + c, n) / static_cast<A>(s.positions());
      }
      for (int64_t r = at.first_row; r < at.last_row; ++r) {
        const GatheredRows<T> lines = {{row(r - 1), row(r), row(r + 1)}};
        if (p.dx.data != nullptr) {
          const int64_t step = p.dx.inner;
          T* dx = const_cast<T*>(interleaved_at<T>(p.dx, at.b, r * s.width, c));
          if (p.residual.data == nullptr) {
            convolve_line<T>(turned, offset, s.width, lines,
                             [=](int64_t w, Vec<T> out) { store_n(dx + w * step, out, n); });
          } else {
            const T* residual = interleaved_at<T>(p.residual, at.b, r * s.width, c);
            const int64_t from = p.residual.inner;
            convolve_line<T>(turned, offset, s.width, lines, [=](int64_t w, Vec<T> out) {
              store_n(dx + w * step, out + load_n(residual + w * from, n), n);
            });
          }
        }
        if (!kWantsTaps) continue;
        const T* x = interleaved_at<T>(p.x, at.b, r * s.width, c);
        const int64_t step = p.x.inner;
        correlate_line<T>(
            s.width, lines, [=](int64_t w) { return load_n(x + w * step, n); }, lane_bits<T>(0, n), r == at.first_row,
            sums);
      }
      A* dtaps = partials + at.block * kTaps * s.channels + c;
      for (int k = 0; kWantsTaps && k < kTaps; ++k) store_n(dtaps + (k % 3 * 3 + k / 3) * s.channels, sums[k], n);
    });
  });
}

template <class T>
void gather_convolve_kernel(const GatherConvolveParams& p, int threads) {
  if (p.shape.interleaved) {
    p.dtaps != nullptr ? gather_convolve_interleaved<true, T>(p, threads)
                       : gather_convolve_interleaved<false, T>(p, threads);
  } else if (is_small<T>(p.shape.height, p.shape.width)) {
    p.dtaps != nullptr ? gather_convolve_small<true, T>(p, threads) : gather_convolve_small<false, T>(p, threads);
  } else {
    p.dtaps != nullptr ? gather_convolve_planar<true, T>(p, threads) : gather_convolve_planar<false, T>(p, threads);
  }
}

// Adds up the partial gradients of the taps over batch and blocks, in double: [count, C, 9] or, of interleaved maps,
// [count, 9, C].
template <class T>
void reduce_taps(const GatherConvolveParams& p, int threads) {
  constexpr int64_t kAtOnce = 256;
  const ImageShape& s = p.shape;
  const Acc<T>* partials = static_cast<const Acc<T>*>(p.workspace);
  const int64_t count = s.interleaved ? s.batch * ceil_div(s.height, kRowsAtOnce) : s.batch;
  const int64_t elements = kTaps * s.channels;
  parallel_for(p.dtaps == nullptr ? 0 : ceil_div(elements, kAtOnce), threads, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kAtOnce; first < end * kAtOnce && first < elements; first += kAtOnce) {
      const int64_t some = elements - first < kAtOnce ? elements - first : kAtOnce;
      double sums[kAtOnce] = {};
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t i = 0; i < some; ++i) sums[i] += partials[k * elements + first + i];
      }
      for (int64_t i = 0; i < some; ++i) {
        const int64_t at = first + i;
        const int64_t to = s.interleaved ? at % s.channels * kTaps + at / s.channels : at;
        store_one<T>(p.dtaps, to, static_cast<Acc<T>>(sums[i]));
      }
    }
  });
}

inline int64_t gather_convolve_workspace(const ImageShape& s, int64_t sources, int threads) {
  if (!s.interleaved) return s.batch * s.channels * kTaps + threads * planes_at_once(s) * s.positions();
  return s.channels * kTaps * s.batch * ceil_div(s.height, kRowsAtOnce) + s.batch * sources * (s.channels + 1) +
         threads * gathered_size(s);
}

}  // namespace ela::ELA_ISA
