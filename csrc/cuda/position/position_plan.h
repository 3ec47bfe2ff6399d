// Plans of the launches over positions. As in common/plan.h, sizes alone decide.
//
// A block has kPlanThreads threads: `lanes` of them, a team, share the channels of a position (interleaved) or of as
// many positions as a vector holds (planar). Where a team does not reach all channels with the vectors that its threads
// take of a map at a time, it goes over them in rounds.
#pragma once

#include "cuda/common/plan.h"

namespace ela::cuda {

// Vectors of a map that a thread takes at a time, and of the gradients of maps, which need more registers.
template <int kVec>
constexpr int kPositionVectors = kVec == 1 ? 4 : 2;
template <int kVec>
constexpr int kGradientVectors = kVec == 1 ? 2 : 1;
constexpr int64_t kPositionBytes = 32;   // of a row that a planar tile reads at least: a sector
constexpr int64_t kPositionLine = 128;   // the same where rounds are needed anyway, and there are blocks enough
constexpr int64_t kPositionTile = 128;   // positions of a planar tile at most: their sums lie in shared memory
constexpr int64_t kMaxPositionRun = 32;  // tiles that a block of the backward takes one after the other, at most
constexpr int kPositionResident = 2;     // blocks on a multiprocessor: two leave 128 registers a thread

// Maps that a block reads side by side: in one round over the channels (of a single one the next is read ahead), in
// several, in the backward's sums and for its gradients.
template <int kVec, bool kInterleaved>
constexpr int kHeldMaps = !kInterleaved || kVec == 1 ? 1
                          : kVec == 4                ? 4
                                                     : 3;
constexpr int kRoundMaps = 2;
template <bool kInterleaved>
constexpr int kSumMaps = kInterleaved ? 2 : 1;
template <bool kKeys>
constexpr int kGradientMaps = kKeys ? 1 : 2;

// Also a kernel parameter.
struct PositionGrid {
  int64_t items;      // of blocks
  int64_t tiles;      // in all
  int64_t positions;  // of a sample
  int64_t samples;
  uint32_t in_sample;  // tiles of a sample (planar)
  int channels;
  int team_log2;  // lanes of a team
  bool is_held;   // whether a team reaches all channels at once
  int run;        // tiles of an item
};

inline int64_t positions_of_tile(const PositionGrid& g, bool interleaved, int64_t vec) {
  return (kPlanThreads >> g.team_log2) * (interleaved ? 1 : vec);
}

inline PositionGrid plan_positions(const Shape& s, int64_t vec, int64_t element_size) {
  PositionGrid g = {};
  static_assert(kPositionVectors<4> == kPositionVectors<8>, "one number for every vector");
  const int64_t vectors = vec == 1 ? kPositionVectors<1> : kPositionVectors<4>;
  int64_t lanes;
  if (s.interleaved) {
    lanes = power_of_two(ceil_quotient(s.channels, vec * vectors), 1, kPlanThreads);
  } else {
    const int64_t bytes = vec * element_size;
    const int64_t most = power_of_two(ceil_quotient(s.positions, vec), 1, kPlanThreads);  // that a row has room for
    const auto across = [&](int64_t wanted) { return wanted < most ? wanted : most; };
    const int64_t narrowest = across(kPositionBytes / bytes);
    // As few positions as it takes to have all channels at once, if that leaves rows that are worth reading.
    lanes = power_of_two(ceil_quotient(s.channels, vectors), 1, kPlanThreads);
    if (kPlanThreads / lanes < narrowest) {
      int64_t teams = across(kPositionLine / bytes);
      while (teams > narrowest && s.batch * ceil_quotient(s.positions, teams * vec) < kFewBlocks) teams /= 2;
      lanes = kPlanThreads / teams;
    }
    const int64_t widest = across(vec == 1 ? kPlanThreads : kPositionTile / vec);
    if (kPlanThreads / lanes > widest) lanes = kPlanThreads / widest;
  }
  g.team_log2 = log2_of(lanes);
  g.is_held = s.channels <= lanes * vectors * (s.interleaved ? vec : 1);
  g.channels = static_cast<int>(s.channels);
  g.positions = s.positions;
  g.samples = s.batch;
  const int64_t tile = positions_of_tile(g, s.interleaved, vec);
  const int64_t in_sample = ceil_quotient(s.positions, tile);
  g.in_sample = static_cast<uint32_t>(in_sample);
  // Positions of interleaved maps are numbered through the batch: a sample may have fewer than a tile.
  g.tiles = s.interleaved ? ceil_quotient(s.batch * s.positions, tile) : s.batch * in_sample;
  g.run = 1;
  g.items = g.tiles;
  return g;
}

// The same, where each block leaves a sum for every channel: fewer blocks where there are plenty.
inline PositionGrid plan_position_runs(const Shape& s, int64_t vec, int64_t element_size) {
  PositionGrid g = plan_positions(s, vec, element_size);
  while (g.run < kMaxPositionRun && ceil_quotient(g.tiles, int64_t{2} * g.run) >= kEnoughBlocks) g.run *= 2;
  g.items = ceil_quotient(g.tiles, int64_t{g.run});
  return g;
}

// Floats of shared memory in which teams of several warps bring their sums together: `in` numbers of each position from
// every warp, and the `out` numbers that are made of them.
inline int64_t team_floats(const PositionGrid& g, bool interleaved, int64_t vec, int64_t in, int64_t out) {
  const int64_t lanes = int64_t{1} << g.team_log2, across = kPlanThreads / lanes;
  const int64_t warps =
      interleaved ? ceil_quotient(lanes, int64_t{kPlanWarp}) : kPlanThreads / (across > kPlanWarp ? across : kPlanWarp);
  return warps == 1 ? 0 : positions_of_tile(g, interleaved, vec) * (warps * in + out);
}

// Rows of partial sums of the row's gradient, whatever the call's alignment, which a caller need not know.
inline int64_t position_parts(const Shape& s, int64_t element_size) {
  const int64_t aligned = plan_position_runs(s, 16 / element_size, element_size).items;
  const int64_t single = plan_position_runs(s, 1, element_size).items;
  return aligned > single ? aligned : single;
}

}  // namespace ela::cuda
