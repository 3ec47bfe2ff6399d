// The producer of a layer: depthwise 3x3 convolution (padding 1, stride 1, no bias) and the mean over space in one read
// of x, and its backward in one read of dv and x.
//
// Least bytes: forward x read and v written; backward dv and x read and dx written. Rows that are read again stay in
// cache. Sums over space and batch are cut by the shape alone and added in a fixed order: the same call gives the same
// bits on any number of threads.
#pragma once

#include "cpu/maps.h"
#include "cpu/parallel.h"
#include "cpu/plane.h"
#include "cpu/small_planes.h"

namespace ela::ELA_ISA {

template <class T>
inline const float* widened_in_order(const T* x, float* buffer, int64_t count) {
  for_vectors<T>(count, [&](int64_t i, auto n) { store_n(buffer + i, load_n(x + i, n), n); });
  return buffer;
}
inline const float* widened_in_order(const float* x, float*, int64_t) { return x; }
inline const double* widened_in_order(const double* x, double*, int64_t) { return x; }

template <class T>
inline void load_taps(const void* taps, int64_t c, Vec<T>* to) {
  for (int i = 0; i < kTaps; ++i) to[i] = broadcast<T>(load_one<T>(taps, c * kTaps + i));
}

template <class T, class V>
void depthwise_planar(const DepthwiseParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  for_part(s, s.channels, threads, [&](int64_t begin, int64_t end) {
    alignas(ELA_VECTOR_BYTES) A buffer[kIsWide<T> ? 1 : kWidenedPlane];
    for (PlaneIndex at(begin, end, s.channels); at.is_there(); at.step()) {
      Vec<T> tap[kTaps];
      load_taps<T>(p.taps, at.c, tap);
      const Plane<const T> x = at.of<T>(p.x);
      const Plane<V> v = at.written_of<V>(p.v);
      const A sum =
          s.positions() > kWidenedPlane
              ? convolve_plane<T, false>(x.data, x, tap, v, s.height, s.width)
              : convolve_plane<T, false>(widened_in_order(x.data, buffer, s.positions()), x, tap, v, s.height, s.width);
      store_one<T>(p.mean, at.item, sum / static_cast<A>(s.positions()));
    }
  });
}

// Planes of bfloat16 and float16 that are not wide, with zeros between their rows. The plane after the present one is
// padded before this one is convolved: what was stored a moment ago is read slowly.
template <class T, class V>
void depthwise_padded(const DepthwiseParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const int64_t size = padded_size<T>(s.height, s.width);
  for_part(s, s.channels, threads, [&](int64_t begin, int64_t end) {
    alignas(ELA_VECTOR_BYTES) A buffers[2 * kPaddedPlane];
    for (int64_t i = 0; i < 2 * size; ++i) buffers[i] = 0;
    A *now = buffers + kLanes<T>, *later = now + size;
    const auto pad = [&](const PlaneIndex& at, A* to) {
      const Plane<const T> x = at.of<T>(p.x);
      pad_plane<T>(x.data, x.next, to, s.height, s.width);
    };
    PlaneIndex at(begin, end, s.channels), ahead = at;
    for (; ahead.is_there() && ahead.item == begin; ahead.step()) pad(ahead, now);
    for (; at.is_there(); at.step()) {
      if (ahead.is_there()) pad(ahead, later);
      ahead.step();
      Vec<T> tap[kTaps];
      load_taps<T>(p.taps, at.c, tap);
      const A sum = convolve_plane<T, true>(now, at.of<T>(p.x), tap, at.written_of<V>(p.v), s.height, s.width);
      store_one<T>(p.mean, at.item, sum / static_cast<A>(s.positions()));
      A* const used = now;
      now = later, later = used;
    }
  });
}

// Small planes, a lane each.
template <class T, class V>
void depthwise_small(const DepthwiseParams& p, int threads) {
  constexpr int kL = kLanes<T>;
  const ImageShape& s = p.shape;
  for_part(s, s.channels, threads, [&](int64_t begin, int64_t end) {
    LanePlanes<T> x(s.height, s.width);
    alignas(ELA_VECTOR_BYTES) Acc<T> v[kSmallPlane * kL];
    for_lanes<T>(begin, end, s.channels, [&](int64_t b, int64_t c, auto planes) {
      Vec<T> tap[kTaps], sum{};
      load_lane_taps<T>(p.taps, c, planes, tap);
      to_lanes<T>(planar_at<T>(p.x, b, c, 0), p.x.inner, planes, s.positions(), x.row(0));
      for (int64_t r = 0; r < s.height; ++r) {
        Acc<T>* const row = v + r * x.pitch;
        sum += convolve_line<T>(tap, Vec<T>{}, s.width, x.around(r),
                                [=](int64_t w, Vec<T> out) { store_n(row + w * kL, out, kL); });
      }
      from_lanes<T>(v, const_cast<V*>(planar_at<V>(p.v, b, c, 0)), p.v.inner, planes, s.positions(), kAsItIs);
      store_n(static_cast<T*>(p.mean) + b * s.channels + c, sum / static_cast<Acc<T>>(s.positions()), planes);
    });
  });
}

// Interleaved maps: some rows and a strip of channels at a time, so that the three rows of a line stay in cache.
constexpr int64_t kRowsAtOnce = 16;
constexpr int64_t kStripChannels = 64;

struct ImageItem {
  int64_t b, block, first_row, last_row, c, count;
};

// Calls body(item) for every part of the image, of `strip` channels.
template <class Body>
inline void for_strips(const ImageShape& s, int64_t strip, int threads, Body body) {
  const int64_t blocks = ceil_div(s.height, kRowsAtOnce), strips = ceil_div(s.channels, strip);
  for_part(s, blocks * strips, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      ImageItem at;
      at.b = item / (blocks * strips);
      at.block = at.b * blocks + item / strips % blocks;
      at.first_row = item / strips % blocks * kRowsAtOnce;
      at.last_row = at.first_row + kRowsAtOnce < s.height ? at.first_row + kRowsAtOnce : s.height;
      at.c = item % strips * strip;
      at.count = s.channels - at.c < strip ? s.channels - at.c : strip;
      body(at);
    }
  });
}

// [C, 9] as [9, C], the taps of a row along the line first: how interleaved maps read them.
template <class T>
inline void prepare_taps(const ImageShape& s, const void* taps, Acc<T>* transposed) {
  for (int along = 0; along < 3; ++along) {
    for (int across = 0; across < 3; ++across) {
      Acc<T>* row = transposed + (3 * along + across) * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) row[c] = load_one<T>(taps, c * kTaps + 3 * across + along);
    }
  }
}

// The three rows of an image that a line needs, `lanes` channels of them; what lies beyond an edge is one vector of
// zeros, read again and again. The row after them is asked for meanwhile, or where there is none the last again.
template <class T, class N>
struct Rows {
  static constexpr T kZeros[kLanes<T>] = {};
  Run<const T> row[3], asked;
  N lanes;
  Rows(const ImageShape& s, const MapView& map, int64_t b, int64_t r, int64_t c, N n) : lanes(n) {
    const auto run = [&](int64_t at) { return Run<const T>{interleaved_at<T>(map, b, at * s.width, c), map.inner}; };
    const Run<const T> zeros = {kZeros, 0};
    row[0] = r > 0 ? run(r - 1) : zeros;
    row[1] = run(r);
    row[2] = r + 1 < s.height ? run(r + 1) : zeros;
    asked = run(r + 2 < s.height ? r + 2 : r);
  }
  Triple<T> operator()(int64_t w) const {
    __builtin_prefetch(asked.at(w), 0, 2);
    return {load_n(row[0].at(w), lanes), load_n(row[1].at(w), lanes), load_n(row[2].at(w), lanes)};
  }
};

template <class T, class V>
void depthwise_interleaved(const DepthwiseParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const A* taps = static_cast<const A*>(p.rows);
  A* sums = static_cast<A*>(p.workspace);  // [B, blocks of rows, C]
  for_strips(s, kStripChannels, threads, [&](const ImageItem& at) {
    A* sum = sums + at.block * s.channels + at.c;
    for (int64_t i = 0; i < at.count; ++i) sum[i] = 0;
    for (int64_t r = at.first_row; r < at.last_row; ++r) {
      for_vectors<T>(at.count, [&](int64_t i, auto n) {
        Vec<T> tap[kTaps];
        for (int k = 0; k < kTaps; ++k) tap[k] = load_n(taps + k * s.channels + at.c + i, n);
        const Run<V> v = {const_cast<V*>(interleaved_at<V>(p.v, at.b, r * s.width, at.c + i)), p.v.inner};
        const Rows<T, decltype(n)> rows(s, p.x, at.b, r, at.c + i, n);
        const Vec<T> centers =
            convolve_line<T>(tap, Vec<T>{}, s.width, rows, [=](int64_t w, Vec<T> out) { store_n(v.at(w), out, n); });
        store_n(sum + i, load_n(sum + i, n) + centers, n);
      });
    }
  });
  const int64_t blocks = ceil_div(s.height, kRowsAtOnce);
  for_part(s, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for_vectors<T>(s.channels, [&](int64_t c, int n) {
        Vec<T> sum{};
        for (int64_t k = 0; k < blocks; ++k) sum += load_n(sums + (b * blocks + k) * s.channels + c, n);
        store_n(static_cast<T*>(p.mean) + b * s.channels + c, sum / static_cast<A>(s.positions()), n);
      });
    }
  });
}

// From x of type T to v of type V.
template <class T, class V = T>
void depthwise_kernel(const DepthwiseParams& p, int threads) {
  if (p.shape.interleaved) return depthwise_interleaved<T, V>(p, threads);
  if (is_small<T>(p.shape.height, p.shape.width)) return depthwise_small<T, V>(p, threads);
  is_padded<T>(p.shape.height, p.shape.width) ? depthwise_padded<T, V>(p, threads) : depthwise_planar<T, V>(p, threads);
}

// Accumulation elements.
inline int64_t depthwise_workspace(const ImageShape& s) {
  return s.interleaved ? s.batch * ceil_div(s.height, kRowsAtOnce) * s.channels : 0;
}

}  // namespace ela::ELA_ISA
