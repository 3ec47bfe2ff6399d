// Tiles of feature maps in shared memory, and the walk down a column of one: what the convolution and its backward
// share. The device's side of producer_plan.h.
//
// A tile is read as it lies in memory, edges and all that is beyond them left out, so that a planar one is a single run
// of 16-byte vectors. A thread that walks down the first or last column of a map reads one zero again and again instead
// of a neighbour.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/common/parameter.cuh"
#include "cuda/layer/producer_plan.h"

namespace ela::cuda {

static_assert(kBlock == kPlanThreads && kWarp == kPlanWarp, "producer_plan.h is written for these blocks");

constexpr int kTaps = 9;
constexpr int kZeroBytes = 16;  // ahead of a tile with neighbours: its element at -1 is zero

// Of the taps of a tile's lines, as float32.
__host__ __device__ constexpr int taps_bytes(int lines) { return ceil_div(4 * kTaps * lines, 16) * 16; }

// Of a tile: a run of elements may begin within a vector and end within one.
template <class T>
int64_t tile_bytes(int64_t elements) {
  return (ceil_div<int64_t>(elements, kFullVector<T>) + 1) * 16;
}

// Division of numbers below 2^16 by one of them, for many numbers.
class Divider {
 public:
  __device__ explicit Divider(int divisor) : factor_(0xffffffffu / static_cast<unsigned>(divisor)) {}
  __device__ int operator()(int x) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<unsigned>(x) + 1) * factor_) >> 32);
  }

 private:
  unsigned factor_;
};

// A piece of a map as it lies in shared memory: the lines of a tile, `rows` from `top` and `cols` from `left`.
struct Box {
  int top, left, rows, cols;
};

struct Tile {
  int64_t first_sample;
  int samples;
  int64_t groups;  // tiles of a line
  int group;       // which of them
  int first_line, lines;
  Box inner, outer;  // the tile itself; and with neighbours, where the map has them
};

__device__ inline Tile tile_of(const ProducerGrid& g, unsigned item) {
  const unsigned groups = static_cast<unsigned>(g.tiles_down) * g.tiles_across;
  unsigned line_tile, group, rest;
  // What lies close together in memory is worked on at the same time.
  if (g.interleaved) {
    rest = item / g.line_tiles;
    line_tile = item - rest * g.line_tiles;
    item = rest;
    rest = item / groups;
    group = item - rest * groups;
  } else {
    rest = item / groups;
    group = item - rest * groups;
    item = rest;
    rest = item / g.line_tiles;
    line_tile = item - rest * g.line_tiles;
  }
  Tile t;
  t.first_sample = int64_t{rest} * g.samples;
  t.samples = static_cast<int>(smaller<int64_t>(g.samples, g.batch - t.first_sample));
  t.groups = groups;
  t.group = static_cast<int>(group);
  t.first_line = static_cast<int>(line_tile) * g.lines;
  t.lines = smaller(g.lines, g.channels - t.first_line);
  const int down = static_cast<int>(group) / g.tiles_across;
  const int across = static_cast<int>(group) - down * g.tiles_across;
  const int top = down * g.rows, left = across * g.cols;
  t.inner = {top, left, smaller(g.rows, g.height - top), smaller(g.cols, g.width - left)};
  const int outer_top = larger(top - 1, 0), outer_left = larger(left - 1, 0);
  t.outer = {outer_top, outer_left, smaller(top + t.inner.rows + 1, g.height) - outer_top,
             smaller(left + t.inner.cols + 1, g.width) - outer_left};
  return t;
}

// Steps of a box in shared memory, in elements.
struct Steps {
  int line, row, col;
};

__device__ inline Steps steps_of(const ProducerGrid& g, const Box& box) {
  if (g.interleaved) return {1, box.cols << g.strip_log2, 1 << g.strip_log2};
  return {box.rows * box.cols, box.cols, 1};
}

// Of a planar box that is one run of elements: the first of them, in the sample.
__device__ inline int64_t run_start(const ProducerGrid& g, const Tile& t, const Box& box) {
  return (int64_t{t.first_line} * g.height + box.top) * g.width;
}

// How far the first element of a box lies behind the place in shared memory that a vector begins at.
template <int kVec>
__device__ inline int phase_of(const ProducerGrid& g, const Tile& t, const Box& box, int64_t sample, int64_t batch) {
  if (kVec == 1 || g.interleaved) return 0;
  return static_cast<int>(static_cast<unsigned>(sample * batch + run_start(g, t, box)) % kVec);
}

// Calls each(address in the map, place in shared memory) for the vectors of a box, and single(...) for the elements of
// it that fill none.
template <int kVec, class Each, class Single>
__device__ inline void for_box(const ProducerGrid& g, const Tile& t, const Box& box, const MapView& map, int64_t sample,
                               const Each& each, const Single& single) {
  const int64_t start = sample * map.batch;
  if (g.interleaved) {
    // A thread's vectors all hold the same channels.
    const int vectors_log2 = g.strip_log2 - (kVec == 8 ? 3 : kVec == 4 ? 2 : 0);
    const int channel = (threadIdx.x & ((1 << vectors_log2) - 1)) * kVec;
    if (channel >= t.lines) return;
    const Divider by_cols(box.cols);
    const int64_t corner = start + (int64_t{box.top} * g.width + box.left) * map.inner + t.first_line + channel;
    // Vectors are only read where the steps within a tile fit 32 bits.
    using Step = std::conditional_t<kVec == 1, int64_t, int>;
    const Step col_step = static_cast<Step>(map.inner), row_step = static_cast<Step>(map.inner * g.width);
    const int count = box.rows * box.cols;
#pragma unroll 2
    for (int i = threadIdx.x >> vectors_log2; i < count; i += kBlock >> vectors_log2) {
      const int row = by_cols(i);
      each(corner + (row * row_step + (i - row * box.cols) * col_step), (i << g.strip_log2) + channel);
    }
  } else if constexpr (kVec == 1) {
    const Divider by_cols(box.cols), by_rows(box.rows);
    const int count = t.lines * box.rows * box.cols;
    for (int i = threadIdx.x; i < count; i += kBlock) {
      const int row_of_all = by_cols(i);
      const int line = by_rows(row_of_all);
      const int row = row_of_all - line * box.rows;
      const int col = i - row_of_all * box.cols;
      const int64_t at = int64_t{box.top + row} * g.width + (box.left + col);
      each(start + int64_t{t.first_line + line} * map.inner + at, i);
    }
  } else {
    const int64_t first = start + run_start(g, t, box);
    const int phase = phase_of<kVec>(g, t, box, sample, map.batch);
    const int count = t.lines * box.rows * box.cols;
    const int head = smaller(-phase & (kVec - 1), count);
    const int vectors = static_cast<int>(static_cast<unsigned>(count - head) / kVec);
    const int tail = count - head - vectors * kVec;
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors; i += kBlock) {
      each(first + head + i * kVec, phase + head + i * kVec);
    }
    if (static_cast<int>(threadIdx.x) < head) single(first + threadIdx.x, phase + threadIdx.x);
    if (static_cast<int>(threadIdx.x) < tail) {
      const int i = count - tail + threadIdx.x;
      single(first + i, phase + i);
    }
  }
}

// 16 bytes from global to shared memory, without a register in between where the processor can: after wait_for_copies()
// and a barrier they are there.
__device__ inline void copy_vector(void* to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  *static_cast<uint4*>(to) = __ldg(static_cast<const uint4*>(from));
#endif
}

__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

template <class T, int kVec>
__device__ inline void load_box(const ProducerGrid& g, const Tile& t, const Box& box, const MapView& map,
                                int64_t sample, T* tile) {
  const T* data = static_cast<const T*>(map.data);
  const auto single = [&](int64_t from, int to) { tile[to] = data[from]; };
  const auto each = [&](int64_t from, int to) {
    if constexpr (kVec == 1) {
      single(from, to);
    } else {
      copy_vector(tile + to, data + from);
    }
  };
  for_box<kVec>(g, t, box, map, sample, each, single);
}

template <class T, int kVec>
__device__ inline void store_box(const ProducerGrid& g, const Tile& t, const Box& box, const MapView& map,
                                 int64_t sample, const T* tile) {
  T* data = static_cast<T*>(map.data);
  const auto single = [&](int64_t to, int from) { data[to] = tile[from]; };
  const auto each = [&](int64_t to, int from) {
    if constexpr (kVec == 1) {
      single(to, from);
    } else {
      *reinterpret_cast<uint4*>(data + to) = *reinterpret_cast<const uint4*>(tile + from);
    }
  };
  for_box<kVec>(g, t, box, map, sample, each, single);
}

// The taps of a tile's lines as float32, in the order of the filters.
__device__ inline void load_taps(const Tile& t, const Parameter& wv, float* taps) {
  const int64_t first = int64_t{t.first_line} * kTaps;
#pragma unroll 2
  for (int i = threadIdx.x; i < t.lines * kTaps; i += kBlock) taps[i] = load_parameter(wv, first + i);
}

// The columns that a thread walks down, one after the other: all of one line.
struct Column {
  int line;        // of the tile
  int col;         // of the map
  int begin, end;  // rows of the map
};

// Calls each(column) for the thread's columns. A tile of several planes has no more columns than threads.
template <class Each>
__device__ inline void for_columns(const ProducerGrid& g, const Tile& t, const Each& each) {
  const Divider by_cols(t.inner.cols), by_parts(g.parts);
  const int lines_log2 = g.interleaved ? g.strip_log2 : 0;
  const int count = (g.interleaved ? g.lines : t.lines) * g.parts * t.inner.cols;
  for (int i = threadIdx.x; i < count; i += kBlock) {
    const int rest = i >> lines_log2;
    const int lines_and_parts = by_cols(rest);
    const int above = by_parts(lines_and_parts);
    const int part = lines_and_parts - above * g.parts;
    Column c;
    c.line = g.interleaved ? i & ((1 << lines_log2) - 1) : above;
    c.col = t.inner.left + rest - lines_and_parts * t.inner.cols;
    const int end = t.inner.top + t.inner.rows;
    c.begin = t.inner.top + part * g.walk;
    c.end = smaller(c.begin + g.walk, end);
    if (c.line < t.lines && c.begin < c.end) each(c);
  }
}

// Three neighbours in a row of a tile.
struct Neighbours {
  float left, center, right;
};

// Walks down the rows of a tile with neighbours, from the row above a column's first. The element at -1 is zero.
template <class T>
class NeighboursWalk {
 public:
  __device__ NeighboursWalk(const ProducerGrid& g, const Tile& t, const Column& c, int phase, const T* tile) {
    const Steps s = steps_of(g, t.outer);
    const int at = phase + c.line * s.line + (c.begin - 1 - t.outer.top) * s.row + (c.col - t.outer.left) * s.col;
    const bool has_left = c.col > 0, has_right = c.col < g.width - 1;
    center_ = tile + at;
    left_ = tile + (has_left ? at - s.col : -1);
    right_ = tile + (has_right ? at + s.col : -1);
    step_ = s.row;
    left_step_ = has_left ? s.row : 0;
    right_step_ = has_right ? s.row : 0;
  }
  // The present row, unless the map has none there; then on to the next one.
  __device__ Neighbours next(bool exists = true) {
    Neighbours n = {0, 0, 0};
    if (exists) n = {to_float(*left_), to_float(*center_), to_float(*right_)};
    left_ += left_step_, center_ += step_, right_ += right_step_;
    return n;
  }

 private:
  const T *left_, *center_, *right_;
  int left_step_, step_, right_step_;
};

// Where the elements of a column lie in a tile without neighbours: the first, and the step to the next.
struct ColumnPlace {
  int first, step;
};

__device__ inline ColumnPlace column_place(const ProducerGrid& g, const Tile& t, const Column& c, int phase) {
  const Steps s = steps_of(g, t.inner);
  return {phase + c.line * s.line + (c.begin - t.inner.top) * s.row + (c.col - t.inner.left) * s.col, s.row};
}

// The sums of the threads, one array of kBlock for each of `kinds`, added up by line in a fixed order; calls
// write(kind, line, sum) for each line of the tile.
template <class Write>
__device__ inline void sum_lines(const ProducerGrid& g, const Tile& t, int kinds, const float* sums,
                                 const Write& write) {
  const int columns = g.parts * t.inner.cols;
  const int of_line = g.interleaved ? kBlock >> g.strip_log2 : smaller(t.lines > 1 ? columns : kBlock, kBlock);
  const int line_step = g.interleaved ? 1 : of_line;
  const int step = g.interleaved ? g.lines : 1;
  int lanes = 1;
  while (lanes < kWarp && lanes < of_line) lanes *= 2;
  const int team = threadIdx.x / lanes, lane = threadIdx.x & (lanes - 1);
  const int teams = kBlock / lanes;
  const Divider by_lines(t.lines);
  // Every lane of a warp takes part in its shuffles.
  for (int first = 0; first < kinds * t.lines; first += teams) {
    const int item = smaller(first + team, kinds * t.lines - 1);
    const int kind = by_lines(item);
    const int line = item - kind * t.lines;
    float sum = 0;
    for (int i = lane; i < of_line; i += lanes) sum += sums[kind * kBlock + line * line_step + i * step];
    sum = sum_lanes(sum, lanes);
    if (lane == 0 && first + team < kinds * t.lines) write(kind, line, sum);
  }
}

}  // namespace ela::cuda
