// The cross-entropy kernels of every instruction set this machine can run, against plain double loops: ragged
// sizes, ignored rows, smoothing, bias, every dtype, more rows than a chunk, peaked rows whose tiles are left
// out, large logits, several threads.
#include <cmath>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/codebook.h"
#include "kernels/cpu/cross_entropy_api.h"
#include "kernels/tests/check.h"

namespace {

using namespace ibq::cpu;
constexpr int64_t kIgnored = -1;

struct Case {
  int n, k, d;
  bool bias;
  float smoothing, spread, ignored;
};

struct Data {
  std::vector<float> hidden, head, bias, grad;
  std::vector<int64_t> targets;
};

struct Truth {
  std::vector<double> loss, lse, grad_hidden, grad_head, grad_bias;
  double magnitude = 0;  // greatest sum of |h_m w_m| behind a logit, by which its rounding is bounded
};

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

// A matrix as the kernels take it. Values fit bfloat16 and float16 alike, so `from` is changed to them: 8
// bits of mantissa, and nothing below float16's subnormals.
std::vector<uint16_t> narrow(std::vector<float>& from, DType dtype) {
  std::vector<uint16_t> bits;
  for (float& f : from) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    u &= std::fabs(f) < 6.2e-5f ? 0u : 0xffff0000u;
    std::memcpy(&f, &u, 4);
    const uint32_t half = u == 0 ? 0 : (u >> 16 & 0x8000u) | ((u & 0x7fffffffu) - 0x38000000u) >> 13;
    bits.push_back(static_cast<uint16_t>(dtype == DType::kBFloat16 ? u >> 16 : half));
  }
  return bits;
}

// Room for a gradient in the problem's dtype, full of NaN, and what it holds as float.
struct Output {
  DType dtype;
  std::vector<float> single;
  std::vector<uint16_t> half;
  Output(DType t, int64_t count)
      : dtype(t),
        single(t == DType::kFloat32 ? count : 0, NAN),
        half(t == DType::kFloat32 ? 0 : count, 0xffff) {}
  void* data() { return dtype == DType::kFloat32 ? static_cast<void*>(single.data()) : half.data(); }
  std::vector<float> values() const {
    std::vector<float> out = single;
    for (uint16_t h : half) {
      const uint32_t u = static_cast<uint32_t>(h) << 16;
      float f;
      std::memcpy(&f, &u, 4);
      if (dtype == DType::kFloat16) {
        const int exponent = h >> 10 & 31, mantissa = h & 1023;
        f = exponent == 31
                ? NAN
                : std::ldexp(exponent ? 1024.0f + mantissa : mantissa, exponent ? exponent - 25 : -24);
        if (h & 0x8000) f = -f;
      }
      out.push_back(f);
    }
    return out;
  }
};

Data make_data(const Case& s) {
  std::mt19937 rng(s.n * 1000003 + s.k * 1009 + s.d);
  std::normal_distribution<float> normal;
  Data x;
  x.hidden.resize(s.n * s.d), x.head.resize(s.k * s.d), x.bias.resize(s.k), x.grad.resize(s.n);
  for (auto* v : {&x.hidden, &x.head, &x.bias, &x.grad})
    for (float& f : *v) f = normal(rng);
  for (float& f : x.head) f *= s.spread;
  for (int i = 0; i < s.n; ++i) {
    const bool ignored = static_cast<float>(rng() % 1000) < 1000 * s.ignored;
    x.targets.push_back(ignored ? kIgnored : static_cast<int64_t>(rng() % s.k));
  }
  return x;
}

Truth truth(const Case& s, const Data& x) {
  Truth t;
  t.loss.assign(s.n, 0), t.lse.assign(s.n, 0);
  t.grad_hidden.assign(s.n * s.d, 0), t.grad_head.assign(s.k * s.d, 0), t.grad_bias.assign(s.k, 0);
  std::vector<double> logits(s.k);
  for (int i = 0; i < s.n; ++i) {
    if (x.targets[i] == kIgnored) continue;
    double top = -INFINITY, sum = 0, dot_q = 0;
    for (int j = 0; j < s.k; ++j) {
      double dot = s.bias ? x.bias[j] : 0.0f, size = std::fabs(dot);
      for (int m = 0; m < s.d; ++m) {
        const double term = double(x.hidden[i * s.d + m]) * x.head[j * s.d + m];
        dot += term, size += std::fabs(term);
      }
      logits[j] = dot;
      top = std::fmax(top, dot);
      t.magnitude = std::fmax(t.magnitude, size);
    }
    for (double l : logits) sum += std::exp(l - top);
    t.lse[i] = top + std::log(sum);
    for (int j = 0; j < s.k; ++j) {
      const double q = (j == x.targets[i] ? 1 - double(s.smoothing) : 0) + double(s.smoothing) / s.k;
      dot_q += q * logits[j];
      const double ds = x.grad[i] * (std::exp(logits[j] - t.lse[i]) - q);
      t.grad_bias[j] += ds;
      for (int m = 0; m < s.d; ++m) {
        t.grad_hidden[i * s.d + m] += ds * x.head[j * s.d + m];
        t.grad_head[j * s.d + m] += ds * x.hidden[i * s.d + m];
      }
    }
    t.loss[i] = t.lse[i] - dot_q;
  }
  return t;
}

template <typename A>
void near(const std::string& name, const std::vector<A>& got, const std::vector<double>& want, double bound) {
  double largest = 1, error = 0;
  for (double w : want) largest = std::fmax(largest, std::fabs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = std::fabs(double(got[i]) - want[i]);
    error = std::isnan(difference) ? INFINITY : std::fmax(error, difference);
  }
  CHECK(error <= bound * largest, "%s: error %.3g, bound %.3g", name.c_str(), error, bound * largest);
}

void check_case(const Kernels& kernels, const Case& s, int thread_count, DType dtype) {
  Data x = make_data(s);
  std::vector<uint16_t> hidden, head;
  const bool half = dtype != DType::kFloat32;
  if (half) hidden = narrow(x.hidden, dtype), head = narrow(x.head, dtype);
  const Truth want = truth(s, x);
  std::ostringstream out;
  out << kernels.name << " n=" << s.n << " k=" << s.k << " d=" << s.d << " smoothing=" << s.smoothing
      << " threads=" << thread_count << " dtype=" << static_cast<int>(dtype) << " ";
  const std::string name = out.str();

  Problem p;
  p.dtype = dtype;
  p.z = half ? static_cast<const void*>(hidden.data()) : x.hidden.data();
  p.codebook = half ? static_cast<const void*>(head.data()) : x.head.data();
  p.bias = s.bias ? x.bias.data() : nullptr;
  p.n = s.n, p.k = s.k, p.d = s.d;
  const Parallel parallel = threads(thread_count);

  std::vector<float> loss(s.n, NAN), grad_bias(s.k, NAN);
  Output hidden_out(dtype, s.n * s.d), head_out(dtype, s.k * s.d);
  std::vector<double> lse(s.n, NAN);
  CrossEntropyForward f;
  f.targets = x.targets.data(), f.ignore_index = kIgnored, f.label_smoothing = s.smoothing;
  f.loss = loss.data(), f.lse = lse.data();
  CHECK(kernels.cross_entropy_forward(p, f, parallel), "%s", name.c_str());
  CrossEntropyBackward b;
  b.targets = x.targets.data(), b.ignore_index = kIgnored, b.label_smoothing = s.smoothing;
  b.grad_loss = x.grad.data(), b.lse = lse.data();
  b.grad_hidden = hidden_out.data(), b.grad_head = head_out.data(), b.grad_bias = grad_bias.data();
  CHECK(kernels.cross_entropy_backward(p, b, parallel), "%s", name.c_str());
  const std::vector<float> grad_hidden = hidden_out.values(), grad_head = head_out.values();

  // A logit is off by about eps sqrt(d) of its terms; the exponential makes that a relative error of P.
  const double bound = 4 * 1.2e-7 * (1 + want.magnitude / std::sqrt(double(s.d)));
  near(name + "loss", loss, want.loss, bound);
  near(name + "lse", lse, want.lse, bound);
  // Pairs round dS to 2^-9 of itself and outputs are rounded once; rows may cancel to less than their terms.
  const double rounded = bound + (half ? std::ldexp(1.0, -7) : 0.0);
  near(name + "grad_hidden", grad_hidden, want.grad_hidden, rounded);
  near(name + "grad_head", grad_head, want.grad_head, rounded);
  near(name + "grad_bias", grad_bias, want.grad_bias, bound);
  for (int i = 0; i < s.n; ++i)
    if (x.targets[i] == kIgnored)
      CHECK(loss[i] == 0 && grad_hidden[i * s.d] == 0, "%s row %d is ignored", name.c_str(), i);

  Output again_hidden(dtype, s.n * s.d), again_head(dtype, s.k * s.d);
  b.grad_hidden = again_hidden.data(), b.grad_head = again_head.data(), b.grad_bias = nullptr;
  kernels.cross_entropy_backward(p, b, parallel);
  CHECK(again_hidden.values() == grad_hidden && again_head.values() == grad_head, "%s is not repeatable",
        name.c_str());
  p.dropped_mass = 0;
  kernels.cross_entropy_backward(p, b, parallel);
  near(name + "grad_head without skipping", again_head.values(), want.grad_head, rounded);
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, false, 0.0f, 1.0f, 0.0f},       {0, 5, 3, true, 0.1f, 1.0f, 0.0f},
      {9, 40, 7, true, 0.0f, 1.0f, 1.0f},       {97, 1025, 59, true, 0.1f, 0.3f, 0.3f},
      {405, 450, 32, false, 0.0f, 1.0f, 0.0f},  {2100, 90, 8, true, 0.2f, 1.0f, 0.4f},
      {20, 400, 1030, false, 0.0f, 0.1f, 0.2f}, {200, 3000, 16, false, 0.0f, 20.0f, 0.1f},
      {25, 390, 33, true, 0.0f, 300.0f, 0.0f},
  };
  std::istringstream names(available_isas());
  for (std::string name; std::getline(names, name, ',');) {
    const Kernels* k = kernels_named(name.c_str());
    CHECK(k != nullptr, "kernels_named(%s)", name.c_str());
    for (const Case& c : cases)
      for (int t : {1, 3}) check_case(*k, c, t, DType::kFloat32);
    for (const Case& c : cases) check_case(*k, c, 2, DType::kBFloat16);
    check_case(*k, cases[3], 2, DType::kFloat16);
  }
  return ibq::test::finish("cross_entropy");
}
