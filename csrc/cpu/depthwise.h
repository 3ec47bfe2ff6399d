// The producer of a layer: depthwise 3x3 convolution (padding 1, stride 1, no bias) and the mean over space in one read
// of x, and its backward in one read of dv and x.
//
// Least bytes: forward x read and v written; backward dv and x read and dx written. Rows that are read again stay in
// cache. Sums over space and batch are cut by the shape alone and added in a fixed order: the same call gives the same
// bits on any number of threads.
//
// Both forms of a map run through the same line of vectors: down a column of a plane, where the neighbours of a vector
// lie to its left and right, or along a row of interleaved channels, where they lie in the rows above and below.
// "Along" is the direction of the line, "across" the other.

constexpr int kTaps = 9;

// One vector of a line and its two neighbours across it; zeros beyond the edges.
template <class T>
struct Triple {
  Vec<T> before, center, after;
};

// taps[3 * along + across]. Calls store(i, v) for every place of the line; returns the sum of the centers.
template <class T, class Load, class Store>
inline Vec<T> convolve_line(const Vec<T>* tap, int64_t length, Load triple, Store store) {
  // What the places read so far give to the place before the present one, and to the present one.
  Vec<T> previous{}, here{}, sum{};
  for (int64_t i = 0; i < length; ++i) {
    const Triple<T> t = triple(i);
    sum += t.center;
    if (i > 0) store(i - 1, previous + tap[6] * t.before + tap[7] * t.center + tap[8] * t.after);
    previous = here + tap[3] * t.before + tap[4] * t.center + tap[5] * t.after;
    here = tap[0] * t.before + tap[1] * t.center + tap[2] * t.after;
  }
  store(length - 1, previous);
  return sum;
}

// From triples of dv and centers of x: dx, `offset` added, to store(i, dx), and <dv, shifted x> added to sums[tap].
template <bool kWantsTaps, class T, class Load, class Center, class Store>
inline void convolve_line_backward(const Vec<T>* tap, Vec<T> offset, int64_t length, Load triple, Center x, Store store,
                                   Vec<T>* sums) {
  Vec<T> previous{}, here = offset;
  Vec<T> x_previous{}, x_here{}, x_next = kWantsTaps ? x(0) : Vec<T>{};
  for (int64_t i = 0; i < length; ++i) {
    const Triple<T> t = triple(i);
    // A tap's output lies on the other side of its input: the neighbours change places.
    if (kWantsTaps) {
      x_previous = x_here;
      x_here = x_next;
      x_next = i + 1 < length ? x(i + 1) : Vec<T>{};
      sums[0] += x_previous * t.after, sums[1] += x_previous * t.center, sums[2] += x_previous * t.before;
      sums[3] += x_here * t.after, sums[4] += x_here * t.center, sums[5] += x_here * t.before;
      sums[6] += x_next * t.after, sums[7] += x_next * t.center, sums[8] += x_next * t.before;
    }
    if (i > 0) store(i - 1, previous + tap[0] * t.after + tap[1] * t.center + tap[2] * t.before);
    previous = here + tap[3] * t.after + tap[4] * t.center + tap[5] * t.before;
    here = offset + tap[6] * t.after + tap[7] * t.center + tap[8] * t.before;
  }
  store(length - 1, previous);
}

template <class T>
inline Vec<T> broadcast(Acc<T> x) {
  return Vec<T>{} + x;
}

template <class T>
inline Acc<T> load_one(const void* p, int64_t i) {
  return load_n(static_cast<const T*>(p) + i, 1)[0];
}

template <class T>
inline void store_one(void* p, int64_t i, Acc<T> x) {
  store_n(static_cast<T*>(p) + i, broadcast<T>(x), 1);
}

// A column of vectors of a plane: which lanes there are, and which of them have a neighbour to either side.
//
// Where parts of vectors are dear, whole ones are loaded instead in all rows but the first or last, since what lies
// beyond the lanes is still of this plane, and the other lanes are cleared; a part is stored together with what is
// there behind it. Measured with AVX2 at 2 GHz, in cache: a plane of 14 x 14 took 459 ns by parts and takes 279 so in
// float, 1118 and 480 in float16, whose parts are copies of a run-time length.
template <class T>
struct Columns {
  int64_t w;
  int count, left_begin, right_end;
  bool inside;                     // nothing to clear in any row
  int64_t whole_begin, whole_end;  // the rows in which whole vectors may be loaded and stored
  Bits<T> before, center, after;   // the lanes to keep of them
};

template <class T>
inline Columns<T> columns_at(int64_t w, int64_t height, int64_t width) {
  const int64_t left = width - w;
  const int count = static_cast<int>(left < kLanes<T> ? left : kLanes<T>);
  const int left_begin = w == 0 ? 1 : 0, right_end = left > count ? count : count - 1;
  // From the first row on from which the vector to the right would end behind the plane. (A division takes longer.)
  int64_t whole_end = height + 1;
  for (int64_t covered = 0; covered < w + 1 + kLanes<T>; covered += width) --whole_end;
  return {w,
          count,
          left_begin,
          right_end,
          left_begin == 0 && right_end == kLanes<T>,
          kPartsAreCheap ? height : left_begin,
          whole_end,
          lane_bits<T>(left_begin, count),
          lane_bits<T>(0, count),
          lane_bits<T>(0, right_end)};
}

template <class T>
inline bool is_whole(const Columns<T>& c, int64_t r) {
  return r >= c.whole_begin && r < c.whole_end;
}

template <bool kInside, class T, class D>
inline Triple<D> plane_triple(const D* plane, int64_t r, int64_t width, const Columns<T>& c) {
  const D* at = plane + r * width + c.w;
  if (kInside) return {load_n(at - 1, kLanes<T>), load_n(at, kLanes<T>), load_n(at + 1, kLanes<T>)};
  if (!is_whole(c, r)) {
    return {load_lanes(at - 1, c.left_begin, c.count), load_n(at, c.count), load_lanes(at + 1, 0, c.right_end)};
  }
  return {keep<T>(load_n(at - 1, kLanes<T>), c.before), keep<T>(load_n(at, kLanes<T>), c.center),
          keep<T>(load_n(at + 1, kLanes<T>), c.after)};
}

template <bool kInside, class T>
inline Vec<T> plane_center(const T* plane, int64_t r, int64_t width, const Columns<T>& c) {
  const T* at = plane + r * width + c.w;
  if (kInside) return load_n(at, kLanes<T>);
  return is_whole(c, r) ? keep<T>(load_n(at, kLanes<T>), c.center) : load_n(at, c.count);
}

// What lies behind the part is of a column that is stored already, or of the next row of this one, to be stored next.
template <bool kInside, class T>
inline void store_plane(T* plane, int64_t r, int64_t width, const Columns<T>& c, Vec<T> x) {
  T* at = plane + r * width + c.w;
  if (kInside || c.count == kLanes<T>) {
    store_n(at, x, kLanes<T>);
  } else if (is_whole(c, r)) {
    store_n(at, merge<T>(x, load_n(at, kLanes<T>), c.center), kLanes<T>);
  } else {
    store_n(at, x, c.count);
  }
}

template <bool kInside, class T>
inline Vec<T> convolve_column(const T* x, const Vec<T>* tap, T* v, int64_t height, int64_t width, const Columns<T>& c) {
  return convolve_line<T>(
      tap, height, [&](int64_t r) { return plane_triple<kInside>(x, r, width, c); },
      [&](int64_t r, Vec<T> out) { store_plane<kInside>(v, r, width, c, out); });
}

// v = x convolved; returns the sum over the plane.
template <class T>
inline Acc<T> convolve_plane(const T* x, const Vec<T>* tap, T* v, int64_t height, int64_t width) {
  Vec<T> sum{};
  for (int64_t w = 0; w < width; w += kLanes<T>) {
    const Columns<T> c = columns_at<T>(w, height, width);
    sum += c.inside ? convolve_column<true>(x, tap, v, height, width, c)
                    : convolve_column<false>(x, tap, v, height, width, c);
  }
  return sum_lanes<T>(sum);
}

template <bool kInside, bool kWantsTaps, class T, class D>
inline void convolve_column_backward(const D* dv, const T* x, const Vec<T>* tap, Vec<T> offset, const T* residual,
                                     T* dx, Vec<T>* sums, int64_t height, int64_t width, const Columns<T>& c) {
  convolve_line_backward<kWantsTaps, T>(
      tap, offset, height,
      [&](int64_t r) {
        const Triple<D> t = plane_triple<kInside>(dv, r, width, c);
        return Triple<T>{t.before, t.center, t.after};
      },
      [&](int64_t r) { return plane_center<kInside>(x, r, width, c); },
      [&](int64_t r, Vec<T> out) {
        if (dx == nullptr) return;
        if (residual != nullptr) out += plane_center<kInside>(residual, r, width, c);
        store_plane<kInside>(dx, r, width, c, out);
      },
      sums);
}

// dv comes in its own type, or in the accumulation type where it was just gathered. `residual` is added to dx where it
// is not null. dx may be null; x is read, and dtaps written, where the taps want a gradient.
template <bool kWantsTaps, class T, class D>
inline void convolve_plane_backward(const D* dv, const T* x, const Vec<T>* tap, Acc<T> offset, const T* residual, T* dx,
                                    Acc<T>* dtaps, int64_t height, int64_t width) {
  Vec<T> sums[kTaps] = {};
  const Vec<T> offsets = broadcast<T>(offset);
  for (int64_t w = 0; w < width; w += kLanes<T>) {
    const Columns<T> c = columns_at<T>(w, height, width);
    if (c.inside) {
      convolve_column_backward<true, kWantsTaps>(dv, x, tap, offsets, residual, dx, sums, height, width, c);
    } else {
      convolve_column_backward<false, kWantsTaps>(dv, x, tap, offsets, residual, dx, sums, height, width, c);
    }
  }
  if (!kWantsTaps) return;
  for (int i = 0; i < kTaps; ++i) dtaps[i] = sum_lanes<T>(sums[i]);
}

template <class T>
void depthwise_planar(const DepthwiseParams& p, int threads) {
  const ImageShape& s = p.shape;
  for_part(s, s.channels, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / s.channels, c = item % s.channels;
      Vec<T> tap[kTaps];
      for (int i = 0; i < kTaps; ++i) tap[i] = broadcast<T>(load_one<T>(p.taps, c * kTaps + i));
      const Acc<T> sum = convolve_plane(planar_at<T>(p.x, b, c, 0), tap, const_cast<T*>(planar_at<T>(p.v, b, c, 0)),
                                        s.height, s.width);
      store_one<T>(p.mean, item, sum / static_cast<Acc<T>>(s.positions()));
    }
  });
}

// Interleaved maps: some rows and a strip of channels at a time, so that the three rows of a line stay in cache.
constexpr int64_t kRowsAtOnce = 16;
constexpr int64_t kStripChannels = 64;

struct ImageItem {
  int64_t b, block, first_row, last_row, c, count;
};

// Calls body(item) for every part of the image.
template <int64_t kStrip, class Body>
inline void for_strips(const ImageShape& s, int threads, Body body) {
  const int64_t blocks = ceil_div(s.height, kRowsAtOnce), strips = ceil_div(s.channels, kStrip);
  for_part(s, blocks * strips, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      ImageItem at;
      at.b = item / (blocks * strips);
      at.block = at.b * blocks + item / strips % blocks;
      at.first_row = item / strips % blocks * kRowsAtOnce;
      at.last_row = at.first_row + kRowsAtOnce < s.height ? at.first_row + kRowsAtOnce : s.height;
      at.c = item % strips * kStrip;
      at.count = s.channels - at.c < kStrip ? s.channels - at.c : kStrip;
      body(at);
    }
  });
}

// [C, 9] as [9, C], the taps of a row along the line first: how interleaved maps read them.
template <class T>
inline void prepare_taps(const ImageShape& s, const void* taps, Acc<T>* transposed) {
  for (int along = 0; along < 3; ++along) {
    for (int across = 0; across < 3; ++across) {
      Acc<T>* row = transposed + (3 * along + across) * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) row[c] = load_one<T>(taps, c * kTaps + 3 * across + along);
    }
  }
}

// The three rows of an image that a line needs; null beyond the edges. D is the type in memory.
template <class T, class D = T>
struct Rows {
  const D* row[3];
  int64_t step;
  int lanes;
  // `first` is where row r - 1 would be.
  Rows(const ImageShape& s, int64_t r, const D* first, int64_t row_step, int64_t position_step, int n)
      : step(position_step), lanes(n) {
    for (int a = 0; a < 3; ++a) {
      const bool inside = r + a - 1 >= 0 && r + a - 1 < s.height;
      row[a] = inside ? first + a * row_step : nullptr;
    }
  }
  Rows(const ImageShape& s, const MapView& map, int64_t b, int64_t r, int64_t c, int n)
      : Rows(s, r, interleaved_at<D>(map, b, (r - 1) * s.width, c), s.width * map.inner, map.inner, n) {}
  Vec<T> load(int a, int64_t w) const { return row[a] == nullptr ? Vec<T>{} : load_n(row[a] + w * step, lanes); }
  Triple<T> operator()(int64_t w) const { return {load(0, w), load(1, w), load(2, w)}; }
};

template <class T>
void depthwise_interleaved(const DepthwiseParams& p, int threads) {
  using A = Acc<T>;
  const ImageShape& s = p.shape;
  const A* taps = static_cast<const A*>(p.rows);
  A* sums = static_cast<A*>(p.workspace);  // [B, blocks of rows, C]
  for_strips<kStripChannels>(s, threads, [&](const ImageItem& at) {
    A* sum = sums + at.block * s.channels + at.c;
    for (int64_t i = 0; i < at.count; ++i) sum[i] = 0;
    for (int64_t r = at.first_row; r < at.last_row; ++r) {
      for_vectors<T>(at.count, [&](int64_t i, int n) {
        Vec<T> tap[kTaps];
        for (int k = 0; k < kTaps; ++k) tap[k] = load_n(taps + k * s.channels + at.c + i, n);
        T* v = const_cast<T*>(interleaved_at<T>(p.v, at.b, r * s.width, at.c + i));
        const Vec<T> centers = convolve_line<T>(tap, s.width, Rows<T>(s, p.x, at.b, r, at.c + i, n),
                                                [&](int64_t w, Vec<T> out) { store_n(v + w * p.v.inner, out, n); });
        store_n(sum + i, load_n(sum + i, n) + centers, n);
      });
    }
  });
  const int64_t blocks = ceil_div(s.height, kRowsAtOnce);
  for_part(s, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for_vectors<T>(s.channels, [&](int64_t c, int n) {
        Vec<T> sum{};
        for (int64_t k = 0; k < blocks; ++k) sum += load_n(sums + (b * blocks + k) * s.channels + c, n);
        store_n(static_cast<T*>(p.mean) + b * s.channels + c, sum / static_cast<A>(s.positions()), n);
      });
    }
  });
}

template <class T>
void depthwise_kernel(const DepthwiseParams& p, int threads) {
  p.shape.interleaved ? depthwise_interleaved<T>(p, threads) : depthwise_planar<T>(p, threads);
}

// Accumulation elements.
inline int64_t depthwise_workspace(const ImageShape& s) {
  return s.interleaved ? s.batch * ceil_div(s.height, kRowsAtOnce) * s.channels : 0;
}
