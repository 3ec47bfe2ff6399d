// Where the elements of a map lie.
#pragma once

#include "cpu/simd_target.h"
#include "views.h"

namespace ela::ELA_ISA {

template <class T>
inline const T* planar_at(const MapView& map, int64_t b, int64_t c, int64_t offset) {
  return static_cast<const T*>(map.data) + b * map.batch + c * map.inner + offset;
}

template <class T>
inline const T* interleaved_at(const MapView& map, int64_t b, int64_t position, int64_t c) {
  return static_cast<const T*>(map.data) + b * map.batch + position * map.inner + c;
}

// Positions of an interleaved map, from one of them and from a channel on.
template <class T>
struct Run {
  T* data;
  int64_t step;
  T* at(int64_t position) const { return data + position * step; }
};

template <class T>
inline Run<T> writable(Run<const T> run) {
  return {const_cast<T*>(run.data), run.step};
}

}  // namespace ela::ELA_ISA
