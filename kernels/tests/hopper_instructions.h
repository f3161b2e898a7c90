// Stands in for kernels/cuda/hopper/ptx.cuh: its functions, carried out by hopper_emulator.h.
#pragma once

#include "hopper_emulator.h"

#define IBQ_GRID_CONSTANT

namespace ibq::cuda::hopper {

inline unsigned char* swizzled_shared() { return cuda::emulator::block.shared; }

inline void barrier_init(SharedAddress barrier, int arrivals) {
  if (barrier % 8 != 0 || barrier + 8 > emulator::block.shared_bytes) emulator::fail("mbarrier address");
  if (arrivals < 1) emulator::fail("mbarrier.init without arrivals");
  emulator::state.barriers[barrier] = {arrivals, arrivals, 0, 0};
  emulator::state.barriers_published = false;
}

inline void barrier_init_fence() { emulator::state.barriers_published = true; }

inline void barrier_arrive(SharedAddress barrier) {
  emulator::MBarrier& b = emulator::barrier_at(barrier);
  if (b.pending == 0) emulator::fail("more arrivals at an mbarrier than its phase has");
  --b.pending;
  emulator::end_phase_if_complete(b);
}

inline void barrier_arrive_expect(SharedAddress barrier, int bytes) {
  emulator::barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
  while ((emulator::barrier_at(barrier).phase & 1u) == parity) emulator::wait_a_turn();
}

inline void prefetch_tensor_map(const TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(&map) % 64) emulator::fail("a tensor map is not 64-byte aligned");
}

inline void copy_box(SharedAddress dst, const TensorMap& map, int column, int row, SharedAddress barrier) {
  prefetch_tensor_map(map);
  if (!emulator::state.barriers_published) emulator::fail("copy_box before barrier_init_fence");
  if (dst % 128 != 0) emulator::fail("a swizzled box needs a 128-byte aligned place");
  emulator::BoxCopy copy{{}, dst, barrier, column, row};
  std::memcpy(&copy.map, &map, sizeof(copy.map));
  emulator::barrier_at(barrier);
  if (emulator::state.delivery == emulator::Delivery::at_once) {
    emulator::deliver(copy);
  } else {
    emulator::state.copies.push_back(copy);
  }
}

template <int kThreads>
void named_barrier_arrive(int id) {
  static_assert(kThreads % 32 == 0);
  if (id < 1 || id > 15) emulator::fail("named barrier id");
  emulator::NamedBarrier& b = emulator::state.named[static_cast<size_t>(id)];
  if (b.arrived == 0) b.expected = kThreads;
  if (b.expected != kThreads) emulator::fail("threads disagree on the size of a named barrier");
  if (++b.arrived < kThreads) return;
  b.arrived = 0;
  ++b.generation;
  emulator::progress();
}

template <int kThreads>
void named_barrier_sync(int id) {
  const uint64_t generation = emulator::state.named[static_cast<size_t>(id)].generation;
  named_barrier_arrive<kThreads>(id);
  while (emulator::state.named[static_cast<size_t>(id)].generation == generation) emulator::wait_a_turn();
}

template <int kRegisters>
void set_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  int mine = kRegisters;
  emulator::warpgroup_meeting(
      mine, [](emulator::Warpgroup& group, std::array<int*, emulator::kWarpgroup>& threads) {
        group.registers = *threads[0];
      });
}

template <int kRegisters>
void give_up_registers() {
  set_registers<kRegisters>();
}

template <int kRegisters>
void take_registers() {
  set_registers<kRegisters>();
}

inline void wgmma_fence() {
  int mine = 0;
  emulator::warpgroup_meeting(
      mine, [](emulator::Warpgroup& group, std::array<int*, emulator::kWarpgroup>&) { group.fenced = true; });
}

inline void wgmma_commit() {
  int mine = 0;
  emulator::warpgroup_meeting(mine, [](emulator::Warpgroup& group, std::array<int*, emulator::kWarpgroup>&) {
    group.committed.push_back(std::move(group.open));
    group.open = emulator::Group{};
  });
}

template <int kPending>
void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7);
  int mine = 0;
  emulator::warpgroup_meeting(mine, [](emulator::Warpgroup& group, std::array<int*, emulator::kWarpgroup>&) {
    while (group.committed.size() > kPending) {
      const emulator::Group done = std::move(group.committed.front());
      group.committed.pop_front();
      emulator::complete(group, done);
    }
    group.fenced = false;  // registers may be touched from here on
  });
}

template <int kRegisters>
void hold(float (&)[kRegisters]) {}

enum class Major : int { depth = 0, outer = 1 };

template <bool kBf16, Major kA, Major kB, int kRegisters>
void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma({d, a, b, accumulate}, kRegisters, kBf16, kA == Major::outer, kB == Major::outer);
}

inline int fresh_thread() { return static_cast<int>(threadIdx.x); }

template <bool kBf16>
uint32_t pack_two(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if constexpr (kBf16) {
      return is_nan(x) ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    } else {
      return emulator::float_to_f16(x);
    }
  };
  return round(low) | round(high) << 16;
}

}  // namespace ibq::cuda::hopper
