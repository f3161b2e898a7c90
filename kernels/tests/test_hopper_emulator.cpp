// The Hopper emulator itself: layouts against values that CUTLASS 4.2's CuTe computes, products against
// loops, and that it refuses programs which real hardware would run wrongly.
#define IBQ_SIMT_EMULATION

#include <sys/wait.h>
#include <unistd.h>

#include "../cuda/hopper/operand.cuh"
#include "check.h"
#include "hopper_problem.h"

namespace ibq::cuda::hopper {
namespace {

using emulator::Delivery;
using test::Matrix16;

// Byte offsets of as_position_independent_swizzle_layout(tile_to_shape(atom, shape)) for bf16:
// Layout_K_SW128_Atom over (128, 64), and Layout_MN_SW128_Atom over (256, 64) with Step<_2, _1>.
void test_layouts_are_cutes() {
  struct Place {
    int i, k;
    uint32_t byte;
  };
  for (const Place& p :
       {Place{0, 9, 18}, {1, 0, 144}, {7, 63, 910}, {9, 17, 1202}, {38, 40, 4912}, {127, 33, 16306}}) {
    const uint64_t operand = columns_further(along_columns(0, 0), p.k / 16);
    CHECK(emulator::operand_address(operand, false, p.i, p.k % 16) == p.byte, "K-major %d, %d", p.i, p.k);
  }
  for (const Place& p :
       {Place{9, 0, 18}, {0, 1, 144}, {63, 7, 910}, {64, 0, 8192}, {77, 29, 11978}, {255, 63, 32654}}) {
    const uint64_t operand = rows_further(along_rows<64>(0), p.k / 16);
    CHECK(emulator::operand_address(operand, true, p.i, p.k % 16) == p.byte, "MN-major %d, %d", p.i, p.k);
  }
  // The fields that make_gmma_desc gives for these two: SBO 64, LBO 1 and 512, layout type 1.
  CHECK(along_columns(0, 0) == 0x4000004000010000u && along_rows<64>(0) == 0x4000004002000000u, "fields");
}

// One warpgroup multiplies what two boxes brought, a and b [64, 64]: d = a b^T, then e += a^T b.
constexpr SharedAddress kA = 0, kB = 8192, kBarrier = 16384;
constexpr int64_t kBytes = 16384 + 8;
enum class Fault {
  none,
  no_init_fence,
  no_full_wait,
  too_few_bytes,
  no_wgmma_fence,
  read_before_wait,
  write_in_flight,
  refill_in_flight,
  half_named_barrier,
  unswizzled_start,
};

void program(const TensorMap& a, const TensorMap& b, Fault fault, float (*d_out)[32], float (*e_out)[32]) {
  const bool first = threadIdx.x == 0;
  const SharedAddress base = fault == Fault::unswizzled_start ? 64 : 0;
  if (first) {
    barrier_init(kBarrier, 1);
    if (fault != Fault::no_init_fence) barrier_init_fence();
    barrier_arrive_expect(kBarrier, fault == Fault::too_few_bytes ? 8192 : 16384);
    copy_box(kA + base, a, 0, 0, kBarrier);
    copy_box(kB, b, 0, 0, kBarrier);
  }
  block_barrier();
  if (fault != Fault::no_full_wait) barrier_wait(kBarrier, 0);
  float d[32];
  if (fault != Fault::no_wgmma_fence) wgmma_fence();
  for (int step = 0; step < 4; ++step)
    wgmma<true, Major::depth, Major::depth>(d, columns_further(along_columns(kA + base, 0), step),
                                            columns_further(along_columns(kB, 0), step), step > 0);
  wgmma_commit();
  if (fault == Fault::refill_in_flight && first) {
    barrier_arrive_expect(kBarrier, 8192);
    copy_box(kA, b, 0, 0, kBarrier);
  }
  if (fault == Fault::write_in_flight && first) d[3] = 1.0f;
  if (fault == Fault::read_before_wait) {
    for (int i = 0; i < 32; ++i) d_out[threadIdx.x][i] = d[i];
  }
  if (fault == Fault::half_named_barrier && first) named_barrier_arrive<64>(3);
  wgmma_wait<0>();
  if (fault == Fault::read_before_wait) return;
  float e[32];
  for (int i = 0; i < 32; ++i) {
    d_out[threadIdx.x][i] = d[i];
    e[i] = 1.0f;
  }
  wgmma_fence();
  for (int step = 0; step < 4; ++step)
    wgmma<true, Major::outer, Major::outer>(e, rows_further(along_rows<64>(kA), step),
                                            rows_further(along_rows<64>(kB), step), true);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) e_out[threadIdx.x][i] = e[i];
}

struct Run {
  Matrix16 a{true, 64, 64}, b{true, 50, 64};  // 14 rows of b come from outside and are zeros
  float d[128][32], e[128][32];
  Run() {
    std::mt19937 random(1);
    std::uniform_int_distribution<int> few(-2, 2);
    a.fill([&] { return static_cast<float>(few(random)); });
    b.fill([&] { return static_cast<float>(few(random)); });
  }
  void operator()(Fault fault, Delivery delivery) {
    const TensorMap a_map = a.map(64), b_map = b.map(64);
    emulator::launch(1, 128, kBytes, 1, delivery, [&] { program(a_map, b_map, fault, d, e); });
  }
};

void test_products() {
  for (Delivery delivery : {Delivery::at_once, Delivery::when_all_wait}) {
    Run run;
    run(Fault::none, delivery);
    for (int t = 0; t < 128; ++t) {
      for (int r = 0; r < 32; ++r) {
        const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (r % 4 / 2),
                  column = r / 4 * 8 + 2 * (t % 4) + r % 2;
        const double expected = column < 50 ? dot(run.a, row, run.b, column) : 0.0;
        CHECK(run.d[t][r] == expected, "d[%d, %d] is %g, not %g", row, column, run.d[t][r], expected);
        double sum = 1.0;
        for (int j = 0; j < 50; ++j) sum += static_cast<double>(run.a.get(j, row)) * run.b.get(j, column);
        CHECK(run.e[t][r] == static_cast<float>(sum), "e[%d, %d] is %g, not %g", row, column, run.e[t][r],
              sum);
      }
    }
  }
}

// Runs in a child, since a refusal aborts.
bool refused(Fault fault, Delivery delivery) {
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(2);
    Run run;
    run(fault, delivery);
    bool finite = true;
    for (const auto& row : run.d)
      for (float x : row) finite = finite && !is_nan(x);
    _exit(finite ? 0 : 1);  // NaN in a result is as good as a refusal
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !WIFEXITED(status) || WEXITSTATUS(status) == 1;
}

void test_faults_are_found() {
  CHECK(!refused(Fault::none, Delivery::when_all_wait), "the right program was refused");
  CHECK(refused(Fault::no_init_fence, Delivery::at_once), "copy before the fence of barrier_init");
  CHECK(refused(Fault::no_full_wait, Delivery::when_all_wait), "no wait for the copy");
  CHECK(refused(Fault::too_few_bytes, Delivery::when_all_wait), "expected fewer bytes than come");
  CHECK(refused(Fault::no_wgmma_fence, Delivery::at_once), "no wgmma.fence");
  CHECK(refused(Fault::read_before_wait, Delivery::at_once), "accumulators read in flight");
  CHECK(refused(Fault::write_in_flight, Delivery::at_once), "accumulators written in flight");
  CHECK(refused(Fault::refill_in_flight, Delivery::at_once), "operands overwritten in flight");
  CHECK(refused(Fault::half_named_barrier, Delivery::at_once), "a named barrier left half full");
  CHECK(refused(Fault::unswizzled_start, Delivery::at_once), "a box off its alignment");
}

void test_half_rounding() {
  for (uint32_t bits = 0; bits < 0x7c00u; bits += 7) {
    const float exact = cuda::emulator::f16_to_float(static_cast<uint16_t>(bits));
    const float next = cuda::emulator::f16_to_float(static_cast<uint16_t>(bits + 1));
    CHECK(emulator::float_to_f16(exact) == bits, "exact %x", bits);
    if (bits + 1 < 0x7c00u) {
      const float middle = 0.5f * (exact + next);
      CHECK(emulator::float_to_f16(middle) == bits + bits % 2, "middle %x", bits);
      CHECK(emulator::float_to_f16(std::nextafter(middle, next)) == bits + 1, "above %x", bits);
    }
  }
}

int run_all() {
  test_layouts_are_cutes();
  test_products();
  test_faults_are_found();
  test_half_rounding();
  return test::finish("test_hopper_emulator");
}

}  // namespace
}  // namespace ibq::cuda::hopper

int main() { return ibq::cuda::hopper::run_all(); }
