// The backward call: what surrounds the sweep of backward.h. Workspace, row constants, the winners' shares,
// and the parts of the gradients added up.
#pragma once

// A winner's dS, settled: what it adds to dz, dE and dbias.
struct Share {
  int64_t code, row;  // row of the chunk; code -1: none
  float ds;
};

inline int compare_shares(const void* a, const void* b) {
  const Share &x = *static_cast<const Share*>(a), &y = *static_cast<const Share*>(b);
  if (x.code != y.code) return x.code < y.code ? -1 : 1;
  return x.row < y.row ? -1 : x.row > y.row;
}

// shares [chunk][2]: each row's winners, of the select and of the entropy group.
inline void collect_shares(const BackwardContext& c, Share* shares) {
  const Plan& plan = c.plan;
  for (int64_t r = 0; r < c.chunk_rows; ++r)
    for (int group = 0; group < 2; ++group) {
      Share& share = shares[2 * r + group];
      share = {-1, r, 0.0f};
      if (!(group == 0 ? c.in.grad_z_q != nullptr : c.in.row_entropy != nullptr)) continue;
      double others = 0;
      for (int t = 0; t < plan.code_tasks; ++t) {
        const Winner& w = c.winners[((int64_t)group * plan.code_tasks + t) * plan.chunk + r];
        others += w.others;
        if (w.code >= 0) share.code = w.code;
      }
      share.ds = (float)-others;
    }
}

// dz of one row of the chunk: the code tasks' parts and its winners' two shares.
template <DType T>
void write_grad_z(const BackwardContext& c, int64_t r, const Share* shares) {
  const Plan& plan = c.plan;
  const Problem& p = c.problem;
  float* sum = c.grad_z + r * plan.padded;
  for (int t = 1; t < plan.code_tasks; ++t) {
    const float* part = sum + (int64_t)t * plan.chunk * plan.padded;
    for (int64_t e = 0; e < plan.d; ++e) sum[e] += part[e];
  }
  for (int group = 0; group < 2; ++group)
    if (shares[group].code >= 0)
      add_scaled_row(p.dtype, p.codebook, shares[group].code, plan.d, shares[group].ds, sum);
  for (int64_t e = 0; e < plan.d; e += kWidth)
    store_narrow<T>(c.in.grad_z, (c.row + r) * plan.d + e, load(sum + e) * set1(p.scale), plan.d - e);
}

// dE and dbias of the shares of one code, added to what stands in `out` and rounded once.
template <DType T>
void spend_code(const BackwardContext& c, const Share* first, const Share* last, float* sum, void* out) {
  const Problem& p = c.problem;
  const int64_t code = first->code, at = code * p.d;
  for (int64_t e = 0; e < p.d; e += kWidth) store(sum + e, load_live<T>(out, at + e, p.d - e));
  float ds = 0;
  for (const Share* s = first; s < last; ++s) {
    add_scaled_row(p.dtype, p.z, c.row + s->row, p.d, p.scale * s->ds, sum);
    ds += s->ds;
  }
  if (p.norm_weight != 0.0f) add_scaled_row(p.dtype, p.codebook, code, p.d, -2.0f * p.norm_weight * ds, sum);
  for (int64_t e = 0; e < p.d; e += kWidth) store_narrow<T>(out, at + e, load(sum + e), p.d - e);
  if (c.grad_bias) c.grad_bias[code] += ds;
}

// Adds all shares to dE (row task 0's part of it where there are parts), a code by one task. Sorts them.
inline void spend_shares(const BackwardContext& c, Share* shares, const Parallel& parallel) {
  const int64_t count = 2 * c.chunk_rows;
  qsort(shares, (size_t)count, sizeof(Share), compare_shares);
  int64_t none = 0;
  while (none < count && shares[none].code < 0) ++none;
  const DType out_type = c.grad_codes ? DType::kFloat32 : c.problem.dtype;
  void* out = c.grad_codes ? static_cast<void*>(c.grad_codes) : c.in.grad_codebook;
  const int tasks = (int)min_of(parallel.threads, c.plan.tasks());
  run_tasks(parallel, tasks, [&](int t) {
    const int64_t code0 = c.plan.k * t / tasks, code1 = c.plan.k * (t + 1) / tasks;
    float* sum = c.scratch + c.scratch_stride * t;
    for (int64_t i = none, next; i < count; i = next) {
      for (next = i + 1; next < count && shares[next].code == shares[i].code;) ++next;
      if (shares[i].code < code0 || shares[i].code >= code1) continue;
      for_dtype(out_type, [&](auto type) {
        spend_code<decltype(type)::value>(c, shares + i, shares + next, sum, out);
      });
    }
  });
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
template <DType T>
void reduce_parts(const float* parts, int count_of_parts, int64_t count, void* out,
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

template <bool kPairs, bool kSelect, bool kEntropy>
bool run_backward(const Problem& p, const Backward& in, const Parallel& parallel) {
  const Plan plan(p, parallel.threads);
  Workspace workspace;
  BackwardContext c{p, in, plan};
  tile_grid(plan.n, plan.k, &c.call_tiles, &c.blocks);
  c.bound = c.blocks > 0 && p.dropped_mass > 0 ? in.tile_bound : nullptr;
  const Candidates lists = kEntropy && p.dropped_mass > 0
                               ? Candidates::written(in.candidates, in.candidate_bytes, p)
                               : Candidates();
  c.kept = KeptLogits::written(in.candidates, in.candidate_bytes, p);
  c.scratch_stride = round_up(
      kBlock * words<kPairs>(plan.d) + kBlock + (kGroup + kMR) * kBlock + 2 * kBlock * plan.padded, 16);
  // dE goes straight into the output unless there are parts of it to add up: of the row tasks, or of several
  // chunks where the output's dtype is too narrow to add them up in.
  const bool apart = plan.row_tasks > 1 || (plan.n > plan.chunk && p.dtype != DType::kFloat32);
  Share* shares = nullptr;
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
  workspace.add(&shares, 2 * plan.chunk);
  if (apart) workspace.add(&c.grad_codes, plan.row_tasks * plan.k * plan.d);
  if (in.grad_bias) workspace.add(&c.grad_bias, plan.row_tasks * plan.k);
  if (!workspace.allocate()) return false;
  if (kEntropy) {
    double sum = 0;
    for (int64_t j = 0; j < plan.k; ++j) sum += in.grad_mean_prob[j];
    const double mean = sum / (double)plan.k;
    for (int64_t j = 0; j < plan.k; ++j) c.centered[j] = (float)(in.grad_mean_prob[j] - mean);
  }
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
    if (lists.parts)
      for_rows(parallel, c.chunk_rows, [&](int64_t r) { listed_row_dot(c, lists, r); });
    else if (kEntropy)
      run_tasks(parallel, plan.tasks(), [&](int t) { row_dot_task<kPairs>(c, t); });
    run_tasks(parallel, plan.tasks(), [&](int t) { backward_task<kPairs, kSelect, kEntropy>(c, t); });
    collect_shares(c, shares);
    for_dtype(p.dtype, [&](auto t) {
      for_rows(parallel, c.chunk_rows,
               [&](int64_t r) { write_grad_z<decltype(t)::value>(c, r, shares + 2 * r); });
    });
    spend_shares(c, shares, parallel);
  }
  if (apart)
    for_dtype(p.dtype, [&](auto t) {
      reduce_parts<decltype(t)::value>(c.grad_codes, plan.row_tasks, plan.k * plan.d, in.grad_codebook,
                                       parallel);
    });
  if (in.grad_bias)
    reduce_parts<DType::kFloat32>(c.grad_bias, plan.row_tasks, plan.k, in.grad_bias, parallel);
  return true;
}
