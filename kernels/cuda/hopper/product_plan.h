// How the Hopper products W B and W^T B are cut: tiles of 128 output rows × all columns, times splits of the
// depth, so that every multiprocessor has one. Plain arithmetic.
#pragma once

#include "../../common/host_device.h"

namespace ibq::cuda::hopper {

constexpr int kProductThreads = 384;  // a producer and two consumer warpgroups
constexpr int kProductRows = 128;
constexpr int kDepthTile = 128;  // what is live or not
constexpr int kStageDepth = 64;
constexpr int kWeightBytes = kProductRows * kStageDepth * 2;

IBQ_HD constexpr int product_stage_bytes(int panels) { return kWeightBytes + kStageDepth * panels * 128; }

struct ProductPlan {
  int64_t row_tiles;
  int64_t depth_tiles;
  int64_t splits, tiles_per_split;
  int stages;  // 0: does not fit
  int64_t shared_bytes;

  IBQ_HD int64_t blocks() const { return row_tiles * splits; }
};

IBQ_HD ProductPlan plan_product(int64_t rows, int64_t depth, int64_t D, int multiprocessors,
                                int64_t shared_limit) {
  constexpr int kMostStages = 6;
  ProductPlan plan{};
  plan.row_tiles = ceil_div(rows, int64_t{kProductRows});
  plan.depth_tiles = ceil_div(depth, int64_t{kDepthTile});
  const int64_t stage = product_stage_bytes(static_cast<int>(D / 64)) + 16;  // and its two barriers
  const int64_t stages = shared_limit / stage < kMostStages ? shared_limit / stage : kMostStages;
  plan.stages = stages >= 2 ? static_cast<int>(stages) : 0;
  plan.shared_bytes = plan.stages * stage;
  int64_t splits = plan.row_tiles > 0 ? multiprocessors / plan.row_tiles : 1;
  if (splits > plan.depth_tiles) splits = plan.depth_tiles;
  if (splits < 1) splits = 1;
  plan.tiles_per_split = ceil_div(plan.depth_tiles, splits);
  plan.splits = plan.tiles_per_split > 0 ? ceil_div(plan.depth_tiles, plan.tiles_per_split) : 1;
  return plan;
}

}  // namespace ibq::cuda::hopper
