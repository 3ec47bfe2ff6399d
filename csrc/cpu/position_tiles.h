// Tiles of positions, in which attention over depth at every position is worked out.
#pragma once

#include "cpu/maps.h"
#include "cpu/parallel.h"
#include "cpu/params.h"
#include "cpu/simd.h"

namespace ela::ELA_ISA {

// Of all maps that a tile reads twice: most of a second-level cache of 1 MiB, with room for what is fetched ahead.
// Measured with 12 and 24 maps: less makes runs too short for the processor's own prefetching, more falls out of cache.
constexpr int64_t kPositionTileBytes = 768 * 1024;
constexpr int64_t kPositionTile = 256;                 // positions of a tile at most
constexpr int64_t kPositionBlockElements = 32 * 1024;  // of a map to one item of work, and one partial sum of drow
constexpr int kPositionVectors = 4;                    // of channels, or of positions, whose sums are in registers
constexpr int kPositionDepths = 4;                     // of a planar map that are summed before the sum is stored
constexpr int kPositionChannels = 4;                   // of a planar map that share a position's factors in registers
constexpr int64_t kPositionFactors = 64;               // depths whose factors are copied to where they lie together

// Positions to one item of work: by the shape alone.
inline int64_t position_block(const Shape& s) {
  int64_t positions = kPositionBlockElements / s.channels;
  if (!s.interleaved) positions = ceil_div(positions, 64) * 64;
  if (positions > s.positions) positions = s.positions;
  return positions < 1 ? 1 : positions;
}
inline int64_t position_blocks(const Shape& s) { return ceil_div(s.positions, position_block(s)); }

// Positions of a tile that reads `maps` maps twice.
template <class T>
inline int64_t position_tile(const Shape& s, int64_t maps) {
  int64_t positions = kPositionTileBytes / (maps * s.channels * static_cast<int64_t>(sizeof(T)));
  if (positions > kPositionTile) positions = kPositionTile;
  if (s.interleaved) return positions < 1 ? 1 : positions;
  // Runs of some lines at least, though the tile falls out of second-level cache then: shorter ones of many channels
  // are slower than reading twice. Measured with 24 maps of 14 x 14, 256 channels: by a third.
  constexpr int64_t least = 128, whole = 64;
  return positions < least ? least : positions / whole * whole;
}

// A tile: positions [first, first + count) of sample b, which belong to an item of work.
struct PositionTile {
  int64_t item, b, first, count;
};

// Calls body(tile) for all tiles. Which positions make an item does not depend on the number of threads.
template <class T, class Body>
inline void for_position_tiles(const Shape& s, int64_t maps, int threads, Body body) {
  const int64_t blocks = position_blocks(s), block = position_block(s), step = position_tile<T>(s, maps);
  parallel_for(s.batch * blocks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * block;
      const int64_t last = first + block < s.positions ? first + block : s.positions;
      for (int64_t at = first; at < last; at += step) {
        body(PositionTile{item, item / blocks, at, at + step < last ? step : last - at});
      }
    }
  });
}

// How far on in a map the next tile lies.
inline int64_t to_next_tile(const Shape& s, const MapView& map, const PositionTile& at) {
  const int64_t position = s.interleaved ? map.inner : 1;
  return at.first + at.count < s.positions ? at.count * position : map.batch - at.first * position;
}

// Fetches a line into second-level cache for the next tile. Its memory would else stand still while a tile that is in
// cache is worked on. The address may lie in no map: a prefetch of one that is nobody's does nothing.
inline void fetch_ahead(const void* p) { __builtin_prefetch(p, 0, 2); }

// Whether the vector `i` elements on begins a line of cache, of which there are several vectors where these are short.
template <class T>
inline bool begins_line(int64_t i) {
  constexpr int64_t line = 64 / sizeof(T);
  return kLanes<T> >= line || i % line == 0;
}

// Of planes [B, depth, N] in the accumulation type: where the tile's positions of depth t begin.
template <class A>
inline A* plane_at(const void* planes, const Shape& s, int64_t depth, const PositionTile& at, int64_t t) {
  return static_cast<A*>(const_cast<void*>(planes)) + (at.b * depth + t) * s.positions + at.first;
}

inline const MapView& key_map(const PositionParams& p, int64_t t) {
  return p.keys == nullptr ? p.values[t] : p.keys[t];
}

}  // namespace ela::ELA_ISA
