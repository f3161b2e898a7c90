// ibq_cuda_softmax_* and ibq_cuda_cross_entropy_*: checks, plans on the current device, launches. UNRUN ON A
// GPU.
#include "cross_entropy.h"
#include "hopper/hopper.h"
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

namespace {

bool arguments_are_valid(const ibq_problem&, const ibq_softmax_forward& out) { return is_valid(out); }
bool arguments_are_valid(const ibq_problem&, const ibq_softmax_backward& args) { return is_valid(args); }
bool arguments_are_valid(const ibq_problem& problem, const ibq_cross_entropy& args) {
  return is_valid(problem, args);
}

template <typename Arguments>
cudaError_t sequence_limits(const ibq_problem& problem, const Arguments& args, LaunchLimits* limits) {
  const bool valid = is_valid(problem) && arguments_are_valid(problem, args);
  return valid ? current_limits(&limits->device) : cudaErrorInvalidValue;
}

// Workspace is what a sequence's layout comes to from a null base.
template <typename Workspace, typename Arguments>
int workspace_bytes(const ibq_problem* problem, const Arguments* args, int64_t* bytes) {
  LaunchLimits limits{};
  const cudaError_t error = sequence_limits(*problem, *args, &limits);
  if (error == cudaSuccess) *bytes = Workspace(Operands(*problem), *args, limits, nullptr).bytes;
  return error;
}

// Runs a sequence once its workspace is known to suffice. Rows: there is nothing to do without any.
template <typename Workspace, typename Arguments, typename Sequence>
int run(const ibq_problem& problem, const Arguments& args, int64_t bytes, void* stream,
        const Sequence& sequence) {
  LaunchLimits limits{};
  const cudaError_t error = sequence_limits(problem, args, &limits);
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
