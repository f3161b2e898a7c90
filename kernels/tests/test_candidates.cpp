// Candidates and kept logits: what a forward and a backward give with them must be what they give without, in
// every regime of the logits, on every instruction set, whatever the threads; lists must be kept where they
// fit and given up where they do not, and logits kept unless P is peaked.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/codebook.h"
#include "kernels/tests/check.h"

namespace {

using namespace ibq::cpu;

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

struct Inputs {
  int n, k, d;
  std::vector<float> z, e, g, a, c;
};

// S_ij = slope_i level_j and a little noise; temperature 0.1.
//   spread  levels normal: a twentieth of the entries count
//   wide    less so, and no code of the first block stands out: a probe finds P spread too, and lists
//           stand beside kept logits
//   flat    all entries count
//   peaked  one code has a row's whole mass
//   ties    a hundredth of the codes share the top
//   rising  every code tops those before it: lists fill with what is soon left behind
//   mixed   every other row is flat
//   nan     spread, and a row of NaN
//   late    spread, and flat from the second chunk on
Inputs inputs(const std::string& kind, int n, int k, int d) {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  Inputs x{n,
           k,
           d,
           std::vector<float>(n * d),
           std::vector<float>(k * d),
           std::vector<float>(n * d),
           std::vector<float>(n),
           std::vector<float>(k)};
  for (auto* v : {&x.z, &x.e, &x.g, &x.a, &x.c})
    for (auto& f : *v) f = normal(rng);
  for (auto& f : x.z) f *= 0.01f;
  for (int j = 0; j < k; ++j) {
    float level = normal(rng);
    if (kind == "peaked") level = j % 4000 == 1234 ? 50.0f + 10.0f * static_cast<float>(j / 4000) : level;
    if (kind == "ties") level = static_cast<float>(j % 100);
    if (kind == "rising") level = 170.0f * static_cast<float>(j) / static_cast<float>(k);
    if (kind == "wide" && j < 256) level = std::min(level, 2.2f);
    x.e[j * d] = level;
  }
  for (int i = 0; i < n; ++i) {
    const bool flat = kind == "flat" || (kind == "mixed" && i % 2) || (kind == "late" && i >= 2060);
    x.z[i * d] = flat ? 0.001f : kind == "wide" ? 1.05f : 1.2f;
    if (flat)
      for (int m = 1; m < d; ++m) x.z[i * d + m] *= 0.1f;
  }
  if (kind == "nan") x.z[7 * d + 1] = NAN;
  return x;
}

// How much memory a call gets for candidates: none, room for lists and some logits, room for all logits.
enum class Room { kNone, kSome, kAll };

struct Results {
  std::vector<float> mean, grad_z, grad_e;
  int32_t listed = 0, kept = 0;
};

Results step(const Kernels& kernels, const Inputs& x, Room room, int forward_threads, int backward_threads,
             float dropped_mass = kNegligibleMass) {
  const int n = x.n, k = x.k, d = x.d;
  Problem p;
  p.z = x.z.data(), p.codebook = x.e.data(), p.n = n, p.k = k, p.d = d, p.dropped_mass = dropped_mass;
  int64_t tiles, blocks;
  kernels.tile_grid(n, k, &tiles, &blocks);
  std::vector<int64_t> indices(n);
  std::vector<float> readout(n * d), entropy(n), bound(2 * tiles * blocks);
  std::vector<double> lse(n), lse_tau(n);
  const int64_t share[] = {0, 8, 10},
                bytes = kernels.candidate_bytes(n, k, d) * share[static_cast<int>(room)] / 10;
  void* candidates = nullptr;
  if (bytes > 0) {
    CHECK(posix_memalign(&candidates, 64, static_cast<size_t>(bytes)) == 0, "memory");
    std::memset(candidates, 0xcd, static_cast<size_t>(bytes));
  }
  Results out;
  out.mean.resize(k), out.grad_z.resize(n * d), out.grad_e.resize(k * d);
  Forward f;
  f.indices = indices.data(), f.lse = lse.data(), f.readout = readout.data(), f.temperature = 0.1f;
  f.lse_tau = lse_tau.data(), f.row_entropy = entropy.data(), f.mean_prob = out.mean.data();
  f.tile_bound = bound.data(), f.candidates = candidates, f.candidate_bytes = bytes;
  CHECK(kernels.forward(p, f, threads(forward_threads)), "forward");
  Backward b;
  b.grad_z_q = x.g.data(), b.lse = lse.data(), b.readout = readout.data(), b.temperature = 0.1f;
  b.lse_tau = lse_tau.data(), b.row_entropy = entropy.data(), b.grad_row_entropy = x.a.data();
  b.grad_mean_prob = x.c.data(), b.grad_z = out.grad_z.data(), b.grad_codebook = out.grad_e.data();
  b.tile_bound = bound.data(), b.candidates = candidates, b.candidate_bytes = bytes;
  CHECK(kernels.backward(p, b, threads(backward_threads)), "backward");
  if (bytes > 0)
    out.listed = static_cast<int32_t*>(candidates)[0], out.kept = static_cast<int32_t*>(candidates)[1];
  std::free(candidates);
  return out;
}

// Greatest difference, as a share of the greatest value; NaN against NaN is none.
double difference(const std::vector<float>& got, const std::vector<float>& want) {
  double scale = 1e-30, worst = 0;
  for (float w : want)
    if (std::isfinite(w)) scale = std::max(scale, std::fabs(double(w)));
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::isnan(got[i]) && std::isnan(want[i])) continue;
    const double error = std::fabs(double(got[i]) - want[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst / scale;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check(const Kernels& kernels, const char* kind, bool listed, int n, int d, int forward_threads,
           int backward_threads) {
  const Inputs x = inputs(kind, n, 8300, d);
  const Results want = step(kernels, x, Room::kNone, forward_threads, backward_threads);
  char name[80];
  std::snprintf(name, sizeof(name), "%s %s, threads %d and %d", kernels.name, kind, forward_threads,
                backward_threads);
  int64_t tiles, blocks;
  kernels.tile_grid(n, x.k, &tiles, &blocks);
  for (Room room : {Room::kSome, Room::kAll}) {
    const Results got = step(kernels, x, room, forward_threads, backward_threads);
    const Results again = step(kernels, x, room, forward_threads, backward_threads);
    if (room == Room::kSome) {
      CHECK((got.listed > 0) == listed, "%s: parts listed: %d", name, got.listed);
      CHECK(got.kept < blocks, "%s: blocks kept: %d", name, got.kept);
    } else {
      CHECK(got.listed == 0 || got.kept == 0, "%s: parts listed %d, blocks kept %d", name, got.listed,
            got.kept);
    }
    if (std::strcmp(kind, "peaked") == 0) CHECK(got.kept == 0, "%s: blocks kept: %d", name, got.kept);
    if (std::strcmp(kind, "wide") == 0) CHECK(got.kept > 0, "%s: blocks kept: %d", name, got.kept);
    if (std::strcmp(kind, "flat") == 0)
      CHECK(got.kept > 0 && (room == Room::kSome || got.kept == blocks), "%s: blocks kept: %d", name,
            got.kept);
    const double mean = difference(got.mean, want.mean), grad_z = difference(got.grad_z, want.grad_z),
                 grad_e = difference(got.grad_e, want.grad_e);
    CHECK(mean < 5e-7 && grad_z < 2e-6 && grad_e < 2e-6, "%s: mean %.3g, dz %.3g, dE %.3g", name, mean,
          grad_z, grad_e);
    CHECK(same(got.mean, again.mean) && same(got.grad_z, again.grad_z) && same(got.grad_e, again.grad_e),
          "%s: not repeatable", name);
  }
}

}  // namespace

int main() {
  std::istringstream names(available_isas());
  for (std::string name; std::getline(names, name, ',');) {
    const Kernels& kernels = *kernels_named(name.c_str());
    CHECK(kernels.candidate_bytes(100, kernels.bounded_from - 1, 64) == 0, "small codebooks leave nothing");
    CHECK(kernels.candidate_bytes(1 << 20, 1 << 20, 64) == kCandidateBytes, "what is left is bounded");
    CHECK(kernels.candidate_bytes(1 << 20, 1 << 20, 256) == int64_t{1} << 30, "by the gradient where larger");
    for (int forward_threads : {1, 3})
      for (int backward_threads : {1, 2}) {
        check(kernels, "spread", true, 61, 12, forward_threads, backward_threads);
        check(kernels, "peaked", true, 61, 12, forward_threads, backward_threads);
      }
    check(kernels, "ties", true, 61, 12, 2, 2);
    check(kernels, "wide", true, 61, 12, 1, 2);
    check(kernels, "rising", true, 61, 12, 2, 2);
    check(kernels, "flat", false, 61, 12, 2, 2);
    check(kernels, "mixed", false, 61, 12, 2, 2);
    check(kernels, "nan", false, 61, 12, 2, 2);
    check(kernels, "spread", true, 2100, 4, 1, 2);  // two chunks of rows
    check(kernels, "late", false, 2100, 4, 1, 2);
    const Results none = step(kernels, inputs("spread", 61, 8300, 12), Room::kAll, 2, 2, 0.0f);
    CHECK(none.listed == 0 && none.kept == 0, "%s: with skipping off nothing is left", kernels.name);
  }
  return ibq::test::finish("candidates");
}
