// The ops of namespace ibq_fast_cupy: the glue of cuda_ops.cpp and cuda_training_ops.cpp once more, its
// launches made by CuPy instead of nvcc's. Needs neither nvcc nor a torch built for CUDA to compile. UNRUN ON
// A GPU.
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
#define ibq_cuda_bound_grid ibq_cupy_bound_grid
#define ibq_cuda_softmax_forward_workspace ibq_cupy_softmax_forward_workspace
#define ibq_cuda_softmax_forward ibq_cupy_softmax_forward
#define ibq_cuda_softmax_backward_workspace ibq_cupy_softmax_backward_workspace
#define ibq_cuda_softmax_backward ibq_cupy_softmax_backward
#define ibq_cuda_cross_entropy_forward_workspace ibq_cupy_cross_entropy_forward_workspace
#define ibq_cuda_cross_entropy_forward ibq_cupy_cross_entropy_forward
#define ibq_cuda_cross_entropy_backward_workspace ibq_cupy_cross_entropy_backward_workspace
#define ibq_cuda_cross_entropy_backward ibq_cupy_cross_entropy_backward

#include "csrc/cuda_ops.cpp"
#include "csrc/cuda_training_ops.cpp"
#include "kernels/cuda/gather_launch.h"
#include "kernels/cuda/histogram_launch.h"
#include "kernels/cuda/search_launch.h"
#include "kernels/cuda/sequences.h"

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

void ibq_cuda_bound_grid(int64_t N, int64_t K, int64_t* row_tiles, int64_t* code_tiles) {
  ibq::cuda::bound_grid(N, K, ibq::cuda::LaunchLimits{}, row_tiles, code_tiles);
}

int ibq_cuda_softmax_forward_workspace(const ibq_problem* problem, const ibq_softmax_forward* args,
                                       int64_t* bytes) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::workspace_bytes<ibq::cuda::ForwardWorkspace>(queue, problem, args, bytes);
}

int ibq_cuda_softmax_forward(const ibq_problem* problem, const ibq_softmax_forward* args, int deterministic,
                             void* workspace, int64_t bytes, void*) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::run_softmax_forward(queue, *problem, *args, deterministic != 0, workspace, bytes);
}

int ibq_cuda_softmax_backward_workspace(const ibq_problem* problem, const ibq_softmax_backward* args,
                                        int64_t* bytes) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::workspace_bytes<ibq::cuda::BackwardWorkspace>(queue, problem, args, bytes);
}

int ibq_cuda_softmax_backward(const ibq_problem* problem, const ibq_softmax_backward* args, int deterministic,
                              void* workspace, int64_t bytes, void*) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::run_softmax_backward(queue, *problem, *args, deterministic != 0, workspace, bytes);
}

int ibq_cuda_cross_entropy_forward_workspace(const ibq_problem* problem, const ibq_cross_entropy* args,
                                             int64_t* bytes) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::workspace_bytes<ibq::cuda::CrossEntropyForwardWorkspace>(queue, problem, args, bytes);
}

int ibq_cuda_cross_entropy_forward(const ibq_problem* problem, const ibq_cross_entropy* args, void* workspace,
                                   int64_t bytes, void*) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::run_cross_entropy_forward(queue, *problem, *args, workspace, bytes);
}

int ibq_cuda_cross_entropy_backward_workspace(const ibq_problem* problem, const ibq_cross_entropy* args,
                                              int64_t* bytes) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::workspace_bytes<ibq::cuda::CrossEntropyBackwardWorkspace>(queue, problem, args, bytes);
}

int ibq_cuda_cross_entropy_backward(const ibq_problem* problem, const ibq_cross_entropy* args,
                                    int deterministic, void* workspace, int64_t bytes, void*) {
  ibq::cupy::CupyQueue queue;
  return ibq::cuda::run_cross_entropy_backward(queue, *problem, *args, deterministic != 0, workspace, bytes);
}
