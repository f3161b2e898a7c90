// Runs the CUDA kernels of kernels/cuda on the CPU, one block at a time, each thread a fiber.
//
// It stands in for intrinsics.cuh (see there) and gives every function of that file its documented meaning,
// as strictly as it can: shared memory starts as NaN, cp.async delivers at the last moment its wait allows,
// addresses are checked for alignment, warp-wide instructions wait for all lanes, and the order in which
// threads take turns is a parameter, so that a missing barrier changes the result. It says nothing about
// speed nor about what real tensor cores do in the last bit.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "../common/host_device.h"

#define IBQ_DEVICE inline
#define IBQ_KERNEL(threads, blocks_per_sm) inline void
#define IBQ_UNROLL
#define IBQ_UNROLL_BY(count)

namespace ibq::cuda {

struct Index {
  uint32_t x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

struct Copy {
  uint32_t dst;
  const unsigned char* src;
  int size, bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // copies of the group not yet committed
};

// A meeting of several threads: the last to arrive computes, then all go on.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
  void* slot[32] = {};
};

// Who runs when a thread waits: with an odd number of turns, thread i + turns, so that all warps advance
// together; with kWarpByWarp each warp runs as far as the block's next barrier before another starts.
constexpr uint32_t kWarpByWarp = 0;

struct Block {
  static constexpr size_t kStackBytes = 256 * 1024;
  std::vector<Fiber> fibers;  // of the largest launch so far: their stacks are kept
  uint32_t threads = 0;
  std::vector<Meeting> warps;
  Meeting barrier;
  int alive = 0;
  uint32_t turns = 1;
  uint64_t idle_turns = 0;
  ucontext_t main;
  std::vector<unsigned char> shared_storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::function<void()> body;
};
inline Block block;

inline void switch_to(uint32_t from, uint32_t to) {
  threadIdx.x = to;
  swapcontext(&block.fibers[from].context, &block.fibers[to].context);
  threadIdx.x = from;
}

enum class Waiting { for_warp, for_block };

inline uint32_t next_alive(uint32_t from, Waiting waiting) {
  const uint32_t threads = block.threads;
  const bool stay_in_warp = block.turns == kWarpByWarp && waiting == Waiting::for_warp;
  uint32_t next = from;
  do {
    if (stay_in_warp) {
      next = next / 32 * 32 + (next + 1) % 32;
    } else {
      next = (next + (block.turns == kWarpByWarp ? 1 : block.turns)) % threads;
    }
  } while (block.fibers[next].done);
  return next;
}

inline void yield(Waiting waiting) {
  if (++block.idle_turns > 1000000)
    fail("all threads wait: a barrier or warp instruction is not reached by all");
  const uint32_t from = threadIdx.x, to = next_alive(from, waiting);
  if (to != from) switch_to(from, to);
}

inline void fiber_main() {
  block.body();
  Fiber& self = block.fibers[threadIdx.x];
  self.done = true;
  block.idle_turns = 0;
  if (--block.alive == 0) {
    setcontext(&block.main);
  } else {
    const uint32_t next = next_alive(threadIdx.x, Waiting::for_block);
    threadIdx.x = next;
    setcontext(&block.fibers[next].context);
  }
}

// Runs kernel() in `blocks` blocks of `threads` (a power of two, at least 32) with poisoned shared memory.
template <typename Kernel>
void launch(int64_t blocks, int threads, int64_t shared_bytes, uint32_t turns, Kernel kernel) {
  block.body = kernel;
  block.turns = turns;
  block.shared_storage.resize(static_cast<size_t>(shared_bytes) + 128);
  const auto start = reinterpret_cast<uintptr_t>(block.shared_storage.data());
  block.shared = block.shared_storage.data() + (128 - start % 128) % 128;
  block.shared_bytes = static_cast<size_t>(shared_bytes);
  gridDim.x = static_cast<uint32_t>(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<uint32_t>(b);
    std::memset(block.shared, 0xff, block.shared_bytes);
    if (block.fibers.size() < static_cast<size_t>(threads)) block.fibers.resize(static_cast<size_t>(threads));
    block.threads = static_cast<uint32_t>(threads);
    block.warps.assign(static_cast<size_t>(threads / 32), Meeting{});
    block.barrier = Meeting{};
    block.alive = threads;
    block.idle_turns = 0;
    for (uint32_t t = 0; t < block.threads; ++t) {
      Fiber& fiber = block.fibers[t];
      if (!fiber.stack) fiber.stack.reset(new unsigned char[Block::kStackBytes]);
      fiber.done = false;
      fiber.groups.clear();
      fiber.open.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Block::kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
    }
    threadIdx.x = 0;
    swapcontext(&block.main, &block.fibers[0].context);
  }
}

// All 32 lanes of the warp meet; the last to arrive runs compute(slots) on everyone's `mine`.
template <typename Slot, typename Compute>
void warp_meeting(Slot& mine, Compute compute) {
  Meeting& warp = block.warps[threadIdx.x / 32];
  warp.slot[threadIdx.x % 32] = &mine;
  const uint64_t generation = warp.generation;
  if (++warp.arrived == 32) {
    Slot* slots[32];
    for (int lane = 0; lane < 32; ++lane) slots[lane] = static_cast<Slot*>(warp.slot[lane]);
    compute(slots);
    warp.arrived = 0;
    ++warp.generation;
    block.idle_turns = 0;
  }
  while (warp.generation == generation) yield(Waiting::for_warp);
}

inline unsigned char* shared_bytes_at(uint32_t address, int size) {
  if (address % static_cast<uint32_t>(size) != 0) fail("shared memory address is not aligned");
  if (address + static_cast<size_t>(size) > block.shared_bytes) fail("shared memory address out of bounds");
  return block.shared + address;
}

inline void deliver(const Copy& copy) {
  unsigned char* dst = shared_bytes_at(copy.dst, copy.size);
  std::memset(dst, 0, static_cast<size_t>(copy.size));
  if (copy.bytes > 0) std::memcpy(dst, copy.src, static_cast<size_t>(copy.bytes));
}

inline void enqueue(uint32_t dst, const void* src, int size, int bytes) {
  if (reinterpret_cast<uintptr_t>(src) % static_cast<uintptr_t>(size) != 0)
    fail("cp.async source is not aligned");
  shared_bytes_at(dst, size);
  block.fibers[threadIdx.x].open.push_back({dst, static_cast<const unsigned char*>(src), size, bytes});
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  const float magnitude =
      exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                    : std::ldexp(static_cast<float>(mantissa | 1024u), static_cast<int>(exponent) - 25);
  return sign ? -magnitude : magnitude;
}

struct MmaLane {
  float (*c)[4];
  const uint32_t* a;
  uint32_t b[2];
};

// element(word, i): element i of a 32-bit word of an operand; elements_per_word of them.
template <int kPerWord, typename ElementOf>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ElementOf element) {
  MmaLane mine{&c, a, {b0, b1}};
  warp_meeting(mine, [&](MmaLane** lanes) {
    constexpr int kDepth = 8 * kPerWord;
    float A[16][kDepth], B[8][kDepth];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < kPerWord; ++i) {
        A[g][t * kPerWord + i] = element(lanes[lane]->a[0], i);
        A[g + 8][t * kPerWord + i] = element(lanes[lane]->a[1], i);
        A[g][(t + 4) * kPerWord + i] = element(lanes[lane]->a[2], i);
        A[g + 8][(t + 4) * kPerWord + i] = element(lanes[lane]->a[3], i);
        B[g][t * kPerWord + i] = element(lanes[lane]->b[0], i);
        B[g][(t + 4) * kPerWord + i] = element(lanes[lane]->b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i / 2) * 8, column = (lane % 4) * 2 + i % 2;
        double sum = (*lanes[lane]->c)[i];
        for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(A[row][k]) * B[column][k];
        (*lanes[lane]->c)[i] = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace emulator

using SharedAddress = uint32_t;

inline unsigned char* dynamic_shared() { return emulator::block.shared; }
inline SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(static_cast<const unsigned char*>(p) - emulator::block.shared);
}

inline void cp_async_16(SharedAddress dst, const void* src, int bytes) {
  emulator::enqueue(dst, src, 16, bytes);
}
inline void cp_async_4(SharedAddress dst, const void* src, int bytes) {
  emulator::enqueue(dst, src, 4, bytes);
}

inline void cp_async_commit() {
  emulator::Fiber& self = emulator::block.fibers[threadIdx.x];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::block.fibers[threadIdx.x].groups;
  while (groups.size() > kPending) {
    for (const emulator::Copy& copy : groups.front()) emulator::deliver(copy);
    groups.erase(groups.begin());
  }
}

inline void store_shared_16(SharedAddress dst, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t words[4] = {a, b, c, d};
  std::memcpy(emulator::shared_bytes_at(dst, 16), words, 16);
}

inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  struct Lane {
    uint32_t (*r)[4];
    SharedAddress row;
  } mine{&r, row};
  emulator::warp_meeting(mine, [](Lane** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(&(*lanes[lane]->r)[matrix],
                    emulator::shared_bytes_at(lanes[8 * matrix + lane / 4]->row, 16) + 4 * (lane % 4), 4);
  });
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  struct Lane {
    uint32_t (*r)[4];
    SharedAddress row;
  } mine{&r, row};
  emulator::warp_meeting(mine, [](Lane** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i)
          std::memcpy(
              &pair[i],
              emulator::shared_bytes_at(lanes[8 * matrix + 2 * (lane % 4) + i]->row, 16) + 2 * (lane / 4), 2);
        (*lanes[lane]->r)[matrix] = pair[0] | (uint32_t{pair[1]} << 16);
      }
  });
}

inline uint32_t load_shared_4(SharedAddress src) {
  uint32_t x;
  std::memcpy(&x, emulator::shared_bytes_at(src, 4), 4);
  return x;
}
inline uint16_t load_shared_2(SharedAddress src) {
  uint16_t x;
  std::memcpy(&x, emulator::shared_bytes_at(src, 2), 2);
  return x;
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma<2>(c, a, b0, b1, [](uint32_t word, int i) {
    return emulator::bf16_to_float(static_cast<uint16_t>(word >> (16 * i)));
  });
}

inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma<2>(c, a, b0, b1, [](uint32_t word, int i) {
    return emulator::f16_to_float(static_cast<uint16_t>(word >> (16 * i)));
  });
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::mma<1>(c, a, b0, b1, [](uint32_t word, int) {
    if (word & 0x1fffu) emulator::fail("an operand of mma_tf32 was not rounded to tf32");
    return emulator::bits_to_float(word);
  });
}

inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x007fffffu) ? 0x7fffe000u : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

inline float as_float(uint32_t bits) { return emulator::bits_to_float(bits); }
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float f16_to_float(uint16_t bits) { return emulator::f16_to_float(bits); }
inline uint32_t round_to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  return is_nan(x) ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_to_bf16(low) | (round_to_bf16(high) << 16); }
inline float exp2_approximate(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float max_or_nan(float a, float b) { return is_nan(a) || is_nan(b) ? quiet_nan() : (a > b ? a : b); }
inline float larger(float a, float b) { return std::fmax(a, b); }

template <typename T>
T shuffle_xor(T x, int lanes) {
  struct Lane {
    T in, out;
  } mine{x, x};
  emulator::warp_meeting(mine, [lanes](Lane** all) {
    for (int lane = 0; lane < 32; ++lane) all[lane]->out = all[lane ^ lanes]->in;
  });
  return mine.out;
}

inline uint32_t lanes_with_same(int32_t value) {
  struct Lane {
    int32_t value;
    uint32_t mask;
  } mine{value, 0};
  emulator::warp_meeting(mine, [](Lane** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int other = 0; other < 32; ++other)
        if (all[lane]->value == all[other]->value) all[lane]->mask |= 1u << other;
  });
  return mine.mask;
}

inline uint32_t lanes_where(bool condition) {
  struct Lane {
    bool condition;
    uint32_t mask;
  } mine{condition, 0};
  emulator::warp_meeting(mine, [](Lane** all) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= uint32_t{all[lane]->condition} << lane;
    for (int lane = 0; lane < 32; ++lane) all[lane]->mask = mask;
  });
  return mine.mask;
}

inline int first_lane(uint32_t lanes) { return __builtin_ctz(lanes); }
inline int count_lanes(uint32_t lanes) { return __builtin_popcount(lanes); }
inline void atomic_add_shared(uint32_t* address, uint32_t value) { *address += value; }
inline void atomic_add_global(int64_t* address, int64_t value) { *address += value; }
inline void atomic_add_global(float* address, float value) { *address += value; }

// Threads that have returned take no part, as on the device.
inline void block_barrier() {
  emulator::Meeting& barrier = emulator::block.barrier;
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  for (;;) {
    if (barrier.generation != generation) return;
    if (barrier.arrived == emulator::block.alive) {
      barrier.arrived = 0;
      ++barrier.generation;
      emulator::block.idle_turns = 0;
      return;
    }
    emulator::yield(emulator::Waiting::for_block);
  }
}

}  // namespace ibq::cuda
