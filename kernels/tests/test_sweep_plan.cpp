// What the host decides for the CUDA sweeps: rectangles, shared memory, splits and their workspace; and the
// rules that sweeps share.
#include <cmath>
#include <initializer_list>

#include "../cuda/cross_entropy.h"
#include "../cuda/softmax_backward.h"
#include "check.h"

namespace {

using namespace ibq;
using namespace ibq::cuda;

constexpr int64_t kKilo = 1024;
const DeviceLimits kDevices[] = {
    {108, 164 * kKilo, 163 * kKilo},  // compute capability 8.0
    {128, 100 * kKilo, 99 * kKilo},   // 8.9
    {132, 228 * kKilo, 227 * kKilo},  // 9.0
    {148, 228 * kKilo, 227 * kKilo},  // 10.0
};
const Element kElements[] = {Element::f32, Element::bf16, Element::f16};
const int64_t kSizes[] = {1, 127, 128, 129, 1000, 4096, 16384, 100000, 262144};

void test_rectangles_cover_and_fit() {
  for (int64_t N : kSizes)
    for (int64_t K : kSizes)
      for (int bytes : {2, 4}) {
        const Rectangle r = plan_rectangle(N, K, bytes);
        CHECK(r.rows % kSweepTileRows == 0 && r.codes % kSweepTileCodes == 0 && r.rows > 0 && r.codes > 0,
              "%ld x %ld", long(r.rows), long(r.codes));
        CHECK(r.rows * r.codes * bytes <= kWeightsBytes, "%ld x %ld", long(r.rows), long(r.codes));
        CHECK(r.rows < N + kSweepTileRows && r.codes < K + kSweepTileCodes, "larger than S");
        int64_t covered = 0, last = -1;
        for_rectangles(r, N, K, [&](int64_t row, int64_t rows, int64_t code, int64_t codes) {
          CHECK(row % kSweepTileRows == 0 && code % kSweepTileCodes == 0 && rows > 0 && codes > 0, "%ld, %ld",
                long(row), long(code));
          CHECK(row * K + code > last, "out of order");
          last = row * K + code;
          covered += rows * codes;
        });
        CHECK(covered == N * K, "N %ld, K %ld", long(N), long(K));
      }
}

void test_every_device_has_a_plan() {
  for (const DeviceLimits& device : kDevices)
    for (Element element : kElements)
      for (int64_t D : {int64_t{1}, int64_t{33}, int64_t{256}, int64_t{1024}, int64_t{100000}}) {
        for (int operands : {1, 2}) {
          const SweepPlan plan = plan_sweep(4096, 8192, D, element, operands, device);
          CHECK(plan.stages >= 2 && plan.shared_bytes <= device.shared_per_block,
                "D %ld: %d stages, %ld bytes", long(D), plan.stages, long(plan.shared_bytes));
          CHECK(plan.chunks * kChunkBytes >= D * bytes_of(element), "D %ld", long(D));
          // What write_row_parts keeps in the ring's place.
          CHECK(plan.shared_bytes >= 4 * 2 * kSweepTileRows * 4, "%ld", long(plan.shared_bytes));
        }
        const ProductPlan plan = plan_product(4096, 8192, D, element, device);
        CHECK(plan.stages >= 2 && plan.shared_bytes <= device.shared_per_block, "D %ld", long(D));
      }
}

void test_splits_stay_in_their_workspace() {
  for (const DeviceLimits& device : kDevices)
    for (Element element : kElements)
      for (int64_t rows : kSizes)
        for (int64_t depth : {int64_t{1}, int64_t{128}, int64_t{8192}})
          for (int64_t D : {int64_t{1}, int64_t{256}, int64_t{1024}}) {
            const ProductPlan plan = plan_product(rows, depth, D, element, device);
            CHECK(plan.splits >= 1 && plan.splits * plan.tiles_per_split >= plan.depth_tiles &&
                      (plan.splits - 1) * plan.tiles_per_split < plan.depth_tiles,
                  "%ld splits of %ld", long(plan.splits), long(plan.tiles_per_split));
            if (plan.splits > 1)
              CHECK(plan.splits * rows * D <= partial_floats(element, device), "%ld x %ld x %ld",
                    long(plan.splits), long(rows), long(D));
            LaunchLimits limits{device};
            const SweepPlan sweep = plan_sweep(rows, depth, D, element, 1, device);
            CHECK(sweep.schedule.splits * sweep.schedule.row_tiles * kSweepTileRows <=
                      row_part_rows(rows, limits),
                  "%ld rows", long(rows));
          }
}

// The promise of ibq_cuda.h: a constant, and terms in N and in K alone.
void test_workspace_is_bounded() {
  const LaunchLimits limits{kDevices[2]};
  const auto bytes = [&](int64_t N, int64_t K) {
    const ibq_problem p{nullptr, nullptr, nullptr, N, K, 256, IBQ_BF16, 1.0f, 1.0f, IBQ_NEGLIGIBLE_MASS};
    float some;
    ibq_softmax_backward args{};
    args.grad_z_q = args.row_entropy = &some;
    return BackwardWorkspace(Operands(p), args, limits, nullptr).bytes;
  };
  constexpr int64_t kConstant = 100 << 20;
  for (int64_t N : kSizes)
    for (int64_t K : kSizes)
      CHECK(bytes(N, K) <= kConstant + 128 * N + 16 * K, "N %ld, K %ld: %ld bytes", long(N), long(K),
            long(bytes(N, K)));
}

void test_log_scale_keeps_digits() {
  for (double lse : {0.0, 3.7, -12000.123456, 31415.926535})
    for (float inverse_tau : {1.0f, 100.0f}) {
      const LogScale scale = log_scale(lse, inverse_tau);
      const float x = scale.high - 0.01f;
      const float got = (x - scale.high) * inverse_tau - scale.low;
      const double expected = static_cast<double>(x) * inverse_tau - lse;
      CHECK(std::fabs(got - expected) <= 1e-6, "lse %g: %g, expected %g", lse, got, expected);
    }
}

void test_tempered_sums_join() {
  const double s[] = {1.0, -0.5, 3.25, 3.0};
  const auto sums = [&](int first, int end, double reference) {
    TemperedSums all{0.0, 0.0};
    for (int j = first; j < end; ++j) {
      const double y = s[j] - reference;
      all.sum += std::exp(y), all.moment += y * std::exp(y);
    }
    return all;
  };
  TemperedSums joined{0.0, 0.0};
  add_tempered(joined, sums(0, 2, 1.0), 1.0 - 3.25);
  add_tempered(joined, sums(2, 4, 3.25), 0.0);
  add_tempered(joined, {0.0, 0.0}, -positive_infinity());  // a split without a finite logit
  const TemperedSums whole = sums(0, 4, 3.25);
  CHECK(std::fabs(joined.sum - whole.sum) < 1e-15 && std::fabs(joined.moment - whole.moment) < 1e-15,
        "%g, %g", joined.sum, joined.moment);
  CHECK(entropy_of({1.0, 0.0}) == 0.0, "one code has it all");
  CHECK(std::fabs(entropy_of({4.0, 0.0}) - std::log(4.0)) < 1e-15, "four have the same");
}

void test_skipping_rule() {
  for (int64_t K : {int64_t{1}, int64_t{262144}}) {
    const double dropped = static_cast<double>(K) * std::exp(-double{negligible_gap(K, kNegligibleMass)});
    CHECK(dropped <= kNegligibleMass * 1.0001, "K %ld drops %g", long(K), dropped);
    CHECK(negligible_gap(K, 0.0f) == positive_infinity(), "0 drops nothing");
  }
  CHECK(is_live(-10.0f, 20.0f) && !is_live(-30.0f, 20.0f) && is_live(quiet_nan(), 20.0f), "liveness");
  CHECK(!is_live(negative_infinity(), 20.0f) && is_live(negative_infinity(), positive_infinity()),
        "infinities");
  int64_t tiles, blocks;
  bound_grid(1000, kBoundedFrom - 1, LaunchLimits{}, &tiles, &blocks);
  CHECK(tiles == 0 && blocks == 0, "small codebooks have no bounds");
  bound_grid(1000, kBoundedFrom + 1, LaunchLimits{}, &tiles, &blocks);
  CHECK(tiles == 8 && blocks == kBoundedFrom / 128 + 1, "%ld, %ld", long(tiles), long(blocks));
}

void test_incomplete_arguments_are_refused() {
  float some = 0.0f;
  double more = 0.0;
  ibq_softmax_forward forward{};
  CHECK(!is_valid(forward), "nothing asked for");
  forward.lse = &more;
  CHECK(is_valid(forward), "the select group");
  forward.mean_prob = &some;
  CHECK(!is_valid(forward), "mean probabilities without entropies");
  forward.row_entropy = &some;
  forward.lse_tau = &more;
  CHECK(!is_valid(forward), "temperature 0");
  forward.temperature = 0.01f;
  CHECK(is_valid(forward), "both groups");
  ibq_softmax_backward backward{};
  backward.grad_z = backward.grad_codebook = &some;
  CHECK(!is_valid(backward), "no group");
  backward.grad_z_q = &some;
  backward.lse = &more;
  CHECK(!is_valid(backward), "no readout");
  backward.readout = &some;
  CHECK(is_valid(backward), "the select group");
  ibq_problem p{&some, &some, nullptr, 1, 1, 1, IBQ_F32, 1.0f, 0.5f, 0.0f};
  const int64_t target = 0;
  ibq_cross_entropy cross{};
  cross.targets = &target;
  cross.lse = &more;
  CHECK(!is_valid(p, cross), "a norm weight");
  p.norm_weight = 0.0f;
  CHECK(is_valid(p, cross), "a linear head");
  p.K = (int64_t{1} << 31) - 1;
  CHECK(!is_valid(p), "too many codes");
}

void test_winners() {
  CHECK(winner_code(-1, -1) == -1 && winner_code(5, -1) == 5 && winner_code(-1, 5) == 5, "codes");
  CHECK(winner_gradient(5, 2.0, -1, 3.0) == -2.0 && winner_gradient(5, 2.0, 5, 3.0) == -5.0,
        "only winners count");
}

}  // namespace

int main() {
  test_rectangles_cover_and_fit();
  test_every_device_has_a_plan();
  test_splits_stay_in_their_workspace();
  test_workspace_is_bounded();
  test_log_scale_keeps_digits();
  test_tempered_sums_join();
  test_skipping_rule();
  test_incomplete_arguments_are_refused();
  test_winners();
  return ibq::test::finish("test_sweep_plan");
}
