// ibq_cuda_softmax_* and ibq_cuda_cross_entropy_*: checks, plans on the current device, launches. UNRUN ON A
// GPU.
#include "cross_entropy.h"
#include "launches.h"
#include "softmax_backward.h"

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

namespace {

cudaError_t sequence_limits(const ibq_problem& problem, LaunchLimits* limits) {
  return is_valid(problem) ? current_limits(&limits->device) : cudaErrorInvalidValue;
}

// Workspace is what a sequence's layout comes to from a null base.
template <typename Workspace, typename Arguments>
int workspace_bytes(const ibq_problem* problem, const Arguments* args, int64_t* bytes) {
  LaunchLimits limits{};
  const cudaError_t error = sequence_limits(*problem, &limits);
  if (error == cudaSuccess) *bytes = Workspace(Operands(*problem), *args, limits, nullptr).bytes;
  return error;
}

// Runs a sequence once its workspace is known to suffice. Rows: there is nothing to do without any.
template <typename Workspace, typename Arguments, typename Sequence>
int run(const ibq_problem& problem, const Arguments& args, int64_t bytes, void* stream,
        const Sequence& sequence) {
  LaunchLimits limits{};
  const cudaError_t error = sequence_limits(problem, &limits);
  if (error != cudaSuccess) return error;
  if (bytes < Workspace(Operands(problem), args, limits, nullptr).bytes) return cudaErrorInvalidValue;
  StreamQueue queue(static_cast<cudaStream_t>(stream));
  if (problem.N > 0) sequence(queue, limits);
  return queue.status();
}

}  // namespace
}  // namespace ibq::cuda

using namespace ibq::cuda;

void ibq_cuda_bound_grid(int64_t N, int64_t K, int64_t* row_tiles, int64_t* code_tiles) {
  bound_grid(N, K, LaunchLimits{}, row_tiles, code_tiles);
}

int ibq_cuda_softmax_forward_workspace(const ibq_problem* problem, const ibq_softmax_forward* out,
                                       int64_t* bytes) {
  return workspace_bytes<ForwardWorkspace>(problem, out, bytes);
}

int ibq_cuda_softmax_forward(const ibq_problem* problem, const ibq_softmax_forward* out, int deterministic,
                             void* workspace, int64_t bytes, void* stream) {
  return run<ForwardWorkspace>(
      *problem, *out, bytes, stream, [&](StreamQueue& queue, const LaunchLimits& limits) {
        softmax_forward(queue, *problem, *out, deterministic != 0, limits, workspace);
      });
}

int ibq_cuda_softmax_backward_workspace(const ibq_problem* problem, const ibq_softmax_backward* args,
                                        int64_t* bytes) {
  return workspace_bytes<BackwardWorkspace>(problem, args, bytes);
}

int ibq_cuda_softmax_backward(const ibq_problem* problem, const ibq_softmax_backward* args, int deterministic,
                              void* workspace, int64_t bytes, void* stream) {
  return run<BackwardWorkspace>(
      *problem, *args, bytes, stream, [&](StreamQueue& queue, const LaunchLimits& limits) {
        softmax_backward(queue, *problem, *args, deterministic != 0, limits, workspace);
      });
}

int ibq_cuda_cross_entropy_forward_workspace(const ibq_problem* problem, const ibq_cross_entropy* args,
                                             int64_t* bytes) {
  return workspace_bytes<CrossEntropyForwardWorkspace>(problem, args, bytes);
}

int ibq_cuda_cross_entropy_forward(const ibq_problem* problem, const ibq_cross_entropy* args, void* workspace,
                                   int64_t bytes, void* stream) {
  return run<CrossEntropyForwardWorkspace>(*problem, *args, bytes, stream,
                                           [&](StreamQueue& queue, const LaunchLimits& limits) {
                                             cross_entropy_forward(queue, *problem, *args, limits, workspace);
                                           });
}

int ibq_cuda_cross_entropy_backward_workspace(const ibq_problem* problem, const ibq_cross_entropy* args,
                                              int64_t* bytes) {
  return workspace_bytes<CrossEntropyBackwardWorkspace>(problem, args, bytes);
}

int ibq_cuda_cross_entropy_backward(const ibq_problem* problem, const ibq_cross_entropy* args,
                                    int deterministic, void* workspace, int64_t bytes, void* stream) {
  return run<CrossEntropyBackwardWorkspace>(
      *problem, *args, bytes, stream, [&](StreamQueue& queue, const LaunchLimits& limits) {
        cross_entropy_backward(queue, *problem, *args, deterministic != 0, limits, workspace);
      });
}
