// Launches the kernels of histogram_kernel.cuh on any queue (launch.h).
#pragma once

#include "histogram_plan.h"
#include "launch.h"

namespace ibq::cuda {

template <bool kShared>
struct HistogramKernel {
  using Function = void (*)(const int64_t*, int64_t, int64_t, int64_t*);
  static constexpr const char* kSource = "histogram_kernel.cuh";
  static KernelExpression name() {
    return KernelExpression(kShared ? "histogram_shared_kernel" : "histogram_global_kernel");
  }
};

// ibq_cuda_code_histogram on a queue.
template <typename Queue>
int launch_histogram(Queue& queue, const int64_t* indices, int64_t N, int64_t K, int64_t* counts) {
  if (N < 0 || N >= int64_t{1} << 40 || K < 1 || K > INT32_MAX) return kInvalidValue;
  const int error = queue.fill(counts, 0, K * static_cast<int64_t>(sizeof(int64_t)));
  if (error != kSuccess || N == 0) return error;
  if (K <= kSharedHistogramCodes) {
    const Grid grid{histogram_blocks(N), kHistogramThreads, K * static_cast<int64_t>(sizeof(uint32_t))};
    return queue.launch(HistogramKernel<true>{}, grid, indices, N, K, counts);
  }
  const Grid grid{histogram_blocks(N), kHistogramThreads, 0};
  return queue.launch(HistogramKernel<false>{}, grid, indices, N, K, counts);
}

}  // namespace ibq::cuda
