// The launches of ibq_cuda_cross_entropy_forward and _backward. Plain C++.
//
// Ignored rows are computed and left out: their number is on the device, and waiting for it is not allowed. A
// tile of W of ignored rows alone costs its S and no product.
#pragma once

#include "softmax_forward.h"

namespace ibq::cuda {

inline bool is_valid(const ibq_problem& p, const ibq_cross_entropy& args) {
  return p.scale == 1.0f && p.norm_weight == 0.0f && args.targets && args.lse &&
         args.label_smoothing >= 0.0 && args.label_smoothing <= 1.0;
}

struct CrossEntropyForwardWorkspace {
  SearchPlan plan;
  SearchWorkspace search;
  float* target_logit;
  int64_t bytes;

  CrossEntropyForwardWorkspace(const Operands& in, const ibq_cross_entropy& args, const LaunchLimits& limits,
                               void* base) {
    const ibq_problem& p = in.problem;
    Arena arena(base);
    plan = plan_search(p.N, p.K, p.D, bytes_of(in.element), limits.device);
    search = take_search(arena, plan, p.N, Extra::target, args.label_smoothing > 0.0);
    target_logit = arena.take<float>(p.N);
    bytes = arena.used();
  }
};

template <typename Queue>
void cross_entropy_forward(Queue& queue, const ibq_problem& p, const ibq_cross_entropy& args,
                           const LaunchLimits& limits, void* workspace) {
  const Operands in(p);
  const CrossEntropyForwardWorkspace w(in, args, limits, workspace);
  if (w.plan.stages == 0) return queue.refuse();
  SearchArguments search = search_arguments(in, w.plan, w.search, 1.0f);
  search.targets = args.targets;
  search.target_logit = w.target_logit;
  queue.launch(Kernel::search_target, in.element, w.plan.schedule.blocks(), w.plan.shared_bytes, search);
  StatisticsArguments statistics = statistics_arguments(search);
  statistics.lse = args.lse;
  statistics.target_logit = w.target_logit;
  statistics.targets = args.targets;
  statistics.ignore_index = args.ignore_index;
  statistics.smoothing = args.label_smoothing;
  statistics.loss = args.loss;
  queue.launch(Kernel::statistics, in.element, blocks_for(p.N, kRowThreads), 0, statistics);
}

struct CrossEntropyBackwardWorkspace {
  RowConstants* rows;
  RectangleWorkspace rectangle;
  int64_t bytes;

  CrossEntropyBackwardWorkspace(const Operands& in, const ibq_cross_entropy& args, const LaunchLimits& limits,
                                void* base) {
    Arena arena(base);
    rows = arena.take<RowConstants>(round_up(in.problem.N, kSweepTileRows));
    rectangle = take_rectangle(arena, in, {true, false, args.grad_bias != nullptr, true}, limits);
    bytes = arena.used();
  }
};

template <typename Queue>
void cross_entropy_backward(Queue& queue, const ibq_problem& p, const ibq_cross_entropy& args,
                            bool deterministic, const LaunchLimits& limits, void* workspace) {
  const Operands in(p);
  const CrossEntropyBackwardWorkspace w(in, args, limits, workspace);
  queue.fill(args.grad_hidden, 0, p.N * p.D * 4);
  queue.fill(args.grad_head, 0, p.K * p.D * 4);
  if (args.grad_bias) queue.fill(args.grad_bias, 0, p.K * 4);
  RowConstantsArguments constants{};
  constants.N = p.N;
  constants.D = p.D;
  constants.K = p.K;
  constants.inverse_tau = 1.0f;
  constants.lse = args.lse;
  constants.grad_loss = args.grad_loss;
  constants.targets = args.targets;
  constants.ignore_index = args.ignore_index;
  constants.rows = w.rows;
  queue.launch(Kernel::row_constants, in.element, blocks_for(round_up(p.N, kSweepTileRows), kRowThreads / 32),
               0, constants);
  SweepArguments sweep = sweep_arguments(in, w.rows, nullptr);
  sweep.lse = args.lse;
  sweep.use_select = 1;
  sweep.smoothing = static_cast<float>(args.label_smoothing);
  sweep.share = static_cast<float>(args.label_smoothing / static_cast<double>(p.K));
  if (args.label_smoothing > 0.0) sweep.gap = positive_infinity();  // q is nowhere 0: nothing is negligible
  sweep.weights = w.rectangle.weights;
  sweep.live = w.rectangle.live;
  sweep.column_parts = w.rectangle.column_parts;
  for_rectangles(w.rectangle.rectangle, p.N, p.K,
                 [&](int64_t row, int64_t rows, int64_t code, int64_t codes) {
                   run_sweep(queue, Kernel::sweep_cross, in, sweep, row, rows, code, codes, limits);
                   if (args.grad_bias) add_columns(queue, sweep, codes, 1.0, args.grad_bias);
                   run_product(queue, false, in, w.rectangle, sweep, rows, codes, 1.0f, deterministic,
                               args.grad_hidden, limits);
                   run_product(queue, true, in, w.rectangle, sweep, rows, codes, 1.0f, deterministic,
                               args.grad_head, limits);
                 });
}

}  // namespace ibq::cuda
