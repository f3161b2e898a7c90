// The launches of ibq_cuda_softmax_forward: a search sweep that also keeps the sums of both softmaxes, then,
// when readout or mean probabilities are wanted, a second sweep that knows the log-sum-exps, whose P meets
// the codebook. Plain C++.
//
// Tried on paper: carrying the readout along with the first sweep, rescaled as the maxima rise, saves the
// second S of a call without mean probabilities (4 NKD operations instead of 6); the training op wants them
// and forms that S anyway, and with final log-sum-exps dead tiles cost no product.
#pragma once

#include "rectangles.h"

namespace ibq::cuda {

struct SearchWorkspace {
  float *max, *sum, *tempered_sum, *tempered_moment, *logits;
  int32_t* index;
};

inline SearchWorkspace take_search(Arena& arena, const SearchPlan& plan, int64_t N, Extra extra,
                                   bool logits) {
  const int64_t count = plan.schedule.splits * N;
  SearchWorkspace w{};
  w.max = arena.take<float>(count);
  w.index = arena.take<int32_t>(count);
  w.sum = arena.take<float>(count);
  if (extra == Extra::entropy) {
    w.tempered_sum = arena.take<float>(count);
    w.tempered_moment = arena.take<float>(count);
  }
  if (logits) w.logits = arena.take<float>(count);
  return w;
}

inline SearchArguments search_arguments(const Operands& in, const SearchPlan& plan, const SearchWorkspace& w,
                                        float inverse_tau) {
  SearchArguments args{};
  args.z = in.z;
  args.codebook = in.codebook;
  args.bias = in.bias;
  args.scale = in.problem.scale;
  args.N = in.problem.N;
  args.K = in.problem.K;
  args.row_bytes = in.row_bytes;
  args.access = in.access_of(in.z, in.codebook);
  args.plan = plan;
  args.split_max = w.max;
  args.split_index = w.index;
  args.split_sum = w.sum;
  args.inverse_tau = inverse_tau;
  args.split_tempered_sum = w.tempered_sum;
  args.split_tempered_moment = w.tempered_moment;
  args.split_logits = w.logits;
  return args;
}

inline StatisticsArguments statistics_arguments(const SearchArguments& search) {
  StatisticsArguments args{};
  args.N = search.N;
  args.K = search.K;
  args.splits = search.plan.schedule.splits;
  args.split_max = search.split_max;
  args.split_index = search.split_index;
  args.split_sum = search.split_sum;
  args.split_tempered_sum = search.split_tempered_sum;
  args.split_tempered_moment = search.split_tempered_moment;
  args.split_logits = search.split_logits;
  args.inverse_tau = search.inverse_tau;
  return args;
}

// Whether the outputs asked for go together (ibq_cuda.h).
inline bool is_valid(const ibq_softmax_forward& out) {
  if (!out.lse && !out.row_entropy) return false;
  if (out.readout && !out.lse) return false;
  if (out.mean_prob && !out.row_entropy) return false;
  return !out.row_entropy || (out.lse_tau && out.temperature > 0.0f);
}

struct ForwardWorkspace {
  SearchPlan plan;
  SearchWorkspace search;
  float* bias;
  RowConstants* rows;
  RectangleWorkspace rectangle;
  int64_t bytes;

  ForwardWorkspace(const Operands& in, const ibq_softmax_forward& out, const LaunchLimits& limits,
                   void* base) {
    const ibq_problem& p = in.problem;
    Arena arena(base);
    plan = plan_search(p.N, p.K, p.D, bytes_of(in.element), limits.device);
    search = take_search(arena, plan, p.N, out.row_entropy ? Extra::entropy : Extra::none, false);
    bias = p.norm_weight != 0.0f ? arena.take<float>(p.K) : nullptr;
    if (out.readout || out.mean_prob) {
      rows = arena.take<RowConstants>(round_up(p.N, kSweepTileRows));
      const bool readout = out.readout != nullptr;
      rectangle = take_rectangle(arena, in, {readout, false, out.mean_prob != nullptr, readout}, limits);
    }
    bytes = arena.used();
  }
};

inline void bound_grid(int64_t N, int64_t K, const LaunchLimits& limits, int64_t* row_tiles,
                       int64_t* code_tiles) {
  const bool bounded = K >= limits.bounded_from;
  *row_tiles = bounded ? ceil_div(N, int64_t{kSweepTileRows}) : 0;
  *code_tiles = bounded ? ceil_div(K, int64_t{kSweepTileCodes}) : 0;
}

template <typename Queue>
void softmax_forward(Queue& queue, const ibq_problem& p, const ibq_softmax_forward& out, bool deterministic,
                     const LaunchLimits& limits, void* workspace) {
  Operands in(p);
  const ForwardWorkspace w(in, out, limits, workspace);
  if (w.plan.stages == 0) return queue.refuse();
  const bool entropy = out.row_entropy != nullptr;
  const float inverse_tau = entropy ? 1.0f / out.temperature : 1.0f;
  prepare_bias(queue, in, w.bias);

  const SearchArguments search = search_arguments(in, w.plan, w.search, inverse_tau);
  queue.launch(entropy ? Kernel::search_entropy : Kernel::search, in.element, w.plan.schedule.blocks(),
               w.plan.shared_bytes, search);
  StatisticsArguments statistics = statistics_arguments(search);
  statistics.indices = out.indices;
  statistics.max = out.max;
  statistics.lse = out.lse;
  statistics.lse_tau = out.lse_tau;
  statistics.row_entropy = out.row_entropy;
  queue.launch(Kernel::statistics, in.element, blocks_for(p.N, kRowThreads), 0, statistics);
  if (!out.readout && !out.mean_prob) return;

  RowConstantsArguments constants{};
  constants.N = p.N;
  constants.D = p.D;
  constants.K = p.K;
  constants.inverse_tau = inverse_tau;
  constants.lse = out.lse;
  constants.lse_tau = out.lse_tau;
  constants.rows = w.rows;
  queue.launch(Kernel::row_constants, in.element, blocks_for(round_up(p.N, kSweepTileRows), kRowThreads / 32),
               0, constants);
  if (out.readout) queue.fill(out.readout, 0, p.N * p.D * 4);
  if (out.mean_prob) queue.fill(out.mean_prob, 0, p.K * 4);
  SweepArguments sweep = sweep_arguments(in, w.rows, nullptr);
  sweep.inverse_tau = inverse_tau;
  sweep.use_select = out.readout != nullptr;
  sweep.use_entropy = entropy;
  sweep.weights = w.rectangle.weights;
  sweep.live = w.rectangle.live;
  sweep.column_parts = w.rectangle.column_parts;
  bound_grid(p.N, p.K, limits, &sweep.bound_tiles, &sweep.bound_blocks);
  sweep.tile_bound_out = sweep.bound_tiles > 0 ? out.tile_bound : nullptr;
  for_rectangles(w.rectangle.rectangle, p.N, p.K,
                 [&](int64_t row, int64_t rows, int64_t code, int64_t codes) {
                   run_sweep(queue, Kernel::sweep_probability, in, sweep, row, rows, code, codes, limits);
                   if (out.mean_prob)
                     add_columns(queue, sweep, codes, 1.0 / static_cast<double>(p.N), out.mean_prob);
                   if (out.readout)
                     run_product(queue, false, in, w.rectangle, sweep, rows, codes, 1.0f, deterministic,
                                 out.readout, limits);
                 });
}

}  // namespace ibq::cuda
