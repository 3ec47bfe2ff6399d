// The convolution of a plane, down columns of vectors.
//
// The last column ends at the plane's edge and overlaps the one before where the width is no multiple of a vector, so
// that vectors are whole: what is computed twice is the same both times. Only the neighbours beyond an edge are masked.
// A plane narrower than a vector is one column of parts.
#pragma once

#include "cpu/lines.h"
#include "cpu/maps.h"
#include "cpu/params.h"

namespace ela::ELA_ISA {

// The elements of a plane that are widened before they are convolved, on the stack: each would be three times else.
constexpr int64_t kWidenedPlane = 16 * 1024;
template <class T>
constexpr bool kIsWide = sizeof(T) == sizeof(Acc<T>);

// kLeft, kRight: the column stands at that edge.
template <class T, bool kLeft, bool kRight>
struct WholeColumn {
  int64_t w, width;
  Bits<T> fresh;  // the lanes that no column before had
  template <class D>
  Triple<T> triple(const D* plane, int64_t r) const {
    const D* at = plane + r * width + w;
    constexpr int lanes = kLanes<T>;
    return {load_lanes(at - 1, kLeft ? 1 : 0, lanes), load_n(at, lanes),
            load_lanes(at + 1, 0, kRight ? lanes - 1 : lanes)};
  }
  Vec<T> center(const T* plane, int64_t r) const { return load_n(plane + r * width + w, kLanes<T>); }
  template <class V>
  void store(V* plane, int64_t r, Vec<T> x) const {
    store_n(plane + r * width + w, x, kLanes<T>);
  }
};

template <class T>
struct NarrowColumn {
  static constexpr int64_t w = 0;
  int64_t width, whole_rows;  // rows from whose start a whole vector ends within the plane
  Bits<T> fresh;
  int count;
  template <class D>
  Triple<T> triple(const D* plane, int64_t r) const {
    const D* at = plane + r * width;
    return {load_lanes(at - 1, 1, count), load_n(at, count), load_lanes(at + 1, 0, count - 1)};
  }
  // With what follows in the other lanes, which nobody reads.
  Vec<T> center(const T* plane, int64_t r) const {
    return load_n(plane + r * width, r < whole_rows ? kLanes<T> : count);
  }
  // Rows are stored in their order: what lies behind this one is stored later.
  template <class V>
  void store(V* plane, int64_t r, Vec<T> x) const {
    store_n(plane + r * width, x, r < whole_rows ? kLanes<T> : count);
  }
};

// Calls body(column) from left to right.
template <class T, class Body>
inline void for_columns(int64_t height, int64_t width, Body body) {
  constexpr int64_t lanes = kLanes<T>;
  const Bits<T> all = lane_bits<T>(0, lanes);
  if (width < lanes) {
    const int64_t last = height * width - lanes;  // where the last whole vector starts
    const int count = static_cast<int>(width);
    return body(NarrowColumn<T>{width, last < 0 ? 0 : last / width + 1, lane_bits<T>(0, count), count});
  }
  if (width == lanes) return body(WholeColumn<T, true, true>{0, width, all});
  body(WholeColumn<T, true, false>{0, width, all});
  int64_t w = lanes;
  for (; w + lanes < width; w += lanes) body(WholeColumn<T, false, false>{w, width, all});
  const int covered = static_cast<int>(w - (width - lanes));
  body(WholeColumn<T, false, true>{width - lanes, width, lane_bits<T>(covered, lanes)});
}

// What a convolution reads or writes, and the plane of which the same is asked for meanwhile: the next one, or where
// there is none the same again. (Asking for memory that is not mapped costs ten times what a vector costs.)
template <class P>
struct Plane {
  P *data, *next;
};

// v = x convolved, rounded to its type; returns the sum over the plane. `wide` is x, or x widened.
template <class T, class D, class V>
inline Acc<T> convolve_plane(const D* wide, Plane<const T> x, const Vec<T>* tap, Plane<V> v, int64_t height,
                             int64_t width) {
  Vec<T> sum{};
  for_columns<T>(height, width, [&](auto column) {
    const Vec<T> centers = convolve_line<T>(
        tap, Vec<T>{}, height,
        [=](int64_t r) {
          __builtin_prefetch(x.next + r * width + column.w);
          return column.triple(wide, r);
        },
        [=](int64_t r, Vec<T> out) {
          __builtin_prefetch(v.next + r * width + column.w, 1);
          column.store(v.data, r, out);
        });
    sum += keep<T>(centers, column.fresh);
  });
  return sum_lanes<T>(sum);
}

// dx from the gathered dv, `offset` and, where it is not null, `residual` added.
template <class T>
inline void convolve_plane_turned(const Acc<T>* dv, const Vec<T>* tap, Acc<T> offset, const T* residual, Plane<T> dx,
                                  int64_t height, int64_t width) {
  Vec<T> turned[kTaps];
  for (int i = 0; i < kTaps; ++i) turned[i] = tap[kTaps - 1 - i];
  for_columns<T>(height, width, [&](auto column) {
    const auto convolve = [&](auto residual_at) {
      convolve_line<T>(
          turned, broadcast<T>(offset), height, [=](int64_t r) { return column.triple(dv, r); },
          [=](int64_t r, Vec<T> out) {
            __builtin_prefetch(dx.next + r * width + column.w, 1);
            column.store(dx.data, r, residual_at(r, out));
          });
    };
    if (residual == nullptr) {
      convolve([](int64_t, Vec<T> out) { return out; });
    } else {
      convolve([=](int64_t r, Vec<T> out) { return out + column.center(residual, r); });
    }
  });
}

// <dv, shifted x> for every tap.
template <class T>
inline void correlate_plane(const Acc<T>* dv, Plane<const T> x, Acc<T>* dtaps, int64_t height, int64_t width) {
  Vec<T> totals[kTaps];
  for_columns<T>(height, width, [&](auto column) {
    correlate_line<T>(
        height, [=](int64_t r) { return column.triple(dv, r); },
        [=](int64_t r) {
          __builtin_prefetch(x.next + r * width + column.w);
          return column.center(x.data, r);
        },
        column.fresh, column.w == 0, totals);
  });
  for (int i = 0; i < kTaps; ++i) dtaps[i] = sum_lanes<T>(totals[i]);
}

// The plane of `item`, numbered through the batch, of the items before `end`.
template <class T>
inline Plane<const T> plane_at(const MapView& map, int64_t channels, int64_t item, int64_t end) {
  const int64_t next = item + 1 < end ? item + 1 : item;
  return {planar_at<T>(map, item / channels, item % channels, 0),
          planar_at<T>(map, next / channels, next % channels, 0)};
}
template <class T>
inline Plane<T> written_plane_at(const MapView& map, int64_t channels, int64_t item, int64_t end) {
  const Plane<const T> plane = plane_at<T>(map, channels, item, end);
  return {const_cast<T*>(plane.data), const_cast<T*>(plane.next)};
}

}  // namespace ela::ELA_ISA
