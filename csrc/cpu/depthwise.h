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
struct Columns {
  int64_t w;
  int count, left_begin, right_end;
};

template <class T>
inline Columns columns_at(int64_t w, int64_t width) {
  const int64_t left = width - w;
  const int count = static_cast<int>(left < kLanes<T> ? left : kLanes<T>);
  return {w, count, w == 0 ? 1 : 0, left > count ? count : count - 1};
}

template <class T>
inline Triple<T> plane_triple(const T* row, const Columns& c) {
  const T* at = row + c.w;
  return {load_lanes(at - 1, c.left_begin, c.count), load_n(at, c.count), load_lanes(at + 1, 0, c.right_end)};
}

// v = x convolved; returns the sum over the plane.
template <class T>
inline Acc<T> convolve_plane(const T* x, const Vec<T>* tap, T* v, int64_t height, int64_t width) {
  Vec<T> sum{};
  for (int64_t w = 0; w < width; w += kLanes<T>) {
    const Columns c = columns_at<T>(w, width);
    sum += convolve_line<T>(
        tap, height, [&](int64_t r) { return plane_triple(x + r * width, c); },
        [&](int64_t r, Vec<T> out) { store_n(v + r * width + w, out, c.count); });
  }
  return sum_lanes<T>(sum);
}

// dv comes in its own type, or in the accumulation type where it was just gathered. `residual` is added to dx where it
// is not null. dx may be null; x is read, and dtaps written, where the taps want a gradient.
template <bool kWantsTaps, class T, class D>
inline void convolve_plane_backward(const D* dv, const T* x, const Vec<T>* tap, Acc<T> offset, const T* residual, T* dx,
                                    Acc<T>* dtaps, int64_t height, int64_t width) {
  Vec<T> sums[kTaps] = {};
  for (int64_t w = 0; w < width; w += kLanes<T>) {
    const Columns c = columns_at<T>(w, width);
    convolve_line_backward<kWantsTaps, T>(
        tap, broadcast<T>(offset), height,
        [&](int64_t r) {
          const Triple<D> t = plane_triple(dv + r * width, c);
          return Triple<T>{t.before, t.center, t.after};
        },
        [&](int64_t r) { return load_n(x + r * width + w, c.count); },
        [&](int64_t r, Vec<T> out) {
          if (dx == nullptr) return;
          if (residual != nullptr) out += load_n(residual + r * width + w, c.count);
          store_n(dx + r * width + w, out, c.count);
        },
        sums);
  }
  if (!kWantsTaps) return;
  for (int i = 0; i < kTaps; ++i) dtaps[i] = sum_lanes<T>(sums[i]);
}

template <class T>
void depthwise_planar(const DepthwiseParams& p, int threads) {
  const ImageShape& s = p.shape;
  for_samples(s, s.channels, threads, [&](int64_t begin, int64_t end) {
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
  for_samples(s, blocks * strips, threads, [&](int64_t begin, int64_t end) {
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
  for_samples(s, 1, threads, [&](int64_t begin, int64_t end) {
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
