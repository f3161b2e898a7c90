// What follows the forward's first sweep once the log-sum-exps are known: column sums of p, the readout of
// peaked rows, bounds of the tiles.
#pragma once

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
    const Block block = load_logit_block<kPairs>(c.problem, plan, c.kept, code0, range.code1, packed, bias);
    const int columns = block.panels * kNR;
    // Compensated: every row may add the same, and then every rounding goes the same way.
    float sums[kBlock] = {}, lost[kBlock] = {};
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      if (!tile_live(c.bound, c.call_tiles, c.blocks, 1, c.row + r, code0, gap)) continue;
      const float* tile_logits = logits;
      if (c.kept.has(code0))
        tile_logits = c.kept.at(c.row + r, code0);
      else
        logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                            c.problem.scale, bias, logits);
      float tile[kBlock] = {};
      for (int i = 0; i < kMR && r + i < c.chunk_rows; ++i) {
        const LogProb log_p(c.out.lse_tau[c.row + r + i], inverse_tau);
        const float* x = tile_logits + i * kBlock;
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

// The same from the candidates.
inline void listed_mean_prob_task(const ForwardContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  const float inverse_tau = 1.0f / c.out.temperature;
  const int64_t rows = min_of(range.row1, c.chunk_rows);
  CandidateCursor* cursors = c.cursors + (int64_t)range.code_task * plan.chunk;
  float* total = c.column_sums + (int64_t)range.row_task * plan.k;
  for (int64_t r = range.row0; r < rows; ++r) cursors[r] = {c.lists.head(task, c.row + r), 0};
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kSegment) {
    const int64_t end = min_of(code0 + kSegment, range.code1);
    double sums[kSegment] = {};
    for (int64_t r = range.row0; r < rows; ++r) {
      CandidateCursor at = cursors[r];
      if (at.page < 0) continue;
      if (r + 1 < rows && cursors[r + 1].page >= 0)
        prefetch_entries(c.lists.page(task, cursors[r + 1].page), cursors[r + 1].at);
      const LogProb log_p(c.out.lse_tau[c.row + r], inverse_tau);
      while (at.page >= 0) {
        const CandidatePage& page = c.lists.page(task, at.page);
        if (at.at == page.fill) {
          at = {page.next, 0};
          continue;
        }
        if (page.codes[at.at] >= end) break;
        if (at.at == 0 && page.next >= 0) prefetch_entries(c.lists.page(task, page.next), 0);
        __builtin_prefetch(page.codes + at.at + 64);
        __builtin_prefetch(page.logits + at.at + 64);
        int live = (int)min_of(kWidth, page.fill - at.at);
        while (page.codes[at.at + live - 1] >= end) --live;
        const F p = exp_of(log_p.of(listed_logits(page.logits + at.at, live, log_p.high)));
        add_at(sums, page.codes + at.at, (int32_t)code0, p, live);
        at.at += live;
      }
      cursors[r] = at;
    }
    for (int64_t j = code0; j < end; ++j) total[j] += (float)sums[j - code0];
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
