// The generator's loss with the Hopper kernels in place of the portable ones, forward and backward, against a
// reference in double: rows that stay in shared memory, and rows that are streamed.
#include "cross_entropy_reference.h"
#include "hopper_queue.h"

namespace {

using namespace ibq::test;
using hopper::emulator::Delivery;

constexpr int64_t kBig = 227 * 1024;

void check(const CrossEntropyCase& c, Delivery delivery, bool nearly_right = false) {
  std::mt19937 random(31);
  CrossEntropyProblem p(c, random);
  if (nearly_right) {
    for (int64_t i = 0; i < c.N; ++i)
      for (int64_t d = 0; d < c.C; ++d)
        p.hidden.set(i, d, p.head.get(p.targets[size_t(i)] < 0 ? 0 : p.targets[size_t(i)], d) * 0.4f);
  }
  HopperQueue queue(c.name, c.multiprocessors, c.shared, delivery);
  check_case(c, p, queue);
  CHECK(queue.taken >= 4, "%s: search, sweep and two products", c.name);
}

}  // namespace

int main() {
  const Element bf16 = Element::bf16;
  check({"resident", bf16, 140, 300, 128, 0.1, true, 0.3f, 3, kBig, 1 << 20, true}, Delivery::when_all_wait);
  check({"streamed", bf16, 270, 400, 320, 0.0, true, 0.1f, 2, kBig, 256 * 256 * 2, true},
        Delivery::when_all_wait);
  check({"streamed, one item", bf16, 1, 900, 384, 0.1, false, 0.1f, 1, kBig, 1 << 20, false},
        Delivery::at_once);
  check({"streamed, nearly right", bf16, 40, 700, 320, 0.0, false, 1.0f, 2, kBig, 1 << 20, true},
        Delivery::at_once, true);
  return ibq::test::finish("test_hopper_cross_entropy");
}
