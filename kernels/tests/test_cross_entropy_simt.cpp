// ibq_cuda_cross_entropy_forward and _backward as they are launched, run by the emulator and compared with a
// reference in double.
#include "cross_entropy_reference.h"

namespace {

using namespace ibq::test;

constexpr uint32_t kWarps = emulator::kWarpByWarp;

struct Case {
  CrossEntropyCase problem;
  uint32_t turns;
};

const Case kCases[] = {
    {{"bf16 one of all", Element::bf16, 1, 1, 1, 0.0, true, 1.0f, 1, 227 * 1024, 1 << 20, true}, 1},
    {{"bf16", Element::bf16, 140, 300, 72, 0.0, true, 0.3f, 3, 163 * 1024, 128 * 128 * 2, true}, kWarps},
    {{"bf16 wide, smoothing", Element::bf16, 40, 150, 300, 0.1, false, 0.1f, 2, 99 * 1024, 1 << 20, true},
     kWarps},
    {{"f16 odd", Element::f16, 33, 131, 33, 0.0, true, 1.0f, 2, 99 * 1024, 1 << 20, true}, 5},
    {{"f32 smoothing", Element::f32, 135, 140, 36, 0.2, true, 0.5f, 2, 227 * 1024, 1 << 20, true}, kWarps},
    {{"f32 peaked", Element::f32, 150, 260, 64, 0.0, true, 6.0f, 2, 227 * 1024, 128 * 128 * 4, false},
     kWarps},
};

void check(const CrossEntropyCase& c, CrossEntropyProblem& p, uint32_t turns) {
  EmulatedQueue queue(turns);
  check_case(c, p, queue);
  CHECK(!queue.refused, "%s", c.name);
}

void test_random_problems() {
  std::mt19937 random(21);
  for (const Case& c : kCases) {
    CrossEntropyProblem p(c.problem, random);
    check(c.problem, p, c.turns);
  }
}

// Rows that are nearly right: P - 1 keeps its digits, tiles without mass or target are left out.
void test_nearly_right_rows() {
  std::mt19937 random(22);
  const CrossEntropyCase c{"nearly right", Element::f32, 20, 300,        32,      0.0,
                           false,          1.0f,         2,  227 * 1024, 1 << 20, true};
  CrossEntropyProblem p(c, random);
  for (int64_t j = 0; j < c.K; ++j)
    for (int64_t d = 0; d < c.C; ++d) p.head.set(j, d, p.head.get(j, d) < 0 ? -1.0f : 1.0f);
  for (int64_t i = 0; i < c.N; ++i) {
    if (p.targets[size_t(i)] != kIgnored) p.targets[size_t(i)] = i * 3;
    for (int64_t d = 0; d < c.C; ++d) p.hidden.set(i, d, p.head.get(i * 3, d) * (i % 2 ? 1.0f : 4.0f));
  }
  check(c, p, 1);
}

void test_bad_target_is_seen() {
  std::mt19937 random(23);
  const CrossEntropyCase c{"bad target", Element::bf16, 6, 40,         8,       0.0,
                           true,         1.0f,          1, 227 * 1024, 1 << 20, true};
  CrossEntropyProblem p(c, random);
  p.targets[1] = 40;
  p.targets[2] = -1;
  EmulatedQueue queue(1);
  const CrossEntropyResult r = run(c, p, queue);
  for (size_t i = 0; i < 6; ++i)
    CHECK(ibq::is_nan(r.loss[i]) == (i == 1 || i == 2) &&
              ibq::is_nan(r.grad_hidden[i * 8]) == (i == 1 || i == 2),
          "row %zu: %g", i, r.loss[i]);
}

}  // namespace

int main() {
  test_random_problems();
  test_nearly_right_rows();
  test_bad_target_is_seen();
  return ibq::test::finish("test_cross_entropy_simt");
}
