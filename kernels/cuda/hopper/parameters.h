// Parameters of the Hopper kernels: the portable kernels' arguments and the tensor maps of their operands.
// Plain C++.
#pragma once

#include "../sweep_arguments.h"
#include "stream_plan.h"
#include "tensor_map.h"

namespace ibq::cuda::hopper {

struct SearchParameters {
  TensorMap z;         // boxes of kBoxRows rows
  TensorMap codebook;  // the same
  const float* bias;   // null: none
  float scale;
  int64_t N, K;
  TileSchedule schedule;  // row tiles of kSearchRows
  StreamPlan plan;
  float* split_max;      // [splits, N]
  int32_t* split_index;  // [splits, N]
  float* split_sum;      // [splits, N], with lse
  // As in SearchArguments, with Extra::entropy and Extra::target.
  float inverse_tau;
  float *split_tempered_sum, *split_tempered_moment;
  const int64_t* targets;
  float *target_logit, *split_logits;
};

constexpr int kSearchRows = 2 * kBoxRows;

struct SweepParameters {
  TensorMap z;  // boxes of kBoxRows rows, as the others
  TensorMap cotangents;
  TensorMap codebook;
  StreamPlan plan;
  SweepArguments args;
};

struct ProductParameters {
  TensorMap weights;  // boxes of 128 rows; transposed: of 64
  TensorMap operand;  // boxes of 64 rows
  int stages;
  ProductArguments args;
};

// What a sweep's slot for one tile holds between the warpgroups, in floats: tops of 8 warps in two groups,
// and their column sums.
constexpr int kSlotTops = 16;
constexpr int kSlotFloats = kSlotTops + 8 * kStreamCodes;

template <typename Shape>
IBQ_HD constexpr int64_t exchange_bytes() {
  return int64_t{2} * Shape::kTiles * kSlotFloats * 4;
}

}  // namespace ibq::cuda::hopper
