// ibq_cuda_softmax_* and ibq_cuda_cross_entropy_*: checks, plans on the current device, launches. UNRUN ON A
// GPU.
#include "hopper/hopper.h"
#include "launches.h"
#include "sequences.h"

namespace ibq::cuda {

cudaError_t current_limits(DeviceLimits* limits) {
  int device = 0, shared_per_multiprocessor = 0, shared_per_block = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error =
      cudaDeviceGetAttribute(&shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits->shared_per_multiprocessor = shared_per_multiprocessor;
  limits->shared_per_block = shared_per_block;
  return error;
}

// By operand type, or to the Hopper kernels.
cudaError_t launch_kernel(const Launch& launch, const SweepArguments& args) {
  if (hopper::takes_over(launch.kernel, launch.element, args))
    return static_cast<cudaError_t>(hopper::launch(launch.kernel, args, launch.stream));
  switch (launch.element) {
    case Element::f32:
      return launch_sweep_f32(launch, args);
    case Element::bf16:
      return launch_sweep_bf16(launch, args);
    default:
      return launch_sweep_f16(launch, args);
  }
}

}  // namespace ibq::cuda

using namespace ibq::cuda;

void ibq_cuda_bound_grid(int64_t N, int64_t K, int64_t* row_tiles, int64_t* code_tiles) {
  bound_grid(N, K, LaunchLimits{}, row_tiles, code_tiles);
}

int ibq_cuda_softmax_forward_workspace(const ibq_problem* problem, const ibq_softmax_forward* args,
                                       int64_t* bytes) {
  StreamQueue queue(nullptr);
  return ibq::cuda::workspace_bytes<ibq::cuda::ForwardWorkspace>(queue, problem, args, bytes);
}

int ibq_cuda_softmax_forward(const ibq_problem* problem, const ibq_softmax_forward* args, int deterministic,
                             void* workspace, int64_t bytes, void* stream) {
  StreamQueue queue(static_cast<cudaStream_t>(stream));
  return ibq::cuda::run_softmax_forward(queue, *problem, *args, deterministic != 0, workspace, bytes);
}

int ibq_cuda_softmax_backward_workspace(const ibq_problem* problem, const ibq_softmax_backward* args,
                                        int64_t* bytes) {
  StreamQueue queue(nullptr);
  return ibq::cuda::workspace_bytes<ibq::cuda::BackwardWorkspace>(queue, problem, args, bytes);
}

int ibq_cuda_softmax_backward(const ibq_problem* problem, const ibq_softmax_backward* args, int deterministic,
                              void* workspace, int64_t bytes, void* stream) {
  StreamQueue queue(static_cast<cudaStream_t>(stream));
  return ibq::cuda::run_softmax_backward(queue, *problem, *args, deterministic != 0, workspace, bytes);
}

int ibq_cuda_cross_entropy_forward_workspace(const ibq_problem* problem, const ibq_cross_entropy* args,
                                             int64_t* bytes) {
  StreamQueue queue(nullptr);
  return ibq::cuda::workspace_bytes<ibq::cuda::CrossEntropyForwardWorkspace>(queue, problem, args, bytes);
}

int ibq_cuda_cross_entropy_forward(const ibq_problem* problem, const ibq_cross_entropy* args, void* workspace,
                                   int64_t bytes, void* stream) {
  StreamQueue queue(static_cast<cudaStream_t>(stream));
  return ibq::cuda::run_cross_entropy_forward(queue, *problem, *args, workspace, bytes);
}

int ibq_cuda_cross_entropy_backward_workspace(const ibq_problem* problem, const ibq_cross_entropy* args,
                                              int64_t* bytes) {
  StreamQueue queue(nullptr);
  return ibq::cuda::workspace_bytes<ibq::cuda::CrossEntropyBackwardWorkspace>(queue, problem, args, bytes);
}

int ibq_cuda_cross_entropy_backward(const ibq_problem* problem, const ibq_cross_entropy* args,
                                    int deterministic, void* workspace, int64_t bytes, void* stream) {
  StreamQueue queue(static_cast<cudaStream_t>(stream));
  return ibq::cuda::run_cross_entropy_backward(queue, *problem, *args, deterministic != 0, workspace, bytes);
}
