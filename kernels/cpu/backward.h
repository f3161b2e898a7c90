// Backward: one sweep in which a block of codes meets all rows; each tile's S (and G = g E^T) is
// recomputed in L1, turned into dS in place, and spent at once on dz += dS E; the dS of kGroup rows then
// feeds dE += dS^T z while the block's gradient sits in L2. Nothing that grows with N x K, nothing shared
// between tasks but read-only operands: dz is kept per code range and dE per row range, added up in order.
//
// A row that one code has nearly whole (P > kWinner) gets its winner's dS as minus the sum of its other
// entries, which is what it is exactly (a row of dS adds up to 0): computed by itself it would be the
// rounding left by two nearly equal numbers, times a whole code. It stays out of the products and is added at
// the end.
//
// The entropy group needs r_i = sum_k p_ik c_k of whole rows first: from the forward's candidates, or else in
// one more sweep of S. Tiles of S that the forward kept are not computed again.
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
  double* row_dot = nullptr;      // [code_tasks][chunk] partial r_i
  // c less its mean, [k]: a constant in c cancels in c_j - r_i, so it would only add its rounding
  float* centered = nullptr;
  Winner* winners = nullptr;    // [2][code_tasks][chunk]
  float* grad_z = nullptr;      // [code_tasks][chunk][padded]
  float* grad_codes = nullptr;  // [row_tasks][k][d] where parts of dE are added up before they are rounded to
                                // the output, else null
  float* grad_bias = nullptr;   // [row_tasks][k]
  float* scratch = nullptr;     // per task
  int64_t scratch_stride = 0;
  const float* bound = nullptr;  // [2][tiles][blocks] from the forward, or null
  KeptLogits kept = {};
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
  double* dots = c.row_dot + (int64_t)range.code_task * plan.chunk;
  const float inverse_tau = 1.0f / c.in.temperature;
  const float gap = negligible_gap(c.problem);
  for (int64_t r = range.row0; r < range.row1; ++r) dots[r] = 0;
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    if (!c.any_live<false, true>(range.row0, range.row1, code0, gap)) continue;
    const Block block = load_logit_block<kPairs>(c.problem, plan, c.kept, code0, range.code1, packed, bias);
    const int columns = block.panels * kNR;
    float weights[kBlock] = {};
    memcpy(weights, c.centered + code0, sizeof(float) * block.codes);
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      if (!tile_live(c.bound, c.call_tiles, c.blocks, 1, c.row + r, code0, gap)) continue;
      const float* tile_logits = logits;
      if (c.kept.has(code0))
        tile_logits = c.kept.at(c.row + r, code0);
      else
        logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d), block.panels,
                            c.problem.scale, bias, logits);
      for (int i = 0; i < kMR && r + i < c.chunk_rows; ++i) {
        const LogProb log_p(c.in.lse_tau[c.row + r + i], inverse_tau);
        F sum = F{};
        const float* x = tile_logits + i * kBlock;
        if (negligible(lane_maxima(x, columns), log_p.high[0], gap * c.in.temperature)) continue;
        for (int j = 0; j < columns; j += kWidth) sum += exp_of(log_p.of(load(x + j))) * load(weights + j);
        dots[r + i] += horizontal_sum(sum);
      }
    }
  }
}

// r_i of one row from its candidates.
inline void listed_row_dot(const BackwardContext& c, const Candidates& lists, int64_t r) {
  const Plan& plan = c.plan;
  const LogProb log_p(c.in.lse_tau[c.row + r], 1.0f / c.in.temperature);
  Carried sum = {F{}, F{}};
  for (int t = 0; t < lists.parts; ++t)
    for (int32_t at = lists.head(t, c.row + r); at >= 0;) {
      const CandidatePage& page = lists.page(t, at);
      if (page.next >= 0) prefetch_entries(lists.page(t, page.next), 0);
      for (int i = 0; i < page.fill; i += kWidth) {
        const int live = (int)min_of(kWidth, page.fill - i);
        const F p = exp_of(log_p.of(listed_logits(page.logits + i, live, log_p.high)));
        sum.add(p * gather(c.centered, page.codes + i, live));
      }
      at = page.next;
    }
  c.row_dot[r] = horizontal_sum(sum.sum) + horizontal_sum(sum.lost);
  for (int t = 1; t < plan.code_tasks; ++t) c.row_dot[(int64_t)t * plan.chunk + r] = 0;
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
    double dot = 0;
    for (int t = 0; t < c.plan.code_tasks; ++t) dot += c.row_dot[(int64_t)t * c.plan.chunk + r];
    slope = set1(-a / tau);
    share = set1(inverse_n / tau);
    offset = set1((-a * c.in.row_entropy[row] - (float)dot * inverse_n) / tau);
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

// A block's dE into the output or its part, at element `at`; overwrites block_grad where norms count.
template <DType T>
void write_block(const Problem& p, const Block& block, int64_t padded, const float* bias_grad, bool add,
                 float* block_grad, void* out, int64_t at) {
  for (int64_t j = 0; j < block.codes; ++j, at += p.d) {
    float* from = block_grad + j * padded;
    float scale = p.scale;
    if (p.norm_weight != 0.0f) {  // d(-norm_weight |E|^2), given the column sum of dS
      for (int64_t e = 0; e < p.d; ++e) from[e] *= scale;
      add_scaled_row(p.dtype, p.codebook, block.code0 + j, p.d, -2.0f * p.norm_weight * bias_grad[j], from);
      scale = 1.0f;
    }
    for (int64_t e = 0; e < p.d; e += kWidth) {
      F sum = load(from + e) * set1(scale);
      if (add) sum += load_live<T>(out, at + e, p.d - e);
      store_narrow<T>(out, at + e, sum, p.d - e);
    }
  }
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

  // Where dE goes: the parts or the output.
  const DType out_type = c.grad_codes ? DType::kFloat32 : c.problem.dtype;
  void* out = c.grad_codes ? static_cast<void*>(c.grad_codes) : c.in.grad_codebook;
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const int64_t at = ((int64_t)range.row_task * plan.k + code0) * plan.d;  // in elements
    if (!c.any_live<kSelect, kEntropy>(range.row0, range.row1, code0, gap)) {
      if (c.row == 0)
        memset(static_cast<char*>(out) + at * element_bytes(out_type), 0,
               element_bytes(out_type) * min_of(kBlock, range.code1 - code0) * plan.d);
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
        if (maybe && c.kept.has(code0)) {
          take_tile(c.kept.at(c.row + r, code0), columns, x);
          if (r + kMR < range.row1) prefetch_tile(c.kept.at(c.row + r + kMR, code0));
        } else if (maybe) {
          logits_tile<kPairs>(c.tiles + r * words<kPairs>(plan.d), packed, words<kPairs>(plan.d),
                              block.panels, c.problem.scale, bias, x);
        }
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
    for_dtype(out_type, [&](auto t) {
      write_block<decltype(t)::value>(c.problem, block, plan.padded, bias_grad, c.row > 0, block_grad, out,
                                      at);
    });
    if (c.grad_bias)
      for (int64_t j = 0; j < block.codes; ++j)
        c.grad_bias[range.row_task * plan.k + code0 + j] += bias_grad[j];
  }
}
