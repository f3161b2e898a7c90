// Launches a search: plan, workspace, the kernel of search_kernel.cuh and its finish, on any queue
// (launch.h).
#pragma once

#include "ibq_cuda.h"
#include "launch.h"

namespace ibq::cuda {

template <Element kElement, bool kWithLse>
struct SearchKernel {
  using Function = void (*)(SearchArguments);
  static constexpr const char* kSource = "search_kernel.cuh";
  static KernelExpression name() {
    return KernelExpression("codebook_search_kernel").with(kElement).with(kWithLse);
  }
};

template <bool kWithLse>
struct SearchFinishKernel {
  using Function = void (*)(SearchArguments, int64_t*, float*, float*);
  static constexpr const char* kSource = "search_kernel.cuh";
  static KernelExpression name() { return KernelExpression("codebook_search_finish_kernel").with(kWithLse); }
};

inline bool known_dtype(ibq_dtype dtype) { return dtype == IBQ_F32 || dtype == IBQ_BF16 || dtype == IBQ_F16; }
inline int element_bytes(ibq_dtype dtype) { return dtype == IBQ_F32 ? 4 : 2; }

inline bool search_sizes_are_valid(int64_t N, int64_t K, int64_t D, ibq_dtype dtype) {
  constexpr int64_t kLargest = int64_t{1} << 31;
  return known_dtype(dtype) && N >= 0 && K >= 1 && K < kLargest - kSearchTileRows && D >= 1 &&
         D < kLargest / 4 && N < (int64_t{1} << 62) / (D * 4);
}

template <typename Queue>
int plan_search_on(Queue& queue, int64_t N, int64_t K, int64_t D, ibq_dtype dtype, SearchPlan* plan) {
  if (!search_sizes_are_valid(N, K, D, dtype)) return kInvalidValue;
  DeviceLimits limits{};
  if (const int error = queue.limits(&limits)) return error;
  *plan = plan_search(N, K, D, element_bytes(dtype), limits);
  return plan->stages == 0 || plan->schedule.blocks() > INT32_MAX ? kInvalidConfiguration : kSuccess;
}

template <typename Queue>
int search_workspace(Queue& queue, int64_t N, int64_t K, int64_t D, ibq_dtype dtype, int with_lse,
                     int64_t* bytes) {
  SearchPlan plan{};
  const int error = plan_search_on(queue, N, K, D, dtype, &plan);
  if (error == kSuccess) *bytes = search_workspace_bytes(N, plan, with_lse != 0);
  return error;
}

template <Element kElement, bool kWithLse, typename Queue>
int launch_search_of(Queue& queue, const SearchArguments& args, int64_t* indices, float* max, float* lse) {
  const Grid grid{args.plan.schedule.blocks(), kSearchThreads, args.plan.shared_bytes};
  if (const int error = queue.launch(SearchKernel<kElement, kWithLse>{}, grid, args)) return error;
  const Grid finish{ceil_div(args.N, int64_t{kFinishThreads}), kFinishThreads, 0};
  return queue.launch(SearchFinishKernel<kWithLse>{}, finish, args, indices, max, lse);
}

template <Element kElement, typename Queue>
int launch_search_of(Queue& queue, const SearchArguments& args, int64_t* indices, float* max, float* lse) {
  return lse != nullptr ? launch_search_of<kElement, true>(queue, args, indices, max, lse)
                        : launch_search_of<kElement, false>(queue, args, indices, max, lse);
}

// ibq_cuda_codebook_search on a queue.
template <typename Queue>
int launch_search(Queue& queue, const void* z, const void* codebook, const float* bias, float scale,
                  int64_t N, int64_t K, int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse,
                  void* workspace, int64_t workspace_bytes) {
  SearchArguments args{};
  if (const int error = plan_search_on(queue, N, K, D, dtype, &args.plan)) return error;
  if (N == 0) return kSuccess;
  if (workspace_bytes < search_workspace_bytes(N, args.plan, lse != nullptr)) return kInvalidValue;
  args.z = static_cast<const unsigned char*>(z);
  args.codebook = static_cast<const unsigned char*>(codebook);
  args.bias = bias;
  args.scale = scale;
  args.N = N;
  args.K = K;
  args.row_bytes = D * element_bytes(dtype);
  args.access = widest_access(reinterpret_cast<uintptr_t>(z) | reinterpret_cast<uintptr_t>(codebook) |
                              static_cast<uint64_t>(args.row_bytes));
  const int64_t statistics = args.plan.schedule.splits * N;
  args.split_max = static_cast<float*>(workspace);
  args.split_index = reinterpret_cast<int32_t*>(args.split_max + statistics);
  args.split_sum = lse != nullptr ? args.split_max + 2 * statistics : nullptr;
  switch (dtype) {
    case IBQ_F32:
      return launch_search_of<Element::f32>(queue, args, indices, max, lse);
    case IBQ_BF16:
      return launch_search_of<Element::bf16>(queue, args, indices, max, lse);
    default:
      return launch_search_of<Element::f16>(queue, args, indices, max, lse);
  }
}

}  // namespace ibq::cuda
