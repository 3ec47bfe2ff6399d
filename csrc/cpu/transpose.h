// Blocks of as many rows as a vector has lanes, turned: lane i of row k becomes lane k of row i.
#pragma once

#include "cpu/sum_rows.h"

namespace ela::ELA_ISA {

template <class T>
struct Block {
  Vec<T> row[kLanes<T>];
};

#if defined(__clang__) || __GNUC__ >= 12
constexpr bool kTransposesInRegisters = true;

// Of two rows kWidth apart, the runs of kWidth lanes that lie on the other side change places.
template <class T, int kWidth, int... kI>
inline void exchange_runs(Vec<T>& a, Vec<T>& b, Indices<kI...>) {
  const Vec<T> upper = __builtin_shufflevector(a, b, pair_lane(kI, kWidth, kLanes<T>, true)...);
  a = __builtin_shufflevector(a, b, pair_lane(kI, kWidth, kLanes<T>, false)...);
  b = upper;
}
template <class T, int kWidth, int kRow>
inline void exchange_at(Block<T>& block) {
  if constexpr ((kRow & kWidth) == 0) {
    exchange_runs<T, kWidth>(block.row[kRow], block.row[kRow + kWidth], typename IndicesTo<kLanes<T>>::Type{});
  }
}
template <class T, int kWidth, int... kRows>
inline void exchange_from(Block<T>& block, Indices<kRows...> rows) {
  if constexpr (kWidth < kLanes<T>) {
    (exchange_at<T, kWidth, kRows>(block), ...);
    exchange_from<T, 2 * kWidth>(block, rows);
  }
}
template <class T>
inline void transpose(Block<T>& block) {
  exchange_from<T, 1>(block, typename IndicesTo<kLanes<T>>::Type{});
}
#else
constexpr bool kTransposesInRegisters = false;

template <class T>
inline void transpose(Block<T>& block) {
  Block<T> turned;
  for (int i = 0; i < kLanes<T>; ++i) {
    for (int k = 0; k < kLanes<T>; ++k) turned.row[i][k] = block.row[k][i];
  }
  block = turned;
}
#endif

}  // namespace ela::ELA_ISA
