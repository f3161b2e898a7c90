// The CUDA kernels themselves, run by the emulator: ragged sizes, every element type, every alignment and
// pipeline configuration, ties, NaN and infinities, compared with a loop in double.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "simt_queue.h"

#include "../cuda/gather_kernel.cuh"
#include "../cuda/histogram_kernel.cuh"
#include "check.h"

namespace {

using namespace ibq;
using namespace ibq::cuda;

using ibq::test::Matrix;

struct Case {
  const char* name;
  Element element;
  int64_t N, K, D;
  int offset;  // of z, in elements
  bool with_bias, with_lse;
  float scale;
  DeviceLimits device;
  uint32_t turns;
};

struct Problem {
  Matrix z, codebook;
  std::vector<float> bias;

  explicit Problem(const Case& c)
      : z(c.element, c.N, c.D, c.offset),
        codebook(c.element, c.K, c.D, 0),
        bias(c.with_bias ? size_t(c.K) : 0) {}

  template <typename Draw>
  void fill(Draw draw) {
    for (Matrix* m : {&z, &codebook})
      for (int64_t i = 0; i < m->rows; ++i)
        for (int64_t d = 0; d < m->columns; ++d) m->set(i, d, draw());
    for (float& b : bias) b = draw();
  }
};

struct Result {
  std::vector<int64_t> indices;
  std::vector<float> max, lse;
};

template <Element kElement, bool kWithLse>
void run_kernels(const SearchArguments& args, Result& result, uint32_t turns) {
  emulator::launch(args.plan.schedule.blocks(), kSearchThreads, args.plan.shared_bytes, turns,
                   [&] { codebook_search_kernel<kElement, kWithLse>(args); });
  emulator::launch(ceil_div(args.N, int64_t{kFinishThreads}), kFinishThreads, 0, turns, [&] {
    codebook_search_finish_kernel<kWithLse>(args, result.indices.data(), result.max.data(),
                                            result.lse.data());
  });
}

template <Element kElement>
void run_kernels(const SearchArguments& args, Result& result, bool with_lse, uint32_t turns) {
  with_lse ? run_kernels<kElement, true>(args, result, turns)
           : run_kernels<kElement, false>(args, result, turns);
}

Result search(const Case& c, const Problem& p) {
  SearchArguments args{};
  args.z = p.z.data;
  args.codebook = p.codebook.data;
  args.bias = c.with_bias ? p.bias.data() : nullptr;
  args.scale = c.scale;
  args.N = c.N;
  args.K = c.K;
  args.row_bytes = c.D * p.z.size();
  const auto bits = reinterpret_cast<uintptr_t>(args.z) | reinterpret_cast<uintptr_t>(args.codebook) |
                    static_cast<uintptr_t>(args.row_bytes);
  args.access = widest_access(bits);
  args.plan = plan_search(c.N, c.K, c.D, p.z.size(), c.device);
  CHECK(args.plan.stages != 0, "%s: no plan", c.name);
  const auto statistics = static_cast<size_t>(args.plan.schedule.splits * c.N);
  std::vector<float> split_max(statistics, quiet_nan()), split_sum(statistics, quiet_nan());
  std::vector<int32_t> split_index(statistics, -1);
  args.split_max = split_max.data();
  args.split_index = split_index.data();
  args.split_sum = split_sum.data();
  const auto n = static_cast<size_t>(c.N);
  Result result{std::vector<int64_t>(n, -1), std::vector<float>(n, -7.0f), std::vector<float>(n, -7.0f)};
  if (c.element == Element::f32) run_kernels<Element::f32>(args, result, c.with_lse, c.turns);
  if (c.element == Element::bf16) run_kernels<Element::bf16>(args, result, c.with_lse, c.turns);
  if (c.element == Element::f16) run_kernels<Element::f16>(args, result, c.with_lse, c.turns);
  return result;
}

// A row of S in double, and sum |z_d e_d| * scale + |bias| of its worst code for error bounds.
std::vector<double> logits(const Case& c, const Problem& p, int64_t i, double* magnitude) {
  std::vector<double> s(static_cast<size_t>(c.K));
  *magnitude = 0.0;
  for (int64_t j = 0; j < c.K; ++j) {
    double dot = 0.0, absolute = 0.0;
    for (int64_t d = 0; d < c.D; ++d) {
      const double product = static_cast<double>(p.z.get(i, d)) * p.codebook.get(j, d);
      dot += product;
      absolute += std::fabs(product);
    }
    const double bias = c.with_bias ? p.bias[static_cast<size_t>(j)] : 0.0;
    s[static_cast<size_t>(j)] = dot * c.scale + bias;
    *magnitude = std::max(*magnitude, absolute * std::fabs(c.scale) + std::fabs(bias));
  }
  return s;
}

// `exact` says that every logit is representable: indices and maxima must then be equal, not close.
void check_case(const Case& c, const Problem& p, bool exact) {
  const Result got = search(c, p);
  for (int64_t i = 0; i < c.N; ++i) {
    double magnitude;
    const std::vector<double> s = logits(c, p, i, &magnitude);
    const auto row = static_cast<size_t>(i);
    if (std::any_of(s.begin(), s.end(), [](double x) { return std::isnan(x); })) {
      CHECK(got.indices[row] == 0 && is_nan(got.max[row]), "%s row %ld: NaN row gave %ld, %g", c.name,
            long(i), long(got.indices[row]), got.max[row]);
      CHECK(!c.with_lse || is_nan(got.lse[row]), "%s row %ld: lse %g, expected NaN", c.name, long(i),
            got.lse[row]);
      continue;
    }
    const auto best = std::max_element(s.begin(), s.end());  // the first of equals
    const int64_t index = got.indices[row];
    const bool in_range = index >= 0 && index < c.K;
    CHECK(in_range, "%s row %ld: index %ld", c.name, long(i), long(index));
    if (!in_range) continue;
    const double bound =
        exact ? 0.0
              : magnitude * (std::ldexp(1.0, -21) + static_cast<double>(c.D) / 8 * std::ldexp(1.0, -24));
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

// Shared memory sizes that make plan_search choose: resident z with 4, 3, 2 stages, streamed z with 3, 2.
const DeviceLimits kRoomy{2, 1 << 20, 1 << 20};
const DeviceLimits kHopper{3, 228 * 1024, 227 * 1024};
const DeviceLimits kTight{1, 66 * 1024, 65 * 1024};
const DeviceLimits kOneBlock{1, 1 << 17, 1 << 16};
const DeviceLimits kSmall{5, 100 * 1024, 99 * 1024};

constexpr uint32_t kWarps = emulator::kWarpByWarp;

const Case kCases[] = {
    {"bf16 many tiles, ties between them", Element::bf16, 40, 1100, 3, 0, false, false, 1.0f, kTight, kWarps},
    {"f32 many tiles, ties between them", Element::f32, 20, 500, 2, 0, true, true, 1.0f, kTight, kWarps},
    {"bf16 deep ring, shallow D", Element::bf16, 8, 1000, 40, 0, true, true, 1.0f, kOneBlock, kWarps},
    {"bf16 one of all", Element::bf16, 1, 1, 1, 0, false, true, 1.0f, kHopper, 1},
    {"bf16 aligned, resident", Element::bf16, 70, 300, 136, 0, true, true, 0.5f, kHopper, 1},
    {"bf16 aligned, 4 stages", Element::bf16, 130, 257, 64, 0, false, true, 1.0f, kRoomy, 5},
    {"bf16 2 stages", Element::bf16, 33, 140, 200, 0, true, false, 2.0f, kTight, kWarps},
    {"bf16 streamed", Element::bf16, 20, 270, 328, 0, true, true, 1.0f, kSmall, kWarps},
    {"bf16 odd D", Element::bf16, 9, 190, 59, 0, true, true, 1.0f, kHopper, 3},
    {"bf16 D of 4 bytes", Element::bf16, 9, 190, 70, 0, false, false, 1.0f, kHopper, 3},
    {"bf16 z off by one", Element::bf16, 12, 150, 72, 1, false, true, 1.0f, kRoomy, 9},
    {"bf16 z off by two", Element::bf16, 12, 150, 72, 2, false, true, 1.0f, kTight, 9},
    {"f16 aligned", Element::f16, 140, 200, 96, 0, true, true, 0.25f, kHopper, 11},
    {"f16 odd D", Element::f16, 65, 131, 111, 0, false, false, 1.0f, kTight, kWarps},
    {"f32 aligned", Element::f32, 66, 140, 68, 0, true, true, 1.0f, kHopper, kWarps},
    {"f32 odd D", Element::f32, 17, 97, 59, 1, true, true, 2.0f, kSmall, 3},
    {"f32 one dimension", Element::f32, 3, 65, 1, 0, false, false, 1.0f, kTight, 5},
};

void test_small_integers_are_exact() {  // so every tie is a real tie
  std::mt19937 random(3);
  std::uniform_int_distribution<int> few(-2, 2);
  for (const Case& c : kCases) {
    Problem p(c);
    p.fill([&] { return static_cast<float>(few(random)); });
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
  for (Element element : {Element::bf16, Element::f32}) {
    for (bool with_lse : {false, true}) {
      const Case c{"special values", element, 40, 150, 24, 0, true, with_lse, 1.0f, kHopper, 1};
      Problem p(c);
      const auto draw = [&] { return static_cast<float>(few(random)); };
      p.fill(draw);
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
      p.fill(draw);
      for (float& b : p.bias) b = -1e30f;  // logits of which only the bias is left: all equal
      check_case({"bias only", element, 40, 150, 24, 0, true, with_lse, 0.0f, kHopper, 1}, p, false);
    }
  }
}

void test_scattered_threads_agree_bitwise() {  // whoever runs first, the result is the same
  std::mt19937 random(6);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  Case c{"turns", Element::bf16, 40, 390, 136, 0, true, true, 1.0f, kSmall, 1};
  Problem p(c);
  p.fill([&] { return normal(random); });
  const Result first = search(c, p);
  for (uint32_t turns : {33u, 65u, 127u, emulator::kWarpByWarp}) {
    c.turns = turns;
    const Result again = search(c, p);
    CHECK(first.indices == again.indices && first.max == again.max && first.lse == again.lse, "turns %u",
          turns);
  }
}

void test_histogram() {
  std::mt19937 random(7);
  for (int64_t K : {int64_t{1}, int64_t{1000}, kSharedHistogramCodes, int64_t{20000}}) {
    for (int64_t N : {1, 31, 5000}) {
      std::vector<int64_t> indices(static_cast<size_t>(N)), counts(static_cast<size_t>(K)), expected(counts);
      for (int64_t& i : indices) i = static_cast<int64_t>(random() % static_cast<uint64_t>(K + 2)) - 1;
      std::fill(indices.begin(), indices.begin() + N / 3, K / 2);  // a popular code
      for (int64_t i : indices)
        if (i >= 0 && i < K) ++expected[static_cast<size_t>(i)];
      const auto run = [&](auto kernel, int64_t shared) {
        std::fill(counts.begin(), counts.end(), 0);
        emulator::launch(3, kHistogramThreads, shared, 1,
                         [&] { kernel(indices.data(), N, K, counts.data()); });
        CHECK(counts == expected, "N %ld, K %ld", long(N), long(K));
      };
      if (K <= kSharedHistogramCodes) run(histogram_shared_kernel, K * 4);
      run(histogram_global_kernel, 0);
    }
  }
}

template <typename Word>
void check_gather(int64_t words) {
  constexpr int64_t kCodes = 7, kRows = 21;
  const auto value = [](int64_t i) {
    Word word;
    std::memset(&word, static_cast<int>(i % 251) + 1, sizeof(Word));
    return word;
  };
  std::vector<Word> codebook(static_cast<size_t>(kCodes * words)), out(static_cast<size_t>(kRows * words)),
      second(out);
  for (size_t i = 0; i < codebook.size(); ++i) codebook[i] = value(static_cast<int64_t>(i));
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < kRows; ++i) indices.push_back(i % (kCodes + 2) - 1);  // -1 and kCodes among them
  emulator::launch(ceil_div(kRows, int64_t{kGatherThreads / 32}), kGatherThreads, 0, 1, [&] {
    gather_codes_kernel<Word>(codebook.data(), indices.data(), kRows, kCodes, words, out.data(),
                              second.data());
  });
  std::vector<Word> expected(out.size(), Word{});
  for (int64_t i = 0; i < kRows; ++i) {
    const int64_t code = indices[static_cast<size_t>(i)];
    if (code < 0 || code >= kCodes) continue;
    std::copy_n(codebook.begin() + code * words, words, expected.begin() + i * words);
  }
  const auto bytes = out.size() * sizeof(Word);
  CHECK(std::memcmp(out.data(), expected.data(), bytes) == 0, "%ld words", long(words));
  CHECK(std::memcmp(second.data(), expected.data(), bytes) == 0, "%ld words, second", long(words));
}

void test_gather() {
  for (int64_t words : {1, 31, 32, 70}) {
    check_gather<uint16_t>(words);
    check_gather<uint32_t>(words);
    check_gather<Word16>(words);
  }
}

}  // namespace

int main() {
  test_small_integers_are_exact();
  test_random_values_within_bound();
  test_special_values();
  test_scattered_threads_agree_bitwise();
  test_histogram();
  test_gather();
  return ibq::test::finish("test_common_simt");
}
