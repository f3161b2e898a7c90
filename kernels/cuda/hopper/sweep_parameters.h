// Parameters of the Hopper sweeps and products: the portable kernels' arguments and the tensor maps of their
// operands. Plain C++.
#pragma once

#include "../sweep_arguments.h"
#include "stream_plan.h"
#include "tensor_map.h"

namespace ibq::cuda::hopper {

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
