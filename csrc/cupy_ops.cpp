// The ops of namespace ibq_fast_cupy: the glue of cuda_ops.cpp once more, its launches made by CuPy instead
// of nvcc's. Needs neither nvcc nor a torch built for CUDA to compile. UNRUN ON A GPU.
//
// Here the C surface of kernels/cuda gets names of its own and is implemented on a CupyQueue; the stream
// argument is not looked at, because the launcher takes torch's current stream of the device.
#include "csrc/cupy_queue.h"

#define IBQ_FAST_THROUGH_CUPY
#define ibq_cuda_error_string ibq_cupy_error_string
#define ibq_cuda_codebook_search_workspace ibq_cupy_codebook_search_workspace
#define ibq_cuda_codebook_search ibq_cupy_codebook_search
#define ibq_cuda_code_histogram ibq_cupy_code_histogram
#define ibq_cuda_gather_codes ibq_cupy_gather_codes

#include "csrc/cuda_ops.cpp"
#include "kernels/cuda/gather_launch.h"
#include "kernels/cuda/histogram_launch.h"
#include "kernels/cuda/search_launch.h"

const char* ibq_cuda_error_string(int error) {
  if (error == ibq::cupy::kLauncherFailed) return ibq::cupy::error_text();
  return error == ibq::cuda::kInvalidValue ? "invalid argument" : "invalid configuration";
}

int ibq_cuda_codebook_search_workspace(int64_t N, int64_t K, int64_t D, ibq_dtype dtype, int with_lse,
                                       int64_t* bytes) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::search_workspace(queue, N, K, D, dtype, with_lse, bytes);
}

int ibq_cuda_codebook_search(const void* z, const void* codebook, const float* bias, float scale, int64_t N,
                             int64_t K, int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse,
                             void* workspace, int64_t workspace_bytes, void*) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::launch_search(queue, z, codebook, bias, scale, N, K, D, dtype, indices, max, lse,
                                  workspace, workspace_bytes);
}

int ibq_cuda_code_histogram(const int64_t* indices, int64_t N, int64_t K, int64_t* counts, void*) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::launch_histogram(queue, indices, N, K, counts);
}

int ibq_cuda_gather_codes(const void* codebook, const int64_t* indices, int64_t N, int64_t K, int64_t D,
                          ibq_dtype dtype, void* out, void* second, void*) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::launch_gather(queue, codebook, indices, N, K, D, dtype, out, second);
}
