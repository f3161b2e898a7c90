// Forward sweep: argmax, log-sum-exp, soft readout and the statistics of softmax(S/tau), one pass over S.
//
// A block of codes is packed once and meets every row tile; the tile's logits live in an L1 scratch of
// kMR x kBlock, where each row's epilogue reads them. Per row and task the state is kept per lane:
//   best, best_at   running maximum and its code, strict comparison in code order: lowest index wins
//   sum             sum of exp(x - ref)
//   sum_t, moment_t sum of exp(y - ref_t) and of exp(y - ref_t) (y - ref_t), y = x / tau:
//                   entropy = log(sum_t) - moment_t / sum_t, free of the cancellation of lse - E[y]
// ref follows the row's maximum lazily: a block rescales only rows whose maximum it raises, about
// log(K / kBlock) times a row. Tried and lost: a horizontal argmax per block (2 % at D = 256, 30 % at 8).
#pragma once

struct RowState {
  float* ref;        // [rows]
  float* best;       // [rows][kWidth]
  int32_t* best_at;  // [rows][kWidth]
  float* sum;        // [rows][kWidth]
  float* ref_t;      // [rows]
  float* sum_t;      // [rows][kWidth]
  float* moment_t;   // [rows][kWidth]
  float* readout;    // [rows][padded]
};

struct ForwardContext {
  const Problem& problem;
  const Forward& out;
  const Plan& plan;
  int64_t row;         // first row of the chunk
  int64_t chunk_rows;  // live rows in it
  float* tiles;        // packed rows of the chunk
  RowState state;      // of all code tasks: [code_tasks][chunk]
  float* scratch;      // per task
  int64_t scratch_stride;
  float* column_sums;  // [row_tasks][k]
};

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

// Raises *ref to the row's maximum (given by lanes) if that is greater, and says by what factor sums taken
// against the old reference must be multiplied (1 when it stays).
IBQ_INLINE float raise_reference(F maxima, float* ref) {
  if (!any_greater(maxima, set1(*ref))) return 1.0f;
  float raised = horizontal_max(maxima);
  float alpha = exp_scalar(*ref - raised);
  *ref = raised;
  return alpha;
}

template <bool kLse, bool kReadout, bool kEntropy>
void forward_task(const ForwardContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  float* packed = c.scratch + c.scratch_stride * task;
  float* rows_scratch = packed + kBlock * plan.d;
  float* bias = rows_scratch + (kReadout ? kBlock * plan.padded : 0);
  float* logits = bias + kBlock;
  const int64_t base = (int64_t)range.code_task * plan.chunk;
  const float inverse_tau = 1.0f / c.out.temperature;
  const float gap = negligible_gap(c.problem);

  for (int64_t r = range.row0; r < range.row1; ++r) {
    const int64_t at = base + r;
    const F lowest = set1(-__builtin_inff());
    store(c.state.best + at * kWidth, lowest);
    store_i(c.state.best_at + at * kWidth, I{});
    if (kLse) {
      c.state.ref[at] = -__builtin_inff();
      store(c.state.sum + at * kWidth, F{});
    }
    if (kEntropy) {
      c.state.ref_t[at] = -__builtin_inff();
      store(c.state.sum_t + at * kWidth, F{});
      store(c.state.moment_t + at * kWidth, F{});
    }
    if (kReadout) memset(c.state.readout + at * plan.padded, 0, sizeof(float) * plan.padded);
  }

  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const Block block =
        load_block(c.problem, plan, code0, range.code1, packed, kReadout ? rows_scratch : nullptr, bias);
    const int columns = block.panels * kNR;
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      logits_tile(c.tiles + r * plan.d, packed, plan.d, block.panels, c.problem.scale, bias, logits);
      float alpha[kMR];
      bool live = false;  // whether the tile adds anything to the readout
      for (int i = 0; i < kMR; ++i) {
        const int64_t at = base + r + i;
        float* x = logits + i * kBlock;
        update_best(x, columns, (int32_t)code0, c.state.best + at * kWidth, c.state.best_at + at * kWidth);
        const F maxima = kLse || kEntropy ? lane_maxima(x, columns) : F{};
        if (kEntropy && !negligible(maxima * set1(inverse_tau), c.state.ref_t[at], gap)) {
          float old = c.state.ref_t[at];
          F scale = set1(raise_reference(maxima * set1(inverse_tau), c.state.ref_t + at));
          F ref = set1(c.state.ref_t[at]);
          F sum = load(c.state.sum_t + at * kWidth) * scale;
          // moment against the new reference: sum of e (y - new) = old moment + (old - new) * old sum
          F moment = load(c.state.moment_t + at * kWidth) * scale;
          if (old != c.state.ref_t[at] && old > -__builtin_inff())
            moment += sum * set1(old - c.state.ref_t[at]);
          for (int j = 0; j < columns; j += kWidth) {
            F y = load(x + j) * set1(inverse_tau) - ref;
            F e = exp_of(y);
            sum += e;
            moment += e * max_of(y, set1(-1e4f));
          }
          store(c.state.sum_t + at * kWidth, sum);
          store(c.state.moment_t + at * kWidth, moment);
        }
        if (kLse) {
          alpha[i] = 1.0f;
          if (negligible(maxima, c.state.ref[at], gap)) {
            if (kReadout) memset(x, 0, sizeof(float) * columns);
            continue;
          }
          live = true;
          alpha[i] = raise_reference(maxima, c.state.ref + at);
          F ref = set1(c.state.ref[at]);
          F sum = load(c.state.sum + at * kWidth) * set1(alpha[i]);
          for (int j = 0; j < columns; j += kWidth) {
            F e = exp_of(load(x + j) - ref);
            sum += e;
            if (kReadout) store(x + j, e);
          }
          store(c.state.sum + at * kWidth, sum);
        }
      }
      if (kReadout && live)
        combine_tile(logits, block.rows, block.codes, plan.padded, alpha,
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
  float ref = -__builtin_inff(), ref_t = -__builtin_inff();
  for (int t = 0; t < plan.code_tasks; ++t) {
    const int64_t at = (int64_t)t * plan.chunk + r;
    for (int l = 0; l < kWidth; ++l) {
      float v = c.state.best[at * kWidth + l];
      int64_t i = c.state.best_at[at * kWidth + l];
      if (v > best || (v == best && i < best_at)) best = v, best_at = i;
    }
    if (kLse && !(c.state.ref[at] <= ref)) ref = c.state.ref[at];
    if (kEntropy && !(c.state.ref_t[at] <= ref_t)) ref_t = c.state.ref_t[at];
  }
  const bool none = !(best > -__builtin_inff());
  if (c.out.indices) c.out.indices[row] = none ? 0 : best_at;
  if (c.out.max) c.out.max[row] = none ? __builtin_nanf("") : best;
  if (kLse) {
    double sum = 0;
    for (int t = 0; t < plan.code_tasks; ++t) {
      const int64_t at = (int64_t)t * plan.chunk + r;
      sum += horizontal_sum(load(c.state.sum + at * kWidth)) * exp((double)c.state.ref[at] - ref);
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
    double sum = 0, moment = 0;
    for (int t = 0; t < plan.code_tasks; ++t) {
      const int64_t at = (int64_t)t * plan.chunk + r;
      const double shift = (double)c.state.ref_t[at] - ref_t;
      const double w = exp(shift), s = horizontal_sum(load(c.state.sum_t + at * kWidth));
      sum += s * w;
      if (w > 0) moment += (horizontal_sum(load(c.state.moment_t + at * kWidth)) + shift * s) * w;
    }
    c.out.lse_tau[row] = ref_t + log(sum);
    c.out.row_entropy[row] = (float)(log(sum) - moment / sum);
  }
}

// y - lse for a float64 lse, without losing what float32 can hold of the difference.
struct SplitLse {
  F high, low;
  explicit SplitLse(double lse) : high(set1((float)lse)), low(set1((float)(lse - (double)(float)lse))) {}
  IBQ_INLINE F below(F y) const { return (y - high) - low; }
};

// Second sweep: column sums of p = exp(S/tau - lse_tau), this task's rows and codes.
inline void mean_prob_task(const ForwardContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  float* packed = c.scratch + c.scratch_stride * task;
  float* bias = packed + kBlock * plan.d;
  float* logits = bias + kBlock;
  const F inverse_tau = set1(1.0f / c.out.temperature);
  const float gap = negligible_gap(c.problem);
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const Block block = load_block(c.problem, plan, code0, range.code1, packed, nullptr, bias);
    const int columns = block.panels * kNR;
    float sums[kBlock] = {};
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      logits_tile(c.tiles + r * plan.d, packed, plan.d, block.panels, c.problem.scale, bias, logits);
      for (int i = 0; i < kMR && r + i < c.chunk_rows; ++i) {
        const SplitLse lse(c.out.lse_tau[c.row + r + i]);
        if (negligible(lane_maxima(logits + i * kBlock, columns) * inverse_tau, lse.high[0], gap)) continue;
        for (int j = 0; j < columns; j += kWidth)
          store(sums + j, load(sums + j) + exp_of(lse.below(load(logits + i * kBlock + j) * inverse_tau)));
      }
    }
    float* total = c.column_sums + (int64_t)range.row_task * plan.k + code0;
    for (int64_t j = 0; j < block.codes; ++j) total[j] += sums[j];
  }
}

template <bool kLse, bool kReadout, bool kEntropy>
bool run_forward(const Problem& p, const Forward& out, const Parallel& parallel) {
  const Plan plan(p, parallel.threads);
  Workspace workspace;
  ForwardContext c{p, out, plan, 0, 0, nullptr, {}, nullptr, 0, nullptr};
  const int64_t states = (int64_t)plan.code_tasks * plan.chunk;
  c.scratch_stride =
      round_up(kBlock * plan.d + (kReadout ? kBlock * plan.padded : 0) + kBlock + kMR * kBlock, 16);
  workspace.add(&c.tiles, plan.chunk * plan.d);
  workspace.add(&c.scratch, c.scratch_stride * plan.tasks());
  workspace.add(&c.state.best, states * kWidth);
  workspace.add(&c.state.best_at, states * kWidth);
  if (kLse) {
    workspace.add(&c.state.ref, states);
    workspace.add(&c.state.sum, states * kWidth);
  }
  if (kReadout) workspace.add(&c.state.readout, states * plan.padded);
  const bool mean = kEntropy && out.mean_prob;
  if (kEntropy) {
    workspace.add(&c.state.ref_t, states);
    workspace.add(&c.state.sum_t, states * kWidth);
    workspace.add(&c.state.moment_t, states * kWidth);
    if (mean) workspace.add(&c.column_sums, (int64_t)plan.row_tasks * plan.k);
  }
  if (!workspace.allocate()) return false;
  if (mean) memset(c.column_sums, 0, sizeof(float) * plan.row_tasks * plan.k);

  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    pack_row_tiles(p, p.z, c.row, c.chunk_rows, c.tiles, parallel);
    run_tasks(parallel, plan.tasks(), [&](int t) { forward_task<kLse, kReadout, kEntropy>(c, t); });
    const int tasks = (int)min_of(parallel.threads, c.chunk_rows);
    run_tasks(parallel, tasks, [&](int t) {
      for (int64_t r = c.chunk_rows * t / tasks; r < c.chunk_rows * (t + 1) / tasks; ++r)
        merge_row<kLse, kReadout, kEntropy>(c, r);
    });
    if (mean) run_tasks(parallel, plan.tasks(), [&](int t) { mean_prob_task(c, t); });
  }
  if (mean)
    for (int64_t j = 0; j < plan.k; ++j) {
      float sum = 0;
      for (int t = 0; t < plan.row_tasks; ++t) sum += c.column_sums[t * plan.k + j];
      out.mean_prob[j] = sum / (float)plan.n;
    }
  return true;
}

inline bool forward(const Problem& p, const Forward& out, const Parallel& parallel) {
  const bool lse = out.lse, readout = out.readout, entropy = out.row_entropy;
  if (readout)
    return entropy ? run_forward<true, true, true>(p, out, parallel)
                   : run_forward<true, true, false>(p, out, parallel);
  if (lse)
    return entropy ? run_forward<true, false, true>(p, out, parallel)
                   : run_forward<true, false, false>(p, out, parallel);
  return entropy ? run_forward<false, false, true>(p, out, parallel)
                 : run_forward<false, false, false>(p, out, parallel);
}
