// Stages and shared memory of the Hopper products. Plain arithmetic.
#pragma once

#include "../../common/host_device.h"

namespace ibq::cuda::hopper {

constexpr int kStageDepth = 64;
constexpr int kWeightStageBytes = 128 * kStageDepth * 2;

// A stage: 128 rows of the output by 64 of the depth of W, and 64 rows of `panels` times 64 columns of B.
IBQ_HD constexpr int stage_bytes_of(int panels) { return kWeightStageBytes + kStageDepth * panels * 128; }

struct ProductStages {
  int count;  // 0: do not fit
  int64_t shared_bytes;
};

// Columns of the output in a block, in panels of 64, and how many blocks side by side cover it.
constexpr int kMaxPanels = 4;
IBQ_HD int product_panels(int64_t D) {
  return static_cast<int>(D < 64 * kMaxPanels ? ceil_div(D, int64_t{64}) : kMaxPanels);
}
IBQ_HD int64_t product_column_tiles(int64_t D) { return ceil_div(D, int64_t{64} * product_panels(D)); }

IBQ_HD ProductStages plan_product_stages(int panels, int64_t shared_limit) {
  constexpr int kMost = 6;
  const int64_t bytes = stage_bytes_of(panels) + 16;  // and its two barriers
  const int64_t fit = shared_limit / bytes;
  const int count = fit < 2 ? 0 : static_cast<int>(fit < kMost ? fit : kMost);
  return {count, count * bytes};
}

}  // namespace ibq::cuda::hopper
