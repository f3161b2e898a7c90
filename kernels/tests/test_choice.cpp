// Token choice of every instruction set this machine can run, against the definition with a sort: ties,
// filters, ragged numbers of codes, rows that are no distribution; and its noise against the shared Philox.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/common/philox.h"
#include "kernels/cpu/choice_api.h"
#include "kernels/cpu/codebook.h"

namespace {

using namespace ibq::cpu;
int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

Parallel threads(int count) {
  Parallel p;
  p.threads = count;
  p.run = [](int tasks, void (*body)(void*, int), void* context) {
    std::vector<std::thread> pool;
    for (int t = 0; t < tasks; ++t) pool.emplace_back(body, context, t);
    for (auto& t : pool) t.join();
  };
  return p;
}

struct Settings {
  float temperature, top_p;
  int64_t top_k, seed, image, position;
};

double noise(const Settings& s, int64_t code) {
  const auto offset = static_cast<uint64_t>(code / 4) | static_cast<uint64_t>(s.position) << 32;
  const ibq::Philox4 words =
      ibq::philox_draw(static_cast<uint64_t>(s.seed), static_cast<uint64_t>(s.image), offset);
  return -std::log(-std::log1p(-(words.word[code % 4] + 0.5) * std::pow(2.0, -32)));
}

// The definition. `borderline`: a sum is too near top_p for one answer to be the right one.
int64_t truth(const float* logits, int64_t codes, const Settings& s, bool& borderline) {
  std::vector<float> x(codes);
  for (int64_t j = 0; j < codes; ++j) x[j] = (s.top_k == 1 ? logits[j] : logits[j] / s.temperature) + 0.0f;
  for (float v : x)
    if (std::isnan(v) || v == std::numeric_limits<float>::infinity()) return -1;
  std::vector<int64_t> order(codes);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x[a] > x[b]; });
  if (std::isinf(x[order[0]])) return -1;
  if (s.top_k == 1) return order[0];
  size_t kept = codes;
  if (s.top_k > 0 && s.top_k < codes) {
    const float least = x[order[s.top_k - 1]];
    kept = s.top_k;
    while (kept < order.size() && x[order[kept]] == least) ++kept;
  }
  if (s.top_p < 1) {
    double total = 0, before = 0;
    for (size_t i = 0; i < kept; ++i) total += std::exp(static_cast<double>(x[order[i]]) - x[order[0]]);
    size_t i = 0;
    for (; i < kept && before <= s.top_p * total; ++i) {
      before += std::exp(static_cast<double>(x[order[i]]) - x[order[0]]);
      if (std::fabs(before / total - s.top_p) < 1e-11) borderline = true;
    }
    kept = i;
  }
  int64_t best = -1;
  double score = -std::numeric_limits<double>::infinity();
  std::sort(order.begin(), order.begin() + kept);
  for (size_t i = 0; i < kept; ++i) {
    const double candidate = x[order[i]] + noise(s, order[i]);
    if (candidate > score) {
      score = candidate;
      best = order[i];
    }
  }
  return best;
}

void check(const Kernels& kernels, int64_t codes, int spread, std::mt19937_64& random) {
  constexpr int64_t kRows = 60;
  std::normal_distribution<float> normal(0.0f, spread == 0 ? 0.01f : spread == 1 ? 1.0f : 60.0f);
  const float temperatures[] = {1.0f, 0.4f, 1.7f}, shares[] = {1.0f, 0.001f, 0.5f, 0.93f, 0.9999f};
  const int64_t ranks[] = {0, 1, 2, 5, codes / 2, codes - 1, codes, codes + 7};
  std::vector<float> logits(kRows * codes), temperature(kRows), top_p(kRows);
  std::vector<int64_t> top_k(kRows), seed(kRows), image(kRows), position(kRows), tokens(kRows), alone(kRows);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t j = 0; j < codes; ++j) {
      const float value = normal(random);
      logits[row * codes + j] =
          row % 3 == 0 ? std::nearbyint(value) : value;  // ties, and zeros of both signs
    }
    if (row % 11 == 10) logits[row * codes + random() % codes] = -std::numeric_limits<float>::infinity();
    if (row % 17 == 16) logits[row * codes + random() % codes] = std::nanf("");
    temperature[row] = temperatures[random() % 3];
    top_p[row] = shares[random() % 5];
    top_k[row] = std::max<int64_t>(ranks[random() % 8], 0);
    seed[row] = static_cast<int64_t>(random() >> 1);
    image[row] = static_cast<int64_t>(random() >> (row % 2 ? 1 : 40));
    position[row] = static_cast<int64_t>(random() >> 33);
  }
  Choice in;
  in.logits = logits.data();
  in.temperature = temperature.data();
  in.top_k = top_k.data();
  in.top_p = top_p.data();
  in.seed = seed.data();
  in.image = image.data();
  in.position = position.data();
  in.rows = kRows;
  in.codes = codes;
  in.tokens = tokens.data();
  expect(kernels.choose_tokens(in, threads(1)), "workspace");
  in.tokens = alone.data();
  expect(kernels.choose_tokens(in, threads(3)), "workspace");
  expect(tokens == alone, "another token on three threads");
  for (int64_t row = 0; row < kRows; ++row) {
    const Settings s = {temperature[row], top_p[row], top_k[row], seed[row], image[row], position[row]};
    bool borderline = false;
    const int64_t expected = truth(&logits[row * codes], codes, s, borderline);
    std::ostringstream what;
    what << kernels.name << " V=" << codes << " spread " << spread << " row " << row << " T=" << s.temperature
         << " k=" << s.top_k << " p=" << s.top_p << ": token " << tokens[row] << ", expected " << expected;
    expect(borderline || tokens[row] == expected, what.str());
  }
}

}  // namespace

int main() {
  std::istringstream names(available_isas());
  for (std::string name; std::getline(names, name, ',');) {
    std::mt19937_64 random(7);
    for (int64_t codes : {1, 2, 7, 16, 31, 32, 33, 64, 100, 1000, 5003})
      for (int spread : {0, 1, 2}) check(*kernels_named(name.c_str()), codes, spread, random);
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
