// The Hopper product kernel under the emulator: W B and W^T B with dead tiles, splits, ragged ends and every
// width, against sums in double. Small integers, so that every sum is exact.
#define IBQ_SIMT_EMULATION

#include "../cuda/hopper/product_kernel.cuh"
#include "check.h"
#include "hopper_problem.h"

namespace ibq::cuda::hopper {
namespace {

using emulator::Delivery;
using test::Matrix16;

struct Case {
  const char* name;
  bool bf16, transposed;
  int64_t rows, codes, D;  // of W, less than whole tiles
  int live_of_eight;       // tiles that are live
  int multiprocessors;
  int64_t shared_limit;
  Delivery delivery;
};

template <bool kBf16, bool kTransposed>
void run(const ProductParameters& p, const Case& c) {
  const auto launch = [&](auto kernel) {
    emulator::launch(p.plan.blocks(), kProductThreads, p.plan.shared_bytes, cuda::emulator::kWarpByWarp,
                     c.delivery, [&] { kernel(p); });
  };
  if (c.D == 64) launch(hopper_product_kernel<kBf16, kTransposed, 1>);
  if (c.D == 128) launch(hopper_product_kernel<kBf16, kTransposed, 2>);
  if (c.D == 192) launch(hopper_product_kernel<kBf16, kTransposed, 3>);
  if (c.D == 256) launch(hopper_product_kernel<kBf16, kTransposed, 4>);
}

void check_case(const Case& c) {
  std::mt19937 random(2);
  std::uniform_int_distribution<int> few(-2, 2);
  const int64_t row_tiles = ceil_div(c.rows, int64_t{128}), code_tiles = ceil_div(c.codes, int64_t{128});
  Matrix16 w(c.bf16, row_tiles * 128, code_tiles * 128);
  std::vector<uint8_t> live(static_cast<size_t>(row_tiles * code_tiles));
  for (uint8_t& tile : live) tile = static_cast<int>(random() % 8) < c.live_of_eight;
  for (int64_t i = 0; i < w.rows; ++i)
    for (int64_t j = 0; j < w.columns; ++j)
      w.set(i, j,
            live[static_cast<size_t>(i / 128 * code_tiles + j / 128)]
                ? static_cast<float>(i < c.rows && j < c.codes ? few(random) : 0)
                : quiet_nan());
  Matrix16 b(c.bf16, c.transposed ? c.rows : c.codes, c.D);
  b.fill([&] { return static_cast<float>(few(random)); });

  ProductParameters p{};
  p.weights = w.map(c.transposed ? kStageDepth : kProductRows);
  p.operand = b.map(kStageDepth);
  p.live = live.data();
  p.code_tiles = code_tiles;
  p.rows = c.transposed ? c.codes : c.rows;
  p.factor = 0.5f;
  p.plan = plan_product(p.rows, c.transposed ? c.rows : c.codes, c.D, c.multiprocessors, c.shared_limit);
  CHECK(p.plan.stages >= 2, "%s: no plan", c.name);
  const auto size = static_cast<size_t>(p.rows * c.D);
  std::vector<float> out(size, 3.0f), partial(size * static_cast<size_t>(p.plan.splits), quiet_nan());
  p.out = out.data();
  p.partial = partial.data();
  if (c.bf16) {
    c.transposed ? run<true, true>(p, c) : run<true, false>(p, c);
  } else {
    c.transposed ? run<false, true>(p, c) : run<false, false>(p, c);
  }
  if (p.plan.splits > 1)
    for (int64_t split = 0; split < p.plan.splits; ++split)
      for (size_t i = 0; i < size; ++i) out[i] += p.factor * partial[static_cast<size_t>(split) * size + i];
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t d = 0; d < c.D; ++d) {
      double sum = 0.0;
      for (int64_t k = 0; k < b.rows; ++k) {
        const int64_t row = c.transposed ? k : i, code = c.transposed ? i : k;
        if (live[static_cast<size_t>(row / 128 * code_tiles + code / 128)])
          sum += static_cast<double>(w.get(row, code)) * b.get(k, d);
      }
      const float got = out[static_cast<size_t>(i * c.D + d)];
      CHECK(got == static_cast<float>(3.0 + 0.5 * sum), "%s [%ld, %ld]: %g, expected %g", c.name, long(i),
            long(d), got, 3.0 + 0.5 * sum);
    }
}

int run_all() {
  constexpr int64_t kAll = 227 * 1024;
  for (const Case& c : {
           Case{"one of all", true, false, 1, 1, 64, 8, 1, kAll, Delivery::at_once},
           {"W B", true, false, 200, 300, 256, 8, 1, kAll, Delivery::when_all_wait},
           {"W^T B", true, true, 200, 150, 256, 8, 1, 99 * 1024, Delivery::at_once},
           {"W B, splits, dead tiles", true, false, 130, 520, 128, 4, 5, kAll, Delivery::at_once},
           {"W^T B, splits, dead tiles", true, true, 390, 140, 192, 4, 4, kAll, Delivery::when_all_wait},
           {"W B, fp16", false, false, 60, 140, 192, 8, 1, kAll, Delivery::at_once},
           {"W^T B, fp16", false, true, 140, 60, 64, 8, 1, 50 * 1024, Delivery::when_all_wait},
           {"nothing live", true, true, 140, 140, 64, 0, 3, kAll, Delivery::at_once},
       })
    check_case(c);
  return test::finish("test_hopper_product");
}

}  // namespace
}  // namespace ibq::cuda::hopper

int main() { return ibq::cuda::hopper::run_all(); }
