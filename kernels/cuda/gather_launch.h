// Launches the kernel of gather_kernel.cuh on any queue (launch.h).
#pragma once

#include "gather_plan.h"
#include "ibq_cuda.h"
#include "launch.h"
#include "search_launch.h"

namespace ibq::cuda {

template <typename Word>
struct GatherKernel {
  using Function = void (*)(const Word*, const int64_t*, int64_t, int64_t, int64_t, Word*, Word*);
  static constexpr const char* kSource = "gather_kernel.cuh";
  static KernelExpression name() {
    const char* word =
        sizeof(Word) == 16 ? "ibq::cuda::Word16" : (sizeof(Word) == 4 ? "unsigned int" : "unsigned short");
    return KernelExpression("gather_codes_kernel").with(word);
  }
};

template <typename Word, typename Queue>
int launch_gather_of(Queue& queue, const void* codebook, const int64_t* indices, int64_t N, int64_t K,
                     int64_t row_bytes, void* out, void* second) {
  const Grid grid{gather_blocks(N), kGatherThreads, 0};
  if (grid.blocks > INT32_MAX) return kInvalidConfiguration;
  return queue.launch(GatherKernel<Word>{}, grid, static_cast<const Word*>(codebook), indices, N, K,
                      row_bytes / static_cast<int64_t>(sizeof(Word)), static_cast<Word*>(out),
                      static_cast<Word*>(second));
}

// ibq_cuda_gather_codes on a queue.
template <typename Queue>
int launch_gather(Queue& queue, const void* codebook, const int64_t* indices, int64_t N, int64_t K, int64_t D,
                  ibq_dtype dtype, void* out, void* second) {
  if (N < 0 || K < 1 || D < 1 || !known_dtype(dtype)) return kInvalidValue;
  if (N == 0) return kSuccess;
  const int64_t row_bytes = D * element_bytes(dtype);
  const auto bits = reinterpret_cast<uintptr_t>(codebook) | reinterpret_cast<uintptr_t>(out) |
                    reinterpret_cast<uintptr_t>(second) | static_cast<uintptr_t>(row_bytes);
  if (bits % 16 == 0) return launch_gather_of<Word16>(queue, codebook, indices, N, K, row_bytes, out, second);
  if (bits % 4 == 0)
    return launch_gather_of<uint32_t>(queue, codebook, indices, N, K, row_bytes, out, second);
  return launch_gather_of<uint16_t>(queue, codebook, indices, N, K, row_bytes, out, second);
}

}  // namespace ibq::cuda
