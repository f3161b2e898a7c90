// Row gather, deterministic row scatter-add and the code histogram: bound by memory, the same code for
// every instruction set.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cpu/codebook.h"

namespace ibq::cpu {
namespace {

#include "kernels/cpu/simd.h"
// clang-format off: order matters
#include "kernels/cpu/pack.h"
#include "kernels/cpu/narrow.h"
// clang-format on

template <typename Body>
void run_tasks(const Parallel& parallel, int tasks, const Body& body) {
  auto call = [](void* context, int task) { (*static_cast<const Body*>(context))(task); };
  if (parallel.run && tasks > 1)
    parallel.run(tasks, call, const_cast<Body*>(&body));
  else
    for (int t = 0; t < tasks; ++t) body(t);
}

}  // namespace

void gather_rows(const void* table, const int64_t* indices, int64_t n, int64_t row_bytes, void* dst,
                 const Parallel& parallel) {
  const int tasks = static_cast<int>(std::min<int64_t>(parallel.threads, std::max<int64_t>(n / 64, 1)));
  run_tasks(parallel, tasks, [&](int t) {
    for (int64_t i = n * t / tasks; i < n * (t + 1) / tasks; ++i)
      std::memcpy(static_cast<char*>(dst) + i * row_bytes,
                  static_cast<const char*>(table) + indices[i] * row_bytes, row_bytes);
  });
}

void scatter_add_rows(DType dtype, const void* a, const void* b, const int64_t* indices, int64_t n, int64_t k,
                      int64_t d, void* grad_codebook, const Parallel& parallel) {
  const int tasks = static_cast<int>(std::min<int64_t>(parallel.threads, k));
  run_tasks(parallel, tasks, [&](int t) {
    const int64_t first = k * t / tasks, last = k * (t + 1) / tasks;
    std::vector<int64_t> rows;  // this task's, by code, then in order
    for (int64_t i = 0; i < n; ++i)
      if (indices[i] >= first && indices[i] < last) rows.push_back(i);
    std::stable_sort(rows.begin(), rows.end(), [&](int64_t x, int64_t y) { return indices[x] < indices[y]; });
    std::vector<float> sum(d + kWidth);
    for (size_t i = 0; i < rows.size();) {
      const int64_t code = indices[rows[i]], at = code * d;
      for_dtype(dtype, [&](auto type) {
        constexpr DType T = decltype(type)::value;
        for (int64_t e = 0; e < d; e += kWidth) store(&sum[e], load_live<T>(grad_codebook, at + e, d - e));
        for (; i < rows.size() && indices[rows[i]] == code; ++i) {
          if (a) add_scaled_row_of<T>(a, rows[i], d, 1.0f, sum.data());
          if (b) add_scaled_row_of<T>(b, rows[i], d, 1.0f, sum.data());
        }
        for (int64_t e = 0; e < d; e += kWidth) store_narrow<T>(grad_codebook, at + e, load(&sum[e]), d - e);
      });
    }
  });
}

int64_t histogram(const int64_t* indices, int64_t n, int64_t k, int64_t* counts, const Parallel& parallel) {
  // Private counts per task pay off only while they are small next to the indices.
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(n / 16384, n / std::max<int64_t>(k, 1)));
  const int tasks = static_cast<int>(std::min<int64_t>(parallel.threads, most));
  std::vector<int64_t> parts(static_cast<size_t>(tasks - 1) * k, 0);
  std::atomic<int64_t> bad{-1};
  std::memset(counts, 0, sizeof(int64_t) * k);
  run_tasks(parallel, tasks, [&](int t) {
    int64_t* mine = t == 0 ? counts : parts.data() + static_cast<int64_t>(t - 1) * k;
    for (int64_t i = n * t / tasks; i < n * (t + 1) / tasks; ++i) {
      if (indices[i] < 0 || indices[i] >= k) {
        int64_t seen = bad.load();
        while ((seen < 0 || i < seen) && !bad.compare_exchange_weak(seen, i)) {
        }
        return;
      }
      ++mine[indices[i]];
    }
  });
  for (int t = 1; t < tasks; ++t)
    for (int64_t j = 0; j < k; ++j) counts[j] += parts[static_cast<int64_t>(t - 1) * k + j];
  return bad.load();
}

}  // namespace ibq::cpu
