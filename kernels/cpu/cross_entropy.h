// Cross entropy of a linear head, forward and backward, in products of row groups with code blocks
// (group_tile.h). Nothing of size N x K: S lives as one group x block in L2, where the epilogues read it.
//
// Rows that take part are gathered first, so that ignored rows (and in the backward rows whose incoming
// gradient is 0) cost nothing. The backward leaves out a row tile x block in which every P is below
// dropped_mass / K and no target lies: what is dropped from a row is below 2^-32, where a float32 P - q is
// already rounded at 2^-24. With smoothing q is nowhere 0 and nothing is left out.
//
// The target's own entry, P - 1, is formed by expm1 in float64: a row that is nearly right keeps its digits.
//
// Gradients are added up in float32 and leave in the operands' dtype, a block of dW as soon as it has met all
// rows: bfloat16 needs no float32 [K, C] unless there are several chunks of rows.
#pragma once

struct CrossEntropyContext {
  const Problem& problem;
  const CrossEntropy& in;
  const Plan& plan;           // of the rows that take part
  int64_t* active = nullptr;  // [n] their positions in the call
  int64_t row = 0, chunk_rows = 0;
  int64_t strips = 0;
  void* gathered = nullptr;  // [chunk][d], dtype of the problem
  float* tiles = nullptr;    // packed rows of the chunk
  float* scratch = nullptr;  // per task
  int64_t scratch_stride = 0;
  // forward, [code_tasks][chunk], sums a vector each; target_logit [chunk]. Thousands of blocks add up to
  // `sum`: what rounding added to it too much is carried in `excess`.
  float *ref = nullptr, *sum = nullptr, *excess = nullptr, *target_logit = nullptr;
  double* logit_sum = nullptr;
  // backward: rows in strips [strips][words(chunk)][kNR]; grad_rows of each code task; grad_codes
  // [row_tasks][k][d] where parts of dW are added up before they go to the output, else null
  float *row_strips = nullptr, *grad_rows = nullptr, *grad_codes = nullptr, *grad_bias = nullptr;

  int64_t target(int64_t r) const { return in.targets[active[row + r]]; }
};

// One task's code block with the logits of a group against it, walked by both directions.
template <bool kPairs>
struct GroupSweep {
  float *packed, *bias, *logits;
  GroupSweep(const CrossEntropyContext& c, int task)
      : packed(c.scratch + c.scratch_stride * task),
        bias(packed + kBlock * words<kPairs>(c.plan.d)),
        logits(bias + kBlock) {}
  static int64_t floats(int64_t d) { return kBlock * words<kPairs>(d) + kBlock + kGroupRows * kLine; }
};

// Sum of a row's logits, the columns past the codebook left out.
IBQ_INLINE double sum_of_logits(const float* x, int64_t codes) {
  F sum = F{};
  int64_t j = 0;
  for (; j + kWidth <= codes; j += kWidth) sum += load(x + j);
  double total = horizontal_sum(sum);
  for (; j < codes; ++j) total += x[j];
  return total;
}

template <bool kPairs, bool kSmooth>
void cross_entropy_forward_task(const CrossEntropyContext& c, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  const GroupSweep<kPairs> sweep(c, task);
  const int64_t base = (int64_t)range.code_task * plan.chunk;
  const float gap = negligible_gap(c.problem);
  const int64_t depth = words<kPairs>(plan.d);
  for (int64_t at = base + range.row0; at < base + range.row1; ++at) {
    c.ref[at] = -__builtin_inff();
    store(c.sum + at * kWidth, F{});
    store(c.excess + at * kWidth, F{});
    if (kSmooth) c.logit_sum[at] = 0;
  }
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const Block block =
        load_block<kPairs>(c.problem, plan, code0, range.code1, sweep.packed, nullptr, sweep.bias);
    const int columns = block.panels * kNR;
    for (int64_t group = range.row0; group < range.row1; group += kGroupRows) {
      const int64_t end = min_of(group + kGroupRows, range.row1);
      group_logits<kPairs>(c.tiles + group * depth, (end - group) / kMR, sweep.packed, depth, block.panels,
                           sweep.bias, sweep.logits);
      for (int64_t r = group; r < min_of(end, c.chunk_rows); ++r) {
        const float* x = sweep.logits + (r - group) * kLine;
        const int64_t at = base + r, hit = c.target(r) - code0;
        if (hit >= 0 && hit < block.codes) c.target_logit[r] = x[hit];
        if (kSmooth) c.logit_sum[at] += sum_of_logits(x, block.codes);
        const F maxima = lane_maxima(x, columns);
        if (negligible(maxima, c.ref[at], gap)) continue;
        const F growth = set1(exp_scalar(-raise_reference(maxima, c.ref + at)));
        const F sum = load(c.sum + at * kWidth) * growth, ref = set1(c.ref[at]);
        F part = load(c.excess + at * kWidth) * -growth;
        for (int j = 0; j < columns; j += kWidth) part += exp_of(load(x + j) - ref);
        const F total = sum + part;
        store(c.excess + at * kWidth, (total - sum) - part);
        store(c.sum + at * kWidth, total);
      }
    }
  }
}

// Merges the code tasks' states of a row, in code order.
inline void merge_cross_entropy(const CrossEntropyContext& c, const CrossEntropyForward& out, int64_t r) {
  float ref = -__builtin_inff();
  for (int t = 0; t < c.plan.code_tasks; ++t) {
    const float v = c.ref[(int64_t)t * c.plan.chunk + r];
    if (!(v <= ref)) ref = v;
  }
  double sum = 0, logits = 0;
  for (int t = 0; t < c.plan.code_tasks; ++t) {
    const int64_t at = (int64_t)t * c.plan.chunk + r;
    const double own =
        horizontal_sum(load(c.sum + at * kWidth)) - horizontal_sum(load(c.excess + at * kWidth));
    sum += own * exp((double)c.ref[at] - ref);
    if (c.logit_sum) logits += c.logit_sum[at];
  }
  const double log_sum = log(sum), e = c.in.label_smoothing;
  double loss = ((double)ref - c.target_logit[r]) + log_sum;
  if (c.logit_sum) loss = (1 - e) * loss + e * ((ref - logits / (double)c.plan.k) + log_sum);
  out.loss[c.active[c.row + r]] = (float)loss;
  out.lse[c.active[c.row + r]] = ref + log_sum;
}

// dS of one row in place of its logits: weight * (P - q).
IBQ_INLINE void cross_entropy_row(float* x, int columns, int64_t codes, int64_t target, double lse,
                                  float weight, float smoothing, float share) {
  const LogProb log_p(lse);
  const F w = set1(weight), q = set1(share);
  double own = 0;
  const bool here = target >= 0 && target < codes;
  if (here) own = expm1((double)x[target] - lse) + ((double)smoothing - share);
  for (int j = 0; j < columns; j += kWidth) store(x + j, w * (exp_of(log_p.of(load(x + j))) - q));
  if (here) x[target] = (float)(weight * own);
}

// Whether a row tile's dS against a block must be formed: some P is not negligible, or a target lies here.
inline bool tile_matters(const CrossEntropyContext& c, const CrossEntropyBackward& in, const Block& block,
                         const float* x, int64_t r0, int64_t rows, float gap) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t hit = c.target(r0 + i) - block.code0;
    if (hit >= 0 && hit < block.codes) return true;
    const F maxima = lane_maxima(x + i * kLine, block.panels * kNR);
    if (!negligible(maxima, (float)in.lse[c.active[c.row + r0 + i]], gap)) return true;
  }
  return false;
}

// A block's gradient, strips [strips][kBlock][kNR], into rows of out.
template <DType T>
void write_codes(const float* strips, int64_t codes, int64_t d, bool add, void* out, int64_t at) {
  for (int64_t j = 0; j < codes; ++j, at += d)
    for (int64_t e = 0; e < d; e += kWidth) {
      F sum = load(strips + (e - e % kNR) * kBlock + j * kNR + e % kNR);
      if (add) sum += load_live<T>(out, at + e, d - e);
      store_narrow<T>(out, at + e, sum, d - e);
    }
}

template <bool kPairs>
void cross_entropy_backward_task(const CrossEntropyContext& c, const CrossEntropyBackward& in, int task) {
  const Plan& plan = c.plan;
  const Range range(plan, c.chunk_rows, task);
  const GroupSweep<kPairs> sweep(c, task);
  float* head_strips = sweep.packed + GroupSweep<kPairs>::floats(plan.d);  // [strips][words(kBlock)][kNR]
  float* block_grad = head_strips + words<kPairs>(kBlock) * plan.padded;   // [strips][kBlock][kNR]
  float* paired = block_grad + kBlock * plan.padded;                       // [kGroupRows / 2][kLine]
  const float* by_rows = kPairs ? paired : sweep.logits;                   // dS for group_transposed
  const int64_t depth = words<kPairs>(plan.d), row_stride = words<kPairs>(plan.chunk);
  const float smoothing = in.label_smoothing, share = (float)((double)smoothing / (double)plan.k);
  const float gap = smoothing > 0 ? __builtin_inff() : negligible_gap(c.problem);
  float* grad_rows = c.grad_rows + (int64_t)range.code_task * plan.chunk * plan.padded;
  for (int64_t s = 0; s < c.strips; ++s)
    memset(grad_rows + (s * plan.chunk + range.row0) * kNR, 0,
           sizeof(float) * (range.row1 - range.row0) * kNR);

  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const Block block =
        load_block<kPairs>(c.problem, plan, code0, range.code1, sweep.packed, nullptr, sweep.bias);
    pack_strips<kPairs>(c.problem.dtype, c.problem.codebook, code0, block.codes, plan.d,
                        words<kPairs>(kBlock), head_strips);
    const int columns = block.panels * kNR;
    float bias_grad[kBlock] = {};
    memset(block_grad, 0, sizeof(float) * kBlock * plan.padded);
    for (int64_t group = range.row0; group < range.row1; group += kGroupRows) {
      const int64_t tiles = (min_of(group + kGroupRows, range.row1) - group) / kMR;
      group_logits<kPairs>(c.tiles + group * depth, tiles, sweep.packed, depth, block.panels, sweep.bias,
                           sweep.logits);
      Runs runs;
      for (int64_t t = 0; t < tiles; ++t) {
        float* x = sweep.logits + t * kMR * kLine;
        const int64_t r0 = group + t * kMR, rows = min_of(kMR, c.chunk_rows - r0);
        if (!tile_matters(c, in, block, x, r0, rows, gap)) continue;
        runs.add(t);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = c.active[c.row + r0 + i];
          cross_entropy_row(x + i * kLine, columns, block.codes, in.targets[at] - code0, in.lse[at],
                            in.grad_loss[at], smoothing, share);
          for (int j = 0; c.grad_bias && j < columns; j += kWidth)
            store(bias_grad + j, load(bias_grad + j) + load(x + i * kLine + j));
        }
        if (rows < kMR) memset(x + rows * kLine, 0, sizeof(float) * (kMR - rows) * kLine);
        round_tile<kPairs>(x, columns, paired + t * kMR / 2 * kLine);
      }
      if (runs.count == 0) continue;
      group_combine<kPairs>(runs, sweep.logits, head_strips, block.codes, c.strips, plan.chunk,
                            grad_rows + group * kNR);
      group_transposed<kPairs>(runs, c.chunk_rows - group, by_rows, c.row_strips + words<kPairs>(group) * kNR,
                               block.codes, c.strips, row_stride, block_grad);
    }
    const int64_t at = ((int64_t)range.row_task * plan.k + code0) * plan.d;
    if (c.grad_codes) {
      write_codes<DType::kFloat32>(block_grad, block.codes, plan.d, c.row > 0, c.grad_codes, at);
    } else {
      for_dtype(c.problem.dtype, [&](auto t) {
        write_codes<decltype(t)::value>(block_grad, block.codes, plan.d, c.row > 0, in.grad_head, at);
      });
    }
    for (int64_t j = 0; c.grad_bias && j < block.codes; ++j)
      c.grad_bias[range.row_task * plan.k + code0 + j] += bias_grad[j];
  }
}

// Source of the chunk's rows, gathered unless they stand together, and its first row there.
struct ChunkRows {
  const void* source;
  int64_t first;
  ChunkRows(const CrossEntropyContext& c, const Parallel& parallel) : source(c.problem.z), first(0) {
    const int64_t* at = c.active + c.row;
    first = at[0];
    if (at[c.chunk_rows - 1] - at[0] == c.chunk_rows - 1) return;
    const int64_t bytes = c.plan.d * element_bytes(c.problem.dtype);
    for_rows(parallel, c.chunk_rows, [&](int64_t r) {
      memcpy(static_cast<char*>(c.gathered) + r * bytes,
             static_cast<const char*>(c.problem.z) + at[r] * bytes, bytes);
    });
    source = c.gathered;
    first = 0;
  }
};

// Positions of the rows that take part. (Not in the Workspace: the Plan that sizes it needs their number.)
class ActiveRows {
 public:
  template <typename Wanted>
  ActiveRows(int64_t n, const Wanted& wanted)
      : at_(static_cast<int64_t*>(malloc(sizeof(int64_t) * (size_t)(n > 0 ? n : 1)))) {
    for (int64_t i = 0; at_ && i < n; ++i)
      if (wanted(i)) at_[count_++] = i;
  }
  ~ActiveRows() { free(at_); }
  int64_t* at() const { return at_; }
  int64_t count() const { return count_; }

 private:
  int64_t* at_;
  int64_t count_ = 0;
};

// The call as it is for the rows that take part alone.
inline Problem of_rows(const Problem& p, int64_t count) {
  Problem q = p;
  q.n = count;
  return q;
}

template <bool kPairs>
bool run_cross_entropy_forward(const Problem& p, const CrossEntropyForward& out, const Parallel& parallel) {
  for (int64_t i = 0; i < p.n; ++i) out.loss[i] = 0.0f, out.lse[i] = 0.0;
  const ActiveRows rows(p.n, [&](int64_t i) { return out.targets[i] != out.ignore_index; });
  if (!rows.at()) return false;
  if (rows.count() == 0) return true;
  const Plan plan(of_rows(p, rows.count()), parallel.threads);
  const bool smooth = out.label_smoothing > 0;
  const int64_t states = (int64_t)plan.code_tasks * plan.chunk;
  Workspace workspace;
  CrossEntropyContext c{p, out, plan};
  c.active = rows.at();
  c.scratch_stride = round_up(GroupSweep<kPairs>::floats(plan.d), 16);
  float* gathered = nullptr;
  if (rows.count() < p.n) workspace.add(&gathered, plan.chunk * plan.d);
  workspace.add(&c.tiles, plan.chunk * words<kPairs>(plan.d));
  workspace.add(&c.scratch, c.scratch_stride * plan.tasks());
  workspace.add(&c.ref, states);
  workspace.add(&c.sum, states * kWidth);
  workspace.add(&c.excess, states * kWidth);
  workspace.add(&c.target_logit, plan.chunk);
  if (smooth) workspace.add(&c.logit_sum, states);
  if (!workspace.allocate()) return false;
  c.gathered = gathered;
  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    const ChunkRows chunk(c, parallel);
    pack_row_tiles<kPairs>(p, chunk.source, chunk.first, c.chunk_rows, c.tiles, parallel);
    run_tasks(parallel, plan.tasks(), [&](int t) {
      smooth ? cross_entropy_forward_task<kPairs, true>(c, t)
             : cross_entropy_forward_task<kPairs, false>(c, t);
    });
    for_rows(parallel, c.chunk_rows, [&](int64_t r) { merge_cross_entropy(c, out, r); });
  }
  return true;
}

// dh of one row of the chunk: its parts of the code tasks added up, in order.
template <DType T>
void write_row(const CrossEntropyContext& c, int64_t r, void* out) {
  const Plan& plan = c.plan;
  const int64_t at = c.active[c.row + r] * plan.d;
  for (int64_t e = 0; e < plan.d; e += kWidth) {
    const float* from = c.grad_rows + (e - e % kNR) * plan.chunk + r * kNR + e % kNR;
    F sum = load(from);
    for (int t = 1; t < plan.code_tasks; ++t) sum += load(from + t * plan.padded * plan.chunk);
    store_narrow<T>(out, at + e, sum, plan.d - e);
  }
}

// dW = the row tasks' parts added up, in order.
template <DType T>
void reduce_codes(const float* parts, int count_of_parts, int64_t count, void* out,
                  const Parallel& parallel) {
  const int tasks = (int)min_of(parallel.threads, count);
  run_tasks(parallel, tasks, [&](int t) {
    for (int64_t i = count * t / tasks; i < count * (t + 1) / tasks; ++i) {
      float sum = parts[i];
      for (int q = 1; q < count_of_parts; ++q) sum += parts[q * count + i];
      store_element<T>(out, i, sum);
    }
  });
}

template <bool kPairs>
bool run_cross_entropy_backward(const Problem& p, const CrossEntropyBackward& in, const Parallel& parallel) {
  if (p.n > 0) memset(in.grad_hidden, 0, element_bytes(p.dtype) * p.n * p.d);
  const ActiveRows rows(
      p.n, [&](int64_t i) { return in.targets[i] != in.ignore_index && in.grad_loss[i] != 0.0f; });
  if (!rows.at()) return false;
  if (rows.count() == 0) {
    memset(in.grad_head, 0, element_bytes(p.dtype) * p.k * p.d);
    if (in.grad_bias) memset(in.grad_bias, 0, sizeof(float) * p.k);
    return true;
  }
  const Plan plan(of_rows(p, rows.count()), parallel.threads);
  Workspace workspace;
  CrossEntropyContext c{p, in, plan};
  c.active = rows.at();
  c.strips = plan.padded / kNR;
  c.scratch_stride =
      round_up(GroupSweep<kPairs>::floats(plan.d) + (words<kPairs>(kBlock) + kBlock) * plan.padded +
                   (kPairs ? kGroupRows / 2 * kLine : 0),
               16);
  // dW goes straight into the output unless there are parts of it to add up: of the row tasks, or of several
  // chunks where the output's dtype is too narrow to add them up in.
  const bool apart = plan.row_tasks > 1 || (plan.n > plan.chunk && p.dtype != DType::kFloat32);
  float* gathered = nullptr;
  if (rows.count() < p.n) workspace.add(&gathered, plan.chunk * plan.d);
  workspace.add(&c.tiles, plan.chunk * words<kPairs>(plan.d));
  workspace.add(&c.row_strips, words<kPairs>(plan.chunk) * plan.padded);
  workspace.add(&c.scratch, c.scratch_stride * plan.tasks());
  workspace.add(&c.grad_rows, plan.code_tasks * plan.chunk * plan.padded);
  if (apart) workspace.add(&c.grad_codes, plan.row_tasks * plan.k * plan.d);
  if (in.grad_bias) workspace.add(&c.grad_bias, plan.row_tasks * plan.k);
  if (!workspace.allocate()) return false;
  c.gathered = gathered;
  if (c.grad_bias) memset(c.grad_bias, 0, sizeof(float) * plan.row_tasks * plan.k);
  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    const ChunkRows chunk(c, parallel);
    pack_row_tiles<kPairs>(p, chunk.source, chunk.first, c.chunk_rows, c.tiles, parallel);
    const int64_t tiles = (c.chunk_rows + kMR - 1) / kMR;
    const int slices = (int)min_of(parallel.threads, tiles);
    run_tasks(parallel, slices, [&](int t) {
      const int64_t r0 = tiles * t / slices * kMR, r1 = min_of(tiles * (t + 1) / slices * kMR, c.chunk_rows);
      pack_strips<kPairs>(p.dtype, chunk.source, chunk.first + r0, r1 - r0, plan.d, words<kPairs>(plan.chunk),
                          c.row_strips + words<kPairs>(r0) * kNR);
    });
    run_tasks(parallel, plan.tasks(), [&](int t) { cross_entropy_backward_task<kPairs>(c, in, t); });
    for_dtype(p.dtype, [&](auto t) {
      for_rows(parallel, c.chunk_rows,
               [&](int64_t r) { write_row<decltype(t)::value>(c, r, in.grad_hidden); });
    });
  }
  if (apart)
    for_dtype(p.dtype, [&](auto t) {
      reduce_codes<decltype(t)::value>(c.grad_codes, plan.row_tasks, plan.k * plan.d, in.grad_head, parallel);
    });
  if (in.grad_bias) reduce_parts(c.grad_bias, plan.row_tasks, plan.k, plan.k, in.grad_bias, parallel);
  return true;
}

inline bool cross_entropy_forward(const Problem& p, const CrossEntropyForward& out,
                                  const Parallel& parallel) {
  if (kHasPairs && p.dtype == DType::kBFloat16) return run_cross_entropy_forward<kHasPairs>(p, out, parallel);
  return run_cross_entropy_forward<false>(p, out, parallel);
}

inline bool cross_entropy_backward(const Problem& p, const CrossEntropyBackward& in,
                                   const Parallel& parallel) {
  if (kHasPairs && p.dtype == DType::kBFloat16) return run_cross_entropy_backward<kHasPairs>(p, in, parallel);
  return run_cross_entropy_backward<false>(p, in, parallel);
}
