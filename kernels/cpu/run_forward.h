// The forward call: which sweeps it takes, its workspace and its chunks of rows.
#pragma once

// What a few tiles spread over the chunk show against one block of codes. It only chooses between ways to the
// same results.
//   peaked  P: the mean of sum exp(x - max) over their rows is the block's size where P is flat, and 1 where
//           one code has it all. The readout comes along with the first sweep (2 products), or after it over
//           live tiles alone (1 product and what is live of 2).
//   flat    p: so many entries are candidates against the block's own maximum that lists would overflow.
struct Probe {
  bool peaked, flat;
};

template <bool kPairs>
Probe probe_rows(const ForwardContext& c) {
  const Plan& plan = c.plan;
  float* packed = c.scratch;
  float* bias = packed + kBlock * words<kPairs>(plan.d) + words<kPairs>(kBlock) * plan.padded;
  float* logits = bias + kBlock;
  const Block block = load_block<kPairs>(c.problem, plan, 0, min_of(kBlock, plan.k), packed, nullptr, bias);
  const int64_t tiles = (c.chunk_rows + kMR - 1) / kMR, probes = min_of(tiles, 4);
  const float list_depth = candidate_gap(c.problem) * c.out.temperature;
  double effective = 0;
  int64_t rows = 0, candidates = 0;
  for (int64_t q = 0; q < probes; ++q) {
    const int64_t r = tiles * q / probes * kMR;
    logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                        c.problem.scale, bias, logits);
    for (int i = 0; i < kMR && r + i < c.chunk_rows; ++i, ++rows) {
      const float* x = logits + i * kBlock;
      const float top = horizontal_max(lane_maxima(x, block.panels * kNR));
      F sum = F{};
      for (int j = 0; j < block.panels * kNR; j += kWidth) sum += exp_of(load(x + j) - set1(top));
      effective += horizontal_sum(sum);
      for (int j = 0; j < kBlock; ++j) candidates += x[j] >= top - list_depth;
    }
  }
  const double entries = (double)(kBlock * rows);
  return {effective < 0.04 * entries, (double)candidates > 0.75 * entries};
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
  // Lists go with the readout: of the calls that have both groups, the backward wants them too.
  const bool mean = kEntropy && out.mean_prob;
  if (bounded && kReadout && mean) c.lists = Candidates(out.candidates, out.candidate_bytes, p, plan.tasks());
  const bool may_list = c.lists.parts > 0;
  const bool may_keep = bounded && kReadout && mean && out.candidates;
  int32_t dense = 0;
  c.dense = &dense;
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
  if (kEntropy) {
    workspace.add(&c.state.sum_t, states * 2 * kWidth);
    workspace.add(&c.state.moment_t, states * 2 * kWidth);
    if (mean) workspace.add(&c.column_sums, (int64_t)plan.row_tasks * plan.k);
    if (may_list) workspace.add(&c.cursors, states);
    if (may_list) workspace.add(&c.pools, plan.tasks());
  }
  if (bounded) {
    workspace.add(&c.block_max, plan.chunk * c.blocks);
    if (!c.bound) workspace.add(&c.bound, 2 * c.call_tiles * c.blocks);
  }
  if (!workspace.allocate()) return false;
  if (mean) memset(c.column_sums, 0, sizeof(float) * plan.row_tasks * plan.k);

  if (may_list) {
    for (int t = 0; t < plan.tasks(); ++t) c.pools[t] = {0, -1, 0};
    memset(c.lists.heads, -1, sizeof(int32_t) * c.lists.parts * c.lists.rows);
  }

  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    pack_row_tiles<kPairs>(p, p.z, c.row, c.chunk_rows, c.tiles, parallel);
    const Probe probe = kReadout && bounded ? probe_rows<kPairs>(c) : Probe{false, false};
    const bool later = probe.peaked;
    if (c.row == 0 && may_keep && !probe.peaked) {
      // all of S where it fits, else beside the lists, or in their place where there will be none
      c.kept = KeptLogits(out.candidates, out.candidate_bytes, p);
      if (c.kept.nearly_all(p.k)) dense = 1;
      if (c.lists.parts && !dense && !probe.flat)
        c.kept = KeptLogits(out.candidates, out.candidate_bytes - listed_bytes(out.candidate_bytes, p), p);
    }
    if (probe.flat) dense = 1;
    if (dense) c.lists = {};
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
    // a row without a finite log-sum-exp has no probabilities to list, yet counts in every mean
    for (int64_t r = 0; r < c.chunk_rows && c.lists.parts; ++r)
      if (!isfinite(out.lse_tau[c.row + r])) dense = 1;
    if (dense) c.lists = {};
    if (mean)
      run_tasks(parallel, plan.tasks(),
                [&](int t) { c.lists.parts ? listed_mean_prob_task(c, t) : mean_prob_task<kPairs>(c, t); });
  }
  if (out.candidates) {
    static_cast<int32_t*>(out.candidates)[0] = c.lists.parts;
    static_cast<int32_t*>(out.candidates)[1] = (int32_t)c.kept.blocks;
  }
  if (mean)
    for (int64_t j = 0; j < plan.k; ++j) {
      float sum = 0;
      for (int t = 0; t < plan.row_tasks; ++t) sum += c.column_sums[t * plan.k + j];
      out.mean_prob[j] = sum / (float)plan.n;
    }
  return true;
}
