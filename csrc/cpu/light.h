// The light form of a layer: out = gate * v + decay * prev, with gate = sigmoid(scale * <q, k>) of a head, and v, q and
// k from x as in layer.h.
//
// To the kernels of the base form it is an aggregation of two sources with one head a channel. What a channel takes of
// each source, gate and decay, is laid out as [2, B, C] by the forward and kept for the backward.
//
// Least bytes: x read, v written, then v and prev read and out written. Backward: dout, v and prev read for their dot
// products; then dout and x read and dx written, and dout read and dprev written.
#pragma once

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

template <class T>
void light_layer_kernel(const LightParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& image = p.shape;
  // Each kernel has memory of its own: samples are at different kernels at the same time.
  A* rows = static_cast<A*>(p.workspace);
  A* for_depthwise = rows + kTaps * image.channels;
  A* for_aggregate = for_depthwise + depthwise_workspace(image);
  A* for_norm = for_aggregate + aggregate_workspace(by_channel(image), 2);
  const MapView sources[] = {p.v, p.prev};
  const ColumnView columns[] = {{light_factors<T>(p, 0), 1}, {light_factors<T>(p, 1), 1}};
  const StatisticsParams statistics = {image, p.out, for_norm, p.mean_out, p.variance_out};
  if (image.interleaved) prepare_taps<T>(image, p.taps, rows);
  const bool wants_statistics = p.mean_out != nullptr;
  if (p.is_block && !wants_statistics) prepare_norm<T>(p.norm);
  by_part<T>(image, p.heads, p.filter_size, threads, [&](const LayerPart& at, int some) {
    LightParams part = p;
    part.shape.part = at.ahead;
    depthwise_kernel<T>({part.shape, p.x, p.taps, p.v, p.mean, rows, for_depthwise}, some);
    part.shape.part = at.heads;
    channel_filters_kernel<T>(light_filters(part), some);
    light_factors_kernel<T>(part, some);
    aggregate_kernel<T>({by_channel(part.shape), 2, sources, columns, p.out, for_aggregate, {}}, some);
    StatisticsParams of_part = statistics;
    of_part.shape.part = at.heads;
    if (wants_statistics) statistics_kernel<T>(of_part, some);
    if (p.is_block && !wants_statistics) norm_part(p.norm, at.heads, some, norm_kernel<T>);
  });
  if (!wants_statistics) return;
  join_statistics<T>(statistics);
  if (!p.is_block) return;
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

template <class T>
void light_layer_backward_kernel(const LightBackwardParams& p, int threads) {
  using A = Acc<T>;
  const LightParams& f = p.forward;
  const ImageShape& image = f.shape;
  const int64_t elements = image.batch * image.channels;
  const Partials q = plan_partials(by_channel(image), 2);
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
  GatherConvolveParams convolve = {image, image.channels, 1,    &p.dout, &gate,       f.x, f.taps, rows,
                                   dmean, p.dx_residual,  p.dx, p.dtaps, for_convolve};
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
    BackwardParams part_dots = dots;
    part_dots.forward.shape = by_channel(part.shape);
    image.interleaved ? dots_interleaved<T>(part_dots, q, partials, nullptr, some)
                      : dots_planar<T>(part_dots, q, partials, some);
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
    aggregate_kernel<T>({by_channel(part.shape), 1, &p.dout, &decay, p.dprev, for_aggregate, {}}, some);
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
  const int64_t backward = 5 * elements + plan_partials(flat, 2).size + 2 * s.batch * filter_size +
                           aggregate_workspace(flat, 1) + gather_convolve_workspace(s, 1, threads);
  return kTaps * s.channels + (forward > backward ? forward : backward);
}

}  // namespace ela::ELA_ISA
