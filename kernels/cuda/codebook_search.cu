// The search of search_kernel.cuh as nvcc compiles and launches it. UNRUN ON A GPU.
#include "cuda_queue.cuh"
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

const char* ibq_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ibq_cuda_codebook_search_workspace(int64_t N, int64_t K, int64_t D, ibq_dtype dtype, int with_lse,
                                       int64_t* bytes) {
  ibq::cuda::CudaQueue queue(nullptr);
  return ibq::cuda::search_workspace(queue, N, K, D, dtype, with_lse, bytes);
}

int ibq_cuda_codebook_search(const void* z, const void* codebook, const float* bias, float scale, int64_t N,
                             int64_t K, int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse,
                             void* workspace, int64_t workspace_bytes, void* stream) {
  ibq::cuda::CudaQueue queue(stream);
  return ibq::cuda::launch_search(queue, z, codebook, bias, scale, N, K, D, dtype, indices, max, lse,
                                  workspace, workspace_bytes);
}
