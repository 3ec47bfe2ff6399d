// The light form of a layer: out = gate * act(v) + decay * prev, with gate = sigmoid(scale * <q, k>) of a head, and v,
// q and k from x as in layer.h.
//
// Without an activation it is, to the kernels of the base form, an aggregation of two sources with one head a channel.
// What a channel takes of each source, gate and decay, is laid out as [2, B, C] by the forward and kept for the
// backward.
//
// Least bytes: x read, v written, then v and prev read and out written. Where no backward follows, v need not be kept:
// it is written over a sample of scratch again and again, which stays in cache. Backward: dout, v and prev read for
// their dot products; then dout and x read and dx written, and dout read and dprev written. With an activation the
// gradient of v is not a multiple of dout: it is written, and read in place of dout. What the activation makes of v is
// worked out again, since keeping it would cost a map of memory.
#pragma once

#include "cpu/activation.h"
#include "cpu/gather_convolve.h"
#include "cpu/layer.h"

namespace ela::ELA_ISA {

// One head a channel.
inline Shape by_channel(const ImageShape& s) {
  return {s.batch, s.channels, s.channels, s.positions(), s.interleaved, s.part};
}

inline Shape by_head(const LightParams& p) {
  return {p.shape.batch, p.shape.channels, p.heads, p.shape.positions(), p.shape.interleaved, p.shape.part};
}

template <class T>
inline Acc<T>* light_factors(const LightParams& p, int64_t source) {
  return static_cast<Acc<T>*>(p.factors) + source * p.shape.batch * p.shape.channels;
}

inline ChannelFilterParams light_filters(const LightParams& p) {
  return {by_head(p), p.filter_size, p.mean, p.wq, p.wk, p.query, p.key};
}

// Gate and decay of every channel.
template <class T>
void light_factors_kernel(const LightParams& p, int threads) {
  using A = Acc<T>;
  const Shape s = by_head(p);
  const int64_t head_dim = s.head_dim();
  for_part(s, s.heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t at = item * head_dim;
      const T *q = static_cast<const T*>(p.query) + at, *k = static_cast<const T*>(p.key) + at;
      const A score = static_cast<A>(p.scale) * dot_rows(q, k, head_dim);
      const A gate = static_cast<A>(1 / (1 + exp(-static_cast<double>(score))));
      for (int64_t i = 0; i < head_dim; ++i) {
        light_factors<T>(p, 0)[at + i] = gate;
        light_factors<T>(p, 1)[at + i] = load_one<T>(p.decay, (at + i) % s.channels);
      }
    }
  });
}

// out = gate * act(v) + decay * prev.
template <class T, class Act>
void light_activated_kernel(const LightParams& p, Act, int threads) {
  using A = Acc<T>;
  const int64_t channels = p.shape.channels;
  for_stat_blocks(
      p.shape, threads,
      [&](int64_t b, int64_t c) {
        const T *v = planar_at<T>(p.v, b, c, 0), *prev = planar_at<T>(p.prev, b, c, 0);
        T* out = const_cast<T*>(planar_at<T>(p.out, b, c, 0));
        const A gate = light_factors<T>(p, 0)[b * channels + c], decay = light_factors<T>(p, 1)[b * channels + c];
        map_any_order<T>(p.shape.positions(), out,
                         [=](auto at) { return gate * Act::of(at.load(v)).value + decay * at.load(prev); });
      },
      [&](int64_t b, int64_t, int64_t first, int64_t last) {
        const A *gate = light_factors<T>(p, 0) + b * channels, *decay = light_factors<T>(p, 1) + b * channels;
        for (int64_t position = first; position < last; ++position) {
          const T *v = interleaved_at<T>(p.v, b, position, 0), *prev = interleaved_at<T>(p.prev, b, position, 0);
          T* out = const_cast<T*>(interleaved_at<T>(p.out, b, position, 0));
          for_vectors<T>(channels, [=](int64_t c, int n) {
            const Vec<T> value = Act::of(load_n(v + c, n)).value;
            store_n(out + c, load_n(gate + c, n) * value + load_n(decay + c, n) * load_n(prev + c, n), n);
          });
        }
      });
}

// The value's map, or a thread's scratch in its place: one sample, in which all are written.
template <class T>
inline MapView light_value(const LightParams& p, int threads) {
  if (p.keeps_v || !goes_by_sample(p.shape, threads)) return p.v;
  const int64_t sample = p.shape.channels * p.shape.positions();
  return {static_cast<T*>(p.v.data) + thread_index() * sample, 0, p.v.inner};
}

// Samples of scratch for the value where it is not kept.
inline int64_t light_values(const ImageShape& s, int threads) { return goes_by_sample(s, threads) ? threads : s.batch; }

template <class T>
void light_layer_kernel(const LightParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& image = p.shape;
  // Each kernel has memory of its own: samples are at different kernels at the same time.
  A* rows = static_cast<A*>(p.workspace);
  A* for_depthwise = rows + kTaps * image.channels;
  A* for_aggregate = for_depthwise + depthwise_workspace(image);
  A* for_norm = for_aggregate + aggregate_workspace(by_channel(image), 2);
  const ColumnView columns[] = {{light_factors<T>(p, 0), 1}, {light_factors<T>(p, 1), 1}};
  const StatisticsParams statistics = {image, p.out, for_norm, p.mean_out, p.variance_out};
  if (image.interleaved) prepare_taps<T>(image, p.taps, rows);
  const bool wants_statistics = p.mean_out != nullptr;
  const bool is_known = p.is_block && !wants_statistics;
  if (is_known) prepare_norm<T>(p.norm);
  by_part<T>(image, p.heads, p.filter_size, threads, [&](const LayerPart& at, int some) {
    LightParams part = p;
    part.v = light_value<T>(p, threads);
    const MapView sources[] = {part.v, p.prev};
    part.shape.part = at.ahead;
    depthwise_kernel<T>({part.shape, p.x, p.taps, part.v, p.mean, rows, for_depthwise}, some);
    part.shape.part = at.heads;
    channel_filters_kernel<T>(light_filters(part), some);
    light_factors_kernel<T>(part, some);
    if (p.act == Activation::kNone) {
      aggregate_kernel<T>(
          {by_channel(part.shape), 2, sources, columns, p.out, for_aggregate, {}, is_known ? &p.norm : nullptr}, some);
    } else {
      by_activation<T>(p.act, [&](auto act) { light_activated_kernel<T>(part, act, some); });
    }
    StatisticsParams of_part = statistics;
    of_part.shape.part = at.heads;
    if (wants_statistics) statistics_kernel<T>(of_part, some);
    if (is_known && p.act != Activation::kNone) norm_part(p.norm, at.heads, some, norm_kernel<T>);
  });
  if (!wants_statistics) return;
  join_statistics<T>(statistics);
  if (!p.is_block) return;
  track_statistics<T>(p.norm);
  prepare_norm<T>(p.norm);
  norm_kernel<T>(p.norm, threads);
}

// From the dot products by channel: the gradients of query and key, and each sample's part of the decay's [B, C].
template <class T>
void light_rows_kernel(const LightParams& p, const Partials& q, const Acc<T>* partials, T* dquery, T* dkey,
                       double* ddecay, int threads) {
  using A = Acc<T>;
  const Shape s = by_head(p);
  const int64_t head_dim = s.head_dim();
  for_part(s, s.heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / s.heads, at = item * head_dim;
      double dgate = 0;
      for (int64_t i = 0; i < head_dim; ++i) {
        const A* start = partials + b * q.batch + ((at + i) % s.channels) * q.head;
        double decayed = 0;
        for (int64_t block = 0; block < q.blocks; ++block) {
          dgate += start[block * q.block];
          decayed += start[block * q.block + q.depth];
        }
        ddecay[at + i] = decayed;
      }
      const double gate = light_factors<T>(p, 0)[at];
      const A dscore = static_cast<A>(dgate * gate * (1 - gate) * p.scale);
      for (int64_t i = 0; i < head_dim; ++i) {
        store_one<T>(dquery, at + i, dscore * load_one<T>(p.key, at + i));
        store_one<T>(dkey, at + i, dscore * load_one<T>(p.query, at + i));
      }
    }
  });
}

// Of an activated value: partial sums [B, blocks, 2, C] by blocks of positions.
inline Partials activated_partials(const ImageShape& s) {
  const int64_t blocks = stat_blocks(s), row = 2 * s.channels;
  return {blocks, blocks * row, 1, row, s.channels, s.batch * blocks * row};
}

// The dot products of dout with act(v) and with prev, and dv = gate * act'(v) * dout where it is wanted.
template <class T, class Act>
void light_activated_backward_kernel(const LightParams& p, const MapView& dout, const MapView& dv, Act,
                                     Acc<T>* partials, int threads) {
  using A = Acc<T>;
  const int64_t channels = p.shape.channels;
  const bool wants_dv = dv.data != nullptr;
  const Partials q = activated_partials(p.shape);
  for_stat_blocks(
      p.shape, threads,
      [&](int64_t b, int64_t c) {
        const T *v = planar_at<T>(p.v, b, c, 0), *prev = planar_at<T>(p.prev, b, c, 0),
                *d = planar_at<T>(dout, b, c, 0);
        T* to = wants_dv ? const_cast<T*>(planar_at<T>(dv, b, c, 0)) : nullptr;
        const A gate = light_factors<T>(p, 0)[b * channels + c];
        Vec<T> of_value{}, of_prev{};
        for_vectors<T>(p.shape.positions(), [&](int64_t i, int n) {
          // Lanes beyond the end have a zero dout, and so add nothing.
          const Vec<T> x = load_n(d + i, n);
          const Activated<T> y = Act::of(load_n(v + i, n));
          of_value += x * y.value;
          of_prev += x * load_n(prev + i, n);
          if (to != nullptr) store_n(to + i, gate * x * y.slope, n);
        });
        A* sums = partials + b * q.batch + c;
        sums[0] = sum_lanes<T>(of_value), sums[q.depth] = sum_lanes<T>(of_prev);
      },
      [&](int64_t b, int64_t block, int64_t first, int64_t last) {
        A* sums = partials + b * q.batch + block * q.block;
        for_vectors<T>(channels, [&](int64_t c, int n) {
          const Vec<T> gate = load_n(light_factors<T>(p, 0) + b * channels + c, n);
          Vec<T> of_value{}, of_prev{};
          for (int64_t position = first; position < last; ++position) {
            const Vec<T> x = load_n(interleaved_at<T>(dout, b, position, c), n);
            const Activated<T> y = Act::of(load_n(interleaved_at<T>(p.v, b, position, c), n));
            of_value += x * y.value;
            of_prev += x * load_n(interleaved_at<T>(p.prev, b, position, c), n);
            if (wants_dv) store_n(const_cast<T*>(interleaved_at<T>(dv, b, position, c)), gate * x * y.slope, n);
          }
          store_n(sums + c, of_value, n), store_n(sums + q.depth + c, of_prev, n);
        });
      });
}

template <class T>
void light_layer_backward_kernel(const LightBackwardParams& p, int threads) {
  using A = Acc<T>;
  const LightParams& f = p.forward;
  const ImageShape& image = f.shape;
  const int64_t elements = image.batch * image.channels;
  const bool activated = f.act != Activation::kNone;
  const Partials q = activated ? activated_partials(image) : plan_partials(by_channel(image), 2);
  double* ddecay = static_cast<double*>(f.workspace);
  A* rows = reinterpret_cast<A*>(ddecay + elements);
  A* partials = rows + kTaps * image.channels;
  A* dmean = partials + q.size;
  A* for_filters = dmean + elements;
  A* for_aggregate = for_filters + 2 * image.batch * f.filter_size;
  T* dquery = reinterpret_cast<T*>(for_aggregate + aggregate_workspace(by_channel(image), 1));
  T* dkey = dquery + elements;
  A* for_convolve = for_aggregate + aggregate_workspace(by_channel(image), 1) + 2 * elements;
  const MapView values[] = {f.v, f.prev};
  const ColumnView gate = {light_factors<T>(f, 0), 1}, decay = {light_factors<T>(f, 1), 1};
  const A one = 1;
  const ColumnView as_it_is = {&one, 0};
  GatherConvolveParams convolve = {image,
                                   image.channels,
                                   1,
                                   activated ? &p.dv : &p.dout,
                                   activated ? &as_it_is : &gate,
                                   f.x,
                                   f.taps,
                                   rows,
                                   dmean,
                                   p.dx_residual,
                                   p.dx,
                                   p.dtaps,
                                   for_convolve};
  ChannelFilterBackwardParams filters = {light_filters(f), dquery, dkey, dmean, p.dwq, p.dwk, for_filters};
  BackwardParams dots = {};
  // The weights are only read for the push form, which this is not; the factors are as large.
  dots.forward.depth = 2, dots.forward.weights = f.factors;
  dots.values = values, dots.dout = &p.dout;
  const bool has_maps = p.dx.data != nullptr || p.dtaps != nullptr;
  if (image.interleaved) prepare_taps<T>(image, f.taps, rows);
  if (f.is_block) prepare_norm_backward<T>(f.norm, threads);
  by_part<T>(image, f.heads, f.filter_size, threads, [&](const LayerPart& at, int some) {
    if (f.is_block) norm_part(f.norm, at.heads, some, norm_backward_kernel<T>);
    LightParams part = f;
    part.shape.part = at.heads;
    if (activated) {
      by_activation<T>(f.act,
                       [&](auto act) { light_activated_backward_kernel<T>(part, p.dout, p.dv, act, partials, some); });
    } else {
      BackwardParams part_dots = dots;
      part_dots.forward.shape = by_channel(part.shape);
      image.interleaved ? dots_interleaved<T>(part_dots, q, partials, nullptr, {1, nullptr}, some)
                        : dots_planar<T>(part_dots, q, partials, some);
    }
    light_rows_kernel<T>(part, q, partials, dquery, dkey, ddecay, some);
    ChannelFilterBackwardParams part_filters = filters;
    part_filters.forward.shape.part = at.behind;
    mean_gradient_kernel<T>(part_filters, some);
    if (at.ends_sample) {
      part_filters.forward.shape.part = at.sample;
      filter_gradients_kernel<T>(part_filters, some);
    }
    GatherConvolveParams part_convolve = convolve;
    part_convolve.shape.part = at.behind;
    if (has_maps) gather_convolve_kernel<T>(part_convolve, some);
    if (p.dprev.data == nullptr) return;
    aggregate_kernel<T>({by_channel(part.shape), 1, &p.dout, &decay, p.dprev, for_aggregate, {}, nullptr}, some);
  });
  reduce_filters<T>(filters);
  if (has_maps) reduce_taps<T>(convolve, threads);
  for (int64_t c = 0; p.ddecay != nullptr && c < image.channels; ++c) {
    double sum = 0;
    for (int64_t b = 0; b < image.batch; ++b) sum += ddecay[b * image.channels + c];
    store_one<T>(p.ddecay, c, static_cast<A>(sum));
  }
}

// Accumulation elements, forward and backward; doubles and rows of T are counted at their largest.
inline int64_t light_workspace(const ImageShape& s, int64_t filter_size, int threads) {
  const Shape flat = by_channel(s);
  const int64_t elements = s.batch * s.channels;
  const int64_t forward = depthwise_workspace(s) + aggregate_workspace(flat, 2) + norm_workspace(s);
  const int64_t plain = plan_partials(flat, 2).size, activated = activated_partials(s).size;
  const int64_t backward = 5 * elements + (plain > activated ? plain : activated) + 2 * s.batch * filter_size +
                           aggregate_workspace(flat, 1) + gather_convolve_workspace(s, 1, threads);
  return kTaps * s.channels + (forward > backward ? forward : backward);
}

}  // namespace ela::ELA_ISA
