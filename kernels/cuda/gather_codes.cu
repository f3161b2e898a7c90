// The kernel of gather_kernel.cuh as nvcc compiles and launches it. UNRUN ON A GPU.
#include "cuda_queue.cuh"
#include "gather_kernel.cuh"
#include "gather_launch.h"
#include "ibq_cuda.h"

namespace ibq::cuda {

template <typename Word>
auto kernel_of(GatherKernel<Word>) {
  return gather_codes_kernel<Word>;
}

}  // namespace ibq::cuda

int ibq_cuda_gather_codes(const void* codebook, const int64_t* indices, int64_t N, int64_t K, int64_t D,
                          ibq_dtype dtype, void* out, void* second, void* stream) {
  ibq::cuda::CudaQueue queue(stream);
  return ibq::cuda::launch_gather(queue, codebook, indices, N, K, D, dtype, out, second);
}
