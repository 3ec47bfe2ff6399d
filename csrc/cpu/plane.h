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
  int64_t width, last;  // where the last whole vector of the plane starts
  Bits<T> fresh;
  int count;
  template <class D>
  Triple<T> triple(const D* plane, int64_t r) const {
    const D* at = plane + r * width;
    return {load_lanes(at - 1, 1, count), load_n(at, count), load_lanes(at + 1, 0, count - 1)};
  }
  // With what follows in the other lanes, which nobody reads.
  Vec<T> center(const T* plane, int64_t r) const {
    return load_n(plane + r * width, r * width <= last ? kLanes<T> : count);
  }
  // Rows are stored in their order: what lies behind this one is stored later.
  template <class V>
  void store(V* plane, int64_t r, Vec<T> x) const {
    store_n(plane + r * width, x, r * width <= last ? kLanes<T> : count);
  }
};

// A column of what pad_plane() makes of a plane: its neighbours need no mask.
template <class T, class Column>
struct PaddedColumn : Column {
  int64_t pitch;
  Triple<T> triple(const Acc<T>* padded, int64_t r) const {
    const Acc<T>* at = padded + r * pitch + this->w;
    return {Memory<Acc<T>>::load(at - 1), Memory<Acc<T>>::load(at), Memory<Acc<T>>::load(at + 1)};
  }
};

template <class T>
inline NarrowColumn<T> narrow_column(int64_t height, int64_t width) {
  const int count = static_cast<int>(width);
  return {width, height * width - kLanes<T>, lane_bits<T>(0, count), count};
}

// Calls body(column) from left to right.
template <class T, class Body>
inline void for_columns(int64_t height, int64_t width, Body body) {
  constexpr int64_t lanes = kLanes<T>;
  const Bits<T> all = lane_bits<T>(0, lanes);
  if (width < lanes) return body(narrow_column<T>(height, width));
  if (width == lanes) return body(WholeColumn<T, true, true>{0, width, all});
  body(WholeColumn<T, true, false>{0, width, all});
  int64_t w = lanes;
  for (; w + lanes < width; w += lanes) body(WholeColumn<T, false, false>{w, width, all});
  const int covered = static_cast<int>(w - (width - lanes));
  body(WholeColumn<T, false, true>{width - lanes, width, lane_bits<T>(covered, lanes)});
}

// From the start of a row to the next: whole vectors, and a zero between two rows.
template <class T>
inline int64_t padded_pitch(int64_t width) {
  return (width / kLanes<T> + 1) * kLanes<T>;
}
// With a vector before the first row and one after the last.
template <class T>
inline int64_t padded_size(int64_t height, int64_t width) {
  return padded_pitch<T>(width) * height + 2 * kLanes<T>;
}

// The elements of planes that are padded before they are convolved, on the stack.
constexpr int64_t kPaddedPlane = 4 * 1024;
// Measured with AVX2 in cache, in bfloat16, of what a convolution takes otherwise: 91 % at 14 x 14, as much at 28 x 28
// and more at 56 x 56; in float more from 14 x 14 on. The gathered planes of a backward took half as long again.
template <class T>
inline bool is_padded(int64_t height, int64_t width) {
  return !kIsWide<T> && width <= 2 * kLanes<T> && padded_size<T>(height, width) <= kPaddedPlane;
}

template <class T, class Body>
inline void for_padded_columns(int64_t height, int64_t width, Body body) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = padded_pitch<T>(width);
  if (width < lanes) return body(PaddedColumn<T, NarrowColumn<T>>{narrow_column<T>(height, width), pitch});
  using Whole = WholeColumn<T, false, false>;
  int64_t w = 0;
  for (; w + lanes <= width; w += lanes) {
    body(PaddedColumn<T, Whole>{{w, width, lane_bits<T>(0, lanes)}, pitch});
  }
  if (w == width) return;
  const int covered = static_cast<int>(w - (width - lanes));
  body(PaddedColumn<T, Whole>{{width - lanes, width, lane_bits<T>(covered, lanes)}, pitch});
}

// The rows of a plane, widened, in memory that was zero: what lies between them stays so. `from` is where the first row
// starts.
template <class T, class D>
inline void pad_plane(const D* plane, const D* next, Acc<T>* from, int64_t height, int64_t width) {
  constexpr int64_t lanes = kLanes<T>;
  using Wide = Memory<Acc<T>>;
  const int64_t pitch = padded_pitch<T>(width);
  if (width < lanes) {
    const NarrowColumn<T> column = narrow_column<T>(height, width);
    int64_t r = 0;
    for (; r * width <= column.last; ++r) {
      __builtin_prefetch(next + r * width);
      Wide::store(from + r * pitch, keep<T>(load_n(plane + r * width, lanes), column.fresh));
    }
    for (; r < height; ++r) Wide::store(from + r * pitch, load_n(plane + r * width, column.count));
    return;
  }
  for (int64_t r = 0; r < height; ++r) {
    const D* row = plane + r * width;
    int64_t w = 0;
    for (; w + lanes <= width; w += lanes) {
      __builtin_prefetch(next + r * width + w);
      Wide::store(from + r * pitch + w, load_n(row + w, lanes));
    }
    if (w < width) Wide::store(from + r * pitch + width - lanes, load_n(row + width - lanes, lanes));
  }
}

// What a convolution reads or writes, and the plane of which the same is asked for meanwhile: the next one, or where
// there is none the same again. (Asking for memory that is not mapped costs ten times what a vector costs.)
template <class P>
struct Plane {
  P *data, *next;
};

// v = x convolved, rounded to its type; returns the sum over the plane. `wide` is x, x widened, or x padded.
template <class T, bool kPadded, class D, class V>
inline Acc<T> convolve_plane(const D* wide, Plane<const T> x, const Vec<T>* tap, Plane<V> v, int64_t height,
                             int64_t width) {
  Vec<T> sum{};
  const auto convolve = [&](auto column) {
    const Vec<T> centers = convolve_line<T>(
        tap, Vec<T>{}, height,
        [=](int64_t r) {
          if (!kPadded) __builtin_prefetch(x.next + r * width + column.w);
          return column.triple(wide, r);
        },
        [=](int64_t r, Vec<T> out) {
          __builtin_prefetch(v.next + r * width + column.w, 1);
          column.store(v.data, r, out);
        });
    sum += keep<T>(centers, column.fresh);
  };
  if constexpr (kPadded) {
    for_padded_columns<T>(height, width, convolve);
  } else {
    for_columns<T>(height, width, convolve);
  }
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

// The planes [begin, end), numbered through the batch, one after the other: a division for each takes as long as a row.
struct PlaneIndex {
  int64_t item, end, channels, b, c;
  PlaneIndex(int64_t begin, int64_t end, int64_t channels)
      : item(begin), end(end), channels(channels), b(begin / channels), c(begin % channels) {}
  bool is_there() const { return item < end; }
  void step() {
    ++item, ++c;
    if (c == channels) c = 0, ++b;
  }
  // The plane, and the next one where there is one.
  template <class T>
  Plane<const T> of(const MapView& map) const {
    const T* const data = planar_at<T>(map, b, c, 0);
    if (item + 1 >= end) return {data, data};
    return {data, c + 1 < channels ? data + map.inner : planar_at<T>(map, b + 1, 0, 0)};
  }
  template <class T>
  Plane<T> written_of(const MapView& map) const {
    const Plane<const T> plane = of<T>(map);
    return {const_cast<T*>(plane.data), const_cast<T*>(plane.next)};
  }
};

}  // namespace ela::ELA_ISA
