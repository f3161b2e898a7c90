// Launches the kernel of gather_kernel.cuh. UNRUN ON A GPU.
#include <cuda_runtime.h>

#include "gather_kernel.cuh"
#include "ibq_cuda.h"

namespace {

template <typename Word>
cudaError_t launch(const void* codebook, const int64_t* indices, int64_t N, int64_t K, int64_t row_bytes,
                   void* out, void* second, cudaStream_t stream) {
  using namespace ibq::cuda;
  const int64_t blocks = ibq::ceil_div(N, int64_t{kGatherThreads / 32});
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  gather_codes_kernel<Word><<<static_cast<unsigned>(blocks), kGatherThreads, 0, stream>>>(
      static_cast<const Word*>(codebook), indices, N, K, row_bytes / static_cast<int64_t>(sizeof(Word)),
      static_cast<Word*>(out), static_cast<Word*>(second));
  return cudaGetLastError();
}

}  // namespace

int ibq_cuda_gather_codes(const void* codebook, const int64_t* indices, int64_t N, int64_t K, int64_t D,
                          ibq_dtype dtype, void* out, void* second, void* stream) {
  if (N < 0 || K < 1 || D < 1) return cudaErrorInvalidValue;
  if (dtype != IBQ_F32 && dtype != IBQ_BF16 && dtype != IBQ_F16) return cudaErrorInvalidValue;
  if (N == 0) return cudaSuccess;
  const int64_t row_bytes = D * (dtype == IBQ_F32 ? 4 : 2);
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto bits = reinterpret_cast<uintptr_t>(codebook) | reinterpret_cast<uintptr_t>(out) |
                    reinterpret_cast<uintptr_t>(second) | static_cast<uintptr_t>(row_bytes);
  if (bits % 16 == 0)
    return launch<ibq::cuda::Word16>(codebook, indices, N, K, row_bytes, out, second, queue);
  if (bits % 4 == 0) return launch<uint32_t>(codebook, indices, N, K, row_bytes, out, second, queue);
  return launch<uint16_t>(codebook, indices, N, K, row_bytes, out, second, queue);
}
