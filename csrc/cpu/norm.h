// What follows the retrieval o in a residual block: out = x + mask * relu(scale * o + shift), with scale and shift from
// a norm over batch and space, and its backward.
//
// Least bytes: o is read once for its statistics, where they are wanted; then o and x read and out written. Backward:
// dout and o read for two sums a channel, read again for the gradient of o, which is written.
#pragma once

#include <math.h>

#include "cpu/statistics.h"

namespace ela::ELA_ISA {

// Something of a channel, which may be in the type of the maps.
template <class T>
inline Acc<T> load_of_channel(bool narrow, const void* from, int64_t c) {
  return narrow ? load_one<T>(from, c) : static_cast<const Acc<T>*>(from)[c];
}
template <class T>
inline void store_of_channel(bool narrow, void* to, int64_t c, Acc<T> x) {
  if (narrow) {
    store_one<T>(to, c, x);
  } else {
    static_cast<Acc<T>*>(to)[c] = x;
  }
}

// Takes the statistics of a batch into the running ones.
template <class T>
void track_statistics(const NormParams& p) {
  using A = Acc<T>;
  const RunningParams& r = p.running;
  if (r.batches != nullptr) ++*r.batches;
  if (r.mean == nullptr) return;
  const double count = static_cast<double>(p.shape.batch * p.shape.positions());
  const A kept = static_cast<A>(1 - r.factor);
  const auto move = [&](void* running, const void* found, double factor) {
    const A by = static_cast<A>(factor);
    for (int64_t c = 0; c < p.shape.channels; ++c) {
      const A moved = load_of_channel<T>(r.narrow, running, c) * kept + by * static_cast<const A*>(found)[c];
      store_of_channel<T>(r.narrow, running, c, moved);
    }
  };
  move(r.mean, p.mean, r.factor);
  move(r.variance, p.variance, r.factor * count / (count - 1));
}

// scale and shift of every channel, [2, C].
template <class T>
void prepare_norm(const NormParams& p) {
  using A = Acc<T>;
  A* scale = static_cast<A*>(p.factors);
  A* shift = scale + p.shape.channels;
  for (int64_t c = 0; c < p.shape.channels; ++c) {
    const double inverse = 1 / sqrt(static_cast<const A*>(p.variance)[c] + p.eps);
    const double gamma = p.gamma == nullptr ? 1 : load_of_channel<T>(p.narrow, p.gamma, c);
    const double beta = p.beta == nullptr ? 0 : load_of_channel<T>(p.narrow, p.beta, c);
    scale[c] = static_cast<A>(gamma * inverse);
    shift[c] = static_cast<A>(beta - gamma * inverse * static_cast<const A*>(p.mean)[c]);
  }
}

template <class T>
inline Acc<T> mask_of(const NormParams& p, int64_t b) {
  return p.mask == nullptr ? 1 : static_cast<const Acc<T>*>(p.mask)[b];
}

// A NaN stays one.
template <class T>
inline Vec<T> relu(Vec<T> z) {
  return z < Vec<T>{} ? Vec<T>{} : z;
}

template <class T, class Factor>
inline Vec<T> end_of(Vec<T> o, Vec<T> x, Factor scale, Factor shift, Acc<T> mask, bool has_relu) {
  const Vec<T> z = o * scale + shift;
  return x + mask * (has_relu ? relu<T>(z) : z);
}

// The end of a block in a plane, from some element of it on.
template <class T>
struct PlaneEnd {
  static constexpr bool kEndsBlock = true;
  const T* x;
  T* out;
  Acc<T> scale, shift, mask;
  bool has_relu;
  PlaneEnd(const NormParams& p, int64_t b, int64_t c, int64_t offset)
      : x(planar_at<T>(p.x, b, c, offset)),
        out(const_cast<T*>(planar_at<T>(p.out, b, c, offset))),
        scale(static_cast<const Acc<T>*>(p.factors)[c]),
        shift(static_cast<const Acc<T>*>(p.factors)[p.shape.channels + c]),
        mask(mask_of<T>(p, b)),
        has_relu(p.relu) {}
  template <class At>
  Vec<T> of(Vec<T> o, At at) const {
    return end_of<T>(o, at.load(x), scale, shift, mask, has_relu);
  }
};

// The end of a block, of `count` elements of a plane from `offset` on.
template <class T>
inline void end_plane(const NormParams& p, int64_t b, int64_t c, int64_t offset, int64_t count, const T* o) {
  const PlaneEnd<T> end(p, b, c, offset);
  map_any_order<T>(count, end.out, [=](auto at) { return end.of(at.load(o), at); });
}

// The same of `count` channels of a position, from channel `c` on.
template <class T>
inline void end_position(const NormParams& p, int64_t b, int64_t position, int64_t c, int64_t count, const T* o) {
  using A = Acc<T>;
  const T* x = interleaved_at<T>(p.x, b, position, c);
  T* out = const_cast<T*>(interleaved_at<T>(p.out, b, position, c));
  const A *scale = static_cast<const A*>(p.factors) + c, *shift = scale + p.shape.channels;
  const A mask = mask_of<T>(p, b);
  const bool has_relu = p.relu;
  for_vectors<T>(count, [=](int64_t i, auto n) {
    store_n(out + i,
            end_of<T>(load_n(o + i, n), load_n(x + i, n), load_n(scale + i, n), load_n(shift + i, n), mask, has_relu),
            n);
  });
}

template <class T>
void norm_kernel(const NormParams& p, int threads) {
  const ImageShape& s = p.shape;
  for_stat_blocks(
      s, threads, [&](int64_t b, int64_t c) { end_plane<T>(p, b, c, 0, s.positions(), planar_at<T>(p.o, b, c, 0)); },
      [&](int64_t b, int64_t, int64_t first, int64_t last) {
        for (int64_t position = first; position < last; ++position) {
          end_position<T>(p, b, position, 0, s.channels, interleaved_at<T>(p.o, b, position, 0));
        }
      });
}

// The gradient that arrives at the norm's output.
template <class T, class Factor>
inline Vec<T> norm_gradient(bool has_relu, Vec<T> o, Vec<T> dout, Factor scale, Factor shift, Acc<T> mask) {
  const Vec<T> g = mask * dout;
  return has_relu ? (o * scale + shift <= Vec<T>{} ? Vec<T>{} : g) : g;
}

// Partial sums of the gradient g and of g * (o - mean), [2, B, blocks, C]. `x` of the params holds dout here.
template <class T>
void norm_sums_kernel(const NormParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const int64_t blocks = stat_blocks(s);
  const A *scale = static_cast<const A*>(p.factors), *shift = scale + s.channels;
  const A* mean = static_cast<const A*>(p.mean);
  A* sums = static_cast<A*>(p.partials);
  A* products = sums + s.batch * blocks * s.channels;
  const bool has_relu = p.relu;
  for_stat_blocks(
      s, threads,
      [&](int64_t b, int64_t c) {
        const T *o = planar_at<T>(p.o, b, c, 0), *dout = planar_at<T>(p.x, b, c, 0);
        const A by = scale[c], beyond = shift[c], center = mean[c], mask = mask_of<T>(p, b);
        Vec<T> sum{}, product{};
        for_any_order<T>(s.positions(), [&](auto at) {
          const Vec<T> value = at.load(o);
          // Lanes beyond the end have a zero dout, and so a zero gradient.
          const Vec<T> g = norm_gradient<T>(has_relu, value, at.load(dout), by, beyond, mask);
          sum += g;
          product += g * (value - center);
        });
        sums[b * s.channels + c] = sum_lanes<T>(sum);
        products[b * s.channels + c] = sum_lanes<T>(product);
      },
      [&](int64_t b, int64_t block, int64_t first, int64_t last) {
        const A mask = mask_of<T>(p, b);
        for_vectors<T>(s.channels, [&](int64_t c, int n) {
          const Vec<T> scales = load_n(scale + c, n), shifts = load_n(shift + c, n), means = load_n(mean + c, n);
          Vec<T> sum{}, product{};
          for (int64_t position = first; position < last; ++position) {
            const Vec<T> value = load_n(interleaved_at<T>(p.o, b, position, c), n);
            const Vec<T> dout = load_n(interleaved_at<T>(p.x, b, position, c), n);
            const Vec<T> g = norm_gradient<T>(has_relu, value, dout, scales, shifts, mask);
            sum += g;
            product += g * (value - means);
          }
          const int64_t at = (b * blocks + block) * s.channels + c;
          store_n(sums + at, sum, n);
          store_n(products + at, product, n);
        });
      });
}

// dgamma and dbeta, and what the gradient of o takes of o and of one: do = scale * g - slope * o - offset, [2, C] after
// the factors.
template <class T>
void join_norm_sums(const NormParams& p) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const int64_t parts = s.batch * stat_blocks(s);
  const A* sums = static_cast<const A*>(p.partials);
  const A* products = sums + parts * s.channels;
  A* scale = static_cast<A*>(p.factors);
  A *slope = scale + 2 * s.channels, *offset = slope + s.channels;
  const double count = static_cast<double>(s.batch * s.positions());
  for (int64_t c = 0; c < s.channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t i = 0; i < parts; ++i) {
      sum += sums[i * s.channels + c];
      product += products[i * s.channels + c];
    }
    const double inverse = 1 / sqrt(static_cast<const A*>(p.variance)[c] + p.eps);
    if (p.dgamma != nullptr) store_of_channel<T>(p.narrow, p.dgamma, c, static_cast<A>(product * inverse));
    if (p.dbeta != nullptr) store_of_channel<T>(p.narrow, p.dbeta, c, static_cast<A>(sum));
    // With batch statistics mean and variance move as well; with given ones they do not.
    const double by_value = p.batch_statistics ? scale[c] * product * inverse * inverse / count : 0;
    slope[c] = static_cast<A>(by_value);
    offset[c] =
        static_cast<A>(p.batch_statistics ? scale[c] * sum / count - by_value * static_cast<const A*>(p.mean)[c] : 0);
  }
}

template <class T>
void norm_backward_kernel(const NormParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const A *scale = static_cast<const A*>(p.factors), *shift = scale + s.channels;
  const A *slope = shift + s.channels, *offset = slope + s.channels;
  const bool also = p.also.data != nullptr, has_relu = p.relu;
  for_stat_blocks(
      s, threads,
      [&](int64_t b, int64_t c) {
        const T *o = planar_at<T>(p.o, b, c, 0), *dout = planar_at<T>(p.x, b, c, 0);
        const T* more = also ? planar_at<T>(p.also, b, c, 0) : nullptr;
        T* out = const_cast<T*>(planar_at<T>(p.out, b, c, 0));
        const A by = scale[c], beyond = shift[c], by_value = slope[c], less = offset[c], mask = mask_of<T>(p, b);
        map_any_order<T>(s.positions(), out, [=](auto at) {
          const Vec<T> value = at.load(o);
          const Vec<T> g = norm_gradient<T>(has_relu, value, at.load(dout), by, beyond, mask);
          const Vec<T> d = by * g - by_value * value - less;
          return more == nullptr ? d : d + at.load(more);
        });
      },
      [&](int64_t b, int64_t, int64_t first, int64_t last) {
        const A mask = mask_of<T>(p, b);
        for (int64_t position = first; position < last; ++position) {
          const T *o = interleaved_at<T>(p.o, b, position, 0), *dout = interleaved_at<T>(p.x, b, position, 0);
          T* out = const_cast<T*>(interleaved_at<T>(p.out, b, position, 0));
          for_vectors<T>(s.channels, [&](int64_t c, int n) {
            const Vec<T> value = load_n(o + c, n), scales = load_n(scale + c, n);
            const Vec<T> g = norm_gradient<T>(has_relu, value, load_n(dout + c, n), scales, load_n(shift + c, n), mask);
            Vec<T> d = scales * g - load_n(slope + c, n) * value - load_n(offset + c, n);
            if (also) d += load_n(interleaved_at<T>(p.also, b, position, c), n);
            store_n(out + c, d, n);
          });
        }
      });
}

// A part of the batch; the factors are prepared.
template <class Kernel>
inline void norm_part(NormParams p, Part part, int threads, Kernel kernel) {
  p.shape.part = part;
  kernel(p, threads);
}

// Before the backward of any part.
template <class T>
void prepare_norm_backward(const NormParams& p, int threads) {
  prepare_norm<T>(p);
  norm_sums_kernel<T>(p, threads);
  join_norm_sums<T>(p);
}

// All of it, for a block that makes nothing else.
template <class T>
void norm_forward_kernel(const NormParams& p, int threads) {
  prepare_norm<T>(p);
  norm_kernel<T>(p, threads);
}

template <class T>
void norm_gradient_kernel(const NormParams& p, int threads) {
  prepare_norm_backward<T>(p, threads);
  norm_backward_kernel<T>(p, threads);
}

// Accumulation elements: partial sums, and four factors a channel.
inline int64_t norm_workspace(const ImageShape& s) { return (2 * s.batch * stat_blocks(s) + 4) * s.channels; }

}  // namespace ela::ELA_ISA
