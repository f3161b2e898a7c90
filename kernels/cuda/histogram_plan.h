// Sizes of the histogram's blocks and where its counters live.
#pragma once

#include "../common/host_device.h"

namespace ibq::cuda {

constexpr int kHistogramThreads = 512;
// The most codes that a block counts in its own shared memory.
constexpr int64_t kSharedHistogramCodes = 48 * 1024 / 4;

// Enough blocks to fill any device, few enough that flushing private counters stays small.
IBQ_HD int64_t histogram_blocks(int64_t N) {
  const int64_t wanted = ceil_div(N, int64_t{8 * kHistogramThreads});
  return wanted < 1024 ? wanted : 1024;
}

}  // namespace ibq::cuda
