// Whole forward and backward sequences with the Hopper sweeps and products in place of the portable ones,
// against the truth in double, and against the portable kernels: behind the same search logits, weights and
// decisions are the same bit for bit, so results may differ by the order of float32 sums alone. With the
// Hopper search as well, against the truth.
#include "softmax_reference.h"

#include <random>

#include "../cuda/softmax_backward.h"
#include "check.h"
#include "hopper_queue.h"

namespace ibq::cuda::hopper {
namespace {

using emulator::Delivery;
using test::Doubles;
using test::EmulatedQueue;
using test::HopperQueue;
using test::Matrix;
using test::PoisonedWorkspace;
using test::SoftmaxProblem;
using test::SoftmaxTruth;
using test::Sum;

struct Case {
  const char* name;
  int64_t N, K, D;
  bool select, entropy, with_bias;
  double tau, spread;
  int multiprocessors;
  int64_t shared;
  int64_t weights_bytes;
  bool deterministic;
  Delivery delivery;
};

LaunchLimits limits_of(const Case& c) {
  return {{c.multiprocessors, c.shared + kReservedSharedBytes, c.shared}, c.weights_bytes, 256, 1};
}

struct Results {
  std::vector<int64_t> indices;
  std::vector<float> max, readout, row_entropy, mean_prob, tile_bound, grad_z, grad_codebook, grad_bias;
  std::vector<double> lse, lse_tau;
};

ibq_problem problem_of(const SoftmaxProblem& p) {
  return {p.z.data,       p.codebook.data, p.bias.empty() ? nullptr : p.bias.data(),
          p.N(),          p.K(),           p.D(),
          IBQ_BF16,       float(p.scale),  0.0f,
          kNegligibleMass};
}

template <typename Queue>
Results run(const Case& c, const SoftmaxProblem& p, Queue&& queue) {
  const LaunchLimits limits = limits_of(c);
  const auto n = static_cast<size_t>(p.N()), k = static_cast<size_t>(p.K()), d = static_cast<size_t>(p.D());
  int64_t tiles, blocks;
  bound_grid(p.N(), p.K(), limits, &tiles, &blocks);
  const float junk = quiet_nan();
  Results r;
  r.indices.assign(n, -1);
  for (auto* v : {&r.max, &r.row_entropy}) v->assign(n, junk);
  for (auto* v : {&r.lse, &r.lse_tau}) v->assign(n, junk);
  for (auto* v : {&r.readout, &r.grad_z}) v->assign(n * d, junk);
  r.mean_prob.assign(k, junk);
  r.grad_codebook.assign(k * d, junk);
  r.grad_bias.assign(p.bias.size(), junk);
  r.tile_bound.assign(static_cast<size_t>(2 * tiles * blocks), 1.0f);
  const ibq_problem problem = problem_of(p);
  ibq_softmax_forward out{};
  out.indices = r.indices.data();
  out.max = r.max.data();
  ibq_softmax_backward back{};
  if (c.select) {
    out.lse = r.lse.data();
    out.readout = r.readout.data();
    back.grad_z_q = p.grad_z_q.data;
    back.lse = r.lse.data();
    back.readout = r.readout.data();
  }
  out.temperature = back.temperature = static_cast<float>(p.tau);
  if (c.entropy) {
    out.lse_tau = r.lse_tau.data();
    out.row_entropy = r.row_entropy.data();
    out.mean_prob = r.mean_prob.data();
    back.lse_tau = r.lse_tau.data();
    back.row_entropy = r.row_entropy.data();
    back.grad_row_entropy = p.grad_row_entropy.data();
    back.grad_mean_prob = p.grad_mean_prob.data();
  }
  out.tile_bound = r.tile_bound.data();
  PoisonedWorkspace forward(ForwardWorkspace(Operands(problem), out, limits, nullptr).bytes);
  softmax_forward(queue, problem, out, c.deterministic, limits, forward.at());
  back.tile_bound = r.tile_bound.data();
  back.grad_z = r.grad_z.data();
  back.grad_codebook = r.grad_codebook.data();
  back.grad_bias = p.bias.empty() ? nullptr : r.grad_bias.data();
  PoisonedWorkspace backward(BackwardWorkspace(Operands(problem), back, limits, nullptr).bytes);
  softmax_backward(queue, problem, back, c.deterministic, limits, backward.at());
  return r;
}

void check_sums(const char* name, const char* what, const std::vector<float>& got,
                const std::vector<float>* portable, const std::vector<Sum>& truth, double relative) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double bound = truth[i].gross * relative + 2 * truth[i].dropped + 1e-30;
    CHECK(std::fabs(got[i] - truth[i].value) <= bound, "%s: %s[%zu] is %.9g, not %.9g, bound %.3g", name,
          what, i, got[i], truth[i].value, bound);
    if (portable == nullptr) continue;
    const double order = truth[i].gross * 1e-6 + 2 * truth[i].dropped + 1e-30;
    CHECK(std::fabs(static_cast<double>(got[i]) - (*portable)[i]) <= order,
          "%s: %s[%zu] is %.9g, portable %.9g", name, what, i, got[i], (*portable)[i]);
  }
}

void check_case(const Case& c, bool searches) {
  std::mt19937 random(21);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  SoftmaxProblem p(Element::bf16, c.N, c.K, c.D, 0, c.with_bias);
  for (Matrix* m : {&p.z, &p.codebook, &p.grad_z_q, &p.grad_codes})
    for (int64_t i = 0; i < m->rows; ++i)
      for (int64_t d = 0; d < m->columns; ++d)
        m->set(i, d, normal(random) * (m == &p.z ? static_cast<float>(c.spread) : 1.0f));
  // A row that one code has nearly whole, and one that it has whole: a winner each.
  for (int64_t d = 0; d < c.D; ++d) {
    p.z.set(0, d, 12.0f / static_cast<float>(c.D) * p.codebook.get(c.K / 2, d));
    if (c.N > 1) p.z.set(1, d, p.codebook.get(c.K - 1, d));
  }
  for (auto* v : {&p.bias, &p.grad_row_entropy, &p.grad_mean_prob})
    for (float& x : *v) x = normal(random);
  p.scale = 0.75;
  p.tau = c.tau;
  const SoftmaxTruth truth(p, c.select, c.entropy, false);
  HopperQueue queue(c.name, c.multiprocessors, c.shared, c.delivery);
  queue.searches = searches;
  const Results got = run(c, p, queue);
  CHECK(queue.taken > 0, "%s: nothing was taken", c.name);
  Results portable;
  if (!searches) portable = run(c, p, EmulatedQueue(cuda::emulator::kWarpByWarp));
  const auto same = [&](std::vector<float> Results::* sums) {
    return searches ? nullptr : &(portable.*sums);
  };
  double worst = 0.0;
  for (double e : truth.logit_error) worst = std::max(worst, e);
  const double rounding = std::ldexp(1.0, -8);
  const double exact = 16 * worst / std::min(c.entropy ? c.tau : 1.0, 1.0) + 1e-5;
  CHECK(searches || got.tile_bound == portable.tile_bound, "%s: tile bounds", c.name);
  CHECK(searches || got.indices == portable.indices, "%s: indices", c.name);
  if (c.select)
    check_sums(c.name, "readout", got.readout, same(&Results::readout), truth.readout,
               rounding + 4 * worst + 4e-6);
  for (size_t j = 0; c.entropy && j < got.mean_prob.size(); ++j)
    CHECK(std::fabs(got.mean_prob[j] - truth.mean_prob[j]) <=
              (4 * worst / c.tau + 4e-6) * truth.mean_prob[j] + 1e-12,
          "%s: mean_prob[%zu] is %g, not %g", c.name, j, got.mean_prob[j], truth.mean_prob[j]);
  check_sums(c.name, "grad_z", got.grad_z, same(&Results::grad_z), truth.grad_z, 2 * rounding + exact);
  check_sums(c.name, "grad_codebook", got.grad_codebook, same(&Results::grad_codebook), truth.grad_codebook,
             2 * rounding + exact);
  check_sums(c.name, "grad_bias", got.grad_bias, same(&Results::grad_bias), truth.grad_bias,
             rounding + exact);
}

int run_all() {
  constexpr int64_t kBig = 227 * 1024;
  for (const Case& c : {
           Case{"one of all", 1, 1, 64, true, true, true, 1.0, 1.0, 1, kBig, 1 << 20, true,
                Delivery::at_once},
           {"both, D 256", 130, 200, 256, true, true, true, 0.5, 0.2, 2, kBig, 1 << 20, true,
            Delivery::when_all_wait},
           {"both, rectangles", 300, 500, 64, true, true, true, 1.0, 0.3, 3, kBig, 256 * 256 * 2, true,
            Delivery::at_once},
           {"select, splits", 70, 400, 128, true, false, true, 1.0, 0.3, 4, kBig, 1 << 20, true,
            Delivery::when_all_wait},
           {"entropy, splits", 140, 650, 64, false, true, true, 0.1, 0.3, 5, kBig, 1 << 20, true,
            Delivery::when_all_wait},
           {"both, peaked, atomics", 200, 400, 192, true, true, false, 0.2, 1.0, 4, kBig, 1 << 20, false,
            Delivery::at_once},
       }) {
    check_case(c, false);
    if (c.select != c.entropy || c.N == 1) check_case(c, true);
  }
  return test::finish("test_hopper_softmax");
}

}  // namespace
}  // namespace ibq::cuda::hopper

int main() { return ibq::cuda::hopper::run_all(); }
