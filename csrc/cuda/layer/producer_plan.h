// How a depthwise convolution and its backward are cut into blocks of threads. As common/plan.h: plain C++ of sizes
// alone, whatever the addresses, so that partial sums can be allocated ahead; every number to tune stands here.
//
// A block takes one tile of maps after the other, through shared memory:
//   planar        some whole planes, or a band of rows of one plane; very wide maps are cut in columns as well. The
//                 planes or rows of a tile follow each other in memory, so they are read as one run of 16-byte vectors.
//   interleaved   a strip of channels of some rows and columns; a vector holds channels of one position.
// A thread walks down a column of a line (a plane, or a channel), so that each row is read once for the three that need
// it. All columns of a thread belong to one line, and their sums stay in its registers.
#pragma once

#include <algorithm>

#include "cuda/common/plan.h"

namespace ela::cuda {

constexpr int kForwardWalk = 16;                  // rows that a thread walks down, at most; two more are read
constexpr int kBackwardWalk = 8;                  // less, since a tile of three maps has to fit
constexpr int64_t kForwardTileBytes = 16 * 1024;  // of one map, interleaved
constexpr int64_t kBackwardTileBytes = 8 * 1024;
constexpr int64_t kLeastTileBytes = 2 * 1024;    // where there are few tiles for a large GPU
constexpr int64_t kStripBytes = 128;             // interleaved: what a tile takes of a position, at most
constexpr int64_t kFlatWidth = 1024;             // planar: wider maps are cut in columns and read by elements
constexpr int64_t kWideTileBytes = 36 * 1024;    // planar: all maps of a tile of rows wider than a block
constexpr int64_t kEnoughTiles = 1024;           // with more, a block of the backward takes several samples
constexpr int64_t kFilterChunk = 8 * kPlanWarp;  // of the gradients of query and key, that a warp takes at once
constexpr int64_t kMaxSide = int64_t{1} << 27;   // rows and columns are counted in 32 bits
constexpr int64_t kMaxFilterSize = int64_t{1} << 20;

// Where the tiles of a call lie; also a kernel parameter.
struct ProducerGrid {
  int64_t batch;
  int64_t items;  // blocks in all, at most kMaxItems
  int channels, height, width;
  int line_tiles, tiles_down, tiles_across;
  int lines, rows, cols;  // of a tile, at most
  int parts, walk;        // `parts` threads share a column of a tile, `walk` rows each
  int samples;            // that a block takes one after the other
  int strip_log2;         // interleaved: of `lines`
  bool interleaved;

  // Partial sums of a line: tiles of its map.
  int64_t groups() const { return int64_t{tiles_down} * tiles_across; }
  // Those of a line in all samples, where a block adds up those of its samples.
  int64_t sample_groups() const { return ceil_quotient(batch, samples); }
  // Elements of a tile, alone and with its neighbours.
  int64_t inner_elements() const { return int64_t{lines} * rows * cols; }
  int64_t outer_elements() const {
    return int64_t{lines} * (rows < height ? rows + 2 : height) * (cols < width ? cols + 2 : width);
  }
};

// The fewest pieces of `length` of at most `most` each, all but the last alike: how long these are.
inline int64_t even_piece(int64_t length, int64_t most) {
  return ceil_quotient(length, ceil_quotient(length, most < 1 ? 1 : most));
}

inline void cut_planar(ProducerGrid& g, int64_t vec, int64_t element_size, int64_t most_walk, int64_t inner_maps) {
  const int64_t height = g.height, width = g.width, channels = g.channels;
  int64_t lines = 1, rows = height, cols = width, walk = even_piece(height, most_walk);
  int64_t parts = ceil_quotient(height, walk);
  if (width * parts <= kPlanThreads) {
    lines = kPlanThreads / (width * parts);
    if (lines > channels) lines = channels;
    const auto blocks = [&] { return g.batch * ceil_quotient(channels, lines); };
    while (lines > 1 && lines * width * parts > 2 * kPlanWarp && blocks() < kFewBlocks) lines = ceil_quotient(lines, 2);
    // Whole vectors, so that a tile begins with one; the last tile not nearly empty.
    if (lines > vec) {
      lines -= lines % vec;
      lines = ceil_quotient(even_piece(channels, lines), vec) * vec;
    }
  } else if (width <= kFlatWidth) {
    parts = width < kPlanThreads ? kPlanThreads / width : 1;
    const int64_t fitting = (kWideTileBytes / (element_size * width) - 2) / (1 + inner_maps);
    rows = parts * most_walk;
    if (width > kPlanThreads && rows > fitting) rows = fitting < 1 ? 1 : fitting;
    rows = even_piece(height, rows);
    walk = ceil_quotient(rows, parts);
  } else {
    cols = kPlanThreads;
    parts = 1;
    rows = walk;
  }
  g.lines = static_cast<int>(lines < channels ? lines : channels);
  g.rows = static_cast<int>(rows);
  g.cols = static_cast<int>(cols);
  g.parts = static_cast<int>(parts);
  g.walk = static_cast<int>(walk);
}

inline void cut_interleaved(ProducerGrid& g, int64_t vec, int64_t element_size, int64_t most_walk, int64_t tile_bytes) {
  const int64_t widest = kStripBytes / element_size;
  int64_t strip = power_of_two(g.channels, 1, widest);
  // A last strip that is nearly empty wastes its threads.
  while (strip > 2 * vec && ceil_quotient(g.channels, strip) * strip * 3 > 4 * int64_t{g.channels}) strip /= 2;
  const int64_t strips = ceil_quotient(g.channels, strip);
  int64_t bytes = tile_bytes;
  while (true) {
    // Nearly square, and more rows than columns: neighbours of a tile are read twice, from the caches.
    const int64_t positions = bytes / (element_size * strip);
    int64_t side = 1;
    while (2 * side * side <= positions / 2) side *= 2;
    g.cols = static_cast<int>(even_piece(g.width, std::max<int64_t>(side, positions / g.height)));
    g.rows = static_cast<int>(even_piece(g.height, positions / g.cols));
    const int64_t blocks = g.batch * strips * ceil_quotient(g.height, g.rows) * ceil_quotient(g.width, g.cols);
    if (blocks >= kFewBlocks || bytes / 2 < kLeastTileBytes) break;
    bytes /= 2;
  }
  g.lines = static_cast<int>(strip);
  g.strip_log2 = log2_of(strip);
  // As many threads for a column as leave none without work, but no shorter walks than need be.
  const int64_t columns = strip * g.cols;
  const int64_t parts = std::max<int64_t>(ceil_quotient(g.rows, most_walk), kPlanThreads / columns);
  g.walk = static_cast<int>(ceil_quotient(g.rows, parts));
  g.parts = static_cast<int>(ceil_quotient(g.rows, g.walk));
}

// `inner_maps`: maps of a tile without neighbours in shared memory, beside the one with them.
inline ProducerGrid plan_producer(const ImageShape& s, int64_t element_size, bool backward) {
  ProducerGrid g = {};
  g.batch = s.batch;
  g.channels = static_cast<int>(s.channels);
  g.height = static_cast<int>(s.height);
  g.width = static_cast<int>(s.width);
  g.interleaved = s.interleaved;
  const int64_t walk = backward ? kBackwardWalk : kForwardWalk;
  if (s.interleaved) {
    cut_interleaved(g, 16 / element_size, element_size, walk, backward ? kBackwardTileBytes : kForwardTileBytes);
  } else {
    cut_planar(g, 16 / element_size, element_size, walk, backward ? 2 : 1);
  }
  g.line_tiles = static_cast<int>(ceil_quotient(s.channels, g.lines));
  g.tiles_down = static_cast<int>(ceil_quotient(s.height, g.rows));
  g.tiles_across = static_cast<int>(ceil_quotient(s.width, g.cols));
  const int64_t tiles = g.line_tiles * g.groups();
  g.samples = 1;
  if (backward) {
    const int64_t samples = s.batch * tiles / kEnoughTiles;
    g.samples = static_cast<int>(samples < 1 ? 1 : even_piece(s.batch, samples));
  }
  g.items = g.sample_groups() * tiles;
  return g;
}

// Partial sums of each sample and channel that the forward writes.
inline int64_t producer_groups(const ImageShape& s, int64_t element_size) {
  return plan_producer(s, element_size, false).groups();
}

// Partial sums of the backward: of the taps [parts, 9, C], then of the filters [2, size, chunks].
struct ProducerPartials {
  int64_t parts, chunks;
  int64_t taps(int64_t channels) const { return parts * 9 * channels; }
};

inline ProducerPartials producer_partials(const ProducerGrid& g) {
  return {g.sample_groups() * g.groups(), ceil_quotient(g.batch * g.channels, kFilterChunk)};
}

// Floats that hold them.
inline int64_t producer_workspace(const ImageShape& s, int64_t element_size, int64_t filter_size) {
  const ProducerPartials partials = producer_partials(plan_producer(s, element_size, true));
  return partials.taps(s.channels) + 2 * filter_size * partials.chunks;
}

}  // namespace ela::cuda
