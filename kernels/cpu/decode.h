// One token of several sequences through all blocks of the generator, in one parallel region (see crew.h).
//
// Per block five phases, each ending where all threads of a part of the rows meet:
//   qkv      normalised and modulated rows x Wqkv^T
//   attend   per row and key head, see attend.h
//   out      x <- x + gate * (attended Wout^T)
//   gate_up  silu(gate) * up, a gate's row of W meeting its up's row
//   down     x <- x + gate * (that Wdown^T)
// and one for the last norm. The norms are not phases: every thread normalises the part's rows for itself
// when it takes its first item, which for a few rows costs less than meeting once more.
//
// Parts. Few rows are one part: all threads work on it, and each weight is read once, which is what takes the
// time. Many rows are cut into parts of 32 to some 64 that go through all blocks each by itself. With as many
// parts as threads nobody waits for anybody and no row is normalised twice, and the activations of a part
// stay in L2, which those of 200 rows do not. Weights are read once a part: 32 rows take long enough to hide
// that. A thread that is through with its parts helps with the others.
//
// Precision: the residual stream, norms, modulation, rotary, softmax and all sums are float32, whatever the
// weights are. Inputs of products are bfloat16 beside bfloat16 weights where the CPU multiplies pairs of it,
// else float32. The cache is as wide as the weights (int8: float32).
//
// Cost: depth * (2 width^2 + 2 kv_heads head_dim width + 3 hidden width) weights read once a part, and the
// cache.
#pragma once

// silu(g) * u; exp_of takes no more than 88
IBQ_INLINE F gated(F g, F u) {
  const F limit = set1(88.0f), e = -g;
  return g / (exp_of(e > limit ? limit : e) + 1.0f) * u;
}

// How rows and threads are divided into parts.
struct Parts {
  static constexpr int64_t kLeast = 32, kMost = 64;  // rows of a part where there are several

  Parts(int64_t rows, int threads) : rows_(rows), threads_(threads) {
    const int64_t most = rows / kLeast, least = (rows + kMost * threads - 1) / (kMost * threads);
    count = (int)(most < 1 ? 1 : most <= threads ? most : least * threads);
  }
  // First row of a part, whole tiles of the products.
  int64_t begin(int part) const {
    const int64_t tiles = (rows_ + kMaxRows - 1) / kMaxRows;
    return min_of(tiles * part / count * kMaxRows, rows_);
  }
  int64_t rows(int part) const { return begin(part + 1) - begin(part); }
  int64_t most_rows() const {
    int64_t most = 0;
    for (int part = 0; part < count; ++part) most = rows(part) > most ? rows(part) : most;
    return most;
  }
  // The part that a thread begins with, and how many threads begin with a part.
  int of(int thread) const { return count * thread / threads_; }
  int threads(int part) const {
    const auto first = [&](int q) { return (q * threads_ + count - 1) / count; };
    const int here = first(part + 1) - first(part);
    return here < 1 ? 1 : here;
  }

  int count;

 private:
  int64_t rows_;
  int threads_;
};

template <WeightType W>
class StepKernel {
  typedef typename Activations<W>::Element Element;

  // A thread's place at a part: rows [first, last) of those that take part, and memory of its own.
  struct Seat {
    Crew& crew;
    int me;
    int64_t first, last;
    Element* prepared;  // [last - first][stride(width)]
    float* columns;     // [2][kBlockRows][kItemRows]
    float* scores;
  };

 public:
  static bool run(const GeneratorStep& p, const Parallel& parallel) {
    int64_t live = 0;
    for (int64_t r = 0; r < p.rows; ++r) live += p.positions[r] >= 0;
    const int threads = parallel.threads > 0 ? parallel.threads : 1;
    StepKernel k(p, Parts(live, threads));
    return k.run(parallel, live, threads);
  }

 private:
  StepKernel(const GeneratorStep& p, const Parts& parts)
      : p_(p),
        attention_(p),
        parts_(parts),
        width_(p.heads * p.head_dim),
        qkv_width_((p.heads + 2 * p.kv_heads) * p.head_dim) {}

  bool run(const Parallel& parallel, int64_t m, int threads) {
    const int64_t own = parts_.most_rows() * Activations<W>::stride(width_);
    const int64_t each = Crew::counters_for(threads, (int)(5 * p_.depth + 1));
    Workspace workspace;
    Element* prepared;
    float *columns, *scores;
    int64_t* counters;
    workspace.add(&live_, m);
    workspace.add(&stream_, m * width_);
    workspace.add(&qkv_, m * qkv_width_);
    workspace.add(&attended_, m * Activations<W>::stride(width_));
    workspace.add(&expanded_, m * Activations<W>::stride(p_.hidden));
    workspace.add(&prepared, threads * own);
    workspace.add(&columns, threads * 2 * kBlockRows * kItemRows);
    workspace.add(&scores, threads * attention_.scratch());
    workspace.add(&counters, parts_.count * each);
    if (!workspace.allocate()) return false;
    start();
    if (m == 0) return true;
    memset(counters, 0, sizeof(int64_t) * (size_t)(parts_.count * each));
    run_tasks(parallel, threads, [&](int me) {
      for (int i = 0; i < parts_.count; ++i) {
        const int part = (parts_.of(me) + i) % parts_.count;
        Crew crew(parts_.threads(part), counters + part * each);
        work({crew, me % crew.threads(), parts_.begin(part), parts_.begin(part + 1), prepared + me * own,
              columns + me * 2 * kBlockRows * kItemRows, scores + me * attention_.scratch()});
      }
    });
    return true;
  }

  // Which rows take part, their inputs, and zeros for the others.
  void start() {
    int64_t m = 0;
    for (int64_t r = 0; r < p_.rows; ++r) {
      if (p_.positions[r] < 0) {
        memset(p_.out + r * width_, 0, sizeof(float) * (size_t)width_);
        continue;
      }
      memcpy(stream_ + m * width_, p_.x + r * width_, sizeof(float) * (size_t)width_);
      Activations<W>::finish(attended_ + m * Activations<W>::stride(width_), width_);
      Activations<W>::finish(expanded_ + m * Activations<W>::stride(p_.hidden), p_.hidden);
      live_[m++] = r;
    }
  }

  void work(const Seat& s) {
    const auto nothing = [] {};
    int phase = 0;
    for (int64_t layer = 0; layer < p_.depth; ++layer) {
      const Matrix* w = p_.weights + 4 * layer;
      const int64_t part = 6 * layer;
      product(
          s, phase++, w[0], [&] { prepare(s, part); },
          [&](int64_t first, int64_t last) { project(s, w[0], first, last); }, nothing);
      s.crew.run(
          phase++, s.me, (s.last - s.first) * p_.kv_heads, [&] { prefetch(s, w[1]); },
          [&](int64_t i) { attend(s, layer, s.first + i / p_.kv_heads, i % p_.kv_heads); }, nothing);
      product(
          s, phase++, w[1], nothing,
          [&](int64_t first, int64_t last) { add_gated(s, w[1], attended_, part + 2, first, last); },
          [&] { prefetch(s, w[2]); });
      gate_up(s, phase++, w[2], w[3], part);
      product(
          s, phase++, w[3], nothing,
          [&](int64_t first, int64_t last) { add_gated(s, w[3], expanded_, part + 5, first, last); },
          [&] {
            if (layer + 1 < p_.depth) prefetch(s, w[4]);
          });
    }
    s.crew.run(
        phase, s.me, s.last - s.first, nothing,
        [&](int64_t i) {
          float* const out = p_.out + live_[s.first + i] * width_;
          normalise(s.first + i, 6 * p_.depth,
                    [&](int64_t j, F v, int64_t live) { store_narrow<DType::kFloat32>(out, j, v, live); });
        },
        nothing);
  }

  int64_t step_of(const Seat& s, const Matrix& w) const {
    return item_rows(w.n, w.c * Weights<W>::kBytes, s.crew.threads());
  }

  // A phase of products: `rows(first, last)` for every item of W's rows.
  template <typename Before, typename Rows, typename Idle>
  void product(const Seat& s, int phase, const Matrix& w, const Before& before, const Rows& rows,
               const Idle& idle) {
    const int64_t step = step_of(s, w);
    s.crew.run(
        phase, s.me, (w.n + step - 1) / step, before,
        [&](int64_t i) { rows(i * step, min_of((i + 1) * step, w.n)); }, idle);
  }

  // The first rows of W that this thread will read in the phase to come.
  void prefetch(const Seat& s, const Matrix& w) const {
    const int64_t step = step_of(s, w);
    prefetch_rows<W>(w, s.crew.begin((w.n + step - 1) / step, s.me) * step);
  }

  // body(first, count) for the seat's rows, so many at a time as meet an item together.
  template <typename Body>
  IBQ_INLINE void in_blocks(const Seat& s, const Body& body) const {
    const int64_t rows = s.last - s.first, blocks = (rows + kBlockRows - 1) / kBlockRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t from = rows * b / blocks;
      body(s.first + from, rows * (b + 1) / blocks - from);
    }
  }

  const float* modulation(int64_t part, int64_t m) const {
    return p_.modulation + (part * p_.capacity + live_[m]) * width_;
  }

  // put(i, vector, live) of x / rms(x) * scale + shift, `part` being the scale's and part + 1 the shift's.
  template <typename Put>
  void normalise(int64_t m, int64_t part, const Put& put) const {
    const float *x = stream_ + m * width_, *scale = modulation(part, m), *shift = modulation(part + 1, m);
    F squares[2] = {};
    for (int64_t i = 0; i < width_; i += kWidth) {
      const F v = load_live<DType::kFloat32>(x, i, width_ - i);
      squares[i / kWidth % 2] = multiply_add<false>(v, v, squares[i / kWidth % 2]);
    }
    const double mean = horizontal_sum(squares[0] + squares[1]) / (double)width_;
    const F factor = set1((float)(1.0 / sqrt(mean + (double)p_.eps)));
    for (int64_t i = 0; i < width_; i += kWidth) {
      const int64_t live = width_ - i;
      const F v = load_live<DType::kFloat32>(x, i, live) * factor;
      put(i,
          multiply_add<false>(v, load_live<DType::kFloat32>(scale, i, live),
                              load_live<DType::kFloat32>(shift, i, live)),
          live);
    }
  }

  // The seat's rows, normalised, as its own input of a product.
  void prepare(const Seat& s, int64_t part) {
    const int64_t stride = Activations<W>::stride(width_);
    for (int64_t m = s.first; m < s.last; ++m) {
      Element* row = s.prepared + (m - s.first) * stride;
      normalise(m, part, [&](int64_t i, F v, int64_t live) { Activations<W>::put(row, i, v, live); });
      Activations<W>::finish(row, width_);
    }
  }
  const Element* prepared(const Seat& s, int64_t m) const {
    return s.prepared + (m - s.first) * Activations<W>::stride(width_);
  }

  // Column j of a product of row m, scaled where weights are int8.
  static IBQ_INLINE F column(const Matrix& w, const float* columns, int64_t m, int64_t j, int64_t at,
                             int64_t live) {
    const F v = load(columns + m * kItemRows + j);
    if constexpr (W == WeightType::kInt8) return v * load_live<DType::kFloat32>(w.scale, at, live);
    return v;
  }

  void project(const Seat& s, const Matrix& w, int64_t first, int64_t last) {
    in_blocks(s, [&](int64_t from, int64_t count) {
      skinny_product<W>(w, first, last, prepared(s, from), count, s.columns, kItemRows);
      for (int64_t m = 0; m < count; ++m)
        for (int64_t j = first; j < last; j += kWidth)
          store_narrow<DType::kFloat32>(qkv_ + (from + m) * qkv_width_, j,
                                        column(w, s.columns, m, j - first, j, last - j), last - j);
    });
  }

  // stream += gate * (x W^T), the gates being modulation `part`.
  void add_gated(const Seat& s, const Matrix& w, const Element* x, int64_t part, int64_t first,
                 int64_t last) {
    in_blocks(s, [&](int64_t from, int64_t count) {
      skinny_product<W>(w, first, last, x + from * Activations<W>::stride(w.c), count, s.columns, kItemRows);
      for (int64_t m = 0; m < count; ++m) {
        float* const stream = stream_ + (from + m) * width_;
        const float* const gate = modulation(part, from + m);
        for (int64_t j = first; j < last; j += kWidth) {
          const int64_t live = last - j;
          const F sum = multiply_add<false>(load_live<DType::kFloat32>(gate, j, live),
                                            column(w, s.columns, m, j - first, j, live),
                                            load_live<DType::kFloat32>(stream, j, live));
          store_narrow<DType::kFloat32>(stream, j, sum, live);
        }
      }
    });
  }

  void gate_up(const Seat& s, int phase, const Matrix& w, const Matrix& next, int64_t part) {
    const int64_t hidden = p_.hidden;
    const int64_t step = item_rows(hidden, 2 * w.c * Weights<W>::kBytes, s.crew.threads());
    float *const gates = s.columns, *const ups = gates + kBlockRows * kItemRows;
    s.crew.run(
        phase, s.me, (hidden + step - 1) / step, [&] { prepare(s, part + 3); },
        [&](int64_t item) {
          const int64_t first = item * step, last = min_of(first + step, hidden);
          in_blocks(s, [&](int64_t from, int64_t count) {
            for (int64_t j = first; j < last; j += kQuad)
              eight_rows<W>(w, j, min_of(4, last - j), hidden + j, min_of(4, last - j), kQuad,
                            prepared(s, from), count, gates + (j - first), ups + (j - first), kItemRows);
            for (int64_t m = 0; m < count; ++m) {
              Element* const row = expanded_ + (from + m) * Activations<W>::stride(hidden);
              for (int64_t j = first; j < last; j += kWidth) {
                const int64_t live = last - j;
                const F g = column(w, gates, m, j - first, j, live);
                const F u = column(w, ups, m, j - first, hidden + j, live);
                Activations<W>::put(row, j, gated(g, u), live);
              }
            }
          });
        },
        [&] { prefetch(s, next); });
  }

  void attend(const Seat& s, int64_t layer, int64_t m, int64_t h) {
    attention_.key_head(qkv_ + m * qkv_width_, layer, live_[m], h, s.scores,
                        attended_ + m * Activations<W>::stride(width_));
  }

  const GeneratorStep& p_;
  const Attention<W> attention_;
  const Parts parts_;
  const int64_t width_, qkv_width_;
  int64_t* live_;  // the rows that take part
  float* stream_;  // [m, width], the residual stream
  float* qkv_;     // [m, qkv_width]
  Element *attended_, *expanded_;
};

inline bool generator_step(const GeneratorStep& p, const Parallel& parallel) {
  return for_weight_type(p.type,
                         [&](auto type) { return StepKernel<decltype(type)::value>::run(p, parallel); });
}
