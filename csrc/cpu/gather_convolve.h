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
  for (int64_t i = 0; p.sources == 0 && i < length; ++i) planes[i] = 0;
  for (int64_t offset = 0; p.sources != 0 && offset < length; offset += kChunk) {
    const int64_t count = length - offset < kChunk ? length - offset : kChunk;
    for (int64_t j = 0; j < p.sources; j += kStreams) {
      const int some = static_cast<int>(p.sources - j < kStreams ? p.sources - j : kStreams);
      const T* source[kStreams];
      A factor[kStreams];
      for (int i = 0; i < some; ++i) {
        source[i] = planar_at<T>(p.maps[j + i], b, c, offset);
        factor[i] = factor_at<A>(p.columns[j + i], head);
      }
      add_some<T>(some, planes + offset, source, factor, count, j == 0, nullptr, nullptr);
    }
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
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / s.channels, c = item % s.channels;
      if (item == gathered) {
        const int64_t of_head = head_dim - c % head_dim;
        int64_t count = of_head < at_once ? of_head : at_once;
        if (count > end - item) count = end - item;
        gather_planes<T>(p, b, c, count * s.positions(), planes);
        first = item, gathered = item + count;
      }
      const A* plane = planes + (item - first) * s.positions();
      if (kWantsTaps) {
        correlate_plane<T>(plane, plane_at<T>(p.x, s.channels, item, end), partials + item * kTaps, s.height, s.width);
      }
      if (p.dx.data == nullptr) continue;
      Vec<T> tap[kTaps];
      for (int i = 0; i < kTaps; ++i) tap[i] = broadcast<T>(load_one<T>(p.taps, c * kTaps + i));
      const A offset = p.dmean == nullptr ? 0 : static_cast<const A*>(p.dmean)[item] / static_cast<A>(s.positions());
      const T* residual = p.residual.data == nullptr ? nullptr : planar_at<T>(p.residual, b, c, 0);
      convolve_plane_turned<T>(plane, tap, offset, residual, written_plane_at<T>(p.dx, s.channels, item, end), s.height,
                               s.width);
    }
  });
}

// Interleaved: dv of some rows, with one more above and below, and of a strip of channels.
constexpr int64_t kGatherChannels = 32;

template <class T>
inline void gather_rows(const GatherConvolveParams& p, const Acc<T>* weights, int64_t b, int64_t first, int64_t last,
                        int64_t c, int64_t count, Acc<T>* rows) {
  const ImageShape& s = p.shape;
  for (int64_t i = 0; p.sources == 0 && i < (last - first) * s.width * kGatherChannels; ++i) rows[i] = 0;
  for (int64_t j = 0; j < p.sources; j += kStreams) {
    const int some = static_cast<int>(p.sources - j < kStreams ? p.sources - j : kStreams);
    for (int64_t position = first * s.width; position < last * s.width; ++position) {
      Acc<T>* sum = rows + (position - first * s.width) * kGatherChannels;
      for_vectors<T>(count, [&](int64_t i, int n) {
        Vec<T> x{};
        if (j != 0) x = load_n(sum + i, n);
        for (int k = 0; k < some; ++k) {
          x += load_n(weights + (b * p.sources + j + k) * s.channels + c + i, n) *
               load_n(interleaved_at<T>(p.maps[j + k], b, position, c) + i, n);
        }
        store_n(sum + i, x, n);
      });
    }
  }
}

inline int64_t gathered_rows_size(const ImageShape& s) { return (kRowsAtOnce + 2) * s.width * kGatherChannels; }

template <bool kWantsTaps, class T>
void gather_convolve_interleaved(const GatherConvolveParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const int64_t blocks = ceil_div(s.height, kRowsAtOnce);
  const A* taps = static_cast<const A*>(p.rows);
  A* partials = static_cast<A*>(p.workspace);                     // [B, blocks of rows, 9, C], in the order of dtaps
  A* weights = partials + s.batch * blocks * kTaps * s.channels;  // [B, sources, C]
  A* buffers = weights + s.batch * p.sources * s.channels;        // one for each thread
  const Shape flat = {s.batch, s.channels, p.heads, s.positions(), true, s.part};
  expand_columns<T>(flat, p.sources, [&](int64_t j) { return p.columns[j]; }, weights, threads);
  for_strips<kGatherChannels>(s, threads, [&](const ImageItem& at) {
    A* rows = buffers + thread_index() * gathered_rows_size(s);
    const int64_t above = at.first_row > 0 ? at.first_row - 1 : 0;
    const int64_t below = at.last_row < s.height ? at.last_row + 1 : s.height;
    gather_rows<T>(p, weights, at.b, above, below, at.c, at.count, rows);
    A* dtaps = partials + at.block * kTaps * s.channels + at.c;
    for (int k = 0; kWantsTaps && k < kTaps; ++k) {
      for (int64_t i = 0; i < at.count; ++i) dtaps[k * s.channels + i] = 0;
    }
    for (int64_t r = at.first_row; r < at.last_row; ++r) {
      for_vectors<T>(at.count, [&](int64_t i, int n) {
        const int64_t c = at.c + i;
        const int64_t row_step = s.width * kGatherChannels;
        const Rows<T, A> lines(s, r, rows + (r - 1 - above) * row_step + i, row_step, kGatherChannels, n);
        if (p.dx.data != nullptr) {
          Vec<T> turned[kTaps], offset{};
          for (int k = 0; k < kTaps; ++k) turned[kTaps - 1 - k] = load_n(taps + k * s.channels + c, n);
          if (p.dmean != nullptr) {
            offset = load_n(static_cast<const A*>(p.dmean) + at.b * s.channels + c, n) / static_cast<A>(s.positions());
          }
          const T* residual =
              p.residual.data == nullptr ? nullptr : interleaved_at<T>(p.residual, at.b, r * s.width, c);
          T* dx = const_cast<T*>(interleaved_at<T>(p.dx, at.b, r * s.width, c));
          convolve_line<T>(turned, offset, s.width, lines, [&](int64_t w, Vec<T> out) {
            if (residual != nullptr) out += load_n(residual + w * p.residual.inner, n);
            store_n(dx + w * p.dx.inner, out, n);
          });
        }
        if (!kWantsTaps) return;
        const T* x = interleaved_at<T>(p.x, at.b, r * s.width, c);
        Vec<T> sums[kTaps];
        correlate_line<T>(
            s.width, lines, [&](int64_t w) { return load_n(x + w * p.x.inner, n); }, lane_bits<T>(0, n), true, sums);
        for (int k = 0; k < kTaps; ++k) {
          A* total = dtaps + (k % 3 * 3 + k / 3) * s.channels + i;
          store_n(total, load_n(total, n) + sums[k], n);
        }
      });
    }
  });
}

template <class T>
void gather_convolve_kernel(const GatherConvolveParams& p, int threads) {
  if (p.shape.interleaved) {
    p.dtaps != nullptr ? gather_convolve_interleaved<true, T>(p, threads)
                       : gather_convolve_interleaved<false, T>(p, threads);
  } else {
    p.dtaps != nullptr ? gather_convolve_planar<true, T>(p, threads) : gather_convolve_planar<false, T>(p, threads);
  }
}

// Adds up the partial gradients of the taps over batch and blocks, in double.
template <class T>
void reduce_taps(const GatherConvolveParams& p, int threads) {
  const ImageShape& s = p.shape;
  const Acc<T>* partials = static_cast<const Acc<T>*>(p.workspace);
  const int64_t count = s.interleaved ? s.batch * ceil_div(s.height, kRowsAtOnce) : s.batch;
  const int64_t channel = s.interleaved ? 1 : kTaps, tap = s.interleaved ? s.channels : 1;
  parallel_for(p.dtaps == nullptr ? 0 : s.channels, threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int i = 0; i < kTaps; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < count; ++k) sum += partials[k * kTaps * s.channels + c * channel + i * tap];
        store_one<T>(p.dtaps, c * kTaps + i, static_cast<Acc<T>>(sum));
      }
    }
  });
}

inline int64_t gather_convolve_workspace(const ImageShape& s, int64_t sources, int threads) {
  if (!s.interleaved) return s.batch * s.channels * kTaps + threads * planes_at_once(s) * s.positions();
  return s.channels * (kTaps * s.batch * ceil_div(s.height, kRowsAtOnce) + s.batch * sources) +
         threads * gathered_rows_size(s);
}

}  // namespace ela::ELA_ISA
