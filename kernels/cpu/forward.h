// Forward sweep: argmax, log-sum-exp, soft readout and the statistics of softmax(S/tau), one pass over S.
// The argmax alone is search.h's.
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
  KeptLogits kept = {};
  Candidates lists = {};           // none when the call is dense
  int32_t* dense = nullptr;        // set by a task that runs short of pages; the others then stop listing too
  CandidatePool* pools = nullptr;  // [tasks]
  CandidateCursor* cursors = nullptr;  // [code_tasks][chunk]
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

// Whether a task may go on listing: it has a page for each of its rows, if need be by shrinking their lists,
// and enough beyond that not to shrink them again soon.
inline bool make_room(const ForwardContext& c, int task, const Range& range, float list_depth) {
  if (__atomic_load_n(c.dense, __ATOMIC_RELAXED)) return false;
  const CandidatePart part{c.lists, task, c.pools[task]};
  const int64_t rows = range.row1 - range.row0;
  if (part.left() >= rows) return true;
  for (int64_t r = range.row0; r < min_of(range.row1, c.chunk_rows); ++r) {
    const int64_t at = (int64_t)range.code_task * c.plan.chunk + r;
    shrink(part, c.row + r, &c.cursors[at].page, c.state.ref[at] - list_depth);
  }
  if (part.left() >= rows + c.lists.pages_each / 16) return true;
  __atomic_store_n(c.dense, 1, __ATOMIC_RELAXED);
  return false;
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
  const float list_depth = candidate_gap(c.problem) * c.out.temperature;
  bool listing = kEntropy && c.lists.parts;

  for (int64_t r = range.row0; r < range.row1; ++r) {
    const int64_t at = base + r;
    if (listing) c.cursors[at].page = -1;
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
    listing = listing && make_room(c, task, range, list_depth);
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                          c.problem.scale, bias, logits);
      if (kEntropy && c.kept.has(code0)) keep_tile(logits, columns, c.kept.at(c.row + r, code0));
      float alpha[kMR];
      bool live = false;  // whether the tile adds anything to the readout
      for (int i = 0; i < kMR; ++i) {
        const int64_t at = base + r + i;
        float* x = logits + i * kBlock;
        update_best(x, columns, (int32_t)code0, c.state.best + at * kWidth, c.state.best_at + at * kWidth);
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
        if (listing && !spent_t && r + i < c.chunk_rows)
          append({c.lists, task, c.pools[task]}, c.row + r + i, &c.cursors[at].page, x, columns,
                 (int32_t)code0, (int32_t)(code0 + block.codes), c.state.ref[at] - list_depth);
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
  if (kEntropy) finish_keeping();
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
    if (!(c.state.ref[at] <= ref)) ref = c.state.ref[at];
  }
  // none: no logit above the padding's (kMasked), as where all are -inf, of which there is no distribution
  const bool none = !(best > -__builtin_inff()) || best_at >= plan.k;
  if (none) ref = __builtin_nanf("");
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
