// The 3x3 convolution along lines of vectors, and its gradients.
//
// Both forms of a map run through the same line of vectors: down a column of a plane, where the neighbours of a vector
// lie to its left and right, or along a row of interleaved channels, where they lie in the rows above and below.
// "Along" is the direction of the line, "across" the other.
#pragma once

#include "cpu/simd.h"

namespace ela::ELA_ISA {

constexpr int kTaps = 9;

// One vector of a line and its two neighbours across it; zeros beyond the edges.
template <class T>
struct Triple {
  Vec<T> before, center, after;
};

// taps[3 * along + across]. Calls store(i, v), `offset` added, for every place of the line; returns the sum of the
// centers.
template <class T, class Load, class Store>
inline Vec<T> convolve_line(const Vec<T>* tap, Vec<T> offset, int64_t length, Load triple, Store store) {
  // Copies, which no store can change: they stay in registers.
  const Vec<T> a0 = tap[0], a1 = tap[1], a2 = tap[2], b0 = tap[3], b1 = tap[4], b2 = tap[5], c0 = tap[6], c1 = tap[7],
               c2 = tap[8];
  // What the places read so far give to the place before the present one, and to the present one.
  Vec<T> previous{}, here = offset, sum{};
  for (int64_t i = 0; i < length; ++i) {
    const Triple<T> t = triple(i);
    sum += t.center;
    const Vec<T> out = previous + c0 * t.before + c1 * t.center + c2 * t.after;
    if (i > 0) store(i - 1, out);
    previous = here + b0 * t.before + b1 * t.center + b2 * t.after;
    here = offset + a0 * t.before + a1 * t.center + a2 * t.after;
  }
  store(length - 1, previous);
  return sum;
}

// From triples of dv and centers of x: <dv, shifted x> of the lanes to keep, put into totals[tap] by the first line and
// added by the others. (Clearing totals first took an eighth of the time that a small plane takes beside its loops.)
//
// Apart from the gradient of x, which is a convolution with the taps turned: nine sums and nine taps at once are more
// than AVX2 has registers. Measured with AVX2 in cache, planes of 56 x 56: this takes 10 cycles a vector and that 12,
// and nine products take nine.
template <class T, class Load, class Center>
inline void correlate_line(int64_t length, Load triple, Center x, Bits<T> kept, bool is_first, Vec<T>* totals) {
  Vec<T> a0{}, a1{}, a2{}, b0{}, b1{}, b2{}, c0{}, c1{}, c2{};
  Vec<T> previous{}, here{}, next = x(0);
  for (int64_t i = 0; i < length; ++i) {
    const Triple<T> t = triple(i);
    previous = here;
    here = next;
    next = i + 1 < length ? x(i + 1) : Vec<T>{};
    // A tap's output lies on the other side of its input: the neighbours change places.
    a0 += previous * t.after, a1 += previous * t.center, a2 += previous * t.before;
    b0 += here * t.after, b1 += here * t.center, b2 += here * t.before;
    c0 += next * t.after, c1 += next * t.center, c2 += next * t.before;
  }
  const Vec<T> sums[kTaps] = {a0, a1, a2, b0, b1, b2, c0, c1, c2};
  for (int i = 0; i < kTaps; ++i) totals[i] = is_first ? keep<T>(sums[i], kept) : totals[i] + keep<T>(sums[i], kept);
}

template <class T>
inline Vec<T> broadcast(Acc<T> x) {
  return Vec<T>{} + x;
}

inline float load_one(const float* p) { return *p; }
inline double load_one(const double* p) { return *p; }
inline float load_one(const bfloat16* p) { return bits_of<float>(static_cast<uint32_t>(p->bits) << 16); }
inline float load_one(const float16* p) { return load_n(p, 1)[0]; }
template <class T>
inline Acc<T> load_one(const void* p, int64_t i) {
  return load_one(static_cast<const T*>(p) + i);
}

template <class T>
inline void store_one(void* p, int64_t i, Acc<T> x) {
  store_n(static_cast<T*>(p) + i, broadcast<T>(x), 1);
}

}  // namespace ela::ELA_ISA
