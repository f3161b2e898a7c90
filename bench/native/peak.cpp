// The machine's own limits, for "share of peak": fused multiply-adds that touch registers only, and reads
// that miss every cache. Each thread warms up (another library's threads may still be spinning on its core)
// and then counts what it does until a common deadline; the rates of all threads are added up.
//
// 24 independent accumulators cover the latency of two pipes (4 cycles for float32, 6 for bf16 dot products)
// and still fit AVX-512's 32 registers; AVX2 has 16 registers and gets 12.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

// A burst of work; returns how many units (FLOPs or bytes) it did and leaves a value that must be used.
using Burst = int64_t (*)(const void* data, int64_t size, float* sink);

constexpr int64_t kSteps = 20000;

// acc[i] = STEP(acc[i]) for COUNT accumulators, kSteps times, then their sum into *sink.
#define IBQ_SPIN(VECTOR, COUNT, ZERO, STEP)                            \
  VECTOR acc[COUNT];                                                   \
  for (int i = 0; i < COUNT; ++i) acc[i] = ZERO;                       \
  for (int64_t s = 0; s < kSteps; ++s) {                               \
    _Pragma("GCC unroll 24") for (int i = 0; i < COUNT; ++i) { STEP; } \
  }                                                                    \
  VECTOR total = acc[0];                                               \
  for (int i = 1; i < COUNT; ++i) total = total + acc[i];              \
  *sink += total[0]

typedef float Float4 __attribute__((vector_size(16)));

int64_t fma_portable(const void*, int64_t, float* sink) {
  Float4 a = {1.0f, 1.0f, 1.0f, 1.0f}, b = a * 1e-3f + *sink * 0.0f;
  IBQ_SPIN(Float4, 12, b, acc[i] = a * b + acc[i]);
  return kSteps * 12 * 4 * 2;
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) int64_t fma_avx2(const void*, int64_t, float* sink) {
  __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(1e-3f + *sink * 0.0f);
  IBQ_SPIN(__m256, 12, b, acc[i] = _mm256_fmadd_ps(a, b, acc[i]));
  return kSteps * 12 * 8 * 2;
}

__attribute__((target("avx512f"))) int64_t fma_avx512(const void*, int64_t, float* sink) {
  __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-3f + *sink * 0.0f);
  IBQ_SPIN(__m512, 24, b, acc[i] = _mm512_fmadd_ps(a, b, acc[i]));
  return kSteps * 24 * 16 * 2;
}

__attribute__((target("avx512f,avx512bf16"))) int64_t dot_bf16(const void*, int64_t, float* sink) {
  __m512 b = _mm512_set1_ps(1e-3f + *sink * 0.0f);
  __m512bh pair = _mm512_cvtne2ps_pbh(b, b);
  IBQ_SPIN(__m512, 24, b, acc[i] = _mm512_dpbf16_ps(acc[i], pair, pair));
  return kSteps * 24 * 32 * 2;
}
#endif

int64_t read_slice(const void* data, int64_t size, float* sink) {
  const Float4* p = static_cast<const Float4*>(data);
  Float4 acc[8] = {};
  int64_t vectors = size / 16 / 8 * 8;
  for (int64_t i = 0; i < vectors; i += 8)
    for (int v = 0; v < 8; ++v) acc[v] = acc[v] + p[i + v];
  for (int v = 0; v < 8; ++v) *sink += acc[v][0];
  return vectors * 16;
}

struct Choice {
  const char* name;
  Burst burst;
};

Choice choose(int kind) {
#if defined(__x86_64__)
  if (kind == 1) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"))
      return {"avx512bf16", dot_bf16};
    return {"", nullptr};
  }
  if (__builtin_cpu_supports("avx512f")) return {"avx512", fma_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", fma_avx2};
#endif
  if (kind == 1) return {"", nullptr};
  return {"portable", fma_portable};
}

constexpr double kWarmUpSeconds = 0.01;

// Units per second of `burst` on `threads` threads, each with its own slice of `data`.
double rate(Burst burst, int threads, double seconds, const char* data, int64_t size) {
  std::atomic<int> ready{0};
  std::vector<double> rates(threads);
  std::vector<float> sinks(threads, 0.0f);
  Clock::time_point start;
  std::atomic<bool> go{false};
  int64_t slice = size / threads / 128 * 128;
  auto work = [&](int t) {
    float sink = 0.0f;
    ready.fetch_add(1);
    while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
    const auto begin = start + std::chrono::duration<double>(kWarmUpSeconds);
    const auto deadline = begin + std::chrono::duration<double>(seconds);
    while (Clock::now() < begin) burst(data + t * slice, slice, &sink);
    const auto begun = Clock::now();
    int64_t done = 0;
    do done += burst(data + t * slice, slice, &sink);
    while (Clock::now() < deadline);
    rates[t] = static_cast<double>(done) / std::chrono::duration<double>(Clock::now() - begun).count();
    sinks[t] = sink;
  };
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) pool.emplace_back(work, t);
  while (ready.load() < threads) std::this_thread::yield();
  start = Clock::now();
  go.store(true, std::memory_order_release);
  for (auto& thread : pool) thread.join();
  volatile float keep = 0.0f;
  for (float s : sinks) keep = keep + s;
  double total = 0.0;
  for (double r : rates) total += r;
  return total;
}

}  // namespace

extern "C" {

// kind 0: float32 multiply-adds, 1: bf16 dot products accumulated in float32. FLOP/s of all threads together;
// 0 where the CPU has no such instruction.
double ibq_peak_flops(int kind, int threads, double seconds) {
  Choice choice = choose(kind);
  return choice.burst ? rate(choice.burst, threads, seconds, nullptr, 0) : 0.0;
}

// The instruction set that ibq_peak_flops uses ("" for none).
const char* ibq_peak_isa(int kind) { return choose(kind).name; }

// Bytes per second read from `size` bytes at `data`, shared out among the threads.
double ibq_read_bandwidth(const void* data, int64_t size, int threads, double seconds) {
  return rate(read_slice, threads, seconds, static_cast<const char*>(data), size);
}
}
