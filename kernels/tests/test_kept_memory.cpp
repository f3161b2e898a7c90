// The memory that large outputs come from: reuse by size, the order of eviction, small sizes left to malloc.
#include "kernels/cpu/kept_memory.h"

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "kernels/tests/check.h"

using namespace ibq::cpu;

// Under the address sanitizer a request for too much is refused like malloc refuses it, not fatal.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace {

constexpr int64_t kSize = kKeptFrom;

void test_reuse() {
  void* first = take_memory(kSize);
  CHECK(first != nullptr && reinterpret_cast<uintptr_t>(first) % (2 << 20) == 0, "aligned to a large page");
  static_cast<char*>(first)[kSize - 1] = 1;
  return_memory(first, kSize);
  void* other = take_memory(kSize + 4096);
  CHECK(other != first, "another size gets another buffer");
  CHECK(take_memory(kSize) == first, "the same size gets it again");
  return_memory(first, kSize);
  return_memory(other, kSize + 4096);
  CHECK(release_kept_memory() == 2 * kSize + 4096, "both waited");
  CHECK(release_kept_memory() == 0, "none waits any more");
}

void test_eviction() {
  std::vector<void*> taken;
  for (int i = 0; i <= kKeptBuffers; ++i) taken.push_back(take_memory(kSize + i * 4096));
  for (int i = 0; i <= kKeptBuffers; ++i) return_memory(taken[i], kSize + i * 4096);
  int64_t kept = 0;
  for (int i = 1; i <= kKeptBuffers; ++i) kept += kSize + i * 4096;
  CHECK(release_kept_memory() == kept, "the first one returned had to go");
}

void test_small() {
  void* small = take_memory(0);
  CHECK(small != nullptr, "nothing is something too");
  return_memory(small, 0);
  return_memory(nullptr, 0);
  CHECK(release_kept_memory() == 0, "small buffers are not kept");
}

void test_too_much() {
  return_memory(take_memory(kSize), kSize);
  CHECK(take_memory(INT64_C(1) << 60) == nullptr, "more than there is");
  CHECK(release_kept_memory() == 0, "what waited was given up for it");
}

void test_threads() {
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&wrong] {
      for (int i = 0; i < 200; ++i) {
        char* buffer = static_cast<char*>(take_memory(kSize));
        if (buffer == nullptr) {
          ++wrong;
          return;
        }
        for (int64_t at = 0; at < kSize; at += kSize / 8) buffer[at] = static_cast<char>(i + at);
        for (int64_t at = 0; at < kSize; at += kSize / 8)
          if (buffer[at] != static_cast<char>(i + at)) ++wrong;
        return_memory(buffer, kSize);
      }
    });
  for (std::thread& t : threads) t.join();
  CHECK(wrong == 0, "%d buffers were missing or shared", wrong.load());
  CHECK(release_kept_memory() <= kKeptBuffers * kSize, "no more waits than may");
}

}  // namespace

int main() {
  test_reuse();
  test_eviction();
  test_small();
  test_too_much();
  test_threads();
  return ibq::test::finish("kept_memory");
}
