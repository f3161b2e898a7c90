// Backward: one sweep in which a block of codes meets all rows; each tile's S (and G = g E^T) is
// recomputed in L1, turned into dS in place, and spent at once on dz += dS E; the dS of kGroup rows then
// feeds dE += dS^T z while the block's gradient sits in L2. No N x K array, nothing shared between
// tasks but read-only operands: dz is kept per code range and dE per row range, added up in order.
//
// A row that one code has nearly whole (P > kWinner) gets its winner's dS as minus the sum of its other
// entries, which is what it is exactly (a row of dS adds up to 0): computed by itself it would be the
// rounding left by two nearly equal numbers, times a whole code. It stays out of the products and is added at
// the end.
//
// The entropy group needs r_i = sum_k p_ik c_k of whole rows first: one more sweep of S.
#pragma once

// Well above 1/2, so that two codes never both win and ties do not round past it.
constexpr float kWinner = 0.75f;

// A row's winner in one group of one code task: its code (-1: none) and the sum of the row's other entries.
struct Winner {
  int64_t code;
  double others;
};

struct BackwardContext {
  const Problem& problem;
  const Backward& in;
  const Plan& plan;
  int64_t row = 0, chunk_rows = 0;
  float* tiles = nullptr;         // packed rows of z
  float* cotangents = nullptr;    // packed rows of g
  const float* z_rows = nullptr;  // [words(chunk_rows)][padded]
  float* delta = nullptr;         // [chunk] g_i . o_i
  float* row_dot = nullptr;       // [code_tasks][chunk] partial r_i
  // c less its mean, [k]: a constant in c cancels in c_j - r_i, so it would only add its rounding
  float* centered = nullptr;
  Winner* winners = nullptr;    // [2][code_tasks][chunk]
  float* grad_z = nullptr;      // [code_tasks][chunk][padded]
  float* grad_codes = nullptr;  // [row_tasks][k][d] when row_tasks > 1, else the output itself
  float* grad_bias = nullptr;   // [row_tasks][k]
  float* scratch = nullptr;     // per task
  int64_t scratch_stride = 0;
  const float* bound = nullptr;  // [2][tiles][blocks] from the forward, or null
  int64_t call_tiles = 0, blocks = 0;

  // Whether a tile may matter to the gradient.
  template <bool kSelect, bool kEntropy>
  bool live(int64_t r, int64_t code0, float gap) const {
    return (kSelect && tile_live(bound, call_tiles, blocks, 0, row + r, code0, gap)) ||
           (kEntropy && tile_live(bound, call_tiles, blocks, 1, row + r, code0, gap));
  }
  template <bool kSelect, bool kEntropy>
  bool any_live(int64_t row0, int64_t row1, int64_t code0, float gap) const {
    for (int64_t r = row0; r < row1; r += kMR)
      if (live<kSelect, kEntropy>(r, code0, gap)) return true;
    return false;
  }
};

template <bool kPairs>
void row_dot_task(const BackwardContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  float* packed = c.scratch + c.scratch_stride * task;
  float* bias = packed + kBlock * words<kPairs>(plan.d);
  float* logits = bias + kBlock;
  float* dots = c.row_dot + (int64_t)range.code_task * plan.chunk;
  const float inverse_tau = 1.0f / c.in.temperature;
  const float gap = negligible_gap(c.problem);
  for (int64_t r = range.row0; r < range.row1; ++r) dots[r] = 0.0f;
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    if (!c.any_live<false, true>(range.row0, range.row1, code0, gap)) continue;
    const Block block = load_block<kPairs>(c.problem, plan, code0, range.code1, packed, nullptr, bias);
    const int columns = block.panels * kNR;
    float weights[kBlock] = {};
    memcpy(weights, c.centered + code0, sizeof(float) * block.codes);
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      if (!tile_live(c.bound, c.call_tiles, c.blocks, 1, c.row + r, code0, gap)) continue;
      logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                          c.problem.scale, bias, logits);
      for (int i = 0; i < kMR && r + i < c.chunk_rows; ++i) {
        const LogProb log_p(c.in.lse_tau[c.row + r + i], inverse_tau);
        F sum = F{};
        const float* x = logits + i * kBlock;
        if (negligible(lane_maxima(x, columns), log_p.high[0], gap * c.in.temperature)) continue;
        for (int j = 0; j < columns; j += kWidth) sum += exp_of(log_p.of(load(x + j))) * load(weights + j);
        dots[r + i] += (float)horizontal_sum(sum);
      }
    }
  }
}

// Which groups a row of a tile still matters to.
struct Matters {
  bool select, entropy;
};

// Takes the winner, if it stands in this row of a tile, out of dS; returns dS with it zeroed.
IBQ_INLINE F leave_out_winner(F p, F ds, int64_t code, Winner* winner) {
  if (!any_greater(p, set1(kWinner))) return ds;
  const I wins = p > set1(kWinner);
  for (int l = 0; l < kWidth; ++l)
    if (wins[l]) winner->code = code + l;
  return wins ? F{} : ds;
}

// dS of one row of a tile, in place of its logits x; g: its row of g E^T; winner: of [2] groups.
template <bool kSelect, bool kEntropy>
IBQ_INLINE void logit_gradient_row(const BackwardContext& c, int64_t r, int64_t code0, int columns,
                                   Matters matters, const float* g, const float* weights, Winner* select,
                                   Winner* entropy, float* x) {
  const int64_t row = c.row + r;
  const F delta = set1(kSelect ? c.delta[r] : 0.0f);
  const LogProb select_log(kSelect ? c.in.lse[row] : 0.0);
  const LogProb entropy_log(kEntropy ? c.in.lse_tau[row] : 0.0, 1.0f / c.in.temperature);
  // p/tau [ -a (log p + H) + (c_j - r)/N ] = p [ log p * slope + c_j * share + offset ]
  F slope = F{}, share = F{}, offset = F{};
  if (kEntropy) {
    const float a = c.in.grad_row_entropy[row], tau = c.in.temperature;
    const float inverse_n = 1.0f / (float)c.problem.n;
    float dot = 0;
    for (int t = 0; t < c.plan.code_tasks; ++t) dot += c.row_dot[(int64_t)t * c.plan.chunk + r];
    slope = set1(-a / tau);
    share = set1(inverse_n / tau);
    offset = set1((-a * c.in.row_entropy[row] - dot * inverse_n) / tau);
  }
  F select_sum = F{}, entropy_sum = F{};
  for (int j = 0; j < columns; j += kWidth) {
    const F v = load(x + j);
    F ds = F{};
    if (kSelect && matters.select) {
      const F p = exp_of(select_log.of(v));
      ds = leave_out_winner(p, p * (load(g + j) - delta), code0 + j, select);
      select_sum += ds;
    }
    if (kEntropy && matters.entropy) {
      const F log_p = entropy_log.of(v);
      const F p = exp_of(log_p);
      const F d = p * (max_of(log_p, set1(-1e4f)) * slope + (load(weights + j) * share + offset));
      const F others = leave_out_winner(p, d, code0 + j, entropy);
      entropy_sum += others;
      ds += others;
    }
    store(x + j, ds);
  }
  if (kSelect) select->others += horizontal_sum(select_sum);
  if (kEntropy) entropy->others += horizontal_sum(entropy_sum);
}

// d(-norm_weight |E|^2) of one code, given the column sum of its dS.
inline void add_norm_gradient(const BackwardContext& c, int64_t code, float bias_grad, float* out) {
  add_scaled_row(c.problem.dtype, c.problem.codebook, code, c.plan.d,
                 -2.0f * c.problem.norm_weight * bias_grad, out);
}

// Adds the winners' dS: dz of the rows [row0, row1), or dE and dbias of the codes [code0, code1).
inline void spend_winners(const BackwardContext& c, int64_t row0, int64_t row1, int64_t code0, int64_t code1,
                          bool to_z) {
  const Plan& plan = c.plan;
  const Problem& p = c.problem;
  auto spend = [&](const Winner* group, int64_t r) {
    int64_t code = -1;
    double others = 0;
    for (int t = 0; t < plan.code_tasks; ++t) {
      const Winner& w = group[(int64_t)t * plan.chunk + r];
      others += w.others;
      if (w.code >= 0) code = w.code;
    }
    if (code < code0 || code >= code1) return;
    const float ds = (float)-others, scaled = p.scale * ds;
    if (to_z) {
      add_scaled_row(p.dtype, p.codebook, code, plan.d, scaled, c.in.grad_z + (c.row + r) * plan.d);
    } else {
      add_scaled_row(p.dtype, p.z, c.row + r, plan.d, scaled, c.grad_codes + code * plan.d);
      if (p.norm_weight != 0.0f) add_norm_gradient(c, code, ds, c.grad_codes + code * plan.d);
      if (c.grad_bias) c.grad_bias[code] += ds;
    }
  };
  for (int64_t r = row0; r < row1; ++r) {
    if (c.in.grad_z_q) spend(c.winners, r);
    if (c.in.row_entropy) spend(c.winners + (int64_t)plan.code_tasks * plan.chunk, r);
  }
}

// dE += dS^T z for the rows [r0, r1) of a group, whose dS stands in `logits` ([kGroup][kBlock]).
template <bool kPairs>
void spend_run(const BackwardContext& c, const Block& block, const float* logits, int64_t group, int64_t r0,
               int64_t r1, float* block_grad) {
  const int64_t live = min_of(r1, c.chunk_rows) - r0;
  accumulate_transposed<kPairs>(logits + (r0 - group) * kBlock, c.z_rows + words<kPairs>(r0) * c.plan.padded,
                                live, block.codes, c.plan.padded, block_grad);
}

template <bool kSelect, bool kEntropy>
IBQ_INLINE Matters row_matters(const BackwardContext& c, int64_t r, const float* x, int columns, float gap) {
  if (r >= c.chunk_rows) return {false, false};
  const F maxima = lane_maxima(x, columns);
  const int64_t row = c.row + r;
  return {kSelect && !negligible(maxima, (float)c.in.lse[row], gap),
          kEntropy && !negligible(maxima * set1(1.0f / c.in.temperature), (float)c.in.lse_tau[row], gap)};
}

template <bool kPairs, bool kSelect, bool kEntropy>
void backward_task(const BackwardContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  float* packed = c.scratch + c.scratch_stride * task;
  float* bias = packed + kBlock * words<kPairs>(plan.d);
  float* logits = bias + kBlock;               // [kGroup][kBlock]: S, then dS
  float* products = logits + kGroup * kBlock;  // [kMR][kBlock]: G
  float* rows_scratch = products + kMR * kBlock;
  float* block_grad = rows_scratch + kBlock * plan.padded;  // [kBlock][padded]
  float zero_bias[kBlock] = {};
  float ones[kMR];
  for (int i = 0; i < kMR; ++i) ones[i] = 1.0f;
  const float gap = negligible_gap(c.problem);
  float* grad_z = c.grad_z + (int64_t)range.code_task * plan.chunk * plan.padded;
  memset(grad_z + range.row0 * plan.padded, 0, sizeof(float) * (range.row1 - range.row0) * plan.padded);

  const bool with_bias = c.grad_bias || c.problem.norm_weight != 0.0f;
  Winner* select = c.winners + (int64_t)range.code_task * plan.chunk;
  Winner* entropy = select + (int64_t)plan.code_tasks * plan.chunk;
  for (int64_t r = range.row0; r < range.row1; ++r) select[r] = entropy[r] = {-1, 0.0};

  float* part = c.grad_codes + (int64_t)range.row_task * plan.k * plan.d;
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    float* out = part + code0 * plan.d;
    if (!c.any_live<kSelect, kEntropy>(range.row0, range.row1, code0, gap)) {
      if (c.row == 0) memset(out, 0, sizeof(float) * min_of(kBlock, range.code1 - code0) * plan.d);
      continue;
    }
    const Block block = load_block<kPairs>(c.problem, plan, code0, range.code1, packed, rows_scratch, bias);
    const int columns = block.panels * kNR;
    float weights[kBlock] = {}, bias_grad[kBlock] = {};
    if (kEntropy) memcpy(weights, c.centered + code0, sizeof(float) * block.codes);
    memset(block_grad, 0, sizeof(float) * kBlock * plan.padded);
    for (int64_t group = range.row0; group < range.row1; group += kGroup) {
      const int64_t group_end = min_of(group + kGroup, range.row1);
      int64_t run = -1;  // first row of the run of tiles whose dS waits to be spent on dE
      for (int64_t r = group; r < group_end; r += kMR) {
        float* x = logits + (r - group) * kBlock;
        Matters rows[kMR];
        Matters tile = {false, false};
        const bool maybe = c.live<kSelect, kEntropy>(r, code0, gap);
        if (maybe)
          logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d),
                              block.panels, c.problem.scale, bias, x);
        for (int i = 0; i < kMR && maybe; ++i) {
          rows[i] = row_matters<kSelect, kEntropy>(c, r + i, x + i * kBlock, columns, gap);
          tile.select |= rows[i].select;
          tile.entropy |= rows[i].entropy;
        }
        if (!tile.select && !tile.entropy) {
          if (run >= 0) spend_run<kPairs>(c, block, logits, group, run, r, block_grad);
          run = -1;
          continue;
        }
        if (kSelect && tile.select)
          logits_tile<kPairs>(c.cotangents + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d),
                              block.panels, 1.0f, zero_bias, products);
        for (int i = 0; i < kMR; ++i) {
          if (rows[i].select || rows[i].entropy)
            logit_gradient_row<kSelect, kEntropy>(c, r + i, code0, columns, rows[i], products + i * kBlock,
                                                  weights, select + r + i, entropy + r + i, x + i * kBlock);
          else
            memset(x + i * kBlock, 0, sizeof(float) * columns);
          if (with_bias)
            for (int j = 0; j < columns; j += kWidth)
              store(bias_grad + j, load(bias_grad + j) + load(x + i * kBlock + j));
        }
        combine_tile<kPairs>(x, block.rows, block.codes, plan.padded, ones, grad_z + r * plan.padded);
        if (run < 0) run = r;
      }
      if (run >= 0) spend_run<kPairs>(c, block, logits, group, run, group_end, block_grad);
    }
    // The first chunk writes: a gradient as large as the codebook is swept once, by the thread that owns it.
    for (int64_t j = 0; j < block.codes; ++j) {
      const float* from = block_grad + j * plan.padded;
      float* to = out + j * plan.d;
      if (c.row == 0)
        for (int64_t e = 0; e < plan.d; ++e) to[e] = c.problem.scale * from[e];
      else
        for (int64_t e = 0; e < plan.d; ++e) to[e] += c.problem.scale * from[e];
    }
    if (c.problem.norm_weight != 0.0f)
      for (int64_t j = 0; j < block.codes; ++j)
        add_norm_gradient(c, code0 + j, bias_grad[j], out + j * plan.d);
    if (c.grad_bias)
      for (int64_t j = 0; j < block.codes; ++j)
        c.grad_bias[range.row_task * plan.k + code0 + j] += bias_grad[j];
  }
}

// delta_i = g_i . o_i of the chunk's rows.
inline void fill_delta(const BackwardContext& c, int64_t r0, int64_t r1, float* scratch_row) {
  for (int64_t r = r0; r < r1; ++r) {
    const float* g =
        widen_rows(c.problem.dtype, c.in.grad_z_q, c.row + r, 1, c.plan.d, c.plan.padded, scratch_row);
    const float* o = c.in.readout + (c.row + r) * c.plan.d;
    double dot = 0;
    for (int64_t j = 0; j < c.plan.d; ++j) dot += (double)g[j] * o[j];
    c.delta[r] = (float)dot;
  }
}

// Adds the parts [parts][count] up into out, a task for each slice.
inline void reduce_parts(const float* parts, int count_of_parts, int64_t stride, int64_t count, float* out,
                         const Parallel& parallel) {
  const int tasks = (int)min_of(parallel.threads, count);
  run_tasks(parallel, tasks, [&](int t) {
    for (int64_t i = count * t / tasks; i < count * (t + 1) / tasks; ++i) {
      float sum = parts[i];
      for (int q = 1; q < count_of_parts; ++q) sum += parts[q * stride + i];
      out[i] = sum;
    }
  });
}

template <bool kPairs, bool kSelect, bool kEntropy>
bool run_backward(const Problem& p, const Backward& in, const Parallel& parallel) {
  const Plan plan(p, parallel.threads);
  Workspace workspace;
  BackwardContext c{p, in, plan};
  tile_grid(plan.n, plan.k, &c.call_tiles, &c.blocks);
  c.bound = c.blocks > 0 && p.dropped_mass > 0 ? in.tile_bound : nullptr;
  c.scratch_stride = round_up(
      kBlock * words<kPairs>(plan.d) + kBlock + (kGroup + kMR) * kBlock + 2 * kBlock * plan.padded, 16);
  const bool split_rows = plan.row_tasks > 1;
  float* widened = nullptr;
  float* row_scratch = nullptr;
  workspace.add(&c.tiles, plan.chunk * words<kPairs>(plan.d));
  workspace.add(&c.scratch, c.scratch_stride * plan.tasks());
  workspace.add(&c.grad_z, plan.code_tasks * plan.chunk * plan.padded);
  workspace.add(&widened, plan.chunk * plan.padded);
  if (kSelect) {
    workspace.add(&c.cotangents, plan.chunk * words<kPairs>(plan.d));
    workspace.add(&c.delta, plan.chunk);
    workspace.add(&row_scratch, plan.padded * parallel.threads);
  }
  if (kEntropy) {
    workspace.add(&c.row_dot, plan.code_tasks * plan.chunk);
    workspace.add(&c.centered, plan.k);
  }
  workspace.add(&c.winners, 2 * plan.code_tasks * plan.chunk);
  if (split_rows) workspace.add(&c.grad_codes, plan.row_tasks * plan.k * plan.d);
  if (in.grad_bias) workspace.add(&c.grad_bias, plan.row_tasks * plan.k);
  if (!workspace.allocate()) return false;
  if (kEntropy) {
    double sum = 0;
    for (int64_t j = 0; j < plan.k; ++j) sum += in.grad_mean_prob[j];
    const double mean = sum / (double)plan.k;
    for (int64_t j = 0; j < plan.k; ++j) c.centered[j] = (float)(in.grad_mean_prob[j] - mean);
  }
  if (!split_rows) c.grad_codes = in.grad_codebook;
  if (c.grad_bias) memset(c.grad_bias, 0, sizeof(float) * plan.row_tasks * plan.k);

  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    pack_row_tiles<kPairs>(p, p.z, c.row, c.chunk_rows, c.tiles, parallel);
    if (kSelect) {
      pack_row_tiles<kPairs>(p, in.grad_z_q, c.row, c.chunk_rows, c.cotangents, parallel);
      const int tasks = (int)min_of(parallel.threads, c.chunk_rows);
      run_tasks(parallel, tasks, [&](int t) {
        fill_delta(c, c.chunk_rows * t / tasks, c.chunk_rows * (t + 1) / tasks,
                   row_scratch + t * plan.padded);
      });
    }
    c.z_rows = rows_operand<kPairs>(p.dtype, p.z, c.row, c.chunk_rows, plan.d, plan.padded, widened);
    if (kEntropy) run_tasks(parallel, plan.tasks(), [&](int t) { row_dot_task<kPairs>(c, t); });
    run_tasks(parallel, plan.tasks(), [&](int t) { backward_task<kPairs, kSelect, kEntropy>(c, t); });
    const int tasks = (int)min_of(parallel.threads, c.chunk_rows);
    run_tasks(parallel, tasks, [&](int t) {
      for (int64_t r = c.chunk_rows * t / tasks; r < c.chunk_rows * (t + 1) / tasks; ++r)
        for (int64_t j = 0; j < plan.d; ++j) {
          float sum = 0;
          for (int q = 0; q < plan.code_tasks; ++q)
            sum += c.grad_z[((int64_t)q * plan.chunk + r) * plan.padded + j];
          in.grad_z[(c.row + r) * plan.d + j] = p.scale * sum;
        }
    });
    run_tasks(parallel, tasks, [&](int t) {
      spend_winners(c, c.chunk_rows * t / tasks, c.chunk_rows * (t + 1) / tasks, 0, plan.k, true);
    });
    // into row task 0's part of dE where rows are split: it is added to the others below
    const int owners = (int)min_of(parallel.threads, plan.k);
    run_tasks(parallel, owners, [&](int t) {
      spend_winners(c, 0, c.chunk_rows, plan.k * t / owners, plan.k * (t + 1) / owners, false);
    });
  }
  if (split_rows)
    reduce_parts(c.grad_codes, plan.row_tasks, plan.k * plan.d, plan.k * plan.d, in.grad_codebook, parallel);
  if (in.grad_bias) reduce_parts(c.grad_bias, plan.row_tasks, plan.k, plan.k, in.grad_bias, parallel);
  return true;
}
