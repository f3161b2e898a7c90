// code_histogram: counts[k] = number of indices equal to k, int64.
//
// STATUS: UNRUN ON A GPU; executed on the CPU by the emulator in kernels/tests.
//
// Contract    indices [N] int64, counts [K] int64 zeroed by the caller. Indices outside [0, K) count nowhere.
//             Integer addition commutes, so the result is the same every time, atomics or not.
// Cost        8 N bytes read, 8 K written. The danger is not bandwidth but a collapsed codebook, where all
//             threads add to one address.
// Choice      K <= 12,288: each block counts in 48 KB of shared memory (32-bit) and adds its non-zero counts
// to
//             the result at the end. Above: lanes of a warp that hold the same code elect one that adds for
//             all, so a collapsed codebook costs 1/32 of the atomics; with codes spread out every lane is
//             alone and the addresses hardly collide.
#pragma once

#include "histogram_plan.h"
#include "intrinsics.cuh"

namespace ibq::cuda {

// Dynamic shared memory: K 32-bit counters. A block sees fewer than 2^32 indices.
IBQ_KERNEL(kHistogramThreads, 1)
histogram_shared_kernel(const int64_t* indices, int64_t N, int64_t K, int64_t* counts) {
  uint32_t* block_counts = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int64_t k = threadIdx.x; k < K; k += kHistogramThreads) block_counts[k] = 0;
  block_barrier();
  const int64_t stride = int64_t{gridDim.x} * kHistogramThreads;
  for (int64_t i = int64_t{blockIdx.x} * kHistogramThreads + threadIdx.x; i < N; i += stride) {
    const int64_t code = indices[i];
    if (code >= 0 && code < K) atomic_add_shared(&block_counts[code], 1);
  }
  block_barrier();
  for (int64_t k = threadIdx.x; k < K; k += kHistogramThreads)
    if (block_counts[k] != 0) atomic_add_global(&counts[k], block_counts[k]);
}

IBQ_KERNEL(kHistogramThreads, 1)
histogram_global_kernel(const int64_t* indices, int64_t N, int64_t K, int64_t* counts) {
  const int64_t stride = int64_t{gridDim.x} * kHistogramThreads;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  // The bound is that of the warp's first lane: all lanes take part in every round.
  for (int64_t first = int64_t{blockIdx.x} * kHistogramThreads + threadIdx.x - lane; first < N;
       first += stride) {
    const int64_t i = first + lane;
    const int64_t index = i < N ? indices[i] : -1;
    const int32_t code = index >= 0 && index < K ? static_cast<int32_t>(index) : -1;
    const uint32_t peers = lanes_with_same(code);
    if (code >= 0 && lane == first_lane(peers)) atomic_add_global(&counts[code], count_lanes(peers));
  }
}

}  // namespace ibq::cuda
