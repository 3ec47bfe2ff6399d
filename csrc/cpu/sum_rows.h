// Sums of the lanes of several vectors at once: for each a few instructions, where one vector alone takes ten.
#pragma once

#include "cpu/simd.h"

namespace ela::ELA_ISA {

#if defined(__clang__) || __GNUC__ >= 12
template <int... kIndices>
struct Indices {};
template <int kN, int... kIndices>
struct IndicesTo : IndicesTo<kN - 1, kN - 1, kIndices...> {};
template <int... kIndices>
struct IndicesTo<0, kIndices...> {
  using Type = Indices<kIndices...>;
};

// Where lane i of two vectors' pairwise sums comes from: runs of kWidth lanes of the one and of the other take turns,
// each the sum of two neighbouring runs.
constexpr int pair_lane(int i, int width, int lanes, bool is_upper) {
  const int within = i % (2 * width), block = i - within;
  return (within < width ? block + within : lanes + block + within - width) + (is_upper ? width : 0);
}
template <class T, int kWidth, int... kI>
inline Vec<T> add_pairs(Vec<T> a, Vec<T> b, Indices<kI...>) {
  return __builtin_shufflevector(a, b, pair_lane(kI, kWidth, kLanes<T>, false)...) +
         __builtin_shufflevector(a, b, pair_lane(kI, kWidth, kLanes<T>, true)...);
}

// Lane i holds a part of the sum of row i % kRows.
template <class T, int kRows>
inline Vec<T> fold_rows(const Acc<T>* rows) {
  if constexpr (kRows == 1) {
    return load_n(rows, kLanes<T>);
  } else {
    constexpr int kHalf = kRows / 2;
    return add_pairs<T, kHalf>(fold_rows<T, kHalf>(rows), fold_rows<T, kHalf>(rows + kHalf * kLanes<T>),
                               typename IndicesTo<kLanes<T>>::Type{});
  }
}

// The sum of each of as many rows as a vector has lanes, which follow one another.
template <class T>
inline Vec<T> sum_rows(const Acc<T>* rows) {
  return fold_rows<T, kLanes<T>>(rows);
}

// sums[j] = sum_lanes<T>(of[j]) of up to four vectors, to the last bit: halves are added to halves, here of several.
template <class T, int kWidth>
inline Vec<T> add_halves(Vec<T> v) {
  if constexpr (kWidth == 0) {
    return v;
  } else {
    return add_halves<T, kWidth / 2>(add_pairs<T, kWidth>(v, v, typename IndicesTo<kLanes<T>>::Type{}));
  }
}
template <class T, int kCount>
inline void sum_each(const Vec<T>* of, Acc<T>* sums) {
  static_assert(kCount <= 4, "two halvings take four vectors into one");
  if constexpr (kCount == 1 || kLanes<T> < 4) {
    for (int j = 0; j < kCount; ++j) sums[j] = sum_lanes<T>(of[j]);
  } else {
    constexpr int kHalf = kLanes<T> / 2, kQuarter = kLanes<T> / 4;
    constexpr auto all = typename IndicesTo<kLanes<T>>::Type{};
    Vec<T> found = add_pairs<T, kHalf>(of[0], of[1], all);
    if constexpr (kCount == 2) {
      found = add_halves<T, kQuarter>(found);
    } else {
      found = add_pairs<T, kQuarter>(found, add_pairs<T, kHalf>(of[2], of[kCount - 1], all), all);
      found = add_halves<T, kQuarter / 2>(found);
    }
    for (int j = 0; j < kCount; ++j) sums[j] = found[j % 2 * kHalf + j / 2 * kQuarter];
  }
}
#else
template <class T, int kCount>
inline void sum_each(const Vec<T>* of, Acc<T>* sums) {
  for (int j = 0; j < kCount; ++j) sums[j] = sum_lanes<T>(of[j]);
}
template <class T>
inline Vec<T> sum_rows(const Acc<T>* rows) {
  Vec<T> sums;
  for (int i = 0; i < kLanes<T>; ++i) sums[i] = sum_lanes<T>(load_n(rows + i * kLanes<T>, kLanes<T>));
  return sums;
}
#endif

}  // namespace ela::ELA_ISA
