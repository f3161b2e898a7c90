// The kernels of histogram_kernel.cuh as nvcc compiles and launches them. UNRUN ON A GPU.
#include "cuda_queue.cuh"
#include "histogram_kernel.cuh"
#include "histogram_launch.h"
#include "ibq_cuda.h"

namespace ibq::cuda {

auto kernel_of(HistogramKernel<true>) { return histogram_shared_kernel; }
auto kernel_of(HistogramKernel<false>) { return histogram_global_kernel; }

}  // namespace ibq::cuda

int ibq_cuda_code_histogram(const int64_t* indices, int64_t N, int64_t K, int64_t* counts, void* stream) {
  ibq::cuda::CudaQueue queue(stream);
  return ibq::cuda::launch_histogram(queue, indices, N, K, counts);
}
