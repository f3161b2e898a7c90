// Runs the launch sequences of softmax_forward.h, softmax_backward.h and cross_entropy.h on any queue
// (launch_list.h) that has, beside fill and launch,
//   int limits(DeviceLimits*)   0, or a cudaError_t
//   void refuse(), status()     as StreamQueue in launches.h
// and answers with 0 or a cudaError_t as int: what the C surface does, whoever launches.
#pragma once

#include "cross_entropy.h"
#include "launch.h"
#include "softmax_backward.h"

namespace ibq::cuda {

inline bool arguments_are_valid(const ibq_problem&, const ibq_softmax_forward& out) { return is_valid(out); }
inline bool arguments_are_valid(const ibq_problem&, const ibq_softmax_backward& args) {
  return is_valid(args);
}
inline bool arguments_are_valid(const ibq_problem& problem, const ibq_cross_entropy& args) {
  return is_valid(problem, args);
}

template <typename Queue, typename Arguments>
int sequence_limits(Queue& queue, const ibq_problem& problem, const Arguments& args, LaunchLimits* limits) {
  const bool valid = is_valid(problem) && arguments_are_valid(problem, args);
  return valid ? static_cast<int>(queue.limits(&limits->device)) : kInvalidValue;
}

// Workspace is what a sequence's layout comes to from a null base.
template <typename Workspace, typename Queue, typename Arguments>
int workspace_bytes(Queue& queue, const ibq_problem* problem, const Arguments* args, int64_t* bytes) {
  LaunchLimits limits{};
  const int error = sequence_limits(queue, *problem, *args, &limits);
  if (error == kSuccess) *bytes = Workspace(Operands(*problem), *args, limits, nullptr).bytes;
  return error;
}

// Runs a sequence once its workspace is known to suffice. Rows: there is nothing to do without any.
template <typename Workspace, typename Queue, typename Arguments, typename Sequence>
int run_sequence(Queue& queue, const ibq_problem& problem, const Arguments& args, int64_t bytes,
                 const Sequence& sequence) {
  LaunchLimits limits{};
  const int error = sequence_limits(queue, problem, args, &limits);
  if (error != kSuccess) return error;
  if (bytes < Workspace(Operands(problem), args, limits, nullptr).bytes) return kInvalidValue;
  if (problem.N > 0) sequence(limits);
  return static_cast<int>(queue.status());
}

template <typename Queue>
int run_softmax_forward(Queue& queue, const ibq_problem& problem, const ibq_softmax_forward& out,
                        bool deterministic, void* workspace, int64_t bytes) {
  return run_sequence<ForwardWorkspace>(queue, problem, out, bytes, [&](const LaunchLimits& limits) {
    softmax_forward(queue, problem, out, deterministic, limits, workspace);
  });
}

template <typename Queue>
int run_softmax_backward(Queue& queue, const ibq_problem& problem, const ibq_softmax_backward& args,
                         bool deterministic, void* workspace, int64_t bytes) {
  return run_sequence<BackwardWorkspace>(queue, problem, args, bytes, [&](const LaunchLimits& limits) {
    softmax_backward(queue, problem, args, deterministic, limits, workspace);
  });
}

template <typename Queue>
int run_cross_entropy_forward(Queue& queue, const ibq_problem& problem, const ibq_cross_entropy& args,
                              void* workspace, int64_t bytes) {
  return run_sequence<CrossEntropyForwardWorkspace>(
      queue, problem, args, bytes,
      [&](const LaunchLimits& limits) { cross_entropy_forward(queue, problem, args, limits, workspace); });
}

template <typename Queue>
int run_cross_entropy_backward(Queue& queue, const ibq_problem& problem, const ibq_cross_entropy& args,
                               bool deterministic, void* workspace, int64_t bytes) {
  return run_sequence<CrossEntropyBackwardWorkspace>(
      queue, problem, args, bytes, [&](const LaunchLimits& limits) {
        cross_entropy_backward(queue, problem, args, deterministic, limits, workspace);
      });
}

}  // namespace ibq::cuda
