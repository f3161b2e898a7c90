// gather_codes: out[i] = codebook[indices[i]], optionally written twice (z_q and the plain codes).
//
// STATUS: UNRUN ON A GPU; executed on the CPU by the emulator in kernels/tests.
//
// Contract    codebook [K, D], indices [N] int64, out and second [N, D] (second may be null), dense rows of
// any
//             element type: a row is moved as words of the widest type that all rows are aligned to. An index
//             outside [0, K) gives a row of zeros.
// Cost        memory-bound: N rows read once, written once or twice, 8 N bytes of indices.
// Choice      A warp takes a row at a time and walks it 32 words at a time (512 bytes with 16-byte words), so
//             reads and writes are whole lines whatever D is; a grid of one row a warp keeps enough loads in
//             flight by occupancy alone. One read serves both outputs.
#pragma once

#include "gather_plan.h"
#include "intrinsics.cuh"

namespace ibq::cuda {

// row_words: words in a row. Grid: ceil(N / (kGatherThreads / 32)) blocks.
template <typename Word>
IBQ_KERNEL(kGatherThreads, 1)
gather_codes_kernel(const Word* codebook, const int64_t* indices, int64_t N, int64_t K, int64_t row_words,
                    Word* out, Word* second) {
  const int64_t row = (int64_t{blockIdx.x} * kGatherThreads + threadIdx.x) >> 5;
  if (row >= N) return;
  const int64_t code = indices[row];
  const bool inside = code >= 0 && code < K;
  for (int64_t word = threadIdx.x & 31; word < row_words; word += 32) {
    const Word value = inside ? codebook[code * row_words + word] : Word{};
    out[row * row_words + word] = value;
    if (second != nullptr) second[row * row_words + word] = value;
  }
}

}  // namespace ibq::cuda
