// Memory for outputs as large as a codebook, kept between steps.
//
// A training step frees the codebook's gradient and asks for one of the same size again. malloc serves such
// sizes by mmap: every step would fault in fresh pages and have the kernel zero them, which on a virtual
// machine takes as long as the arithmetic of one image. Here a freed buffer waits for the next request of its
// size, and lies on large pages where the system gives them.
#pragma once

#include <cstdint>

namespace ibq::cpu {

// Below this malloc may serve a request from its own heap, which it trims or not as it is set.
constexpr int64_t kKeptFrom = 32 << 20;
// Buffers that wait at most; one more pushes out the one that has waited longest.
constexpr int kKeptBuffers = 3;

// `bytes` of uninitialised memory, or null. May be called by any thread, like the functions below.
void* take_memory(int64_t bytes);
// Takes back what take_memory(bytes) gave.
void return_memory(void* buffer, int64_t bytes);
// Frees the buffers that wait; returns their bytes.
int64_t release_kept_memory();

}  // namespace ibq::cpu
