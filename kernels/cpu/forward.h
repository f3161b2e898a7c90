// Forward sweep: argmax, log-sum-exp, soft readout and the statistics of softmax(S/tau), one pass over S.
//
// A block of codes is packed once and meets every row tile; the tile's logits live in an L1 scratch of
// kMR x kBlock, where each row's epilogue reads them. Per row and task the state is kept per lane:
//   best, best_at   running maximum and its code, strict comparison in code order: lowest index wins
//   sum             sum of exp(x - ref)
//                   Sums carry their rounding (Carried): where all logits are alike, every addition to a
//                   plain sum may round the same way, which at K = 262,144 is an error of 1e-4.
//   sum_t, moment_t sums of exp(y) and of exp(y) y, y = (x - ref) / tau: entropy = log(sum_t) - moment_t /
//   sum_t,
//                   free of the cancellation of lse - E[x / tau], and exactly 0 for a row that one code has
//                   whole
// ref follows the row's maximum lazily: a block rescales only rows whose maximum it raises, about
// log(K / kBlock) times a row. Tried and lost: a horizontal argmax per block (2 % at D = 256, 30 % at 8).
#pragma once

// A running sum by lanes and the rounding it has lost so far.
struct Carried {
  F sum, lost;
  IBQ_INLINE static Carried from(const float* at) { return {load(at), load(at + kWidth)}; }
  IBQ_INLINE void to(float* at) const {
    store(at, sum);
    store(at + kWidth, lost);
  }
  IBQ_INLINE void scale(F by) { sum *= by, lost *= by; }
  IBQ_INLINE void add(F x) {
    const F old = sum, term = x + lost;
    sum = old + term;
    lost = term - (sum - old);
  }
};

// The total of a Carried in memory.
inline double carried_total(const float* at) {
  return horizontal_sum(load(at)) + horizontal_sum(load(at + kWidth));
}

struct RowState {
  float* ref;        // [rows]
  float* best;       // [rows][kWidth]
  int32_t* best_at;  // [rows][kWidth]
  float* sum;        // [rows][2][kWidth], a Carried
  float* sum_t;      // [rows][2][kWidth]
  float* moment_t;   // [rows][2][kWidth]
  float* readout;    // [rows][padded]
};

struct ForwardContext {
  const Problem& problem;
  const Forward& out;
  const Plan& plan;
  int64_t row = 0;           // first row of the chunk
  int64_t chunk_rows = 0;    // live rows in it
  float* tiles = nullptr;    // packed rows of the chunk
  RowState state = {};       // of all code tasks: [code_tasks][chunk]
  float* scratch = nullptr;  // per task
  int64_t scratch_stride = 0;
  float* column_sums = nullptr;  // [row_tasks][k]
  float* block_max = nullptr;    // [chunk][blocks] maxima of S, or null
  float* bound = nullptr;        // [2][tiles][blocks] of the call, or null
  int64_t call_tiles = 0, blocks = 0;
};

// Whether a tile may hold anything above `gap` below its rows' log-sum-exp. group 0: P, 1: p.
IBQ_INLINE bool tile_live(const float* bound, int64_t tiles, int64_t blocks, int group, int64_t row,
                          int64_t code0, float gap) {
  return !bound || !(bound[(group * tiles + row / kMR) * blocks + code0 / kBlock] < -gap);
}

IBQ_INLINE float exp_scalar(float x) { return exp_of(set1(x))[0]; }

IBQ_INLINE void update_best(const float* x, int columns, int32_t code0, float* best, int32_t* best_at) {
  F m = load(best);
  I at = load_i(best_at);
  const I lane = iota();
  for (int j = 0; j < columns; j += kWidth) {
    F v = load(x + j);
    I greater = v > m;
    m = greater ? v : m;
    at = greater ? lane + set1_i(code0 + j) : at;
  }
  store(best, m);
  store_i(best_at, at);
}

// Whether a row of a tile, its maxima given by lanes, lies wholly `gap` below the reference. False for NaN.
IBQ_INLINE bool negligible(F maxima, float reference, float gap) {
  const F threshold = set1(reference - gap);
  return !any_not_below(maxima, threshold);
}

// The lanes' maxima of a row of logits; NaN in a lane whose last logit is.
IBQ_INLINE F lane_maxima(const float* x, int columns) {
  F m = load(x);
  for (int j = kWidth; j < columns; j += kWidth) m = max_of(load(x + j), m);
  return m;
}

// Raises *ref to the row's maximum (given by lanes) if that is greater, and says by how much it went up.
IBQ_INLINE float raise_reference(F maxima, float* ref) {
  if (!any_greater(maxima, set1(*ref))) return 0.0f;
  const float raised = horizontal_max(maxima), rise = raised - *ref;
  *ref = raised;
  return rise;
}

template <bool kPairs, bool kLse, bool kReadout, bool kEntropy>
void forward_task(const ForwardContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  float* packed = c.scratch + c.scratch_stride * task;
  float* rows_scratch = packed + kBlock * words<kPairs>(plan.d);
  float* bias = rows_scratch + (kReadout ? words<kPairs>(kBlock) * plan.padded : 0);
  float* logits = bias + kBlock;
  const int64_t base = (int64_t)range.code_task * plan.chunk;
  const float inverse_tau = 1.0f / c.out.temperature;
  const float gap = negligible_gap(c.problem);

  for (int64_t r = range.row0; r < range.row1; ++r) {
    const int64_t at = base + r;
    const F lowest = set1(-__builtin_inff());
    store(c.state.best + at * kWidth, lowest);
    store_i(c.state.best_at + at * kWidth, I{});
    c.state.ref[at] = -__builtin_inff();
    const Carried zero = {F{}, F{}};
    if (kLse) zero.to(c.state.sum + at * 2 * kWidth);
    if (kEntropy) {
      zero.to(c.state.sum_t + at * 2 * kWidth);
      zero.to(c.state.moment_t + at * 2 * kWidth);
    }
    if (kReadout) memset(c.state.readout + at * plan.padded, 0, sizeof(float) * plan.padded);
  }

  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const Block block = load_block<kPairs>(c.problem, plan, code0, range.code1, packed,
                                           kReadout ? rows_scratch : nullptr, bias);
    const int columns = block.panels * kNR;
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                          c.problem.scale, bias, logits);
      float alpha[kMR];
      bool live = false;  // whether the tile adds anything to the readout
      for (int i = 0; i < kMR; ++i) {
        const int64_t at = base + r + i;
        float* x = logits + i * kBlock;
        update_best(x, columns, (int32_t)code0, c.state.best + at * kWidth, c.state.best_at + at * kWidth);
        if (!kLse && !kEntropy) continue;
        const F maxima = lane_maxima(x, columns);
        if (c.block_max) c.block_max[(r + i) * c.blocks + code0 / kBlock] = horizontal_max(maxima);
        const bool spent_t = !kEntropy || negligible(maxima, c.state.ref[at], gap * c.out.temperature);
        const bool spent = !kLse || negligible(maxima, c.state.ref[at], gap);
        alpha[i] = 1.0f;
        if (spent && spent_t) {
          if (kReadout) memset(x, 0, sizeof(float) * columns);
          continue;
        }
        const float rise = raise_reference(maxima, c.state.ref + at);
        const F ref = set1(c.state.ref[at]);
        if (kEntropy && (rise > 0 || !spent_t)) {
          const F scale = set1(exp_scalar(-rise * inverse_tau));
          Carried sum = Carried::from(c.state.sum_t + at * 2 * kWidth);
          Carried moment = Carried::from(c.state.moment_t + at * 2 * kWidth);
          sum.scale(scale);
          moment.scale(scale);
          F more = F{}, more_moment = F{};
          // against the new reference: sum of e (y - rise) = old moment - rise * old sum
          if (rise > 0 && rise < __builtin_inff()) more_moment -= sum.sum * set1(rise * inverse_tau);
          for (int j = 0; j < columns && !spent_t; j += kWidth) {
            F y = (load(x + j) - ref) * set1(inverse_tau);
            F e = exp_of(y);
            more += e;
            more_moment += e * max_of(y, set1(-1e4f));
          }
          sum.add(more);
          moment.add(more_moment);
          sum.to(c.state.sum_t + at * 2 * kWidth);
          moment.to(c.state.moment_t + at * 2 * kWidth);
        }
        if (kLse && (rise > 0 || !spent)) {
          live = true;
          alpha[i] = exp_scalar(-rise);
          Carried sum = Carried::from(c.state.sum + at * 2 * kWidth);
          sum.scale(set1(alpha[i]));
          F more = F{};
          for (int j = 0; j < columns; j += kWidth) {
            F e = exp_of(load(x + j) - ref);
            more += e;
            if (kReadout) store(x + j, e);
          }
          sum.add(more);
          sum.to(c.state.sum + at * 2 * kWidth);
        } else if (kReadout) {
          memset(x, 0, sizeof(float) * columns);
        }
      }
      if (kReadout && live)
        combine_tile<kPairs>(logits, block.rows, block.codes, plan.padded, alpha,
                             c.state.readout + (base + r) * plan.padded);
    }
  }
}

// Merges the code tasks' states of one row, in code order.
template <bool kLse, bool kReadout, bool kEntropy>
void merge_row(const ForwardContext& c, int64_t r) {
  const Plan& plan = c.plan;
  const int64_t row = c.row + r;
  float best = -__builtin_inff();
  int64_t best_at = -1;
  float ref = -__builtin_inff();
  for (int t = 0; t < plan.code_tasks; ++t) {
    const int64_t at = (int64_t)t * plan.chunk + r;
    for (int l = 0; l < kWidth; ++l) {
      float v = c.state.best[at * kWidth + l];
      int64_t i = c.state.best_at[at * kWidth + l];
      if (v > best || (v == best && i < best_at)) best = v, best_at = i;
    }
    if ((kLse || kEntropy) && !(c.state.ref[at] <= ref)) ref = c.state.ref[at];
  }
  const bool none = !(best > -__builtin_inff());
  if (c.out.indices) c.out.indices[row] = none ? 0 : best_at;
  if (c.out.max) c.out.max[row] = none ? __builtin_nanf("") : best;
  if (kLse) {
    double sum = 0;
    for (int t = 0; t < plan.code_tasks; ++t) {
      const int64_t at = (int64_t)t * plan.chunk + r;
      sum += carried_total(c.state.sum + at * 2 * kWidth) * exp((double)c.state.ref[at] - ref);
    }
    c.out.lse[row] = ref + log(sum);
    if (kReadout) {
      float* o = c.out.readout + row * plan.d;
      for (int t = 0; t < plan.code_tasks; ++t) {
        const int64_t at = (int64_t)t * plan.chunk + r;
        const float w = (float)(exp((double)c.state.ref[at] - ref) / sum);
        const float* part = c.state.readout + at * plan.padded;
        for (int64_t j = 0; j < plan.d; ++j) o[j] = (t ? o[j] : 0.0f) + w * part[j];
      }
    }
  }
  if (kEntropy) {
    // the float32 reciprocal the sweeps multiply by, so that exp(x * inverse_tau - lse_tau) adds up to 1
    const double inverse_tau = 1.0f / c.out.temperature;
    double sum = 0, moment = 0;
    for (int t = 0; t < plan.code_tasks; ++t) {
      const int64_t at = (int64_t)t * plan.chunk + r;
      const double shift = ((double)c.state.ref[at] - ref) * inverse_tau;
      const double w = exp(shift), s = carried_total(c.state.sum_t + at * 2 * kWidth);
      sum += s * w;
      if (w > 0) moment += (carried_total(c.state.moment_t + at * 2 * kWidth) + shift * s) * w;
    }
    c.out.lse_tau[row] = ref * inverse_tau + log(sum);
    c.out.row_entropy[row] = (float)(log(sum) - moment / sum);
  }
}

// log p = x / tau - lse for a float64 lse, without losing what float32 can hold of the difference: x is taken
// relative to the float32 logit `high` nearest to tau lse first, so no large x / tau is ever rounded.
struct LogProb {
  F high, low, inverse_tau;
  explicit LogProb(double lse, float inverse = 1.0f) {
    const float h = (float)(lse / inverse);
    high = set1(h);
    low = set1((float)(lse - (double)h * inverse));
    inverse_tau = set1(inverse);
  }
  IBQ_INLINE F of(F x) const { return (x - high) * inverse_tau - low; }
};

// Whether any of the task's tiles of a block of codes is live.
inline bool any_live(const ForwardContext& c, const Range& range, int group, int64_t code0, float gap) {
  for (int64_t r = range.row0; r < range.row1; r += kMR)
    if (tile_live(c.bound, c.call_tiles, c.blocks, group, c.row + r, code0, gap)) return true;
  return false;
}

// Second sweep: column sums of p = exp(S/tau - lse_tau), this task's rows and codes.
template <bool kPairs>
void mean_prob_task(const ForwardContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  float* packed = c.scratch + c.scratch_stride * task;
  float* bias = packed + kBlock * words<kPairs>(plan.d);
  float* logits = bias + kBlock;
  const float inverse_tau = 1.0f / c.out.temperature;
  const float gap = negligible_gap(c.problem);
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    if (!any_live(c, range, 1, code0, gap)) continue;
    const Block block = load_block<kPairs>(c.problem, plan, code0, range.code1, packed, nullptr, bias);
    const int columns = block.panels * kNR;
    // Compensated: every row may add the same, and then every rounding goes the same way.
    float sums[kBlock] = {}, lost[kBlock] = {};
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      if (!tile_live(c.bound, c.call_tiles, c.blocks, 1, c.row + r, code0, gap)) continue;
      logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                          c.problem.scale, bias, logits);
      float tile[kBlock] = {};
      for (int i = 0; i < kMR && r + i < c.chunk_rows; ++i) {
        const LogProb log_p(c.out.lse_tau[c.row + r + i], inverse_tau);
        const float* x = logits + i * kBlock;
        if (negligible(lane_maxima(x, columns), log_p.high[0], gap * c.out.temperature)) continue;
        for (int j = 0; j < columns; j += kWidth)
          store(tile + j, load(tile + j) + exp_of(log_p.of(load(x + j))));
      }
      for (int j = 0; j < columns; j += kWidth) {
        const F old = load(sums + j), term = load(tile + j) + load(lost + j), sum = old + term;
        store(sums + j, sum);
        store(lost + j, term - (sum - old));
      }
    }
    float* total = c.column_sums + (int64_t)range.row_task * plan.k + code0;
    for (int64_t j = 0; j < block.codes; ++j) total[j] += sums[j];
  }
}

// Calls body(r) for r in [0, rows), in parallel.
template <typename Body>
void for_rows(const Parallel& parallel, int64_t rows, const Body& body) {
  const int tasks = (int)min_of(parallel.threads, rows);
  run_tasks(parallel, tasks, [&](int t) {
    for (int64_t r = rows * t / tasks; r < rows * (t + 1) / tasks; ++r) body(r);
  });
}

// Adds up the code tasks' parts of a row's readout, which readout_task left normalised.
inline void sum_readout(const ForwardContext& c, int64_t r) {
  float* o = c.out.readout + (c.row + r) * c.plan.d;
  for (int t = 0; t < c.plan.code_tasks; ++t) {
    const float* part = c.state.readout + ((int64_t)t * c.plan.chunk + r) * c.plan.padded;
    for (int64_t j = 0; j < c.plan.d; ++j) o[j] = (t ? o[j] : 0.0f) + part[j];
  }
}

// Turns a chunk's block maxima into bounds of its tiles, now that the rows' log-sum-exps are known.
template <bool kLse, bool kEntropy>
void bound_tile(const ForwardContext& c, int64_t tile_row) {
  const int64_t tile = (c.row + tile_row) / kMR;
  for (int64_t b = 0; b < c.blocks; ++b) {
    float select = -__builtin_inff(), entropy = -__builtin_inff();
    for (int64_t r = tile_row; r < min_of(tile_row + kMR, c.chunk_rows); ++r) {
      const float m = c.block_max[r * c.blocks + b];
      // negated comparisons: NaN must win, so that a NaN row's tiles stay live
      if (kLse) {
        const float v = (float)(m - c.out.lse[c.row + r]);
        if (!(v <= select)) select = v;
      }
      if (kEntropy) {
        const float v = (float)((double)m * (1.0f / c.out.temperature) - c.out.lse_tau[c.row + r]);
        if (!(v <= entropy)) entropy = v;
      }
    }
    c.bound[tile * c.blocks + b] = select;
    c.bound[(c.call_tiles + tile) * c.blocks + b] = entropy;
  }
}

// The readout once the log-sum-exps are known: a sweep over the live tiles alone.
template <bool kPairs>
void readout_task(const ForwardContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  float* packed = c.scratch + c.scratch_stride * task;
  float* rows_scratch = packed + kBlock * words<kPairs>(plan.d);
  float* bias = rows_scratch + words<kPairs>(kBlock) * plan.padded;
  float* logits = bias + kBlock;
  const float gap = negligible_gap(c.problem);
  float ones[kMR];
  for (int i = 0; i < kMR; ++i) ones[i] = 1.0f;
  float* readout = c.state.readout + (int64_t)range.code_task * plan.chunk * plan.padded;
  memset(readout + range.row0 * plan.padded, 0, sizeof(float) * (range.row1 - range.row0) * plan.padded);
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    if (!any_live(c, range, 0, code0, gap)) continue;
    const Block block = load_block<kPairs>(c.problem, plan, code0, range.code1, packed, rows_scratch, bias);
    const int columns = block.panels * kNR;
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      if (!tile_live(c.bound, c.call_tiles, c.blocks, 0, c.row + r, code0, gap)) continue;
      logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                          c.problem.scale, bias, logits);
      for (int i = 0; i < kMR; ++i) {
        float* x = logits + i * kBlock;
        const LogProb log_p(r + i < c.chunk_rows ? c.out.lse[c.row + r + i] : 0.0);
        for (int j = 0; j < columns; j += kWidth) store(x + j, exp_of(log_p.of(load(x + j))));
      }
      combine_tile<kPairs>(logits, block.rows, block.codes, plan.padded, ones, readout + r * plan.padded);
    }
  }
}

// Whether P looks peaked, from a few tiles spread over the chunk against one block of codes: the mean over
// their rows of sum exp(x - max), which is the block's size where P is flat and 1 where one code has it all.
// It only chooses between two ways to the same readout: along with the first sweep (2 products), or after it
// over live tiles alone (1 product and what is live of 2).
template <bool kPairs>
bool looks_peaked(const ForwardContext& c) {
  const Plan& plan = c.plan;
  float* packed = c.scratch;
  float* bias = packed + kBlock * words<kPairs>(plan.d) + words<kPairs>(kBlock) * plan.padded;
  float* logits = bias + kBlock;
  const Block block = load_block<kPairs>(c.problem, plan, 0, min_of(kBlock, plan.k), packed, nullptr, bias);
  const int64_t tiles = (c.chunk_rows + kMR - 1) / kMR, probes = min_of(tiles, 4);
  double effective = 0;
  int64_t rows = 0;
  for (int64_t q = 0; q < probes; ++q) {
    const int64_t r = tiles * q / probes * kMR;
    logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                        c.problem.scale, bias, logits);
    for (int i = 0; i < kMR && r + i < c.chunk_rows; ++i, ++rows) {
      const float* x = logits + i * kBlock;
      const F top = set1(horizontal_max(lane_maxima(x, block.panels * kNR)));
      F sum = F{};
      for (int j = 0; j < block.panels * kNR; j += kWidth) sum += exp_of(load(x + j) - top);
      effective += horizontal_sum(sum);
    }
  }
  return effective < 0.04 * kBlock * (double)rows;
}

template <bool kPairs, bool kLse, bool kReadout, bool kEntropy>
bool run_forward(const Problem& p, const Forward& out, const Parallel& parallel) {
  const Plan plan(p, parallel.threads);
  Workspace workspace;
  ForwardContext c{p, out, plan};
  c.bound = out.tile_bound;
  tile_grid(plan.n, plan.k, &c.call_tiles, &c.blocks);
  const bool bounded = c.blocks > 0 && (kReadout || kEntropy) && p.dropped_mass > 0;
  if (!bounded) c.bound = nullptr;
  const int64_t states = (int64_t)plan.code_tasks * plan.chunk;
  c.scratch_stride =
      round_up(kBlock * words<kPairs>(plan.d) + (kReadout ? words<kPairs>(kBlock) * plan.padded : 0) +
                   kBlock + kMR * kBlock,
               16);
  workspace.add(&c.tiles, plan.chunk * words<kPairs>(plan.d));
  workspace.add(&c.scratch, c.scratch_stride * plan.tasks());
  workspace.add(&c.state.best, states * kWidth);
  workspace.add(&c.state.best_at, states * kWidth);
  workspace.add(&c.state.ref, states);
  if (kLse) workspace.add(&c.state.sum, states * 2 * kWidth);
  if (kReadout) workspace.add(&c.state.readout, states * plan.padded);
  const bool mean = kEntropy && out.mean_prob;
  if (kEntropy) {
    workspace.add(&c.state.sum_t, states * 2 * kWidth);
    workspace.add(&c.state.moment_t, states * 2 * kWidth);
    if (mean) workspace.add(&c.column_sums, (int64_t)plan.row_tasks * plan.k);
  }
  if (bounded) {
    workspace.add(&c.block_max, plan.chunk * c.blocks);
    if (!c.bound) workspace.add(&c.bound, 2 * c.call_tiles * c.blocks);
  }
  if (!workspace.allocate()) return false;
  if (mean) memset(c.column_sums, 0, sizeof(float) * plan.row_tasks * plan.k);

  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    pack_row_tiles<kPairs>(p, p.z, c.row, c.chunk_rows, c.tiles, parallel);
    const bool later = kReadout && bounded && looks_peaked<kPairs>(c);
    if (later)
      run_tasks(parallel, plan.tasks(), [&](int t) { forward_task<kPairs, kLse, false, kEntropy>(c, t); });
    else
      run_tasks(parallel, plan.tasks(), [&](int t) { forward_task<kPairs, kLse, kReadout, kEntropy>(c, t); });
    for_rows(parallel, c.chunk_rows, [&](int64_t r) {
      if (later)
        merge_row<kLse, false, kEntropy>(c, r);
      else
        merge_row<kLse, kReadout, kEntropy>(c, r);
    });
    if (bounded)
      for_rows(parallel, (c.chunk_rows + kMR - 1) / kMR,
               [&](int64_t t) { bound_tile<kLse, kEntropy>(c, t * kMR); });
    if (later) {
      run_tasks(parallel, plan.tasks(), [&](int t) { readout_task<kPairs>(c, t); });
      for_rows(parallel, c.chunk_rows, [&](int64_t r) { sum_readout(c, r); });
    }
    if (mean) run_tasks(parallel, plan.tasks(), [&](int t) { mean_prob_task<kPairs>(c, t); });
  }
  if (mean)
    for (int64_t j = 0; j < plan.k; ++j) {
      float sum = 0;
      for (int t = 0; t < plan.row_tasks; ++t) sum += c.column_sums[t * plan.k + j];
      out.mean_prob[j] = sum / (float)plan.n;
    }
  return true;
}
