// One token of several sequences through all blocks of the generator, in one parallel region (see crew.h).
//
// Per block five phases, each ending where all threads meet:
//   qkv      normalised and modulated rows x Wqkv^T
//   attend   per row and key head: rotary, append to the cache, softmax(q K^T / sqrt(D)) V over the row's
//   prefix out      x <- x + gate * (attended Wout^T) gate_up  silu(gate) * up, a gate's row of W meeting its
//   up's row down     x <- x + gate * (that Wdown^T)
// and one for the last norm. The norms are not phases: every thread normalises all rows for itself when it
// takes its first item, which for a few rows costs less than meeting once more.
//
// Precision: the residual stream, norms, modulation, rotary, softmax and all sums are float32, whatever the
// weights are. Inputs of products are bfloat16 beside bfloat16 weights where the CPU multiplies pairs of it,
// else float32. The cache is as wide as the weights (int8: float32).
//
// Cost: depth * (2 width^2 + 2 kv_heads head_dim width + 3 hidden width) weights read once, and the cache.
#pragma once

// silu(g) * u; exp_of takes no more than 88
IBQ_INLINE F gated(F g, F u) {
  const F limit = set1(88.0f), e = -g;
  return g / (exp_of(e > limit ? limit : e) + 1.0f) * u;
}

template <WeightType W>
class StepKernel {
  typedef typename Activations<W>::Element Element;
  // The cache's type, and its dtype for the functions of narrow.h.
  static constexpr WeightType kCached = W == WeightType::kInt8 ? WeightType::kFloat32 : W;
  static constexpr DType kCache = kCached == WeightType::kBFloat16  ? DType::kBFloat16
                                  : kCached == WeightType::kFloat16 ? DType::kFloat16
                                                                    : DType::kFloat32;

 public:
  static bool run(const GeneratorStep& p, const Parallel& parallel) {
    StepKernel k(p);
    Workspace workspace;
    const int threads = parallel.threads > 0 ? parallel.threads : 1;
    const int64_t width = k.width_, m = p.rows;
    int64_t* counters;
    workspace.add(&k.live_, m);
    workspace.add(&k.stream_, m * width);
    workspace.add(&k.qkv_, m * k.qkv_width_);
    workspace.add(&k.attended_, m * Activations<W>::stride(width));
    workspace.add(&k.expanded_, m * Activations<W>::stride(p.hidden));
    workspace.add(&k.prepared_, threads * m * Activations<W>::stride(width));
    workspace.add(&k.columns_, threads * 2 * m * kItemRows);
    workspace.add(&k.scores_, threads * (k.scores_width_ + k.padded_dim_));
    workspace.add(&counters, Crew::counters_for(threads, k.phases()));
    if (!workspace.allocate()) return false;
    k.start();
    if (k.m_ == 0) return true;
    Crew crew(threads, k.phases(), counters);
    run_tasks(parallel, threads, [&](int me) { k.work(crew, me, threads); });
    return true;
  }

 private:
  explicit StepKernel(const GeneratorStep& p)
      : p_(p),
        width_(p.heads * p.head_dim),
        qkv_width_((p.heads + 2 * p.kv_heads) * p.head_dim),
        padded_dim_((p.head_dim + kWidth - 1) / kWidth * kWidth),
        scores_width_((p.places + 4 + kWidth - 1) / kWidth * kWidth) {}

  int phases() const { return (int)(5 * p_.depth + 1); }

  // Which rows take part, their inputs, and zeros for the others.
  void start() {
    m_ = 0;
    for (int64_t r = 0; r < p_.rows; ++r) {
      if (p_.positions[r] < 0) {
        memset(p_.out + r * width_, 0, sizeof(float) * (size_t)width_);
        continue;
      }
      memcpy(stream_ + m_ * width_, p_.x + r * width_, sizeof(float) * (size_t)width_);
      Activations<W>::finish(attended_ + m_ * Activations<W>::stride(width_), width_);
      Activations<W>::finish(expanded_ + m_ * Activations<W>::stride(p_.hidden), p_.hidden);
      live_[m_++] = r;
    }
  }

  void work(Crew& crew, int me, int threads) {
    const auto nothing = [] {};
    int phase = 0;
    for (int64_t layer = 0; layer < p_.depth; ++layer) {
      const Matrix* w = p_.weights + 4 * layer;
      const int64_t part = 6 * layer;
      product(
          crew, phase++, me, threads, w[0], [&] { prepare(me, part); },
          [&](int64_t first, int64_t last) { project(me, w[0], first, last); }, nothing);
      crew.run(
          phase++, me, m_ * p_.kv_heads, [&] { prefetch(crew, me, threads, w[1]); },
          [&](int64_t i) { attend(me, layer, i / p_.kv_heads, i % p_.kv_heads); }, nothing);
      product(
          crew, phase++, me, threads, w[1], nothing,
          [&](int64_t first, int64_t last) { add_gated(me, w[1], attended_, part + 2, first, last); },
          [&] { prefetch(crew, me, threads, w[2]); });
      gate_up(crew, phase++, me, threads, w[2], w[3], part);
      product(
          crew, phase++, me, threads, w[3], nothing,
          [&](int64_t first, int64_t last) { add_gated(me, w[3], expanded_, part + 5, first, last); },
          [&] {
            if (layer + 1 < p_.depth) prefetch(crew, me, threads, w[4]);
          });
    }
    crew.run(
        phase, me, m_, nothing,
        [&](int64_t m) {
          normalise(m, 6 * p_.depth, [&](int64_t i, F v, int64_t live) {
            store_narrow<DType::kFloat32>(p_.out + live_[m] * width_, i, v, live);
          });
        },
        nothing);
  }

  int64_t step_of(const Matrix& w, int threads) const {
    return item_rows(w.n, w.c * Weights<W>::kBytes, threads);
  }

  // A phase of products: `rows(first, last)` for every item of W's rows.
  template <typename Before, typename Rows, typename Idle>
  void product(Crew& crew, int phase, int me, int threads, const Matrix& w, const Before& before,
               const Rows& rows, const Idle& idle) {
    const int64_t step = step_of(w, threads);
    crew.run(
        phase, me, (w.n + step - 1) / step, before,
        [&](int64_t i) { rows(i * step, min_of((i + 1) * step, w.n)); }, idle);
  }

  // The first rows of W that this thread will read in the phase to come.
  void prefetch(const Crew& crew, int me, int threads, const Matrix& w) const {
    const int64_t step = step_of(w, threads);
    prefetch_rows<W>(w, crew.begin((w.n + step - 1) / step, me) * step);
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

  // All rows, normalised, as this thread's own input of a product.
  void prepare(int me, int64_t part) {
    const int64_t stride = Activations<W>::stride(width_);
    for (int64_t m = 0; m < m_; ++m) {
      Element* row = prepared(me) + m * stride;
      normalise(m, part, [&](int64_t i, F v, int64_t live) { Activations<W>::put(row, i, v, live); });
      Activations<W>::finish(row, width_);
    }
  }

  Element* prepared(int me) const { return prepared_ + me * p_.rows * Activations<W>::stride(width_); }
  float* columns(int me) const { return columns_ + me * 2 * p_.rows * kItemRows; }

  // Column j of a product of row m, scaled where weights are int8.
  static IBQ_INLINE F column(const Matrix& w, const float* columns, int64_t m, int64_t j, int64_t at,
                             int64_t live) {
    const F v = load(columns + m * kItemRows + j);
    if constexpr (W == WeightType::kInt8) return v * load_live<DType::kFloat32>(w.scale, at, live);
    return v;
  }

  void project(int me, const Matrix& w, int64_t first, int64_t last) {
    float* const out = columns(me);
    skinny_product<W>(w, first, last, prepared(me), m_, out, kItemRows);
    for (int64_t m = 0; m < m_; ++m)
      for (int64_t j = first; j < last; j += kWidth)
        store_narrow<DType::kFloat32>(qkv_ + m * qkv_width_, j, column(w, out, m, j - first, j, last - j),
                                      last - j);
  }

  // stream += gate * (x W^T), the gates being modulation `part`.
  void add_gated(int me, const Matrix& w, const Element* x, int64_t part, int64_t first, int64_t last) {
    float* const out = columns(me);
    skinny_product<W>(w, first, last, x, m_, out, kItemRows);
    for (int64_t m = 0; m < m_; ++m) {
      float* const stream = stream_ + m * width_;
      const float* const gate = modulation(part, m);
      for (int64_t j = first; j < last; j += kWidth) {
        const int64_t live = last - j;
        const F sum = multiply_add<false>(load_live<DType::kFloat32>(gate, j, live),
                                          column(w, out, m, j - first, j, live),
                                          load_live<DType::kFloat32>(stream, j, live));
        store_narrow<DType::kFloat32>(stream, j, sum, live);
      }
    }
  }

  void gate_up(Crew& crew, int phase, int me, int threads, const Matrix& w, const Matrix& next,
               int64_t part) {
    const int64_t hidden = p_.hidden, step = item_rows(hidden, 2 * w.c * Weights<W>::kBytes, threads);
    float *const gates = columns(me), *const ups = gates + p_.rows * kItemRows;
    crew.run(
        phase, me, (hidden + step - 1) / step, [&] { prepare(me, part + 3); },
        [&](int64_t item) {
          const int64_t first = item * step, last = min_of(first + step, hidden);
          for (int64_t j = first; j < last; j += kQuad)
            eight_rows<W>(w, j, min_of(4, last - j), hidden + j, min_of(4, last - j), kQuad, prepared(me), m_,
                          gates + (j - first), ups + (j - first), kItemRows);
          for (int64_t m = 0; m < m_; ++m) {
            Element* const row = expanded_ + m * Activations<W>::stride(hidden);
            for (int64_t j = first; j < last; j += kWidth) {
              const int64_t live = last - j;
              const F g = column(w, gates, m, j - first, j, live);
              const F u = column(w, ups, m, j - first, hidden + j, live);
              Activations<W>::put(row, j, gated(g, u), live);
            }
          }
        },
        [&] { prefetch(crew, me, threads, next); });
  }

  // out[d] = x[d] turned by its pair's angle
  void rotate(const float* x, int64_t position, float factor, float* out) const {
    const float* straight = p_.rotary + position * p_.head_dim;
    const float* crossed = straight + p_.rotary_places * p_.head_dim;
    for (int64_t d = 0; d < p_.head_dim; ++d) out[d] = (x[d] * straight[d] + x[d ^ 1] * crossed[d]) * factor;
  }

  // Key head h of row m, and the queries that share it.
  void attend(int me, int64_t layer, int64_t m, int64_t h) {
    const int64_t dim = p_.head_dim, group = p_.heads / p_.kv_heads, position = p_.positions[live_[m]];
    const float* const heads = qkv_ + m * qkv_width_;
    float* const scores = scores_ + me * (scores_width_ + padded_dim_);
    float* const query = scores + scores_width_;
    const int64_t plane = p_.capacity * p_.kv_heads * p_.places * dim;
    const int64_t row = 2 * layer * plane + (live_[m] * p_.kv_heads + h) * p_.places * dim;
    const int64_t keys = row, values = row + plane;

    rotate(heads + (p_.heads + h) * dim, position, 1.0f, query);
    const float* const value = heads + (p_.heads + p_.kv_heads + h) * dim;
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t at = position * dim + d, live = dim - d;
      store_narrow<kCache>(p_.cache, keys + at, load_live<DType::kFloat32>(query, d, live), live);
      store_narrow<kCache>(p_.cache, values + at, load_live<DType::kFloat32>(value, d, live), live);
    }
    for (int64_t d = dim; d < padded_dim_; ++d) query[d] = 0.0f;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = h * group + g;
      rotate(heads + head * dim, position, (float)(1.0 / sqrt((double)dim)), query);
      const float total = probabilities(keys, position + 1, query, scores);
      read_out(values, position + 1, scores, 1.0f / total, attended_ + m * Activations<W>::stride(width_),
               head * dim);
    }
  }

  // scores[t] = exp(query . key_t - their maximum) for t < count; returns the sum.
  float probabilities(int64_t keys, int64_t count, const float* query, float* scores) const {
    const int64_t dim = p_.head_dim;
    for (int64_t t = 0; t < count; t += 4) {
      F acc[4] = {};
      for (int64_t d = 0; d < dim; d += kWidth) {
        const F q = load(query + d);
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t at = keys + min_of(t + i, count - 1) * dim + d;
          acc[i] = multiply_add<false>(q, cached(at, dim - d), acc[i]);
        }
      }
      const Sums s = sums_of(acc[0], acc[1], acc[2], acc[3]);
      __builtin_memcpy(scores + t, &s, sizeof(s));
    }
    for (int64_t t = count; t < (count + kWidth - 1) / kWidth * kWidth; ++t) scores[t] = -__builtin_inff();
    F high = load(scores);
    for (int64_t t = kWidth; t < count; t += kWidth) high = max_of(high, load(scores + t));
    const F top = set1(horizontal_max(high));
    F sum = F{};
    for (int64_t t = 0; t < count; t += kWidth) {
      const F e = exp_of(load(scores + t) - top);
      sum = sum + e;
      store(scores + t, e);
    }
    return (float)horizontal_sum(sum);
  }

  // out[at + d] = factor * sum_t weights[t] value_t[d], even and odd positions apart
  void read_out(int64_t values, int64_t count, const float* weights, float factor, Element* out,
                int64_t at) const {
    constexpr int kColumns = 4;
    for (int64_t d = 0; d < p_.head_dim; d += kColumns * kWidth)
      read_columns<kColumns>(values, count, weights, factor, out, at, d);
  }

  // Up to kColumns vectors of it from channel d on.
  template <int kColumns>
  void read_columns(int64_t values, int64_t count, const float* weights, float factor, Element* out,
                    int64_t at, int64_t d) const {
    const int64_t dim = p_.head_dim;
    if constexpr (kColumns > 1)
      if (dim - d <= (kColumns - 1) * kWidth)
        return read_columns<kColumns - 1>(values, count, weights, factor, out, at, d);
    F even[kColumns] = {}, odd[kColumns] = {};
    const auto add = [&](F(&sums)[kColumns], int64_t t) {
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) {
        const int64_t channel = d + v * kWidth;
        sums[v] =
            multiply_add<false>(set1(weights[t]), cached(values + t * dim + channel, dim - channel), sums[v]);
      }
    };
    int64_t t = 0;
    for (; t + 1 < count; t += 2) {
      add(even, t);
      add(odd, t + 1);
    }
    if (t < count) add(even, t);
    for (int v = 0; v < kColumns; ++v) {
      const int64_t channel = d + v * kWidth;
      Activations<W>::put(out, at + channel, (even[v] + odd[v]) * set1(factor), dim - channel);
    }
  }

  // kWidth numbers of the cache from element `at` on, or `live`, then zeros.
  IBQ_INLINE F cached(int64_t at, int64_t live) const {
    if (live >= kWidth)
      return widened<kCached>(static_cast<const char*>(p_.cache) + at * Weights<kCached>::kBytes);
    return load_live<kCache>(p_.cache, at, live);
  }

  const GeneratorStep& p_;
  const int64_t width_, qkv_width_, padded_dim_, scores_width_;
  int64_t m_ = 0;  // rows that take part
  int64_t* live_;  // and which they are
  float* stream_;  // [m, width], the residual stream
  float* qkv_;     // [m, qkv_width]
  Element *attended_, *expanded_, *prepared_;
  float *columns_, *scores_;
};

inline bool generator_step(const GeneratorStep& p, const Parallel& parallel) {
  return for_weight_type(p.type,
                         [&](auto type) { return StepKernel<decltype(type)::value>::run(p, parallel); });
}
