// ibq_cuda_softmax_forward and _backward as they are launched, run by the emulator and compared with a
// reference in double: ragged sizes, every element type, rectangles, splits, winners, skipping, NaN.
#include "softmax_reference.h"

#include <random>

#include "../cuda/softmax_backward.h"
#include "check.h"

namespace {

using namespace ibq;
using namespace ibq::cuda;
using ibq::test::EmulatedQueue;
using ibq::test::Matrix;
using ibq::test::PoisonedWorkspace;
using ibq::test::SoftmaxProblem;
using ibq::test::SoftmaxTruth;
using ibq::test::Sum;

struct Case {
  const char* name;
  Element element;
  int64_t N, K, D;
  int offset;  // of z, in elements
  bool select, entropy, with_bias;
  double norm_weight, tau, spread;
  int multiprocessors;
  int64_t shared;         // a block's
  int64_t weights_bytes;  // of a rectangle
  uint32_t turns;
  bool deterministic;
};

constexpr int64_t kBig = 227 * 1024, kMiddle = 163 * 1024, kSmall = 99 * 1024;
constexpr uint32_t kWarps = emulator::kWarpByWarp;

const Case kCases[] = {
    {"bf16 one of all", Element::bf16, 1, 1, 1, 0, true, true, true, 0.0, 1.0, 1.0, 1, kBig, 1 << 20, 1,
     true},
    {"bf16 both, D 256", Element::bf16, 130, 200, 256, 0, true, true, true, 0.5, 0.5, 0.2, 2, kBig, 1 << 20,
     kWarps, true},
    {"bf16 both, streamed", Element::bf16, 40, 300, 256, 0, true, true, false, 0.0, 0.1, 0.1, 4, kSmall,
     1 << 20, kWarps, true},
    {"bf16 rectangles", Element::bf16, 300, 400, 33, 0, true, true, true, 0.3, 1.0, 0.5, 3, kMiddle,
     128 * 256 * 2, 5, true},
    {"bf16 atomics", Element::bf16, 200, 300, 40, 0, true, true, true, 0.0, 1.0, 0.5, 4, kBig, 1 << 20, 1,
     false},
    {"bf16 select", Element::bf16, 70, 150, 64, 1, true, false, true, 0.0, 1.0, 1.0, 2, kBig, 1 << 20, kWarps,
     true},
    {"bf16 entropy", Element::bf16, 70, 150, 8, 0, false, true, false, 0.0, 0.01, 1.0, 2, kBig, 1 << 20, 9,
     true},
    {"f16 both", Element::f16, 140, 130, 64, 0, true, true, true, 0.0, 0.5, 0.5, 2, kMiddle, 128 * 128 * 4,
     kWarps, true},
    {"f16 odd D", Element::f16, 33, 140, 33, 0, true, false, false, 1.0, 1.0, 1.0, 3, kSmall, 1 << 20, 3,
     true},
    {"f32 both", Element::f32, 140, 270, 64, 0, true, true, true, 0.5, 0.5, 0.5, 2, kBig, 128 * 256 * 4,
     kWarps, true},
    {"f32 D 256", Element::f32, 20, 130, 256, 0, true, true, false, 0.0, 1.0, 0.3, 2, kBig, 1 << 20, kWarps,
     true},
    {"f32 odd D", Element::f32, 33, 97, 59, 1, true, true, true, 0.0, 0.3, 0.5, 2, kSmall, 1 << 20, 7, false},
    {"f32 one dimension", Element::f32, 3, 129, 1, 0, true, true, false, 0.2, 0.5, 1.0, 1, kBig, 1 << 20, 1,
     true},
};

LaunchLimits limits_of(const Case& c) {
  return {{c.multiprocessors, c.shared + kReservedSharedBytes, c.shared}, c.weights_bytes, 256, 1};
}

template <typename Random>
void fill(SoftmaxProblem& p, const Case& c, Random& random) {
  std::normal_distribution<float> normal(0.0f, 1.0f);
  for (Matrix* m : {&p.z, &p.codebook, &p.grad_z_q, &p.grad_codes})
    for (int64_t i = 0; i < m->rows; ++i)
      for (int64_t d = 0; d < m->columns; ++d)
        m->set(i, d, normal(random) * (m == &p.z ? static_cast<float>(c.spread) : 1.0f));
  for (auto* v : {&p.bias, &p.grad_row_entropy, &p.grad_mean_prob})
    for (float& x : *v) x = normal(random);
  for (float& x : p.grad_mean_prob) x += 100.0f;  // a constant that must cancel
  p.scale = 0.75;
  p.norm_weight = c.norm_weight;
  p.tau = c.tau;
}

ibq_problem problem_of(const SoftmaxProblem& p, float dropped_mass) {
  const ibq_dtype dtypes[] = {IBQ_F32, IBQ_BF16, IBQ_F16};
  return {p.z.data,
          p.codebook.data,
          p.bias.empty() ? nullptr : p.bias.data(),
          p.N(),
          p.K(),
          p.D(),
          dtypes[static_cast<int>(p.z.element)],
          static_cast<float>(p.scale),
          static_cast<float>(p.norm_weight),
          dropped_mass};
}

struct Forward {
  std::vector<int64_t> indices;
  std::vector<float> max, readout, row_entropy, mean_prob, tile_bound;
  std::vector<double> lse, lse_tau;
};

struct Backward {
  std::vector<float> grad_z, grad_codebook, grad_bias;
};

Forward run_forward(const Case& c, const SoftmaxProblem& p, float dropped_mass) {
  const LaunchLimits limits = limits_of(c);
  const auto n = static_cast<size_t>(p.N()), k = static_cast<size_t>(p.K()), d = static_cast<size_t>(p.D());
  int64_t tiles, blocks;
  bound_grid(p.N(), p.K(), limits, &tiles, &blocks);
  const float junk = quiet_nan();
  Forward f{
      std::vector<int64_t>(n, -1),     std::vector<float>(n, junk),
      std::vector<float>(n * d, junk), std::vector<float>(n, junk),
      std::vector<float>(k, junk),     std::vector<float>(static_cast<size_t>(2 * tiles * blocks), 1.0f),
      std::vector<double>(n, junk),    std::vector<double>(n, junk)};
  ibq_softmax_forward out{};
  out.indices = f.indices.data();
  out.max = f.max.data();
  if (c.select) out.lse = f.lse.data(), out.readout = f.readout.data();
  if (c.entropy)
    out.lse_tau = f.lse_tau.data(), out.row_entropy = f.row_entropy.data(),
    out.mean_prob = f.mean_prob.data();
  out.temperature = static_cast<float>(p.tau);
  out.tile_bound = f.tile_bound.data();
  const ibq_problem problem = problem_of(p, dropped_mass);
  const ForwardWorkspace sizes(Operands(problem), out, limits, nullptr);
  PoisonedWorkspace workspace(sizes.bytes);
  EmulatedQueue queue(c.turns);
  softmax_forward(queue, problem, out, c.deterministic, limits, workspace.at());
  CHECK(!queue.refused, "%s: forward refused", c.name);
  return f;
}

Backward run_backward(const Case& c, const SoftmaxProblem& p, const Forward& f, float dropped_mass) {
  const LaunchLimits limits = limits_of(c);
  const float junk = quiet_nan();
  Backward b{std::vector<float>(static_cast<size_t>(p.N() * p.D()), junk),
             std::vector<float>(static_cast<size_t>(p.K() * p.D()), junk),
             std::vector<float>(p.bias.size(), junk)};
  ibq_softmax_backward args{};
  if (c.select) {
    args.grad_z_q = p.grad_z_q.data;
    args.grad_codes = p.grad_codes.data;
    args.indices = f.indices.data();
    args.lse = f.lse.data();
    args.readout = f.readout.data();
  }
  args.temperature = static_cast<float>(p.tau);
  if (c.entropy) {
    args.lse_tau = f.lse_tau.data();
    args.row_entropy = f.row_entropy.data();
    args.grad_row_entropy = p.grad_row_entropy.data();
    args.grad_mean_prob = p.grad_mean_prob.data();
  }
  args.tile_bound = f.tile_bound.data();
  args.grad_z = b.grad_z.data();
  args.grad_codebook = b.grad_codebook.data();
  args.grad_bias = p.bias.empty() ? nullptr : b.grad_bias.data();
  const ibq_problem problem = problem_of(p, dropped_mass);
  const BackwardWorkspace sizes(Operands(problem), args, limits, nullptr);
  PoisonedWorkspace workspace(sizes.bytes);
  EmulatedQueue queue(c.turns);
  softmax_backward(queue, problem, args, c.deterministic, limits, workspace.at());
  CHECK(!queue.refused, "%s: backward refused", c.name);
  return b;
}

// Relative rounding of a weight.
double weight_error(Element element) {
  return element == Element::bf16  ? std::ldexp(1.0, -8)
         : element == Element::f16 ? std::ldexp(1.0, -10)
                                   : 0.0;
}

void check_near(const char* name, const char* what, size_t at, double got, double expected, double bound) {
  CHECK(std::fabs(got - expected) <= bound, "%s: %s[%zu] is %.9g, expected %.9g, bound %.3g", name, what, at,
        got, expected, bound);
}

void check_sums(const char* name, const char* what, const std::vector<float>& got,
                const std::vector<Sum>& expected, double relative) {
  for (size_t i = 0; i < got.size(); ++i)
    check_near(name, what, i, got[i], expected[i].value,
               expected[i].gross * relative + 2 * expected[i].dropped + 1e-30);
}

void check_forward(const Case& c, const Forward& f, const SoftmaxTruth& truth) {
  for (size_t i = 0; i < f.indices.size(); ++i) {
    const double error = truth.logit_error[i] + 1e-7;
    CHECK(f.indices[i] >= 0 && f.indices[i] < truth.K, "%s: index %ld", c.name, long(f.indices[i]));
    check_near(c.name, "max", i, f.max[i], truth.max[i], 2 * error + 1e-7 * std::fabs(truth.max[i]));
    if (c.select) check_near(c.name, "lse", i, f.lse[i], truth.lse[i], 2 * error + 1e-6);
    if (!c.entropy) continue;
    check_near(c.name, "lse_tau", i, f.lse_tau[i], truth.lse_tau[i], 2 * error / c.tau + 1e-6);
    check_near(c.name, "row_entropy", i, f.row_entropy[i], truth.entropy[i],
               (8 * error / c.tau + 2e-6) * (0.01 + truth.entropy[i]));
  }
  double worst = 0.0;
  for (double e : truth.logit_error) worst = std::max(worst, e);
  for (size_t j = 0; c.entropy && j < f.mean_prob.size(); ++j)
    check_near(c.name, "mean_prob", j, f.mean_prob[j], truth.mean_prob[j],
               (4 * worst / c.tau + 4e-6) * truth.mean_prob[j] + 1e-12);
  if (c.select)
    check_sums(c.name, "readout", f.readout, truth.readout, weight_error(c.element) + 4 * worst + 4e-6);
}

void check_backward(const Case& c, const Backward& b, const SoftmaxTruth& truth) {
  double worst = 0.0;
  for (double e : truth.logit_error) worst = std::max(worst, e);
  const double exact = 16 * worst / std::min(c.entropy ? c.tau : 1.0, 1.0) + 1e-5;
  const double relative = 2 * weight_error(c.element) + exact;
  check_sums(c.name, "grad_z", b.grad_z, truth.grad_z, relative);
  check_sums(c.name, "grad_codebook", b.grad_codebook, truth.grad_codebook, relative);
  check_sums(c.name, "grad_bias", b.grad_bias, truth.grad_bias, weight_error(c.element) + exact);
}

void test_random_problems() {
  std::mt19937 random(11);
  for (const Case& c : kCases) {
    SoftmaxProblem p(c.element, c.N, c.K, c.D, c.offset, c.with_bias);
    fill(p, c, random);
    const SoftmaxTruth truth(p, c.select, c.entropy, c.select);
    const Forward f = run_forward(c, p, kNegligibleMass);
    check_forward(c, f, truth);
    if (c.select) CHECK(f.indices == truth.indices, "%s: indices", c.name);
    check_backward(c, run_backward(c, p, f, kNegligibleMass), truth);
  }
}

// A flat row beside rows that one code has whole; tiles of nothing else are skipped, and the result is the
// same.
void test_flat_beside_one_hot() {
  std::mt19937 random(12);
  for (Element element : {Element::bf16, Element::f32}) {
    const Case c{"flat beside one-hot", element, 150, 400, 32, 0, true, true, true, 0.0, 0.5, 1.0, 2, kBig,
                 128 * 256 * 4,         kWarps,  true};
    SoftmaxProblem p(element, c.N, c.K, c.D, 0, true);
    fill(p, c, random);
    std::fill(p.bias.begin(), p.bias.end(), 0.0f);
    for (int64_t j = 0; j < c.K;
         ++j)  // of equal lengths, so that a multiple of a code is nearest to that code
      for (int64_t d = 0; d < c.D; ++d) p.codebook.set(j, d, p.codebook.get(j, d) < 0.0f ? -1.0f : 1.0f);
    for (int64_t i = 0; i < c.N; ++i)
      for (int64_t d = 0; d < c.D; ++d)
        p.z.set(i, d,
                i == 140   ? 0.0f
                : i == 141 ? 1.2f * p.codebook.get(i, d)
                           : 8.0f * p.codebook.get(i % 100, d));
    const SoftmaxTruth truth(p, true, true, true);
    CHECK(truth.top[141] > 0.99 && truth.top[141] < 1 - 1e-9 && truth.top[0] > 1 - 1e-9 &&
              truth.top[140] < 0.01,
          "%g, %g, %g", truth.top[141], truth.top[0], truth.top[140]);
    const Forward f = run_forward(c, p, kNegligibleMass);
    check_forward(c, f, truth);
    CHECK(f.indices == truth.indices, "indices");
    const Backward b = run_backward(c, p, f, kNegligibleMass);
    check_backward(c, b, truth);
    // The first 128 rows lie on the first 100 codes, the flat row and a gently peaked one in the second row
    // tile.
    const float gap = negligible_gap(c.K, kNegligibleMass);
    for (size_t tile = 0; tile < 8; ++tile)
      for (size_t group : {size_t{0}, size_t{8}})
        CHECK(is_live(f.tile_bound[group + tile], gap) == (tile == 0 || tile >= 4),
              "tile %zu of group %zu: %g", tile, group, f.tile_bound[group + tile]);
    const Backward whole = run_backward(c, p, run_forward(c, p, 0.0f), 0.0f);
    check_backward(c, whole, truth);
    CHECK(whole.grad_z != b.grad_z, "skipping changed nothing: was anything skipped?");
  }
}

void test_nan_row_stays_alone() {
  std::mt19937 random(13);
  const Case c{"NaN row", Element::bf16, 40,  150, 24,   0,       true, true, false,
               0.0,       0.5,           0.5, 2,   kBig, 1 << 20, 1,    true};
  SoftmaxProblem p(c.element, c.N, c.K, c.D, 0, false);
  fill(p, c, random);
  p.z.set(3, 5, quiet_nan());
  const Forward f = run_forward(c, p, kNegligibleMass);
  const Backward b = run_backward(c, p, f, kNegligibleMass);
  for (size_t i = 0; i < 40; ++i) {
    const bool bad = i == 3;
    CHECK(is_nan(f.max[i]) == bad && std::isnan(f.lse[i]) == bad && std::isnan(f.lse_tau[i]) == bad &&
              is_nan(f.row_entropy[i]) == bad,
          "row %zu: %g, %g, %g, %g", i, f.max[i], f.lse[i], f.lse_tau[i], f.row_entropy[i]);
    for (size_t d = 0; d < 24; ++d)
      CHECK(is_nan(f.readout[i * 24 + d]) == bad && is_nan(b.grad_z[i * 24 + d]) == bad, "row %zu", i);
  }
  CHECK(f.indices[3] == 0 && is_nan(f.mean_prob[7]), "a NaN row is seen");
}

void test_order_of_threads_changes_nothing() {
  std::mt19937 random(14);
  Case c{"turns", Element::bf16, 140,           300, 70,  0, true, true, true, 0.0, 0.5, 0.5,
         3,       kSmall,        128 * 256 * 2, 1,   true};
  SoftmaxProblem p(c.element, c.N, c.K, c.D, 0, true);
  fill(p, c, random);
  const Forward first = run_forward(c, p, kNegligibleMass);
  const Backward first_back = run_backward(c, p, first, kNegligibleMass);
  for (uint32_t turns : {127u, kWarps}) {
    c.turns = turns;
    const Forward f = run_forward(c, p, kNegligibleMass);
    const Backward b = run_backward(c, p, f, kNegligibleMass);
    CHECK(f.readout == first.readout && f.mean_prob == first.mean_prob && f.lse_tau == first.lse_tau,
          "turns %u", turns);
    CHECK(b.grad_z == first_back.grad_z && b.grad_codebook == first_back.grad_codebook &&
              b.grad_bias == first_back.grad_bias,
          "turns %u", turns);
  }
}

void test_scatter_with_bad_and_popular_keys() {
  constexpr int64_t kRows = 3000, kCodes = 9, kColumns = 300;
  std::mt19937 random(15);
  Matrix first(Element::f32, kRows, kColumns);
  std::vector<int64_t> keys(kRows);
  std::vector<double> expected(kCodes * kColumns, 0.0);
  for (int64_t i = 0; i < kRows; ++i) {
    keys[size_t(i)] = i < 1500 ? 4 : static_cast<int64_t>(random() % (kCodes + 3)) - 1;  // -1 to kCodes + 1
    for (int64_t d = 0; d < kColumns; ++d) {
      first.set(i, d, static_cast<float>(random() % 7));
      if (keys[size_t(i)] >= 0 && keys[size_t(i)] < kCodes)
        expected[size_t(keys[size_t(i)] * kColumns + d)] += first.get(i, d);
    }
  }
  std::vector<float> out(kCodes * kColumns, 0.0f);
  ScatterArguments args{};
  args.keys = keys.data();
  args.N = kRows;
  args.K = kCodes;
  args.D = kColumns;
  args.first = first.data;
  args.out = out.data();
  EmulatedQueue queue(kWarps);
  queue.launch(Kernel::scatter, Element::f32, 4, kScatterSharedBytes, args);
  for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == expected[i], "%zu: %g, %g", i, out[i], expected[i]);
}

}  // namespace

int main() {
  test_random_problems();
  test_flat_beside_one_hot();
  test_nan_row_stays_alone();
  test_order_of_threads_changes_nothing();
  test_scatter_with_bad_and_popular_keys();
  return ibq::test::finish("test_softmax_simt");
}
