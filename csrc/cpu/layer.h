// What a whole layer needs beyond its attention: the filters over the channel axis, and the kernels in their order.
#pragma once

#include "cpu/aggregate.h"
#include "cpu/backward.h"
#include "cpu/depthwise.h"
#include "cpu/gather_convolve.h"
#include "cpu/norm.h"

namespace ela::ELA_ISA {

// sum_i filter[i] * row[c + i - size / 2] for a vector of channels, zeros beyond the ends; turned: the other way round.
template <bool kTurned, class T>
inline Vec<T> filtered(const T* row, const void* filter, int64_t c, int n, int64_t channels, int64_t size) {
  Vec<T> sum{};
  for (int64_t i = 0; i < size; ++i) {
    const int64_t at = kTurned ? c - i + size / 2 : c + i - size / 2;
    const int64_t begin = at < 0 ? -at : 0, end = channels - at < n ? channels - at : n;
    if (begin < end) {
      sum += load_one<T>(filter, i) * load_lanes(row + at, static_cast<int>(begin), static_cast<int>(end));
    }
  }
  return sum;
}

// Calls body(b, c, n) for the vectors of the rows [B, C] of a part.
template <class T, class Body>
inline void for_rows(const Shape& s, int threads, Body body) {
  for_part(s, s.channels, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / s.channels, first = begin % s.channels;
      const int64_t count = s.channels - first < end - begin ? s.channels - first : end - begin;
      for_vectors<T>(count, [&](int64_t i, int n) { body(b, first + i, n); });
      begin += count;
    }
  });
}

template <class T>
void channel_filters_kernel(const ChannelFilterParams& p, int threads) {
  const int64_t channels = p.shape.channels;
  for_rows<T>(p.shape, threads, [&](int64_t b, int64_t c, int n) {
    const T* mean = static_cast<const T*>(p.mean) + b * channels;
    const int64_t at = b * channels + c;
    if (p.query != nullptr) {
      store_n(static_cast<T*>(p.query) + at, filtered<false>(mean, p.wq, c, n, channels, p.size), n);
    }
    store_n(static_cast<T*>(p.key) + at, filtered<false>(mean, p.wk, c, n, channels, p.size), n);
  });
}

// <drow, shifted mean> for every tap of a filter.
template <class T>
inline void filter_gradient(const T* drow, const T* mean, int64_t channels, int64_t size, Acc<T>* out) {
  for (int64_t i = 0; i < size; ++i) {
    const int64_t shift = i - size / 2;
    const int64_t begin = shift < 0 ? -shift : 0, end = shift > 0 ? channels - shift : channels;
    out[i] = begin < end ? dot_rows(drow + begin, mean + begin + shift, end - begin) : 0;
  }
}

// dmean, of the channels of a part.
template <class T>
void mean_gradient_kernel(const ChannelFilterBackwardParams& p, int threads) {
  const ChannelFilterParams& f = p.forward;
  const int64_t channels = f.shape.channels;
  const void* drows[2] = {p.dquery, p.dkey};
  const void* filters[2] = {f.wq, f.wk};
  for_rows<T>(f.shape, threads, [&](int64_t b, int64_t c, int n) {
    Vec<T> sum{};
    for (int k = 0; k < 2; ++k) {
      if (drows[k] == nullptr) continue;
      sum += filtered<true>(static_cast<const T*>(drows[k]) + b * channels, filters[k], c, n, channels, f.size);
    }
    store_n(static_cast<Acc<T>*>(p.dmean) + b * channels + c, sum, n);
  });
}

// Partial gradients of the filters [2, B, size], of whole samples.
template <class T>
void filter_gradients_kernel(const ChannelFilterBackwardParams& p, int threads) {
  const ChannelFilterParams& f = p.forward;
  const int64_t channels = f.shape.channels;
  const void* drows[2] = {p.dquery, p.dkey};
  for_part(f.shape, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int k = 0; k < 2; ++k) {
        if (drows[k] == nullptr) continue;
        Acc<T>* partial = static_cast<Acc<T>*>(p.workspace) + (k * f.shape.batch + b) * f.size;
        filter_gradient(static_cast<const T*>(drows[k]) + b * channels, static_cast<const T*>(f.mean) + b * channels,
                        channels, f.size, partial);
      }
    }
  });
}

// Adds up the partial gradients of the filters over the batch, in double.
template <class T>
void reduce_filters(const ChannelFilterBackwardParams& p) {
  const ChannelFilterParams& f = p.forward;
  const Acc<T>* partials = static_cast<const Acc<T>*>(p.workspace);
  const void* drows[2] = {p.dquery, p.dkey};
  void* dfilters[2] = {p.dwq, p.dwk};
  for (int k = 0; k < 2; ++k) {
    for (int64_t i = 0; dfilters[k] != nullptr && i < f.size; ++i) {
      double sum = 0;
      for (int64_t b = 0; drows[k] != nullptr && b < f.shape.batch; ++b) {
        sum += partials[(k * f.shape.batch + b) * f.size + i];
      }
      store_one<T>(dfilters[k], i, static_cast<Acc<T>>(sum));
    }
  }
}

// What goes through all kernels of a layer before the next part does. The filters over the channel axis reach over some
// neighbours: what is pooled runs `ahead` of the heads by as many channels, and what takes the gradient of the pooled
// vector stays `behind`. The last part of a sample ends it.
struct LayerPart {
  Part heads, ahead, behind, sample;
  bool ends_sample;
};

// Bytes of one map in a part of a layer. Measured on 512 KiB of second-level cache, for 32, 64, 128 and 256 KiB: a
// stage of six layers of [8, 1024, 14, 14] took 48.7, 45.3, 50.7 and 50.7 ms.
constexpr int64_t kPartBytes = 64 * 1024;

// Whether each thread takes samples, of which there are enough for that; else all threads take the whole batch.
inline bool goes_by_sample(const ImageShape& s, int threads) {
  return s.batch % threads == 0 || s.batch >= 4 * threads;
}

// Calls body(part, threads): one part after the other on each thread where it goes by sample, so that what one kernel
// writes is still in cache when the next reads it; else the whole batch, each kernel on all threads.
template <class T, class Body>
inline void by_part(const ImageShape& s, int64_t heads, int64_t filter_size, int threads, Body body) {
  if (!goes_by_sample(s, threads)) return body(LayerPart{{}, {}, {}, {}, true}, threads);
  const int64_t head_dim = s.channels / heads, reach = filter_size / 2;
  // Interleaved channels lie side by side in memory, and a few of them at a time would be read in pieces.
  int64_t group = s.interleaved ? heads : kPartBytes / (head_dim * s.positions() * static_cast<int64_t>(sizeof(T)));
  if (group < 1) group = 1;
  if (group > heads) group = heads;
  parallel_for(s.batch, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Part sample = {b, 1, 1};
      int64_t ahead = 0, behind = 0;  // channels that are done
      for (int64_t g = 0; g < heads; g += group) {
        const bool is_last = g + group >= heads;
        const int64_t to = (g + group) * head_dim;
        const int64_t next_ahead = to + reach < s.channels ? to + reach : s.channels;
        const int64_t next_behind = is_last ? s.channels : to - reach > behind ? to - reach : behind;
        LayerPart part = {sample, sample, sample, sample, is_last};
        if (group < heads) {
          part.heads = {b * heads + g, is_last ? heads - g : group, heads};
          part.ahead = {b * s.channels + ahead, next_ahead - ahead, s.channels};
          part.behind = {b * s.channels + behind, next_behind - behind, s.channels};
        }
        body(part, 1);
        ahead = next_ahead, behind = next_behind;
      }
    }
  });
}

// Its values are of type V, everything else of type T.
template <class T, class V>
void layer_kernel(const LayerParams& p, int threads) {
  const ImageShape& image = p.depthwise.shape;
  if (image.interleaved) prepare_taps<T>(image, p.depthwise.taps, static_cast<Acc<T>*>(p.rows));
  const bool is_known = p.is_block && !p.wants_statistics;  // its statistics, so that the block ends part by part
  if (is_known) prepare_norm<T>(p.norm);
  by_part<T>(image, p.filters.shape.heads, p.filters.size, threads, [&](const LayerPart& at, int some) {
    LayerParams part = p;
    if (is_known) {
      part.aggregate.norm = &p.norm;
      // Where what it retrieves is not kept.
      if (p.norm.o.data == p.norm.out.data) part.aggregate.out.data = nullptr;
    }
    part.depthwise.rows = p.rows;
    part.depthwise.shape.part = at.ahead;
    part.filters.shape.part = part.weights.shape.part = part.aggregate.shape.part = at.heads;
    part.statistics.shape.part = at.heads;
    depthwise_kernel<T, V>(part.depthwise, some);
    channel_filters_kernel<T>(part.filters, some);
    if (p.retrieves) {
      weights_kernel<T>(part.weights, some);
      aggregate_kernel<T, V>(part.aggregate, some);
      if (p.wants_statistics) statistics_kernel<T>(part.statistics, some);
    }
    if (is_known && !p.retrieves) norm_part(p.norm, at.heads, some, norm_kernel<T>);
  });
  if (!p.wants_statistics) return;
  join_statistics<T>(p.statistics);
  if (!p.is_block) return;
  track_statistics<T>(p.norm);
  prepare_norm<T>(p.norm);
  norm_kernel<T>(p.norm, threads);
}

template <class T, class V>
void layer_backward_kernel(const LayerBackwardParams& p, int threads) {
  const ImageShape& image = p.convolve.shape;
  const bool has_mean = p.filters.dquery != nullptr || p.filters.dkey != nullptr;
  const bool has_maps = p.convolve.dx.data != nullptr || p.convolve.dtaps != nullptr;
  if (image.interleaved) prepare_taps<T>(image, p.convolve.taps, static_cast<Acc<T>*>(p.rows));
  if (p.is_block) prepare_norm_backward<T>(p.norm, threads);
  by_part<T>(image, p.key.shape.heads, p.filters.forward.size, threads, [&](const LayerPart& at, int some) {
    if (p.is_block) norm_part(p.norm, at.heads, some, norm_backward_kernel<T>);
    LayerBackwardParams part = p;
    part.convolve.rows = p.rows;
    part.attention.forward.shape.part = part.key.shape.part = at.heads;
    part.filters.forward.shape.part = part.convolve.shape.part = at.behind;
    if (p.attends) backward_kernel<T, V>(part.attention, some);
    if (p.key.dkey.data != nullptr) gather_key_kernel<T>(part.key, some);
    if (has_mean) mean_gradient_kernel<T>(part.filters, some);
    if (has_maps) gather_convolve_kernel<T>(part.convolve, some);
    if (has_mean && at.ends_sample) {
      part.filters.forward.shape.part = at.sample;
      filter_gradients_kernel<T>(part.filters, some);
    }
  });
  if (has_mean) reduce_filters<T>(p.filters);
  if (has_maps) reduce_taps<T>(p.convolve, threads);
}

}  // namespace ela::ELA_ISA
