// Both softmaxes over a codebook, forward and backward, in double from the stored operands; with each result
// the sum of its terms' absolute values, which is what rounding errors are measured against.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simt_queue.h"

namespace ibq::test {

using Doubles = std::vector<double>;

struct SoftmaxProblem {
  Matrix z, codebook, grad_z_q, grad_codes;
  std::vector<float> bias, grad_row_entropy, grad_mean_prob;
  double scale = 1.0, norm_weight = 0.0, tau = 1.0;

  SoftmaxProblem(Element element, int64_t N, int64_t K, int64_t D, int offset, bool with_bias)
      : z(element, N, D, offset),
        codebook(element, K, D),
        grad_z_q(element, N, D),
        grad_codes(element, N, D),
        bias(with_bias ? static_cast<size_t>(K) : 0),
        grad_row_entropy(static_cast<size_t>(N)),
        grad_mean_prob(static_cast<size_t>(K)) {}

  int64_t N() const { return z.rows; }
  int64_t K() const { return codebook.rows; }
  int64_t D() const { return z.columns; }
};

// A value, the sum of the absolute values of its terms, and what may be left out of it as negligible.
struct Sum {
  double value = 0.0, gross = 0.0, dropped = 0.0;
  void add(double term, double magnitude, double negligible = 0.0) {
    value += term, gross += magnitude, dropped += negligible;
  }
  void add(double term) { add(term, std::fabs(term)); }
};

struct SoftmaxTruth {
  int64_t N, K, D;
  std::vector<int64_t> indices;
  Doubles logit_error;  // [N]: bound on the error of a logit of the row, for unit roundings of S
  Doubles max, lse, lse_tau, entropy, mean_prob, top;
  std::vector<Sum> readout;                           // [N, D]
  std::vector<Sum> grad_z, grad_codebook, grad_bias;  // [N, D], [K, D], [K]

  SoftmaxTruth(const SoftmaxProblem& p, bool select, bool with_entropy, bool hard)
      : N(p.N()), K(p.K()), D(p.D()) {
    const auto at = [&](int64_t i, int64_t d) { return static_cast<size_t>(i * D + d); };
    indices.resize(size_t(N)), logit_error.resize(size_t(N));
    max.resize(size_t(N)), lse.resize(size_t(N)), lse_tau.resize(size_t(N)), entropy.resize(size_t(N));
    top.resize(size_t(N)), mean_prob.assign(size_t(K), 0.0);
    readout.resize(size_t(N * D)), grad_z.resize(size_t(N * D));
    grad_codebook.resize(size_t(K * D)), grad_bias.resize(size_t(K));
    Doubles centered(static_cast<size_t>(K));
    double mean = 0.0;
    for (float c : p.grad_mean_prob) mean += c / static_cast<double>(K);
    for (int64_t j = 0; j < K; ++j) centered[size_t(j)] = p.grad_mean_prob[size_t(j)] - mean;

    for (int64_t i = 0; i < N; ++i) {
      Doubles s(static_cast<size_t>(K));
      double error = 0.0;
      for (int64_t j = 0; j < K; ++j) {
        double dot = 0.0, gross = 0.0, square = 0.0;
        for (int64_t d = 0; d < D; ++d) {
          const double z = p.z.get(i, d), e = p.codebook.get(j, d);
          dot += z * e, gross += std::fabs(z * e), square += e * e;
        }
        const double bias = (p.bias.empty() ? 0.0 : p.bias[size_t(j)]) - p.norm_weight * square;
        s[size_t(j)] = p.scale * dot + bias;
        error = std::max(
            error, gross * std::fabs(p.scale) * (std::ldexp(1.0, -20) + D / 8.0 * std::ldexp(1.0, -24)) +
                       std::fabs(bias) * std::ldexp(1.0, -22));
      }
      const size_t r = static_cast<size_t>(i);
      logit_error[r] = error;
      indices[r] = std::max_element(s.begin(), s.end()) - s.begin();
      max[r] = s[size_t(indices[r])];
      const Doubles P = softmax(s, 1.0, &lse[r]), q = softmax(s, p.tau, &lse_tau[r]);
      top[r] = P[size_t(indices[r])];
      Doubles ds(static_cast<size_t>(K), 0.0), gross(ds), dropped(ds);
      if (select) add_select(p, i, P, ds, gross, dropped, at);
      for (int64_t j = 0; j < K; ++j) mean_prob[size_t(j)] += q[size_t(j)] / static_cast<double>(N);
      entropy[r] = 0.0;
      for (double x : q) entropy[r] -= x > 0.0 ? x * std::log(x) : 0.0;
      if (with_entropy) add_entropy(p, i, q, centered, ds, gross, dropped);
      for (int64_t j = 0; j < K; ++j) {
        grad_bias[size_t(j)].add(ds[size_t(j)], gross[size_t(j)], dropped[size_t(j)]);
        for (int64_t d = 0; d < D; ++d) {
          const double e = p.codebook.get(j, d), z = p.z.get(i, d);
          grad_z[at(i, d)].add(p.scale * ds[size_t(j)] * e, std::fabs(p.scale * e) * gross[size_t(j)],
                               std::fabs(p.scale * e) * dropped[size_t(j)]);
          const double factor = std::fabs(p.scale * z) + 2.0 * std::fabs(p.norm_weight * e);
          grad_codebook[at(j, d)].add(p.scale * ds[size_t(j)] * z - 2.0 * p.norm_weight * ds[size_t(j)] * e,
                                      factor * gross[size_t(j)], factor * dropped[size_t(j)]);
        }
      }
      for (int64_t d = 0; hard && d < D; ++d) {
        grad_codebook[at(indices[r], d)].add(p.grad_z_q.get(i, d));
        grad_codebook[at(indices[r], d)].add(p.grad_codes.get(i, d));
      }
    }
  }

  static Doubles softmax(const Doubles& s, double tau, double* lse) {
    const double top = *std::max_element(s.begin(), s.end()) / tau;
    double sum = 0.0;
    Doubles p(s.size());
    for (size_t j = 0; j < s.size(); ++j) sum += p[j] = std::exp(s[j] / tau - top);
    for (double& x : p) x /= sum;
    *lse = top + std::log(sum);
    return p;
  }

 private:
  // The kernels form a winner's dS as minus the sum of the row's others, so that is what its error goes by.
  static void collect(const Doubles& P, Doubles& own, Doubles& all) {
    const size_t winner = static_cast<size_t>(std::max_element(P.begin(), P.end()) - P.begin());
    if (P[winner] > 0.75) {
      own[winner] = 0.0;
      double others = 0.0;
      for (double x : own) others += x;
      own[winner] = others;
    }
    for (size_t j = 0; j < own.size(); ++j) all[j] += own[j];
  }

  template <typename At>
  void add_select(const SoftmaxProblem& p, int64_t i, const Doubles& P, Doubles& ds, Doubles& gross,
                  Doubles& dropped, const At& at) {
    Doubles own(ds.size()), lost(own);
    double delta = 0.0, delta_gross = 0.0;
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t j = 0; j < K; ++j) readout[at(i, d)].add(P[size_t(j)] * p.codebook.get(j, d));
      delta += p.grad_z_q.get(i, d) * readout[at(i, d)].value;
      delta_gross += std::fabs(p.grad_z_q.get(i, d)) * readout[at(i, d)].gross;
    }
    for (int64_t j = 0; j < K; ++j) {
      double product = 0.0, product_gross = 0.0;
      for (int64_t d = 0; d < D; ++d) {
        const double term = static_cast<double>(p.grad_z_q.get(i, d)) * p.codebook.get(j, d);
        product += term, product_gross += std::fabs(term);
      }
      ds[size_t(j)] += P[size_t(j)] * (product - delta);
      own[size_t(j)] = P[size_t(j)] * (product_gross + delta_gross);
      lost[size_t(j)] = kNegligibleMass / static_cast<double>(K) * (product_gross + delta_gross);
    }
    collect(P, own, gross);
    collect(P, lost, dropped);
  }

  void add_entropy(const SoftmaxProblem& p, int64_t i, const Doubles& q, const Doubles& c, Doubles& ds,
                   Doubles& gross, Doubles& dropped) {
    Doubles own(ds.size()), lost(own);
    const double a = p.grad_row_entropy[size_t(i)], H = entropy[size_t(i)];
    double dot = 0.0, dot_gross = 0.0;
    for (size_t j = 0; j < q.size(); ++j) dot += q[j] * c[j], dot_gross += std::fabs(q[j] * c[j]);
    for (size_t j = 0; j < q.size(); ++j) {
      const double log_q = q[j] > 0.0 ? std::log(q[j]) : 0.0;
      ds[j] += q[j] / p.tau * (-a * (log_q + H) + (c[j] - dot) / static_cast<double>(N));
      const double share = (std::fabs(c[j]) + dot_gross) / static_cast<double>(N);
      own[j] = q[j] / p.tau * (std::fabs(a) * (std::fabs(log_q) + H + 1.0) + share);
      lost[j] = kNegligibleMass / static_cast<double>(K) / p.tau * (std::fabs(a) * (40.0 + H) + share);
    }
    collect(q, own, gross);
    collect(q, lost, dropped);
  }
};

}  // namespace ibq::test
