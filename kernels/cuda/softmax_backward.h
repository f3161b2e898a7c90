// The launches of ibq_cuda_softmax_backward. Plain C++.
//
//   norms into the bias, c centred, row constants (delta_i = g_i . o_i)
//   entropy group: a sweep for sum_k p_ik c_k of whole rows
//   each rectangle: dS; sums of its rows (for winners) and columns (dbias); dz += scale dS E; dE += scale
//   dS^T z winners' dS into dz, dE and dbias; the norms' gradient into dE; the hard path into dE
#pragma once

#include "softmax_forward.h"

namespace ibq::cuda {

// Whether the groups are complete (ibq_cuda.h).
inline bool is_valid(const ibq_softmax_backward& args) {
  if (!args.grad_z || !args.grad_codebook || (!args.grad_z_q && !args.row_entropy)) return false;
  if (args.grad_z_q && (!args.lse || !args.readout)) return false;
  return !args.row_entropy ||
         (args.lse_tau && args.grad_row_entropy && args.grad_mean_prob && args.temperature > 0.0f);
}

struct BackwardWorkspace {
  float *bias, *centered, *column_sums, *row_dots, *gradients;
  RowConstants* rows;
  int32_t* winners;
  double* others;
  int64_t* keys;
  RectangleWorkspace rectangle;
  int64_t bytes;

  BackwardWorkspace(const Operands& in, const ibq_softmax_backward& args, const LaunchLimits& limits,
                    void* base) {
    const ibq_problem& p = in.problem;
    Arena arena(base);
    const bool norms = p.norm_weight != 0.0f, entropy = args.row_entropy != nullptr;
    bias = norms ? arena.take<float>(p.K) : nullptr;
    centered = entropy ? arena.take<float>(p.K) : nullptr;
    row_dots = entropy ? arena.take<float>(2 * row_part_rows(p.N, limits)) : nullptr;
    column_sums = args.grad_bias ? args.grad_bias : norms ? arena.take<float>(p.K) : nullptr;
    rows = arena.take<RowConstants>(round_up(p.N, kSweepTileRows));
    winners = arena.take<int32_t>(2 * p.N);
    others = arena.take<double>(2 * p.N);
    keys = arena.take<int64_t>(p.N);
    gradients = arena.take<float>(p.N);
    rectangle = take_rectangle(arena, in, {true, true, args.grad_bias || norms, true}, limits);
    bytes = arena.used();
  }
};

inline int64_t scatter_blocks(int64_t K, const LaunchLimits& limits) {
  return smaller(K, int64_t{limits.device.multiprocessors} * 4);
}

template <typename Queue>
void softmax_backward(Queue& queue, const ibq_problem& p, const ibq_softmax_backward& args,
                      bool deterministic, const LaunchLimits& limits, void* workspace) {
  Operands in(p);
  const BackwardWorkspace w(in, args, limits, workspace);
  const bool select = args.grad_z_q != nullptr, entropy = args.row_entropy != nullptr;
  const float inverse_tau = entropy ? 1.0f / args.temperature : 1.0f;
  const double n = static_cast<double>(p.N);
  prepare_bias(queue, in, w.bias);
  queue.fill(args.grad_z, 0, p.N * p.D * 4);
  queue.fill(args.grad_codebook, 0, p.K * p.D * 4);
  if (w.column_sums) queue.fill(w.column_sums, 0, p.K * 4);
  queue.fill(w.winners, 0xff, 2 * p.N * 4);
  queue.fill(w.others, 0, 2 * p.N * 8);

  RowConstantsArguments constants{};
  constants.N = p.N;
  constants.D = p.D;
  constants.K = p.K;
  constants.inverse_tau = inverse_tau;
  if (select) {
    constants.lse = args.lse;
    constants.cotangents = static_cast<const unsigned char*>(args.grad_z_q);
    constants.readout = args.readout;
  }
  if (entropy) {
    constants.lse_tau = args.lse_tau;
    constants.row_entropy = args.row_entropy;
    constants.grad_row_entropy = args.grad_row_entropy;
  }
  constants.rows = w.rows;
  queue.launch(Kernel::row_constants, in.element, blocks_for(round_up(p.N, kSweepTileRows), kRowThreads / 32),
               0, constants);

  SweepArguments sweep = sweep_arguments(in, w.rows, args.grad_z_q);
  sweep.inverse_tau = inverse_tau;
  bound_grid(p.N, p.K, limits, &sweep.bound_tiles, &sweep.bound_blocks);
  sweep.tile_bound = sweep.bound_tiles > 0 && p.dropped_mass > 0.0f ? args.tile_bound : nullptr;
  if (entropy) {
    queue.launch(Kernel::center, in.element, 1, kCenterThreads / 32 * 8,
                 CenterArguments{args.grad_mean_prob, p.K, w.centered});
    sweep.column_weights = w.centered;
    sweep.use_entropy = 1;
    sweep.row_parts = w.row_dots;
    const SweepPlan plan = run_sweep(queue, Kernel::sweep_probability, in, sweep, 0, p.N, 0, p.K, limits);
    AddRowsArguments add{};
    add.parts = w.row_dots;
    add.splits = plan.schedule.splits;
    add.stride = plan.schedule.row_tiles * kSweepTileRows;
    add.rows = add.N = p.N;
    add.offset_factor = static_cast<float>(-static_cast<double>(inverse_tau) / n);
    add.constants = w.rows;
    queue.launch(Kernel::add_rows, in.element, blocks_for(p.N, kRowThreads), 0, add);
    sweep.share = static_cast<float>(static_cast<double>(inverse_tau) / n);
  }

  const Kernel kernel = select && entropy ? Kernel::sweep_both
                        : select          ? Kernel::sweep_select
                                          : Kernel::sweep_entropy;
  sweep.use_select = select;
  sweep.weights = w.rectangle.weights;
  sweep.live = w.rectangle.live;
  sweep.row_parts = w.rectangle.row_parts;
  sweep.column_parts = w.rectangle.column_parts;
  sweep.winners = w.winners;
  for_rectangles(w.rectangle.rectangle, p.N, p.K,
                 [&](int64_t row, int64_t rows, int64_t code, int64_t codes) {
                   const SweepPlan plan = run_sweep(queue, kernel, in, sweep, row, rows, code, codes, limits);
                   AddRowsArguments add{};
                   add.parts = sweep.row_parts;
                   add.splits = plan.schedule.splits;
                   add.stride = plan.schedule.row_tiles * kSweepTileRows;
                   add.rows = rows;
                   add.first_row = row;
                   add.N = p.N;
                   add.others = w.others;
                   queue.launch(Kernel::add_rows, in.element, blocks_for(rows, kRowThreads), 0, add);
                   if (w.column_sums) add_columns(queue, sweep, codes, 1.0, w.column_sums);
                   run_product(queue, false, in, w.rectangle, sweep, rows, codes, p.scale, deterministic,
                               args.grad_z, limits);
                   run_product(queue, true, in, w.rectangle, sweep, rows, codes, p.scale, deterministic,
                               args.grad_codebook, limits);
                 });

  const WinnersArguments winners{w.winners, w.others,    in.codebook, p.scale,    p.N,
                                 p.D,       args.grad_z, w.keys,      w.gradients};
  queue.launch(Kernel::winners, in.element, blocks_for(p.N, kRowThreads / 32), 0, winners);
  ScatterArguments scatter{};
  scatter.keys = w.keys;
  scatter.N = p.N;
  scatter.K = p.K;
  scatter.D = p.D;
  scatter.rows = in.z;
  scatter.gradients = w.gradients;
  scatter.scale = p.scale;
  scatter.out = args.grad_codebook;
  scatter.column_sums = w.column_sums;
  queue.launch(Kernel::scatter, in.element, scatter_blocks(p.K, limits), kScatterSharedBytes, scatter);
  if (p.norm_weight != 0.0f)
    queue.launch(
        Kernel::norm_gradient, in.element, blocks_for(p.K, kRowThreads / 32), 0,
        NormGradientArguments{in.codebook, w.column_sums, p.norm_weight, p.K, p.D, args.grad_codebook});
  if (args.indices == nullptr || (!args.grad_z_q && !args.grad_codes)) return;
  ScatterArguments hard{};
  hard.keys = args.indices;
  hard.N = p.N;
  hard.K = p.K;
  hard.D = p.D;
  hard.first = static_cast<const unsigned char*>(args.grad_z_q);
  hard.second = static_cast<const unsigned char*>(args.grad_codes);
  hard.out = args.grad_codebook;
  queue.launch(Kernel::scatter, in.element, scatter_blocks(p.K, limits), kScatterSharedBytes, hard);
}

}  // namespace ibq::cuda
