// What happens once a row between the sweeps: statistics joined, constants prepared, winners spent. Bound by
// memory and small beside the sweeps.
//
// STATUS: UNRUN ON A GPU; executed on the CPU by the emulator in kernels/tests.
//
// Choice. Float64 where a float32 sum would lose what the log-sum-exps keep: a row is a few hundred
// operations.
#pragma once

#include "../common/row_stats.h"
#include "../common/softmax_rules.h"
#include "element_access.cuh"
#include "sweep_arguments.h"

namespace ibq::cuda {

// Joins the splits of each row in order. Grid: ceil(N / kRowThreads) blocks.
IBQ_KERNEL(kRowThreads, 1)
statistics_kernel(const StatisticsArguments args) {
  const int64_t row = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (row >= args.N) return;
  RowStats top = empty_row_stats();
  for (int64_t split = 0; split < args.splits; ++split) {
    const int64_t place = split * args.N + row;
    top = merge(top, {args.split_max[place], 0.0f, args.split_index[place]});
  }
  double sum = 0.0, logits = 0.0;
  TemperedSums tempered{0.0, 0.0};
  for (int64_t split = 0; split < args.splits; ++split) {
    const int64_t place = split * args.N + row;
    const float max = args.split_max[place];
    const double shift = max == top.max ? 0.0 : static_cast<double>(max) - top.max;
    sum += args.split_sum[place] * exp(shift);
    if (args.lse_tau != nullptr)
      add_tempered(tempered, {args.split_tempered_sum[place], args.split_tempered_moment[place]},
                   shift * args.inverse_tau);
    if (args.split_logits != nullptr) logits += args.split_logits[place];
  }
  const bool infinite = top.max == negative_infinity() || top.max == positive_infinity();
  const double lse = infinite ? top.max : top.max + log(sum);
  if (args.indices != nullptr) args.indices[row] = top.index;
  if (args.max != nullptr) args.max[row] = top.max;
  if (args.loss == nullptr) {
    if (args.lse != nullptr) args.lse[row] = lse;
    if (args.lse_tau != nullptr) {
      args.lse_tau[row] =
          infinite ? top.max : static_cast<double>(top.max) * args.inverse_tau + log(tempered.sum);
      args.row_entropy[row] = static_cast<float>(entropy_of(tempered));
    }
    return;
  }
  const int64_t target = args.targets[row];
  if (target == args.ignore_index) {
    args.loss[row] = 0.0f;
    args.lse[row] = 0.0;
    return;
  }
  const bool valid = target >= 0 && target < args.K;
  double loss = valid ? (static_cast<double>(top.max) - args.target_logit[row]) + log(sum) : quiet_nan();
  if (args.split_logits != nullptr)
    loss = (1.0 - args.smoothing) * loss +
           args.smoothing * ((top.max - logits / static_cast<double>(args.K)) + log(sum));
  args.loss[row] = static_cast<float>(loss);
  args.lse[row] = lse;
}

// A warp writes the constants of its row; rows past N, up to whole tiles, are no rows. Grid: one warp a row.
template <Element kElement>
IBQ_KERNEL(kRowThreads, 1)
row_constants_kernel(const RowConstantsArguments args) {
  const int64_t row = warp_row();
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (row >= round_up(args.N, kSweepTileRows)) return;
  RowConstants constants = no_row();
  if (row < args.N) {
    double delta = 0.0;
    if (args.cotangents != nullptr) {
      for (int64_t d = lane; d < args.D; d += 32)
        delta += static_cast<double>(read_element<kElement>(args.cotangents, row * args.D + d)) *
                 args.readout[row * args.D + d];
      delta = sum_over_warp(delta);
    }
    constants.delta = static_cast<float>(delta);
    if (args.lse != nullptr) {
      const LogScale scale = log_scale(args.lse[row], 1.0f);
      constants.select_high = scale.high;
      constants.select_low = scale.low;
    }
    if (args.lse_tau != nullptr) {
      const LogScale scale = log_scale(args.lse_tau[row], args.inverse_tau);
      constants.entropy_high = scale.high;
      constants.entropy_low = scale.low;
    }
    if (args.grad_row_entropy != nullptr) {
      const float slope = -args.grad_row_entropy[row] * args.inverse_tau;
      constants.slope = slope;
      constants.offset = slope * args.row_entropy[row];  // less sum_k p_ik c_k / (N tau), which comes later
    }
    if (args.targets != nullptr) {
      const int64_t target = args.targets[row];
      const bool valid = target >= 0 && target < args.K;
      constants.target = valid ? static_cast<int32_t>(target) : -1;
      constants.delta = valid ? args.grad_loss[row] : quiet_nan();
      if (target == args.ignore_index || (valid && args.grad_loss[row] == 0.0f)) constants = no_row();
    }
  }
  if (lane == 0) args.rows[row] = constants;
}

// Adds up the splits of the row sums of one rectangle: to `others`, or into the rows' offsets.
// Grid: ceil(rows / kRowThreads) blocks.
IBQ_KERNEL(kRowThreads, 1)
add_rows_kernel(const AddRowsArguments args) {
  const int64_t row = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (row >= args.rows) return;
  double sums[2] = {0.0, 0.0};
  for (int64_t split = 0; split < args.splits; ++split) {
    sums[0] += args.parts[split * 2 * args.stride + row];
    sums[1] += args.parts[(split * 2 + 1) * args.stride + row];
  }
  const int64_t at = args.first_row + row;
  if (args.others != nullptr) {
    args.others[at] += sums[0];
    args.others[args.N + at] += sums[1];
  } else {
    args.constants[at].offset += args.offset_factor * static_cast<float>(sums[1]);
  }
}

// Grid: one warp a row.
template <Element kElement>
IBQ_KERNEL(kRowThreads, 1)
winners_kernel(const WinnersArguments args) {
  const int64_t row = warp_row();
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (row >= args.N) return;
  const int32_t select = args.winners[row], entropy = args.winners[args.N + row];
  const int32_t code = winner_code(select, entropy);
  const float ds =
      code < 0
          ? 0.0f
          : static_cast<float>(winner_gradient(select, args.others[row], entropy, args.others[args.N + row]));
  if (lane == 0) {
    args.keys[row] = code;
    args.gradients[row] = ds;
  }
  if (code < 0) return;
  for (int64_t d = lane; d < args.D; d += 32)
    args.grad_z[row * args.D + d] +=
        args.scale * ds * read_element<kElement>(args.codebook, code * args.D + d);
}

}  // namespace ibq::cuda
