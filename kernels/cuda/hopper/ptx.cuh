// The instructions of compute capability 9.0a that the Hopper kernels use, each as one inline function.
//
// As with intrinsics.cuh: kernels write no assembly themselves, need no CUDA header, and compile as C++ with
// IBQ_SIMT_EMULATION, where kernels/tests/hopper_instructions.h gives every function the meaning that the PTX
// ISA documents (sections on wgmma, mbarrier, cp.async.bulk.tensor, barrier, setmaxnreg).
#pragma once

#include "../intrinsics.cuh"
#include "tensor_map.h"

#if defined(IBQ_SIMT_EMULATION)
#include "../../tests/hopper_instructions.h"
#else

#define IBQ_GRID_CONSTANT __grid_constant__

namespace ibq::cuda::hopper {

// The block's dynamic shared memory, 1024-byte aligned: where the 128B swizzle pattern starts.
IBQ_DEVICE unsigned char* swizzled_shared() {
  extern __shared__ __align__(1024) unsigned char ibq_swizzled_shared[];
  return ibq_swizzled_shared;
}

// --- mbarrier: a phase ends when `arrivals` threads have arrived and all expected bytes have come

IBQ_DEVICE void barrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine; a block barrier makes them known to the threads.
IBQ_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

IBQ_DEVICE void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

IBQ_DEVICE void barrier_arrive_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the barrier's phase of this parity (0 for the first, then alternating) has ended.
IBQ_DEVICE void barrier_wait(SharedAddress barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// --- The copy engine

IBQ_DEVICE void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// One box of the map, its first element at (row, column), to dst; its bytes are counted by the barrier.
IBQ_DEVICE void copy_box(SharedAddress dst, const TensorMap& map, int column, int row,
                         SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];\n" ::"r"(dst),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// --- Barriers among some of the block's threads (ids 1 to 15; __syncthreads is id 0)

template <int kThreads>
IBQ_DEVICE void named_barrier_sync(int id) {
  asm volatile("barrier.cta.sync.aligned %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kThreads>
IBQ_DEVICE void named_barrier_arrive(int id) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

// --- Registers of a warpgroup

template <int kRegisters>
IBQ_DEVICE void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
IBQ_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// --- wgmma
// d [64, N] += a [64, 16] b [N, 16]^T over 16-bit elements, N = 2 * registers of d, all through descriptors
// (operand.cuh). With w the warp of the warpgroup, g = lane / 4, t = lane % 4: d[4f + e] is row
// 16w + g + 8(e / 2), column 8f + 2t + e % 2. The sum starts from zero where `accumulate` is false.

// Which dimension of an operand is contiguous in shared memory: the one summed over, or the rows (a), columns
// (b).
enum class Major : int { depth = 0, outer = 1 };

IBQ_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
IBQ_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most kPending of the warpgroup's newest groups are under way.
template <int kPending>
IBQ_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from using registers earlier than here: it does not know that wgmma is asynchronous.
template <int kRegisters>
IBQ_DEVICE void hold(float (&d)[kRegisters]) {
  IBQ_UNROLL
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operand lists, 32 registers at a time.
#define IBQ_REGISTERS_0                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define IBQ_REGISTERS_1                                                                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define IBQ_REGISTERS_2                                                                   \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define IBQ_REGISTERS_3                                                                    \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
  "%125, %126, %127"
#define IBQ_HOLD_8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define IBQ_HOLD_32(d, i) IBQ_HOLD_8(d, i), IBQ_HOLD_8(d, i + 8), IBQ_HOLD_8(d, i + 16), IBQ_HOLD_8(d, i + 24)

#define IBQ_WGMMA_LIST_1 IBQ_REGISTERS_0
#define IBQ_WGMMA_LIST_2 IBQ_WGMMA_LIST_1 ", " IBQ_REGISTERS_1
#define IBQ_WGMMA_LIST_3 IBQ_WGMMA_LIST_2 ", " IBQ_REGISTERS_2
#define IBQ_WGMMA_LIST_4 IBQ_WGMMA_LIST_3 ", " IBQ_REGISTERS_3
#define IBQ_WGMMA_HOLD_1 IBQ_HOLD_32(d, 0)
#define IBQ_WGMMA_HOLD_2 IBQ_WGMMA_HOLD_1, IBQ_HOLD_32(d, 32)
#define IBQ_WGMMA_HOLD_3 IBQ_WGMMA_HOLD_2, IBQ_HOLD_32(d, 64)
#define IBQ_WGMMA_HOLD_4 IBQ_WGMMA_HOLD_3, IBQ_HOLD_32(d, 96)

// shape and types, register list, register operands, the numbers of the operands that follow them
#define IBQ_WGMMA(instruction, list, operands, a_number, b_number, flag_number, a_major, b_major) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag_number                                    \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned." instruction " {" list "}, " a_number ", " b_number \
               ", p, 1, 1, " a_major ", " b_major ";\n}\n"                                        \
               : operands                                                                         \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)),    \
                 "n"(static_cast<int>(kB)))

template <bool kBf16, Major kA, Major kB, int kRegisters>
IBQ_DEVICE void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64 || kRegisters == 96 || kRegisters == 128);
  if constexpr (kRegisters == 32 && kBf16)
    IBQ_WGMMA("m64n64k16.f32.bf16.bf16", IBQ_WGMMA_LIST_1, IBQ_WGMMA_HOLD_1, "%32", "%33", "%34", "%35",
              "%36");
  if constexpr (kRegisters == 32 && !kBf16)
    IBQ_WGMMA("m64n64k16.f32.f16.f16", IBQ_WGMMA_LIST_1, IBQ_WGMMA_HOLD_1, "%32", "%33", "%34", "%35", "%36");
  if constexpr (kRegisters == 64 && kBf16)
    IBQ_WGMMA("m64n128k16.f32.bf16.bf16", IBQ_WGMMA_LIST_2, IBQ_WGMMA_HOLD_2, "%64", "%65", "%66", "%67",
              "%68");
  if constexpr (kRegisters == 64 && !kBf16)
    IBQ_WGMMA("m64n128k16.f32.f16.f16", IBQ_WGMMA_LIST_2, IBQ_WGMMA_HOLD_2, "%64", "%65", "%66", "%67",
              "%68");
  if constexpr (kRegisters == 96 && kBf16)
    IBQ_WGMMA("m64n192k16.f32.bf16.bf16", IBQ_WGMMA_LIST_3, IBQ_WGMMA_HOLD_3, "%96", "%97", "%98", "%99",
              "%100");
  if constexpr (kRegisters == 96 && !kBf16)
    IBQ_WGMMA("m64n192k16.f32.f16.f16", IBQ_WGMMA_LIST_3, IBQ_WGMMA_HOLD_3, "%96", "%97", "%98", "%99",
              "%100");
  if constexpr (kRegisters == 128 && kBf16)
    IBQ_WGMMA("m64n256k16.f32.bf16.bf16", IBQ_WGMMA_LIST_4, IBQ_WGMMA_HOLD_4, "%128", "%129", "%130", "%131",
              "%132");
  if constexpr (kRegisters == 128 && !kBf16)
    IBQ_WGMMA("m64n256k16.f32.f16.f16", IBQ_WGMMA_LIST_4, IBQ_WGMMA_HOLD_4, "%128", "%129", "%130", "%131",
              "%132");
}

#undef IBQ_WGMMA
#undef IBQ_HOLD_8
#undef IBQ_HOLD_32
#undef IBQ_REGISTERS_0
#undef IBQ_REGISTERS_1
#undef IBQ_REGISTERS_2
#undef IBQ_REGISTERS_3
#undef IBQ_WGMMA_LIST_1
#undef IBQ_WGMMA_HOLD_1
#undef IBQ_WGMMA_LIST_2
#undef IBQ_WGMMA_HOLD_2
#undef IBQ_WGMMA_LIST_3
#undef IBQ_WGMMA_HOLD_3
#undef IBQ_WGMMA_LIST_4
#undef IBQ_WGMMA_HOLD_4

// threadIdx.x, read anew: a value derived from it needs no register while products are under way.
IBQ_DEVICE int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

// {low, high} rounded to nearest, packed.
template <bool kBf16>
IBQ_DEVICE uint32_t pack_two(float low, float high) {
  uint32_t packed;
  if constexpr (kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

}  // namespace ibq::cuda::hopper

#endif
