// Launches the kernels of search_kernel.cuh, or hands over to the Hopper ones. UNRUN ON A GPU.
#include <cuda_runtime.h>

#include "hopper/hopper.h"
#include "ibq_cuda.h"
#include "launches.h"
#include "search_kernel.cuh"

namespace {

using namespace ibq::cuda;

int element_bytes(ibq_dtype dtype) { return dtype == IBQ_F32 ? 4 : 2; }

bool sizes_are_valid(int64_t N, int64_t K, int64_t D, ibq_dtype dtype) {
  constexpr int64_t kLargest = int64_t{1} << 31;
  if (dtype != IBQ_F32 && dtype != IBQ_BF16 && dtype != IBQ_F16) return false;
  return N >= 0 && K >= 1 && K < kLargest - kSearchTileRows && D >= 1 && D < kLargest / 4 &&
         N < (int64_t{1} << 62) / (D * 4);
}

cudaError_t plan_on_device(int64_t N, int64_t K, int64_t D, ibq_dtype dtype, SearchPlan* plan) {
  if (!sizes_are_valid(N, K, D, dtype)) return cudaErrorInvalidValue;
  DeviceLimits limits{};
  const cudaError_t error = current_limits(&limits);
  if (error != cudaSuccess) return error;
  *plan = plan_search(N, K, D, element_bytes(dtype), limits);
  return plan->stages == 0 || plan->schedule.blocks() > INT32_MAX ? cudaErrorInvalidConfiguration
                                                                  : cudaSuccess;
}

template <Element kElement, bool kWithLse>
cudaError_t launch(const SearchArguments& args, int64_t* indices, float* max, float* lse,
                   cudaStream_t stream) {
  const auto kernel = codebook_search_kernel<kElement, kWithLse>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(args.plan.shared_bytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(args.plan.schedule.blocks()), kSearchThreads, args.plan.shared_bytes,
           stream>>>(args);
  const auto finish_blocks = static_cast<unsigned>(ibq::ceil_div(args.N, int64_t{kFinishThreads}));
  codebook_search_finish_kernel<kWithLse>
      <<<finish_blocks, kFinishThreads, 0, stream>>>(args, indices, max, lse);
  return cudaGetLastError();
}

template <Element kElement>
cudaError_t launch(const SearchArguments& args, int64_t* indices, float* max, float* lse,
                   cudaStream_t stream) {
  return lse != nullptr ? launch<kElement, true>(args, indices, max, lse, stream)
                        : launch<kElement, false>(args, indices, max, lse, stream);
}

}  // namespace

const char* ibq_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ibq_cuda_codebook_search_workspace(int64_t N, int64_t K, int64_t D, ibq_dtype dtype, int with_lse,
                                       int64_t* bytes) {
  SearchPlan plan{};
  const cudaError_t error = plan_on_device(N, K, D, dtype, &plan);
  if (error != cudaSuccess) return error;
  *bytes = search_workspace_bytes(N, plan, with_lse != 0);
  if (hopper::refusal(N, K, D, dtype, 0) != nullptr) return cudaSuccess;
  // Alignment, not known here, decides between the two: the larger serves both.
  int64_t hopper_bytes = 0;
  const int failed = hopper::codebook_search_workspace(N, K, D, with_lse, &hopper_bytes);
  if (hopper_bytes > *bytes) *bytes = hopper_bytes;
  return failed;
}

int ibq_cuda_codebook_search(const void* z, const void* codebook, const float* bias, float scale, int64_t N,
                             int64_t K, int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse,
                             void* workspace, int64_t workspace_bytes, void* stream) {
  SearchArguments args{};
  const cudaError_t error = plan_on_device(N, K, D, dtype, &args.plan);
  if (error != cudaSuccess) return error;
  if (N == 0) return cudaSuccess;
  const uint64_t addresses = reinterpret_cast<uintptr_t>(z) | reinterpret_cast<uintptr_t>(codebook);
  if (hopper::refusal(N, K, D, dtype, addresses) == nullptr)
    return hopper::codebook_search(z, codebook, bias, scale, N, K, D, dtype, indices, max, lse, workspace,
                                   workspace_bytes, stream);
  if (workspace_bytes < search_workspace_bytes(N, args.plan, lse != nullptr)) return cudaErrorInvalidValue;
  args.z = static_cast<const unsigned char*>(z);
  args.codebook = static_cast<const unsigned char*>(codebook);
  args.bias = bias;
  args.scale = scale;
  args.N = N;
  args.K = K;
  args.row_bytes = D * element_bytes(dtype);
  args.access = widest_access(reinterpret_cast<uintptr_t>(z) | reinterpret_cast<uintptr_t>(codebook) |
                              static_cast<uintptr_t>(args.row_bytes));
  const int64_t statistics = args.plan.schedule.splits * N;
  args.split_max = static_cast<float*>(workspace);
  args.split_index = reinterpret_cast<int32_t*>(args.split_max + statistics);
  args.split_sum = lse != nullptr ? args.split_max + 2 * statistics : nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case IBQ_F32:
      return launch<Element::f32>(args, indices, max, lse, queue);
    case IBQ_BF16:
      return launch<Element::bf16>(args, indices, max, lse, queue);
    default:
      return launch<Element::f16>(args, indices, max, lse, queue);
  }
}
