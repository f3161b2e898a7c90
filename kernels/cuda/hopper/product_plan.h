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

IBQ_HD ProductStages plan_product_stages(int64_t D, int64_t shared_limit) {
  constexpr int kMost = 6;
  const int64_t bytes = stage_bytes_of(static_cast<int>(D / 64)) + 16;  // and its two barriers
  const int64_t fit = shared_limit / bytes;
  const int count = fit < 2 ? 0 : static_cast<int>(fit < kMost ? fit : kMost);
  return {count, count * bytes};
}

}  // namespace ibq::cuda::hopper
