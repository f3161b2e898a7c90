// Launches the kernel of search_kernel.cuh. NEVER RUN ON A GPU. Compiled for sm_90a alone.
#include <cuda_runtime.h>

#include "hopper.h"
#include "search_kernel.cuh"

namespace {

using namespace ibq::cuda;
using hopper::SearchParameters;

// Sets plan, schedule and the blocks to launch.
cudaError_t plan_on_device(int64_t N, int64_t K, int64_t D, SearchParameters* p, unsigned* blocks) {
  int device = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  p->plan = hopper::plan_stream<hopper::WideRows>(D, 0, shared);
  p->schedule = ibq::make_tile_schedule(N, K, hopper::kSearchRows, hopper::kStreamCodes, multiprocessors);
  *blocks = static_cast<unsigned>(hopper::stream_blocks(p->schedule, multiprocessors));
  return p->plan.stages == 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
}

template <bool kBf16, bool kWithLse>
cudaError_t launch_search(const SearchParameters& p, unsigned blocks, int64_t* indices, float* max,
                          float* lse, cudaStream_t stream) {
  const auto kernel = hopper::hopper_search_kernel<kBf16, kWithLse>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(p.plan.shared_bytes));
  if (error != cudaSuccess) return error;
  kernel<<<blocks, hopper::kStreamThreads, p.plan.shared_bytes, stream>>>(p);
  SearchArguments finish{};
  finish.N = p.N;
  finish.plan.schedule = p.schedule;
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
  SearchParameters p{};
  unsigned blocks = 0;
  const cudaError_t error = plan_on_device(N, K, D, &p, &blocks);
  if (error == cudaSuccess) *bytes = search_workspace_bytes(N, p.schedule, with_lse != 0);
  return error;
}

int codebook_search(const void* z, const void* codebook, const float* bias, float scale, int64_t N, int64_t K,
                    int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse, void* workspace,
                    int64_t workspace_bytes, void* stream) {
  SearchParameters p{};
  unsigned blocks = 0;
  const cudaError_t error = plan_on_device(N, K, D, &p, &blocks);
  if (error != cudaSuccess) return error;
  if (workspace_bytes < search_workspace_bytes(N, p.schedule, lse != nullptr)) return cudaErrorInvalidValue;
  const bool bf16 = dtype == IBQ_BF16;
  int failed = encode_tensor_map(request_tensor_map(z, N, D, bf16, kBoxRows), &p.z);
  if (failed == 0)
    failed = encode_tensor_map(request_tensor_map(codebook, K, D, bf16, kBoxRows), &p.codebook);
  if (failed != 0) return failed;
  p.bias = bias;
  p.scale = scale;
  p.N = N;
  p.K = K;
  const int64_t statistics = p.schedule.splits * N;
  p.split_max = static_cast<float*>(workspace);
  p.split_index = reinterpret_cast<int32_t*>(p.split_max + statistics);
  p.split_sum = lse != nullptr ? p.split_max + 2 * statistics : nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (lse != nullptr)
    return bf16 ? launch_search<true, true>(p, blocks, indices, max, lse, queue)
                : launch_search<false, true>(p, blocks, indices, max, lse, queue);
  return bf16 ? launch_search<true, false>(p, blocks, indices, max, lse, queue)
              : launch_search<false, false>(p, blocks, indices, max, lse, queue);
}

}  // namespace ibq::cuda::hopper
