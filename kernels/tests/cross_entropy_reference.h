// What the tests of the cross entropy's sequences share: a random problem, its run on any queue, and the
// check against a reference in double.
#pragma once

#include <random>
#include <string>

#include "../cuda/cross_entropy.h"
#include "check.h"
#include "simt_queue.h"

namespace ibq::test {

using namespace ibq::cuda;

using Doubles = std::vector<double>;
constexpr int64_t kIgnored = -100;

struct CrossEntropyCase {
  const char* name;
  Element element;
  int64_t N, K, C;
  double smoothing;
  bool with_bias;
  float spread;
  int multiprocessors;
  int64_t shared, weights_bytes;
  bool deterministic;
};

struct CrossEntropyProblem {
  Matrix hidden, head;
  std::vector<float> bias, grad_loss;
  std::vector<int64_t> targets;

  template <typename Random>
  CrossEntropyProblem(const CrossEntropyCase& c, Random& random)
      : hidden(c.element, c.N, c.C),
        head(c.element, c.K, c.C),
        bias(c.with_bias ? size_t(c.K) : 0),
        grad_loss(size_t(c.N)),
        targets(size_t(c.N)) {
    std::normal_distribution<float> normal(0.0f, 1.0f);
    for (Matrix* m : {&hidden, &head})
      for (int64_t i = 0; i < m->rows; ++i)
        for (int64_t d = 0; d < m->columns; ++d)
          m->set(i, d, normal(random) * (m == &hidden ? c.spread : 1.0f));
    for (float& b : bias) b = normal(random);
    for (float& g : grad_loss) g = normal(random);
    for (size_t i = 0; i < targets.size(); ++i)
      targets[i] = i % 5 == 4 ? kIgnored : static_cast<int64_t>(random() % static_cast<uint64_t>(c.K));
    if (targets.size() > 6) grad_loss[6] = 0.0f;
  }
};

struct CrossEntropyResult {
  std::vector<float> loss, grad_hidden, grad_head, grad_bias;
  Doubles lse;
};

template <typename Queue>
CrossEntropyResult run(const CrossEntropyCase& c, CrossEntropyProblem& p, Queue& queue) {
  const LaunchLimits limits{
      {c.multiprocessors, c.shared + kReservedSharedBytes, c.shared}, c.weights_bytes, 256, 1};
  const ibq_dtype dtypes[] = {IBQ_F32, IBQ_BF16, IBQ_F16};
  const ibq_problem problem{p.hidden.data,
                            p.head.data,
                            p.bias.empty() ? nullptr : p.bias.data(),
                            c.N,
                            c.K,
                            c.C,
                            dtypes[static_cast<int>(c.element)],
                            1.0f,
                            0.0f,
                            kNegligibleMass};
  const float junk = quiet_nan();
  CrossEntropyResult r{std::vector<float>(size_t(c.N), junk), std::vector<float>(size_t(c.N * c.C), junk),
                       std::vector<float>(size_t(c.K * c.C), junk), std::vector<float>(p.bias.size(), junk),
                       Doubles(size_t(c.N), junk)};
  ibq_cross_entropy args{};
  args.targets = p.targets.data();
  args.ignore_index = kIgnored;
  args.label_smoothing = c.smoothing;
  args.loss = r.loss.data();
  args.lse = r.lse.data();
  args.grad_loss = p.grad_loss.data();
  args.grad_hidden = r.grad_hidden.data();
  args.grad_head = r.grad_head.data();
  args.grad_bias = p.bias.empty() ? nullptr : r.grad_bias.data();
  const Operands in(problem);
  PoisonedWorkspace forward(CrossEntropyForwardWorkspace(in, args, limits, nullptr).bytes);
  cross_entropy_forward(queue, problem, args, limits, forward.at());
  PoisonedWorkspace backward(CrossEntropyBackwardWorkspace(in, args, limits, nullptr).bytes);
  cross_entropy_backward(queue, problem, args, c.deterministic, limits, backward.at());
  return r;
}

inline void check_near(const char* name, const char* what, size_t at, double got, double expected,
                       double bound) {
  CHECK(std::fabs(got - expected) <= bound, "%s: %s[%zu] is %.9g, expected %.9g, bound %.3g", name, what, at,
        got, expected, bound);
}

template <typename Queue>
void check_case(const CrossEntropyCase& c, CrossEntropyProblem& p, Queue& queue) {
  const CrossEntropyResult got = run(c, p, queue);
  const auto at = [&](int64_t i, int64_t d) { return size_t(i * c.C + d); };
  const double share = c.smoothing / static_cast<double>(c.K);
  Doubles hidden(size_t(c.N * c.C)), head(size_t(c.K * c.C)), bias(size_t(c.K));
  Doubles hidden_gross(hidden), head_gross(head), bias_gross(bias);
  Doubles hidden_floor(hidden), head_floor(head), bias_floor(bias);
  double worst = 0.0;
  for (int64_t i = 0; i < c.N; ++i) {
    const int64_t target = p.targets[size_t(i)];
    if (target == kIgnored) {
      CHECK(got.loss[size_t(i)] == 0.0f && got.lse[size_t(i)] == 0.0, "%s: ignored row %ld", c.name, long(i));
      continue;
    }
    Doubles s(static_cast<size_t>(c.K)), P(s);
    double error = 0.0, mean = 0.0;
    for (int64_t j = 0; j < c.K; ++j) {
      double dot = p.bias.empty() ? 0.0 : p.bias[size_t(j)], gross = std::fabs(dot);
      for (int64_t d = 0; d < c.C; ++d) {
        const double term = static_cast<double>(p.hidden.get(i, d)) * p.head.get(j, d);
        dot += term, gross += std::fabs(term);
      }
      s[size_t(j)] = dot;
      mean += dot / static_cast<double>(c.K);
      error = std::max(error, gross * (std::ldexp(1.0, -20) + c.C / 8.0 * std::ldexp(1.0, -24)));
    }
    worst = std::max(worst, error);
    const double top = *std::max_element(s.begin(), s.end());
    double sum = 0.0;
    for (size_t j = 0; j < s.size(); ++j) sum += P[j] = std::exp(s[j] - top);
    const double lse = top + std::log(sum);
    double others = 0.0;
    for (size_t j = 0; j < P.size(); ++j) {
      P[j] /= sum;
      if (static_cast<int64_t>(j) != target) others += P[j];
    }
    const double loss = (1 - c.smoothing) * (lse - s[size_t(target)]) + c.smoothing * (lse - mean);
    check_near(c.name, "lse", size_t(i), got.lse[size_t(i)], lse, error + 1e-6);
    // The sum of a row's exponentials is float32: that is the floor of a small loss, and of P - 1 below.
    constexpr double kSumError = 3e-7;
    check_near(c.name, "loss", size_t(i), got.loss[size_t(i)], loss,
               4 * error * (c.smoothing > 0 ? 1.0 : std::min(1.0, loss)) + kSumError + 1e-6 * loss);
    const double g = p.grad_loss[size_t(i)];
    for (int64_t j = 0; j < c.K; ++j) {
      const bool own = j == target;
      const double ds = g * (own ? -others + c.smoothing - share : P[size_t(j)] - share);
      const double gross = std::fabs(g) * (own ? others + c.smoothing : P[size_t(j)] + share);
      const double floor = std::fabs(g) * kSumError * (own ? 1.0 : P[size_t(j)]);
      bias[size_t(j)] += ds, bias_gross[size_t(j)] += gross, bias_floor[size_t(j)] += floor;
      for (int64_t d = 0; d < c.C; ++d) {
        hidden[at(i, d)] += ds * p.head.get(j, d),
            hidden_gross[at(i, d)] += gross * std::fabs(p.head.get(j, d));
        hidden_floor[at(i, d)] += floor * std::fabs(p.head.get(j, d));
        head[at(j, d)] += ds * p.hidden.get(i, d),
            head_gross[at(j, d)] += gross * std::fabs(p.hidden.get(i, d));
        head_floor[at(j, d)] += floor * std::fabs(p.hidden.get(i, d));
      }
    }
  }
  const double rounding = c.element == Element::bf16  ? std::ldexp(1.0, -8)
                          : c.element == Element::f16 ? std::ldexp(1.0, -10)
                                                      : 0.0;
  const double exact = 8 * worst + 4e-6;
  // 1e-10: entries of P below 2^-32 / K, left out, times operands of some units.
  for (size_t k = 0; k < hidden.size(); ++k)
    check_near(c.name, "grad_hidden", k, got.grad_hidden[k], hidden[k],
               hidden_gross[k] * (rounding + exact) + hidden_floor[k] + 1e-10);
  for (size_t k = 0; k < head.size(); ++k)
    check_near(c.name, "grad_head", k, got.grad_head[k], head[k],
               head_gross[k] * (rounding + exact) + head_floor[k] + 1e-10);
  for (size_t k = 0; k < got.grad_bias.size(); ++k)
    check_near(c.name, "grad_bias", k, got.grad_bias[k], bias[k],
               bias_gross[k] * exact + bias_floor[k] + 1e-10);
}

}  // namespace ibq::test
