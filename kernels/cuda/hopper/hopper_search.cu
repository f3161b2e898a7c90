// Launches the kernel of search_kernel.cuh. NEVER RUN ON A GPU. Compiled for sm_90a alone.
#include <cuda_runtime.h>

#include "hopper.h"
#include "search_kernel.cuh"

namespace {

using namespace ibq::cuda;
using hopper::SearchParameters;

cudaError_t plan_on_device(int64_t N, int64_t K, int64_t D, hopper::StreamPlan* plan) {
  int device = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  *plan = hopper::plan_stream(N, K, D, hopper::kResidentRows, multiprocessors, shared);
  return plan->stages == 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
}

template <bool kBf16, bool kWithLse>
cudaError_t launch(const SearchParameters& p, int64_t* indices, float* max, float* lse, cudaStream_t stream) {
  const auto kernel = hopper::hopper_search_kernel<kBf16, kWithLse>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(p.plan.shared_bytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(p.plan.blocks), hopper::kStreamThreads, p.plan.shared_bytes, stream>>>(p);
  SearchArguments finish{};
  finish.N = p.N;
  finish.plan.schedule = p.plan.schedule;
  finish.split_max = p.split_max;
  finish.split_index = p.split_index;
  finish.split_sum = p.split_sum;
  const auto finish_blocks = static_cast<unsigned>(ibq::ceil_div(p.N, int64_t{kFinishThreads}));
  codebook_search_finish_kernel<kWithLse>
      <<<finish_blocks, kFinishThreads, 0, stream>>>(finish, indices, max, lse);
  return cudaGetLastError();
}

}  // namespace

namespace ibq::cuda::hopper {

int codebook_search_workspace(int64_t N, int64_t K, int64_t D, int with_lse, int64_t* bytes) {
  StreamPlan plan{};
  const cudaError_t error = plan_on_device(N, K, D, &plan);
  if (error == cudaSuccess) *bytes = search_workspace_bytes(N, plan, with_lse != 0);
  return error;
}

int codebook_search(const void* z, const void* codebook, const float* bias, float scale, int64_t N, int64_t K,
                    int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse, void* workspace,
                    int64_t workspace_bytes, void* stream) {
  SearchParameters p{};
  const cudaError_t error = plan_on_device(N, K, D, &p.plan);
  if (error != cudaSuccess) return error;
  if (workspace_bytes < search_workspace_bytes(N, p.plan, lse != nullptr)) return cudaErrorInvalidValue;
  const bool bf16 = dtype == IBQ_BF16;
  int failed = encode_tensor_map(request_tensor_map(z, N, D, bf16, kBoxRows), &p.z);
  if (failed == 0)
    failed = encode_tensor_map(request_tensor_map(codebook, K, D, bf16, kBoxRows), &p.codebook);
  if (failed != 0) return failed;
  p.bias = bias;
  p.scale = scale;
  p.N = N;
  p.K = K;
  const int64_t statistics = p.plan.schedule.splits * N;
  p.split_max = static_cast<float*>(workspace);
  p.split_index = reinterpret_cast<int32_t*>(p.split_max + statistics);
  p.split_sum = lse != nullptr ? p.split_max + 2 * statistics : nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (lse != nullptr)
    return bf16 ? launch<true, true>(p, indices, max, lse, queue)
                : launch<false, true>(p, indices, max, lse, queue);
  return bf16 ? launch<true, false>(p, indices, max, lse, queue)
              : launch<false, false>(p, indices, max, lse, queue);
}

}  // namespace ibq::cuda::hopper
