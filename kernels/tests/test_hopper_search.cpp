// The Hopper search kernel under the emulator: ragged sizes, ties, NaN and infinities, every depth of the
// ring, several work items a block, against a loop in double.
#define IBQ_SIMT_EMULATION

#include <algorithm>
#include <cmath>

#include "../cuda/hopper/search_kernel.cuh"
#include "check.h"
#include "hopper_problem.h"

namespace {

using namespace ibq;
using namespace ibq::cuda;
using hopper::emulator::Delivery;
using test::Matrix16;

struct Case {
  const char* name;
  bool bf16;
  int64_t N, K, D;
  bool with_bias, with_lse;
  float scale;
  int multiprocessors;
  int64_t shared_limit;
  uint32_t turns;
  Delivery delivery;
};

struct Problem {
  Matrix16 z, codebook;
  std::vector<float> bias;
  explicit Problem(const Case& c)
      : z(c.bf16, c.N, c.D), codebook(c.bf16, c.K, c.D), bias(c.with_bias ? size_t(c.K) : 0) {}
  template <typename Draw>
  void fill(Draw draw) {
    z.fill(draw);
    codebook.fill(draw);
    for (float& b : bias) b = draw();
  }
};

struct Result {
  std::vector<int64_t> indices;
  std::vector<float> max, lse;
};

template <bool kBf16, bool kWithLse>
void run_kernels(const hopper::SearchParameters& p, const Case& c, Result& result) {
  hopper::emulator::launch(hopper::stream_blocks(p.schedule, c.multiprocessors), hopper::kStreamThreads,
                           p.plan.shared_bytes, c.turns, c.delivery,
                           [&] { hopper::hopper_search_kernel<kBf16, kWithLse>(p); });
  SearchArguments finish{};
  finish.N = c.N;
  finish.plan.schedule = p.schedule;
  finish.split_max = p.split_max;
  finish.split_index = p.split_index;
  finish.split_sum = p.split_sum;
  emulator::launch(ceil_div(c.N, int64_t{kFinishThreads}), kFinishThreads, 0, 1, [&] {
    codebook_search_finish_kernel<kWithLse>(finish, result.indices.data(), result.max.data(),
                                            result.lse.data());
  });
}

Result search(const Case& c, const Problem& problem) {
  hopper::SearchParameters p{};
  p.z = problem.z.map(128);
  p.codebook = problem.codebook.map(128);
  p.bias = c.with_bias ? problem.bias.data() : nullptr;
  p.scale = c.scale;
  p.N = c.N;
  p.K = c.K;
  p.plan = hopper::plan_stream<hopper::WideRows>(c.D, 0, c.shared_limit);
  p.schedule = make_tile_schedule(c.N, c.K, hopper::kSearchRows, hopper::kStreamCodes, c.multiprocessors);
  CHECK(p.plan.stages >= 2, "%s: no plan", c.name);
  const auto statistics = static_cast<size_t>(p.schedule.splits * c.N);
  std::vector<float> split_max(statistics, quiet_nan()), split_sum(statistics, quiet_nan());
  std::vector<int32_t> split_index(statistics, -1);
  p.split_max = split_max.data();
  p.split_index = split_index.data();
  p.split_sum = split_sum.data();
  const auto n = static_cast<size_t>(c.N);
  Result result{std::vector<int64_t>(n, -1), std::vector<float>(n, -7.0f), std::vector<float>(n, -7.0f)};
  if (c.bf16) {
    c.with_lse ? run_kernels<true, true>(p, c, result) : run_kernels<true, false>(p, c, result);
  } else {
    c.with_lse ? run_kernels<false, true>(p, c, result) : run_kernels<false, false>(p, c, result);
  }
  return result;
}

// `exact` says that every logit is representable: indices and maxima must then be equal, not close.
void check_case(const Case& c, const Problem& p, bool exact) {
  const Result got = search(c, p);
  for (int64_t i = 0; i < c.N; ++i) {
    const auto row = static_cast<size_t>(i);
    std::vector<double> s(static_cast<size_t>(c.K));
    double magnitude = 0.0;
    for (int64_t j = 0; j < c.K; ++j) {
      const double bias = c.with_bias ? p.bias[static_cast<size_t>(j)] : 0.0;
      s[static_cast<size_t>(j)] = dot(p.z, i, p.codebook, j) * c.scale + bias;
      magnitude = std::max(magnitude, std::fabs(s[static_cast<size_t>(j)]) + std::fabs(bias));
    }
    if (std::any_of(s.begin(), s.end(), [](double x) { return std::isnan(x); })) {
      CHECK(got.indices[row] == 0 && is_nan(got.max[row]), "%s row %ld: NaN row gave %ld, %g", c.name,
            long(i), long(got.indices[row]), got.max[row]);
      CHECK(!c.with_lse || is_nan(got.lse[row]), "%s row %ld: lse %g", c.name, long(i), got.lse[row]);
      continue;
    }
    const auto best = std::max_element(s.begin(), s.end());  // the first of equals
    const int64_t index = got.indices[row];
    const bool in_range = index >= 0 && index < c.K;
    CHECK(in_range, "%s row %ld: index %ld", c.name, long(i), long(index));
    if (!in_range) continue;
    // The emulator rounds to float once per wgmma: D / 16 + 2 roundings of partial sums near sqrt(D).
    const double bound =
        exact ? 0.0 : (magnitude + std::sqrt(double(c.D))) * static_cast<double>(c.D / 16 + 3) * 0x1p-24;
    const double gap = *best - s[static_cast<size_t>(index)];
    CHECK(exact || std::isinf(*best) ? index == best - s.begin() : gap <= 2 * bound,
          "%s row %ld: index %ld, expected %ld, gap %g", c.name, long(i), long(index), long(best - s.begin()),
          gap);
    CHECK(std::isinf(*best) ? got.max[row] == static_cast<float>(*best)
                            : std::fabs(got.max[row] - *best) <= bound,
          "%s row %ld: max %.9g, expected %.9g, bound %g", c.name, long(i), got.max[row], *best, bound);
    if (!c.with_lse) {
      CHECK(got.lse[row] == -7.0f, "%s row %ld: lse was written", c.name, long(i));
      continue;
    }
    double lse = *best;
    if (!std::isinf(*best)) {
      double sum = 0.0;
      for (double x : s) sum += std::exp(x - *best);
      lse += std::log(sum);
    }
    CHECK(std::isinf(lse) ? got.lse[row] == static_cast<float>(lse)
                          : std::fabs(got.lse[row] - lse) <= bound + 1e-6 * (1.0 + std::fabs(lse)),
          "%s row %ld: lse %.9g, expected %.9g", c.name, long(i), got.lse[row], lse);
  }
}

constexpr int64_t kHopper = 227 * 1024;
constexpr uint32_t kWarps = emulator::kWarpByWarp;

const Case kCases[] = {
    {"one of all", true, 1, 1, 64, false, true, 1.0f, 132, kHopper, 1, Delivery::at_once},
    {"splits", true, 130, 300, 64, true, true, 0.5f, 3, kHopper, kWarps, Delivery::when_all_wait},
    {"two items a block, ring of 2", true, 300, 500, 128, false, true, 1.0f, 1, 98 * 1024, kWarps,
     Delivery::at_once},
    {"ring of 5, 4 panels", false, 70, 390, 256, true, true, 1.0f, 1, 210 * 1024, 5, Delivery::when_all_wait},
    {"fp16, no lse", false, 257, 129, 192, true, false, 2.0f, 2, kHopper, kWarps, Delivery::at_once},
    {"whole tiles", true, 256, 256, 256, true, true, 1.0f, 2, kHopper, 7, Delivery::at_once},
};

void test_small_integers_are_exact() {  // so every tie is a real tie
  std::mt19937 random(3);
  std::uniform_int_distribution<int> few(-2, 2);
  for (const Case& c : kCases) {
    Problem p(c);
    p.fill([&] { return static_cast<float>(few(random) * (few(random) == 0)); });
    check_case(c, p, true);
  }
}

void test_random_values_within_bound() {
  std::mt19937 random(4);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  for (const Case& c : kCases) {
    Problem p(c);
    p.fill([&] { return normal(random); });
    check_case(c, p, false);
  }
}

void test_special_values() {
  std::mt19937 random(5);
  std::uniform_int_distribution<int> few(-2, 2);
  for (bool with_lse : {false, true}) {
    const Case c{"special values", true, 40, 150,     64,     true,
                 with_lse,         1.0f, 2,  kHopper, kWarps, Delivery::at_once};
    Problem p(c);
    p.fill([&] { return static_cast<float>(few(random)); });
    p.z.set(3, 5, quiet_nan());
    p.z.set(39, 23, quiet_nan());
    check_case(c, p, true);
    p.bias[140] = positive_infinity();
    p.bias[145] = positive_infinity();
    check_case(c, p, true);
    std::fill(p.bias.begin(), p.bias.end(), negative_infinity());
    check_case(c, p, true);
    p.bias[149] = 0.0f;
    check_case(c, p, true);
    p.codebook.set(77, 0, quiet_nan());
    check_case(c, p, true);
  }
}

void test_order_of_threads_does_not_matter() {
  std::mt19937 random(6);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  Case c{"turns", true, 200, 300, 128, true, true, 1.0f, 1, kHopper, 1, Delivery::at_once};
  Problem p(c);
  p.fill([&] { return normal(random); });
  const Result first = search(c, p);
  for (uint32_t turns : {kWarps, 127u, 191u}) {
    for (Delivery delivery : {Delivery::at_once, Delivery::when_all_wait}) {
      c.turns = turns;
      c.delivery = delivery;
      const Result again = search(c, p);
      CHECK(first.indices == again.indices && first.max == again.max && first.lse == again.lse, "turns %u",
            turns);
    }
  }
}

}  // namespace

int main() {
  test_small_integers_are_exact();
  test_random_values_within_bound();
  test_special_values();
  test_order_of_threads_does_not_matter();
  return ibq::test::finish("test_hopper_search");
}
