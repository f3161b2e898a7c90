// Launches the kernels of histogram_kernel.cuh. UNRUN ON A GPU.
#include <cuda_runtime.h>

#include "histogram_kernel.cuh"
#include "ibq_cuda.h"

namespace {

// Enough blocks to fill any device, few enough that flushing private counters stays small.
unsigned grid_for(int64_t N) {
  const int64_t wanted = ibq::ceil_div(N, int64_t{8 * ibq::cuda::kHistogramThreads});
  return static_cast<unsigned>(wanted < 1024 ? wanted : 1024);
}

}  // namespace

int ibq_cuda_code_histogram(const int64_t* indices, int64_t N, int64_t K, int64_t* counts, void* stream) {
  using namespace ibq::cuda;
  if (N < 0 || N >= int64_t{1} << 40 || K < 1 || K > INT32_MAX) return cudaErrorInvalidValue;
  const auto queue = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemsetAsync(counts, 0, static_cast<size_t>(K) * sizeof(int64_t), queue);
  if (error != cudaSuccess || N == 0) return error;
  if (K <= kSharedHistogramCodes) {
    const size_t shared = static_cast<size_t>(K) * sizeof(uint32_t);
    histogram_shared_kernel<<<grid_for(N), kHistogramThreads, shared, queue>>>(indices, N, K, counts);
  } else {
    histogram_global_kernel<<<grid_for(N), kHistogramThreads, 0, queue>>>(indices, N, K, counts);
  }
  return cudaGetLastError();
}
