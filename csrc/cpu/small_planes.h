// Small planes, convolved side by side: as many as a vector has lanes, a lane each, so that no vector is cut short by a
// row of seven elements, and no sum over a plane is one over lanes. The lines go along rows, as in interleaved maps.
#pragma once

#include "cpu/lines.h"
#include "cpu/maps.h"
#include "cpu/params.h"
#include "cpu/transpose.h"

namespace ela::ELA_ISA {

// Vectors of a plane with a row of zeros above and below it, on the stack.
constexpr int64_t kSmallPlane = 128;

// Whether turning planes into lanes and back takes less than their short rows do. Measured in float32, of what the line
// of a plane takes otherwise: a whole layer with AVX-512 forward 77 % and backward 62 % at 7 x 7, 41 and 35 % at 4 x 4,
// 116 and 113 % at 14 x 14; with AVX2 100 and 89 % at 7 x 7, 107 and 95 % at 8 x 8.
template <class T>
inline bool is_small(int64_t height, int64_t width) {
  constexpr int64_t widest = kLanes<T> > 8 ? 8 : kLanes<T> - 1;
  constexpr bool is_float = sizeof(Acc<T>) == sizeof(float);  // of doubles half as many have a lane: it took as long
  return kTransposesInRegisters && is_float && width <= widest && (height + 2) * width <= kSmallPlane;
}

// Calls body(i, n) for blocks of `count` elements; n < kLanes<T> only where there are no more. The last one ends where
// the elements end, and overlaps the one before.
template <class T, class Body>
inline void for_blocks(int64_t count, Body body) {
  constexpr int64_t lanes = kLanes<T>;
  if (count < lanes) return body(int64_t{0}, static_cast<int>(count));
  for (int64_t i = 0; i < count; i += lanes) body(i + lanes <= count ? i : count - lanes, Count<kLanes<T>>{});
}

// Rows of `count` elements, `step` apart, side by side: element i of row k becomes lane k of vector i; zeros in the
// lanes from `rows` on.
template <class T, class D, class N>
inline void to_lanes(const D* from, int64_t step, N rows, int64_t count, Acc<T>* to) {
  for_blocks<T>(count, [=](int64_t i, auto n) {
    Block<T> block;
    for (int k = 0; k < kLanes<T>; ++k) block.row[k] = k < rows ? load_n(from + k * step + i, n) : Vec<T>{};
    transpose(block);
    for (int k = 0; k < n; ++k) store_n(to + (i + k) * kLanes<T>, block.row[k], kLanes<T>);
  });
}

// And back; what is stored of row k, from element i on, is end(row, k, i, n).
template <class T, class D, class N, class End>
inline void from_lanes(const Acc<T>* from, D* to, int64_t step, N rows, int64_t count, End end) {
  for_blocks<T>(count, [=](int64_t i, auto n) {
    Block<T> block;
    for (int k = 0; k < kLanes<T>; ++k) {
      block.row[k] = k < n ? load_n(from + (i + k) * kLanes<T>, kLanes<T>) : Vec<T>{};
    }
    transpose(block);
    for (int k = 0; k < rows; ++k) store_n(to + k * step + i, end(block.row[k], k, i, n), n);
  });
}

constexpr auto kAsItIs = [](auto out, int, int64_t, auto) { return out; };

// Planes side by side, with a row of zeros above and below.
template <class T>
struct LanePlanes {
  alignas(ELA_VECTOR_BYTES) Acc<T> memory[kSmallPlane * kLanes<T>];
  int64_t height, pitch;
  LanePlanes(int64_t height, int64_t width) : height(height), pitch(width * kLanes<T>) {
    for (int64_t i = 0; i < pitch; ++i) memory[i] = row(height)[i] = 0;
  }
  Acc<T>* row(int64_t r) { return memory + (r + 1) * pitch; }
  // The three rows that the line of row r needs.
  auto around(int64_t r) {
    return [above = row(r - 1), pitch = pitch](int64_t w) {
      const auto load = [&](int64_t k) { return load_n(above + k * pitch + w * kLanes<T>, kLanes<T>); };
      return Triple<T>{load(0), load(1), load(2)};
    };
  }
};

// Calls body(b, c, planes) for the planes [begin, end), numbered through the batch: as many of a sample as have a lane.
template <class T, class Body>
inline void for_lanes(int64_t begin, int64_t end, int64_t channels, Body body) {
  while (begin < end) {
    const int64_t c = begin % channels;
    int64_t some = channels - c < end - begin ? channels - c : end - begin;
    if (some >= kLanes<T>) {
      some = kLanes<T>;
      body(begin / channels, c, Count<kLanes<T>>{});
    } else {
      body(begin / channels, c, static_cast<int>(some));
    }
    begin += some;
  }
}

// The taps of channels from `c` on, the taps of a row along the line first.
template <class T, class N>
inline void load_lane_taps(const void* taps, int64_t c, N planes, Vec<T>* to) {
  alignas(ELA_VECTOR_BYTES) Acc<T> lanes[kTaps * kLanes<T>];
  to_lanes<T>(static_cast<const T*>(taps) + c * kTaps, kTaps, planes, kTaps, lanes);
  for (int k = 0; k < kTaps; ++k) to[k] = load_n(lanes + (k % 3 * 3 + k / 3) * kLanes<T>, kLanes<T>);
}

}  // namespace ela::ELA_ISA
