// The search as nvcc compiles and launches it: the Hopper kernels where they serve, those of
// search_kernel.cuh elsewhere. UNRUN ON A GPU.
#include "cuda_queue.cuh"
#include "hopper/hopper.h"
#include "search_kernel.cuh"
#include "search_launch.h"

namespace ibq::cuda {

template <Element kElement, bool kWithLse>
auto kernel_of(SearchKernel<kElement, kWithLse>) {
  return codebook_search_kernel<kElement, kWithLse>;
}

template <bool kWithLse>
auto kernel_of(SearchFinishKernel<kWithLse>) {
  return codebook_search_finish_kernel<kWithLse>;
}

}  // namespace ibq::cuda

namespace hopper = ibq::cuda::hopper;

const char* ibq_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ibq_cuda_codebook_search_workspace(int64_t N, int64_t K, int64_t D, ibq_dtype dtype, int with_lse,
                                       int64_t* bytes) {
  ibq::cuda::CudaQueue queue(nullptr);
  if (const int error = ibq::cuda::search_workspace(queue, N, K, D, dtype, with_lse, bytes)) return error;
  if (hopper::refusal(N, K, D, dtype, 0) != nullptr) return ibq::cuda::kSuccess;
  // Alignment, not known here, decides between the two: the larger serves both.
  int64_t hopper_bytes = 0;
  const int error = hopper::codebook_search_workspace(N, K, D, with_lse, &hopper_bytes);
  if (hopper_bytes > *bytes) *bytes = hopper_bytes;
  return error;
}

int ibq_cuda_codebook_search(const void* z, const void* codebook, const float* bias, float scale, int64_t N,
                             int64_t K, int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse,
                             void* workspace, int64_t workspace_bytes, void* stream) {
  const uint64_t addresses = reinterpret_cast<uintptr_t>(z) | reinterpret_cast<uintptr_t>(codebook);
  if (N > 0 && hopper::refusal(N, K, D, dtype, addresses) == nullptr)
    return hopper::codebook_search(z, codebook, bias, scale, N, K, D, dtype, indices, max, lse, workspace,
                                   workspace_bytes, stream);
  ibq::cuda::CudaQueue queue(stream);
  return ibq::cuda::launch_search(queue, z, codebook, bias, scale, N, K, D, dtype, indices, max, lse,
                                  workspace, workspace_bytes);
}
