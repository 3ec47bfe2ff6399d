// How the work of a call is cut into blocks of threads. Plain C++ of sizes alone: the same shape gets the same plan, so
// partial sums have a fixed order and a workspace can be asked for ahead. Every number to tune stands in this file.
//
// A block has kBlock threads as `across` x `along`:
//   planar        `across` threads share one row of contiguous elements and `along` rows lie in one block, so that
//                 small maps still fill it. A row is a head where its channels follow each other without gaps in every
//                 map, and a channel otherwise.
//   interleaved   `across` threads take a strip of channels, one vector each, and `along` positions.
// A thread takes `per_thread` vectors: every `across`-th of its row (planar), every `along`-th position (interleaved).
#pragma once

#include <cstdint>
#include <initializer_list>

#include "views.h"

namespace ela::cuda {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarp = 32;

// With fewer blocks than this a large GPU has idle multiprocessors: work is cut finer then, whatever it costs.
constexpr int64_t kFewBlocks = 400;
// With more than this, each block takes more, to save the recomputation of scores.
constexpr int64_t kEnoughBlocks = 4096;
constexpr int64_t kMaxRounds = 8;                // times that a thread's first vectors are followed by as many more
constexpr int64_t kScoreShare = 32;              // value elements that a block reads for each key element, at least
constexpr int64_t kPartialShare = 100;           // bytes of maps for each byte of partial sums (interleaved), at least
constexpr int64_t kPreferredShared = 24 * 1024;  // bytes of shared memory of a block: more would cost occupancy
constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxItems = (int64_t{1} << 32) - 1;  // so that a block divides 32-bit numbers to find its place

// Maps that a thread reads side by side, and vectors of each; together they are the reads in flight. More vectors of a
// map spare the dot products shuffles.
constexpr int kForwardMaps = 4;
constexpr int kDotsMaps = 2;
template <int kVec>
constexpr int kForwardUnroll = kVec == 1 ? 4 : 2;
template <int kVec>
constexpr int kDotsUnroll = kVec == 1 ? 8 : 4;

// Blocks that the compiler has to fit on a multiprocessor: three leave 80 registers a thread and keep 96 KB of reads in
// flight. Two where weights of each element, or addresses to write to, need more registers; no instance spills.
constexpr int kBlocksResident = 3;
constexpr int kBlocksResidentWide = 2;

// Where the blocks of a call lie; also a kernel parameter.
struct Grid {
  uint32_t outer, inner;  // blocks of a sample: row blocks x chunks (planar), chunks x strips (interleaved)
  int64_t items;          // blocks in all, at most kMaxItems
  int64_t length;         // vectors of a row (planar), positions (interleaved)
  int64_t rows;           // rows of a sample (planar), vectors of a position (interleaved)
  int channels, heads, head_dim;
  int row_channels;  // channels of a row (planar)
  int across_log2;
  int per_thread;
  bool interleaved;
};

inline int log2_of(int64_t power_of_two) {
  int log2 = 0;
  while ((int64_t{1} << log2) < power_of_two) ++log2;
  return log2;
}

inline int64_t ceil_quotient(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The smallest power of two that is not below `x`, between `low` and `high` (powers of two).
inline int64_t power_of_two(int64_t x, int64_t low, int64_t high) {
  int64_t power = low;
  while (power < x && power < high) power *= 2;
  return power;
}

// Lanes that share one dot product of two rows of `head_dim` elements: about four elements each.
inline int lanes_per_dot(int64_t head_dim) {
  return static_cast<int>(power_of_two(ceil_quotient(head_dim, 4), 1, kPlanWarp));
}

// Lanes whose neighbouring vectors are sure to belong to one head.
inline int64_t lanes_of_one_head(int64_t head_dim, int64_t vec) {
  if (head_dim % vec != 0) return 1;
  const int64_t vectors = head_dim / vec;
  const int64_t power = vectors & -vectors;
  return power < kPlanWarp ? power : kPlanWarp;
}

// Heads that `channels` neighbouring channels can belong to.
inline int64_t heads_touched(const Shape& s, int64_t channels) {
  const int64_t most = (channels + s.head_dim() - 2) / s.head_dim() + 1;
  return most < s.heads ? most : s.heads;
}

// How many vectors a thread takes, a power of two: `unroll` at first, fewer where that leaves multiprocessors idle
// (`least` where that is not to be undercut), more where there are plenty of blocks or fewer than `wanted` would be
// wasteful. `parts` are blocks that differ in more than the vectors they take, `steps` the vectors for one thread if it
// took them all.
struct Share {
  int64_t unroll, least, wanted;
};

inline int64_t choose_per_thread(int64_t parts, int64_t steps, const Share& share) {
  int64_t n = share.unroll;
  const auto blocks = [&](int64_t per_thread) { return parts * ceil_quotient(steps, per_thread); };
  while (n > share.least && n > 1 && blocks(n) < kFewBlocks) n /= 2;
  while (n < steps && n < share.unroll * kMaxRounds && blocks(2 * n) >= kEnoughBlocks) n *= 2;
  while (n < steps && n < share.wanted && blocks(2 * n) >= kFewBlocks) n *= 2;
  while (n < steps && n < share.least) n *= 2;
  return n;
}

inline void cut(Grid& g, const Shape& s, int64_t outer, int64_t inner) {
  g.items = s.batch * outer * inner;
  g.outer = static_cast<uint32_t>(outer);
  g.inner = static_cast<uint32_t>(inner);
}

// `scores`: whether each block computes the weights of its heads.
inline Grid plan_planar(const Shape& s, bool gapless, int64_t vec, int unroll, bool scores) {
  Grid g = {};
  g.interleaved = false;
  g.channels = static_cast<int>(s.channels);
  g.heads = static_cast<int>(s.heads);
  g.head_dim = static_cast<int>(s.head_dim());
  g.row_channels = gapless ? g.head_dim : 1;
  g.rows = s.channels / g.row_channels;
  g.length = ceil_quotient(s.positions * g.row_channels, vec);
  const int64_t across = power_of_two(ceil_quotient(g.length, unroll), kPlanWarp, kPlanThreads);
  const int64_t along = kPlanThreads / across;
  const int64_t row_blocks = ceil_quotient(g.rows, along);
  const int64_t steps = ceil_quotient(g.length, across);
  // A head in the block costs head_dim key elements a depth, and gives across * vec elements a vector of the thread.
  const int64_t wanted = scores ? ceil_quotient(kScoreShare * g.head_dim, across * vec) : 1;
  const int64_t per_thread = choose_per_thread(s.batch * row_blocks, steps, {unroll, 1, wanted});
  g.across_log2 = log2_of(across);
  g.per_thread = static_cast<int>(per_thread);
  cut(g, s, row_blocks, ceil_quotient(steps, per_thread));
  return g;
}

// `least_positions` of a block, 0 where its keys are to decide, and as many as are wanted where that leaves enough
// blocks. `shared_floats(across)`: how many floats of shared memory a depth costs in a block of strips that wide.
template <class SharedFloats>
inline Grid plan_interleaved(const Shape& s, int64_t vec, int unroll, int64_t depth, int64_t least_positions,
                             const SharedFloats& shared_floats, int64_t wanted_positions = 0) {
  Grid g = {};
  g.interleaved = true;
  g.channels = static_cast<int>(s.channels);
  g.heads = static_cast<int>(s.heads);
  g.head_dim = static_cast<int>(s.head_dim());
  g.row_channels = g.head_dim;
  g.rows = ceil_quotient(s.channels, vec);
  g.length = s.positions;
  int64_t across = power_of_two(g.rows, 4, kPlanWarp);
  // A last strip that is nearly empty wastes its threads: half the width wastes fewer.
  while (across > 8 &&
         ceil_quotient(g.rows, across / 2) * (across / 2) * 10 < ceil_quotient(g.rows, across) * across * 9)
    across /= 2;
  while (across > 4 && shared_floats(across) * depth * 4 > kPreferredShared) across /= 2;
  const int64_t along = kPlanThreads / across;
  const int64_t strips = ceil_quotient(g.rows, across);
  const int64_t steps = ceil_quotient(g.length, along);
  const int64_t strip = across * vec;
  const int64_t scored = strip < s.head_dim() ? s.head_dim() : strip;  // channels whose keys the block reads
  const int64_t for_scores = ceil_quotient(kScoreShare * scored, strip * along);
  const int64_t for_caller = ceil_quotient(wanted_positions, along);
  const int64_t wanted = for_caller > for_scores ? for_caller : for_scores;
  const Share share = {unroll, ceil_quotient(least_positions, along), least_positions == 0 ? wanted : 1};
  const int64_t per_thread = choose_per_thread(s.batch * strips, steps, share);
  g.across_log2 = log2_of(across);
  g.per_thread = static_cast<int>(per_thread);
  cut(g, s, ceil_quotient(steps, per_thread), strips);
  return g;
}

}  // namespace ela::cuda
