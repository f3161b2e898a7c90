// The CPU kernels of every instruction set this machine can run, against plain double loops: ragged sizes,
// ties, NaN rows, bias and scale, bf16 and fp16, one and several threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

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

uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float bf16_value(uint16_t h) {
  uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

struct Case {
  int n, k, d;
  bool bias;
  float scale, spread, temperature;
  float norm_weight = 0.0f;
};

// Everything the kernels compute, in double, with the N x K matrices they never form.
struct Truth {
  std::vector<int64_t> indices;
  std::vector<double> max, lse, lse_tau, entropy, mean, readout, grad_z, grad_e, grad_b;
};

struct Data {
  std::vector<float> z, e, b, g, a, c;
};

Truth truth(const Case& s, const Data& x) {
  Truth t;
  const int n = s.n, k = s.k, d = s.d;
  t.mean.assign(k, 0);
  t.readout.assign(n * d, 0);
  t.grad_z.assign(n * d, 0);
  t.grad_e.assign(k * d, 0);
  t.grad_b.assign(k, 0);
  std::vector<double> logits(n * k), p(k), q(k);
  for (int i = 0; i < n; ++i) {
    double* l = &logits[i * k];
    for (int j = 0; j < k; ++j) {
      double dot = 0;
      for (int m = 0; m < d; ++m) dot += double(x.z[i * d + m]) * x.e[j * d + m];
      double norm = 0;
      for (int m = 0; m < d; ++m) norm += double(x.e[j * d + m]) * x.e[j * d + m];
      l[j] = s.scale * dot + (s.bias ? x.b[j] : 0.0f) - s.norm_weight * norm;
    }
    const int best = static_cast<int>(std::max_element(l, l + k) - l);
    double sum = 0, sum_t = 0, expect_t = 0;
    for (int j = 0; j < k; ++j) {
      sum += std::exp(l[j] - l[best]);
      sum_t += std::exp((l[j] - l[best]) / s.temperature);
    }
    t.indices.push_back(best);
    t.max.push_back(l[best]);
    t.lse.push_back(l[best] + std::log(sum));
    t.lse_tau.push_back(l[best] / s.temperature + std::log(sum_t));
    for (int j = 0; j < k; ++j) {
      const double log_p = l[j] / s.temperature - t.lse_tau[i], prob = std::exp(log_p);
      if (prob > 0) expect_t -= prob * log_p;
      t.mean[j] += prob / n;
    }
    t.entropy.push_back(expect_t);
  }
  for (int i = 0; i < n; ++i) {
    const double* l = &logits[i * k];
    double delta = 0, r = 0;
    for (int j = 0; j < k; ++j) {
      p[j] = std::exp(l[j] - t.lse[i]);
      q[j] = std::exp(l[j] / s.temperature - t.lse_tau[i]);
      r += q[j] * x.c[j];
      for (int m = 0; m < d; ++m) t.readout[i * d + m] += p[j] * x.e[j * d + m];
    }
    for (int m = 0; m < d; ++m) delta += double(x.g[i * d + m]) * t.readout[i * d + m];
    for (int j = 0; j < k; ++j) {
      double g_dot = 0;
      for (int m = 0; m < d; ++m) g_dot += double(x.g[i * d + m]) * x.e[j * d + m];
      const double log_q = l[j] / s.temperature - t.lse_tau[i];
      double ds = p[j] * (g_dot - delta);
      if (q[j] > 0) ds += q[j] / s.temperature * (-x.a[i] * (log_q + t.entropy[i]) + (x.c[j] - r) / n);
      t.grad_b[j] += ds;
      for (int m = 0; m < d; ++m) {
        t.grad_z[i * d + m] += s.scale * ds * x.e[j * d + m];
        t.grad_e[j * d + m] += ds * (s.scale * x.z[i * d + m] - 2 * s.norm_weight * x.e[j * d + m]);
      }
    }
  }
  return t;
}

template <typename A>
double worst(const std::vector<A>& got, const std::vector<double>& want) {
  double scale = 1e-30, error = 0;
  for (double w : want) scale = std::max(scale, std::fabs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = std::fabs(double(got[i]) - want[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
  }
  return error / scale;
}

void check_case(const Kernels& kernels, const Case& s, int thread_count, bool bf16) {
  std::mt19937 rng(s.n * 1000003 + s.k * 1009 + s.d);
  std::normal_distribution<float> normal;
  Data x;
  auto fill = [&](std::vector<float>& v, size_t count, float scale) {
    v.resize(count);
    for (auto& f : v) f = normal(rng) * scale;
  };
  fill(x.z, s.n * s.d, s.spread);
  fill(x.e, s.k * s.d, 1.0f);
  fill(x.b, s.k, 1.0f);
  fill(x.g, s.n * s.d, 1.0f);
  fill(x.a, s.n, 1.0f);
  fill(x.c, s.k, float(s.n));
  std::vector<uint16_t> z16, e16, g16;
  if (bf16) {
    for (auto* pair : {&x.z, &x.e, &x.g}) {
      auto& narrow = pair == &x.z ? z16 : pair == &x.e ? e16 : g16;
      for (auto& f : *pair) {
        narrow.push_back(to_bf16(f));
        f = bf16_value(narrow.back());
      }
    }
  }
  const Truth want = truth(s, x);

  Problem p;
  p.dtype = bf16 ? DType::kBFloat16 : DType::kFloat32;
  p.z = bf16 ? static_cast<const void*>(z16.data()) : x.z.data();
  p.codebook = bf16 ? static_cast<const void*>(e16.data()) : x.e.data();
  p.bias = s.bias ? x.b.data() : nullptr;
  p.n = s.n, p.k = s.k, p.d = s.d, p.scale = s.scale, p.norm_weight = s.norm_weight;
  const Parallel parallel = threads(thread_count);

  std::vector<int64_t> indices(s.n);
  std::vector<float> max(s.n), readout(s.n * s.d), entropy(s.n), mean(s.k);
  std::vector<double> lse(s.n), lse_tau(s.n);
  Forward f;
  f.indices = indices.data(), f.max = max.data(), f.lse = lse.data(), f.readout = readout.data();
  f.temperature = s.temperature, f.lse_tau = lse_tau.data(), f.row_entropy = entropy.data();
  f.mean_prob = mean.data();
  std::ostringstream name;
  name << kernels.name << " n=" << s.n << " k=" << s.k << " d=" << s.d << " bias=" << s.bias
       << " scale=" << s.scale << " spread=" << s.spread << " threads=" << thread_count
       << (bf16 ? " bf16" : "");
  expect(kernels.forward(p, f, parallel), name.str() + " forward");
  expect(indices == want.indices, name.str() + " indices");
  // Rounding of a logit of size |S| is about eps sqrt(D) |S|; exponentials turn it into a relative error.
  double magnitude = s.norm_weight * s.d;
  for (double m : want.max) magnitude = std::max(magnitude, std::fabs(m));
  const double eps = 1.2e-7 * std::sqrt(double(s.d) + 4), tol = 8 * eps * (1 + std::fabs(magnitude));
  // Where bfloat16 is multiplied as such, P and dS are rounded to it before their products.
  const bool rounded = bf16 && std::strcmp(kernels.name, "avx512_bf16") == 0;
  const double coarse = rounded ? 1.0 / 256 : 0.0;
  const double tol_t = 8 * eps * (1 + std::fabs(magnitude) / s.temperature);
  auto near = [&](double error, double bound, const char* what) {
    char text[96];
    std::snprintf(text, sizeof(text), " %s: error %.3g, bound %.3g", what, error, bound);
    expect(error <= bound, name.str() + text);
  };
  near(worst(max, want.max), tol, "max");
  near(worst(lse, want.lse), tol, "lse");
  near(worst(readout, want.readout), tol + coarse, "readout");
  near(worst(lse_tau, want.lse_tau), tol_t, "lse_tau");
  if (s.k > 1) near(worst(entropy, want.entropy), tol_t, "entropy");
  near(worst(mean, want.mean), tol_t, "mean");

  std::vector<float> grad_z(s.n * s.d), grad_e(s.k * s.d), grad_b(s.k);
  Backward b;
  b.grad_z_q = bf16 ? static_cast<const void*>(g16.data()) : x.g.data();
  b.lse = lse.data(), b.readout = readout.data(), b.temperature = s.temperature, b.lse_tau = lse_tau.data();
  b.row_entropy = entropy.data(), b.grad_row_entropy = x.a.data(), b.grad_mean_prob = x.c.data();
  std::vector<uint16_t> narrow_z(grad_z.size()), narrow_e(grad_e.size());
  b.grad_z = bf16 ? static_cast<void*>(narrow_z.data()) : grad_z.data();
  b.grad_codebook = bf16 ? static_cast<void*>(narrow_e.data()) : grad_e.data();
  b.grad_bias = grad_b.data();
  auto run = [&] {
    expect(kernels.backward(p, b, parallel), name.str() + " backward");
    if (!bf16) return;
    std::transform(narrow_z.begin(), narrow_z.end(), grad_z.begin(), bf16_value);
    std::transform(narrow_e.begin(), narrow_e.end(), grad_e.begin(), bf16_value);
  };
  run();
  if (s.k > 1) {
    const double rounding = coarse + (bf16 ? 1.0 / 256 : 0.0);
    near(worst(grad_z, want.grad_z), 4 * tol_t + rounding, "grad_z");
    near(worst(grad_e, want.grad_e), 4 * tol_t + rounding, "grad_codebook");
    near(worst(grad_b, want.grad_b), 4 * tol_t, "grad_bias");
  }
  std::vector<float> again_z = grad_z, again_e = grad_e;
  run();
  expect(again_z == grad_z && again_e == grad_e, name.str() + " backward is not repeatable");
}

// Codebooks large enough for tile bounds: flat rows, one-hot rows and both side by side. With and without
// skipping the results must agree to float32 rounding, and skipping must be what saves the work.
void check_skipping(const Kernels& kernels) {
  const int n = 61, k = 8300, d = 48;
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  std::vector<float> e(k * d), z(n * d), g(n * d), a(n), c(k);
  for (auto* v : {&e, &g, &a, &c})
    for (auto& f : *v) f = normal(rng);
  for (auto& f : e) f *= 4.0f;
  for (const char* kind : {"flat", "peaked", "mixed"}) {
    for (int i = 0; i < n; ++i) {
      const bool peaked = kind[0] == 'p' || (kind[0] == 'm' && i % 2);
      const int code = static_cast<int>(rng() % k);
      for (int m = 0; m < d; ++m) z[i * d + m] = peaked ? e[code * d + m] : 0.001f * normal(rng);
    }
    Problem p;
    p.z = z.data(), p.codebook = e.data(), p.n = n, p.k = k, p.d = d;
    int64_t tiles, blocks;
    kernels.tile_grid(n, k, &tiles, &blocks);
    expect(tiles > 0 && blocks > 0, "a codebook of 8,300 codes keeps tile bounds");
    std::vector<double> results[2];
    for (int pass = 0; pass < 2; ++pass) {
      p.dropped_mass = pass == 0 ? 0.0f : kNegligibleMass;
      std::vector<int64_t> indices(n);
      std::vector<float> readout(n * d), entropy(n), mean(k), bound(2 * tiles * blocks);
      std::vector<double> lse(n), lse_tau(n);
      std::vector<float> grad_z(n * d), grad_e(k * d);
      Forward f;
      f.indices = indices.data(), f.lse = lse.data(), f.readout = readout.data(), f.temperature = 0.1f;
      f.lse_tau = lse_tau.data(), f.row_entropy = entropy.data(), f.mean_prob = mean.data();
      f.tile_bound = bound.data();
      kernels.forward(p, f, threads(2));
      Backward b;
      b.grad_z_q = g.data(), b.lse = lse.data(), b.readout = readout.data(), b.temperature = 0.1f;
      b.lse_tau = lse_tau.data(), b.row_entropy = entropy.data(), b.grad_row_entropy = a.data();
      b.grad_mean_prob = c.data(), b.grad_z = grad_z.data(), b.grad_codebook = grad_e.data();
      b.tile_bound = bound.data();
      kernels.backward(p, b, threads(2));
      if (pass == 1 && kind[0] == 'p') {
        int64_t dead = 0;
        for (int64_t t = 0; t < tiles * blocks; ++t) dead += bound[t] < -40;
        expect(dead > tiles * blocks / 2, "most tiles of peaked rows are negligible");
      }
      auto keep = [&](const auto& v, double scale) {
        for (auto x : v) results[pass].push_back(double(x) / scale);
      };
      keep(lse, 100), keep(readout, 10), keep(lse_tau, 1000), keep(entropy, 1), keep(mean, 0.1);
      keep(grad_z, 1000), keep(grad_e, 1000);
    }
    double worst_difference = 0;
    for (size_t i = 0; i < results[0].size(); ++i)
      worst_difference = std::max(worst_difference, std::fabs(results[0][i] - results[1][i]));
    char text[120];
    std::snprintf(text, sizeof(text), "%s: %s rows differ by %.3g with skipping", kernels.name, kind,
                  worst_difference);
    expect(worst_difference < 2e-6, text);
  }
}

// Rounded-first search must be the float32 search bit for bit: random and clustered codes, near ties one
// rounding apart, duplicates (more than any list of candidates holds), NaN and infinite rows, bias and scale.
void check_rounded_first(const Kernels& kernels) {
  const int k = 2500;
  std::mt19937 rng(11);
  std::normal_distribution<float> normal;
  for (int d : {32, 57, 130}) {
    const int n = 32768 / d + 5;  // from where on the search rounds first
    for (int kind = 0; kind < 4; ++kind) {
      std::vector<float> e(k * d), z(n * d), b(k);
      for (auto* v : {&e, &z, &b})
        for (auto& f : *v) f = normal(rng);
      for (int j = 0; j < k && kind > 0; ++j) {
        const int from = kind == 3 ? j % 7 : j % 50;
        for (int m = 0; m < d; ++m) {
          e[j * d + m] = e[from * d + m];
          if (kind == 1) e[j * d + m] += 0.01f * normal(rng);
          if (kind == 2 && rng() % 8 == 0) e[j * d + m] = std::nextafter(e[j * d + m], 10.0f);
        }
      }
      if (kind == 2) e[64 * d] = e[1000 * d + 5] = NAN;
      z[3 * d] = NAN;
      z[5 * d + 1] = INFINITY;
      std::vector<int64_t> indices[2] = {std::vector<int64_t>(n), std::vector<int64_t>(n)};
      std::vector<float> max[2] = {std::vector<float>(n), std::vector<float>(n)};
      for (int first = 0; first < 2; ++first) {
        Problem p;
        p.z = z.data(), p.codebook = e.data(), p.n = n, p.k = k, p.d = d, p.scale = -0.7f;
        p.bias = kind == 1 ? b.data() : nullptr;
        Forward f;
        f.indices = indices[first].data(), f.max = max[first].data(), f.rounded_first = first;
        expect(kernels.forward(p, f, threads(2)), "rounded first");
      }
      expect(indices[0] == indices[1] && std::memcmp(max[0].data(), max[1].data(), n * sizeof(float)) == 0,
             std::string(kernels.name) + ": rounded first differs, kind " + std::to_string(kind) + " d " +
                 std::to_string(d));
    }
  }
}

void check_ties_and_nan(const Kernels& kernels) {
  const int n = 31, k = 2000, d = 5;
  std::vector<float> z(n * d, 1.0f), e(k * d, 0.5f);
  z[7 * d + 2] = NAN;
  std::vector<int64_t> indices(n);
  std::vector<float> max(n);
  std::vector<double> lse(n);
  Problem p;
  p.z = z.data(), p.codebook = e.data(), p.n = n, p.k = k, p.d = d;
  Forward f;
  f.indices = indices.data(), f.max = max.data(), f.lse = lse.data();
  expect(kernels.forward(p, f, threads(3)), "ties forward");
  for (int i = 0; i < n; ++i) {
    expect(indices[i] == 0, std::string(kernels.name) + ": equal codes must give the lowest index");
    expect(std::isnan(max[i]) == (i == 7) && std::isnan(lse[i]) == (i == 7),
           std::string(kernels.name) + ": NaN belongs to the NaN row alone");
  }
  int lowest = k;
  for (int j : {1999, 1200, 1201, 17, 16}) {
    lowest = std::min(lowest, j);
    for (int m = 0; m < d; ++m) e[j * d + m] = 0.75f;
    kernels.forward(p, f, threads(4));
    expect(indices[0] == lowest, "tie at code " + std::to_string(j));
  }
}

// The search alone must be the search of a call that wants the log-sum-exp too, bit for bit: every tile and
// vector cut short, chunks, maxima that rise with every code or never, ties, zeros of both signs, NaN and
// infinite codes, rows without a logit above -inf.
void check_search_alone(const Kernels& kernels) {
  struct Shape {
    int n, k, d;
  };
  const Shape shapes[] = {{1, 1, 1},    {3, 11, 5},    {16, 12, 8},  {17, 13, 7},   {32, 25, 33},
                          {33, 191, 2}, {40, 193, 16}, {61, 400, 9}, {70, 8300, 3}, {2060, 30, 4}};
  for (const Shape& s : shapes)
    for (DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
      for (const char* kind : {"random", "rising", "equal", "small", "broken", "lowest"})
        for (int form = 0; form < 4; ++form) {
          std::mt19937 rng(s.n * 31 + s.k);
          std::normal_distribution<float> normal;
          std::vector<float> z(s.n * s.d), e(s.k * s.d), b(s.k, form == 1 ? -0.0f : 0.0f);
          for (auto& f : z) f = normal(rng);
          for (auto& f : e) f = normal(rng);
          if (kind[0] == 'r' && kind[1] == 'i')
            for (size_t i = 0; i < e.size(); ++i) e[i] = 0.01f * float(i / s.d), z[i % z.size()] = 1.0f;
          if (kind[0] == 'e') std::fill(e.begin(), e.end(), 0.5f);
          if (kind[0] == 's')  // ties everywhere, and products of -0
            for (auto* v : {&z, &e})
              for (auto& f : *v) f = std::copysign(float(rng() % 2), f);
          if (kind[0] == 'b') {
            for (int j = 0; j < s.k; j += 5) e[j * s.d] = NAN;
            e[s.k / 2 * s.d] = INFINITY;
            z[s.n / 2 * s.d] = NAN;
          }
          if (kind[0] == 'l') std::fill(b.begin(), b.end(), -INFINITY);
          if (form == 2)
            for (auto& f : b) f += 0.1f * normal(rng);
          std::vector<uint16_t> narrow[2];
          for (int which = 0; which < 2; ++which)  // fp16 takes the same bits: some other numbers
            for (float f : which ? e : z) narrow[which].push_back(to_bf16(f));
          Problem p;
          p.dtype = type, p.n = s.n, p.k = s.k, p.d = s.d;
          p.z = type == DType::kFloat32 ? static_cast<const void*>(z.data()) : narrow[0].data();
          p.codebook = type == DType::kFloat32 ? static_cast<const void*>(e.data()) : narrow[1].data();
          p.bias = form == 0 && kind[0] != 'l' ? nullptr : b.data();
          p.scale = form == 2 ? -0.7f : 1.0f;
          p.norm_weight = form == 3 ? 0.5f : 0.0f;
          std::vector<int64_t> indices[2];
          std::vector<float> max[2];
          for (int alone = 0; alone < 2; ++alone) {
            indices[alone].resize(s.n), max[alone].resize(s.n);
            std::vector<double> lse(s.n);
            Forward f;
            f.indices = indices[alone].data(), f.max = max[alone].data();
            f.lse = alone ? nullptr : lse.data();
            expect(kernels.forward(p, f, threads(1 + s.k % 3)), "search alone");
          }
          if (kind[0] == 'l')
            for (float m : max[0]) expect(std::isnan(m), "a row without a logit above -inf has no maximum");
          for (int which = 0; which < 2; ++which)
            for (int64_t i : indices[which]) expect(i >= 0 && i < s.k, "an index is that of a code");
          expect(
              indices[0] == indices[1] && std::memcmp(max[0].data(), max[1].data(), s.n * sizeof(float)) == 0,
              std::string(kernels.name) + ": search alone differs, n " + std::to_string(s.n) + " k " +
                  std::to_string(s.k) + " d " + std::to_string(s.d) + " " + kind + " dtype " +
                  std::to_string(static_cast<int>(type)) + " form " + std::to_string(form));
        }
}

void check_rows() {
  const int n = 1000, k = 37, d = 3;
  std::mt19937 rng(1);
  std::vector<int64_t> indices(n), counts(k), want(k, 0);
  for (auto& i : indices) i = static_cast<int64_t>(rng() % k);
  for (auto i : indices) ++want[i];
  expect(histogram(indices.data(), n, k, counts.data(), threads(4)) == -1 && counts == want, "histogram");
  std::vector<int64_t> many(200000, 5);
  many[150000] = 37;
  expect(histogram(many.data(), 200000, k, counts.data(), threads(4)) == 150000,
         "histogram: bad index found");
  std::vector<float> a(n * d), b(n * d), grad(k * d, 1.0f), expected(k * d, 1.0f);
  for (size_t i = 0; i < a.size(); ++i) a[i] = float(rng() % 8), b[i] = float(rng() % 8);
  for (int i = 0; i < n; ++i)
    for (int m = 0; m < d; ++m) expected[indices[i] * d + m] += a[i * d + m] + b[i * d + m];
  scatter_add_rows(DType::kFloat32, a.data(), b.data(), indices.data(), n, k, d, grad.data(), threads(3));
  expect(grad == expected, "scatter_add_rows");
  // 1 + 300 ones: added one by one in bfloat16 the sum would stick at 256
  std::vector<uint16_t> ones(300, to_bf16(1.0f)), narrow(2, to_bf16(1.0f));
  std::vector<int64_t> same(300, 1);
  scatter_add_rows(DType::kBFloat16, ones.data(), nullptr, same.data(), 300, 2, 1, narrow.data(), threads(2));
  expect(narrow[0] == to_bf16(1.0f) && narrow[1] == to_bf16(301.0f), "a code's rows are rounded once");
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, false, 1.0f, 1.0f, 1.0f},          {5, 7, 3, true, 1.0f, 1.0f, 0.5f},
      {97, 1025, 59, true, 0.5f, 1.0f, 0.1f},      {13, 33, 32, false, 1.0f, 2.0f, 0.05f},
      {40, 2000, 16, false, 1.0f, 1.0f, 0.02f},    {2100, 90, 8, true, 2.0f, 0.5f, 0.3f},
      {25, 400, 111, false, 1.0f, 0.001f, 0.01f},  {50, 300, 21, true, 2.0f, 1.0f, 0.5f, 1.0f},
      {30, 250, 8, false, 6.0f, 1.0f, 0.5f, 3.0f},
  };
  std::istringstream names(available_isas());
  int isas = 0;
  for (std::string name; std::getline(names, name, ',');) {
    const Kernels* k = kernels_named(name.c_str());
    expect(k != nullptr, "kernels_named(" + name + ")");
    ++isas;
    for (const Case& c : cases)
      for (int t : {1, 3}) check_case(*k, c, t, false);
    check_case(*k, cases[2], 2, true);
    check_case(*k, cases[4], 1, true);
    check_case(*k, cases[5], 1, true);  // two chunks of rows
    check_case(*k, cases[7], 2, true);
    check_skipping(*k);
    check_rounded_first(*k);
    check_ties_and_nan(*k);
    check_search_alone(*k);
  }
  expect(kernels_named("quantum") == nullptr, "an unknown instruction set must be refused");
  check_rows();
  std::printf("%d instruction sets (%s), %d failures\n", isas, available_isas(), failures);
  return failures != 0;
}
