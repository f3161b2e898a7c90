// Size of the gather's blocks and the words in which it moves rows.
#pragma once

#include "../common/host_device.h"

namespace ibq::cuda {

constexpr int kGatherThreads = 256;  // a warp takes a row

struct alignas(16) Word16 {
  uint32_t part[4];
};

IBQ_HD int64_t gather_blocks(int64_t N) { return ceil_div(N, int64_t{kGatherThreads / 32}); }

}  // namespace ibq::cuda
