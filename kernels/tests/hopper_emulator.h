// The Hopper instructions on the CPU, on top of simt_emulator.h; hopper_instructions.h gives them the names
// that kernels call.
//
// The rules come from the PTX ISA's text, not from the kernels, so that a misreading there shows here:
//   mbarrier       phases of pending arrivals and outstanding bytes; waiting by parity
//   tensor copies  boxes of a 2D map, 128B swizzle on shared addresses (bits 4-6 ^= bits 7-9), zeros outside
//   the
//                  matrix; every documented alignment and size rule is checked
//   wgmma          operands through the 64-bit descriptor, field by field, in the canonical layouts of the
//                  section "Matrix layouts in shared memory": K-major ((8,m),(T,2)):((8T,SBO),(1,T)),
//                  MN-major
//                  ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), then Swizzle<3,4,3> on the byte address
//   wgmma order    wgmma.fence before registers are used; results appear at the wgmma.wait_group that covers
//                  them and the registers hold NaN until then; operands in shared memory are read at issue
//                  and again at completion and must not have changed
//   setmaxnreg     allowed values, and that a block's warpgroups do not ask for more than the register file
// It says nothing about speed.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <map>

#include "../cuda/hopper/tensor_map.h"
#include "simt_emulator.h"

// Kernels take their parameters by value, tensor maps and all; that GCC 4.6 aligned them otherwise is no
// news.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace ibq::cuda::hopper {

namespace emulator {

using cuda::emulator::block;
using cuda::emulator::fail;

// When the copy engine delivers: as soon as it is asked (which finds places that are reused too early), or
// when every thread waits (which finds reads that did not wait).
enum class Delivery { at_once, when_all_wait };

struct MBarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;  // expected less arrived
  uint32_t phase = 0;
};

struct BoxCopy {
  TensorMapRequest map;
  uint32_t dst, barrier;
  int64_t column, row;
};

constexpr int kWarpgroup = 128;

// One operand of a wgmma in shared memory, and what it held at issue.
struct SharedOperand {
  uint64_t descriptor;
  int rows;  // of the M or N dimension
  bool mn_major;
  std::vector<uint16_t> bits;  // [rows][16]
};

// An accumulator that wgmma of uncompleted groups write: one array of `count` registers a thread.
struct Accumulator {
  std::array<float*, kWarpgroup> registers{};
  int count = 0;
  std::vector<float> value;  // [thread][register]
  int groups_in_flight = 0;
};

struct Group {
  std::vector<SharedOperand> operands;
  std::vector<float*> accumulators;  // thread 0's registers name one
};

struct Warpgroup {
  int arrived = 0;
  uint64_t generation = 0;
  std::array<void*, kWarpgroup> slot{};
  bool fenced = false;
  Group open;
  std::deque<Group> committed;
  std::map<float*, Accumulator> accumulators;
  int registers = 0;  // by setmaxnreg; 0: as launched
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
};

struct State {
  Delivery delivery = Delivery::at_once;
  int threads = 0, entered = 0, left = 0;
  std::map<uint32_t, MBarrier> barriers;
  bool barriers_published = false;
  std::deque<BoxCopy> copies;
  std::vector<Warpgroup> warpgroups;
  std::array<NamedBarrier, 16> named;
  uint64_t idle = 0;
};
inline State state;

inline Warpgroup& my_warpgroup() { return state.warpgroups[threadIdx.x / kWarpgroup]; }

// --- Copies

inline uint32_t swizzle_128(uint32_t address) { return address ^ (((address >> 7) & 7u) << 4); }

inline void progress() {
  state.idle = 0;
  block.idle_turns = 0;
}

inline MBarrier& barrier_at(uint32_t address) {
  if (address % 8 != 0) fail("mbarrier is not 8-byte aligned");
  const auto found = state.barriers.find(address);
  if (found == state.barriers.end()) fail("mbarrier was not initialised");
  return found->second;
}

inline void end_phase_if_complete(MBarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  ++b.phase;
  progress();
}

inline void deliver(const BoxCopy& copy) {
  const TensorMapRequest& map = copy.map;
  uint32_t linear = copy.dst;
  for (uint32_t r = 0; r < map.box[1]; ++r) {
    for (uint32_t c = 0; c < map.box[0]; ++c, linear += 2) {
      const int64_t row = copy.row + r, column = copy.column + c;
      const bool inside = row >= 0 && row < static_cast<int64_t>(map.dimensions[1]) && column >= 0 &&
                          column < static_cast<int64_t>(map.dimensions[0]);
      const uint32_t address = swizzle_128(linear);
      uint16_t bits = 0;
      if (inside)
        std::memcpy(&bits,
                    static_cast<const unsigned char*>(map.address) +
                        row * static_cast<int64_t>(map.row_bytes) + column * 2,
                    2);
      if (address + 2 > block.shared_bytes) fail("a box does not fit into shared memory");
      std::memcpy(block.shared + address, &bits, 2);
      if (state.barriers.count(address / 8 * 8)) fail("a box overwrites an mbarrier");
    }
  }
  MBarrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= int64_t{map.box[0]} * map.box[1] * 2;
  end_phase_if_complete(barrier);
}

// Every wait of this file passes through here.
inline void wait_a_turn() {
  if (++state.idle > 2 * static_cast<uint64_t>(state.threads) && !state.copies.empty()) {
    const BoxCopy copy = state.copies.front();
    state.copies.pop_front();
    deliver(copy);
    progress();
  }
  cuda::emulator::yield(cuda::emulator::Waiting::for_block);
}

// --- wgmma

// All 128 threads of the warpgroup meet; the last to come runs compute(slots).
template <typename Slot, typename Compute>
void warpgroup_meeting(Slot& mine, Compute compute) {
  Warpgroup& group = my_warpgroup();
  group.slot[threadIdx.x % kWarpgroup] = &mine;
  const uint64_t generation = group.generation;
  if (++group.arrived == kWarpgroup) {
    std::array<Slot*, kWarpgroup> slots;
    for (int i = 0; i < kWarpgroup; ++i) slots[i] = static_cast<Slot*>(group.slot[i]);
    compute(group, slots);
    group.arrived = 0;
    ++group.generation;
    progress();
  }
  while (group.generation == generation) wait_a_turn();
}

// Byte address of element (i of M or N, k of K) of the operand a descriptor names, 16-bit elements.
inline uint32_t operand_address(uint64_t descriptor, bool mn_major, int i, int k) {
  const auto field = [descriptor](int from, int bits) {
    return static_cast<uint32_t>(descriptor >> from & ((uint64_t{1} << bits) - 1));
  };
  const uint32_t start = field(0, 14) << 4, leading = field(16, 14) << 4, stride = field(32, 14) << 4;
  if (field(14, 2) || field(30, 2) || field(46, 3) || field(52, 10)) fail("reserved descriptor bits are set");
  if (field(62, 2) != 1) fail("only the 128-byte swizzle is emulated");
  if (field(49, 3) != 0)
    fail("a base offset is not emulated: patterns must start at multiples of 1024 bytes");
  if (leading % 16 || stride % 1024) fail("descriptor offsets do not keep the swizzle pattern");
  constexpr int T = 8;  // elements in 16 bytes
  const int64_t unswizzled = mn_major ? i % T * 2 + i / T % 8 * 16 + int64_t{i / (8 * T)} * leading +
                                            k % 8 * 128 + int64_t{k / 8} * stride
                                      : i % 8 * 128 + int64_t{i / 8} * stride + k * 2;
  return swizzle_128(start + static_cast<uint32_t>(unswizzled));
}

inline uint16_t read_shared(uint32_t address) {
  if (address + 2 > block.shared_bytes) fail("wgmma reads beyond shared memory");
  uint16_t bits;
  std::memcpy(&bits, block.shared + address, 2);
  return bits;
}

inline std::vector<uint16_t> read_operand(uint64_t descriptor, int rows, bool mn_major) {
  std::vector<uint16_t> bits(static_cast<size_t>(rows) * 16);
  for (int i = 0; i < rows; ++i)
    for (int k = 0; k < 16; ++k)
      bits[static_cast<size_t>(i) * 16 + k] = read_shared(operand_address(descriptor, mn_major, i, k));
  return bits;
}

// Nearest even, as cvt.rn.f16.f32.
inline uint16_t float_to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u)  // subnormal: a multiple of 2^-24, ties to even by the addition
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 16777216.0f)));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

inline float to_float(uint16_t bits, bool bf16) {
  return bf16 ? cuda::emulator::bf16_to_float(bits) : cuda::emulator::f16_to_float(bits);
}

// Row of D, and column, that register r of a warpgroup's thread holds.
inline int accumulator_row(int thread, int r) { return thread / 32 * 16 + thread % 32 / 4 + r % 4 / 2 * 8; }
inline int accumulator_column(int thread, int r) { return r / 4 * 8 + thread % 4 * 2 + r % 2; }

struct WgmmaThread {
  float* d;
  uint64_t a, b;
  bool accumulate;
};

inline void wgmma(WgmmaThread mine, int count, bool bf16, bool a_mn_major, bool b_mn_major) {
  warpgroup_meeting(mine, [&](Warpgroup& group, std::array<WgmmaThread*, kWarpgroup>& threads) {
    const int columns = count * 2;
    for (const WgmmaThread* t : threads)
      if (t->a != threads[0]->a || t->b != threads[0]->b || t->accumulate != threads[0]->accumulate)
        fail("the threads of a wgmma disagree on its operands");
    std::vector<float> A(64 * 16), B(static_cast<size_t>(columns) * 16);
    SharedOperand a{threads[0]->a, 64, a_mn_major, read_operand(threads[0]->a, 64, a_mn_major)};
    for (size_t i = 0; i < A.size(); ++i) A[i] = to_float(a.bits[i], bf16);
    group.open.operands.push_back(std::move(a));
    SharedOperand b{threads[0]->b, columns, b_mn_major, read_operand(threads[0]->b, columns, b_mn_major)};
    for (size_t i = 0; i < B.size(); ++i) B[i] = to_float(b.bits[i], bf16);
    group.open.operands.push_back(std::move(b));

    Accumulator& d = group.accumulators[threads[0]->d];
    if (d.groups_in_flight == 0) {
      if (!group.fenced) fail("wgmma uses accumulator registers without wgmma.fence");
      d.count = count;
      d.value.resize(static_cast<size_t>(kWarpgroup) * count);
      for (int t = 0; t < kWarpgroup; ++t) {
        d.registers[t] = threads[t]->d;
        std::memcpy(&d.value[static_cast<size_t>(t) * count], threads[t]->d, sizeof(float) * count);
      }
    }
    if (d.count != count) fail("wgmma of different shapes share an accumulator in flight");
    auto& named = group.open.accumulators;
    if (std::find(named.begin(), named.end(), threads[0]->d) == named.end()) {
      named.push_back(threads[0]->d);
      ++d.groups_in_flight;
    }
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int r = 0; r < count; ++r) {
        const float* a_row = &A[static_cast<size_t>(accumulator_row(t, r)) * 16];
        const float* b_row = &B[static_cast<size_t>(accumulator_column(t, r)) * 16];
        float& sum = d.value[static_cast<size_t>(t) * count + r];
        double total = threads[0]->accumulate ? sum : 0.0;
        for (int k = 0; k < 16; ++k) total += static_cast<double>(a_row[k]) * b_row[k];
        sum = static_cast<float>(total);
        threads[t]->d[r] = quiet_nan();
      }
    }
  });
}

inline void complete(Warpgroup& group, const Group& done) {
  for (const SharedOperand& o : done.operands)
    if (read_operand(o.descriptor, o.rows, o.mn_major) != o.bits)
      fail("shared memory changed under a wgmma in flight");
  for (float* name : done.accumulators) {
    Accumulator& d = group.accumulators[name];
    if (--d.groups_in_flight > 0) continue;
    for (int t = 0; t < kWarpgroup; ++t)
      for (int r = 0; r < d.count; ++r) {
        if (!is_nan(d.registers[t][r])) fail("an accumulator was written under a wgmma in flight");
        d.registers[t][r] = d.value[static_cast<size_t>(t) * d.count + r];
      }
    group.accumulators.erase(name);
  }
}

// --- A block's life

inline void enter(int threads, Delivery delivery) {
  if (state.entered == 0) {
    state = State{};
    state.delivery = delivery;
    state.threads = threads;
    state.warpgroups.resize(static_cast<size_t>(threads) / kWarpgroup);
  }
  ++state.entered;
}

inline void leave() {
  if (++state.left < state.threads) return;
  state.entered = 0;
  if (!state.copies.empty()) fail("the block ended while copies were under way");
  int registers = 0;
  for (const Warpgroup& g : state.warpgroups) {
    if (!g.open.accumulators.empty() || !g.committed.empty()) fail("the block ended with a wgmma in flight");
    registers += g.registers * kWarpgroup;
  }
  if (registers > 65536) fail("setmaxnreg asks for more than the register file");
  for (const NamedBarrier& b : state.named)
    if (b.arrived != 0) fail("the block ended with threads arrived at a named barrier");
}

// As cuda::emulator::launch; `turns` must share no factor with `threads`.
template <typename Kernel>
void launch(int64_t blocks, int threads, int64_t shared_bytes, uint32_t turns, Delivery delivery,
            Kernel kernel) {
  cuda::emulator::launch(blocks, threads, shared_bytes, turns, [&] {
    enter(threads, delivery);
    kernel();
    leave();
  });
}

// What cuTensorMapEncodeTiled does, with its documented refusals.
inline TensorMap encode(const TensorMapRequest& r) {
  const auto refuse = [](const char* why) { fail(why); };
  if (r.data_type != 6 && r.data_type != 9) refuse("tensor map: only 16-bit floats are emulated");
  if (reinterpret_cast<uintptr_t>(r.address) % 16) refuse("tensor map: address is not 16-byte aligned");
  if (r.row_bytes % 16 || r.row_bytes >= uint64_t{1} << 40) refuse("tensor map: stride");
  for (int i = 0; i < 2; ++i) {
    if (r.dimensions[i] == 0 || r.dimensions[i] > uint64_t{1} << 32) refuse("tensor map: dimension");
    if (r.box[i] == 0 || r.box[i] > 256) refuse("tensor map: box");
    if (r.element_strides[i] != 1) refuse("tensor map: element stride");
  }
  if (r.swizzle != 3 || r.interleave != 0 || r.out_of_bounds != 0) refuse("tensor map: mode not emulated");
  if (r.box[0] * 2 > 128) refuse("tensor map: a box is wider than the swizzle");
  static_assert(sizeof(TensorMapRequest) <= sizeof(TensorMap));
  TensorMap map{};
  std::memcpy(&map, &r, sizeof(r));
  return map;
}

}  // namespace emulator

}  // namespace ibq::cuda::hopper
