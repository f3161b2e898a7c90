// The handful of PTX instructions the kernels use, each as one inline function, for sm_80 and later.
//
// Kernels call these and never write assembly themselves. Two consequences: the sources need no CUDA header
// beyond the compiler's own, so nvcc and NVRTC take them alike; and a C++ compiler takes them too, with
// IBQ_SIMT_EMULATION, where kernels/tests/simt_emulator.h gives the same functions a meaning on the CPU.
#pragma once

#include "../common/host_device.h"

#if defined(IBQ_SIMT_EMULATION)
#include "../tests/simt_emulator.h"
#else

#define IBQ_DEVICE __device__ __forceinline__
#define IBQ_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)

#define IBQ_PRAGMA(words) _Pragma(#words)
#define IBQ_UNROLL IBQ_PRAGMA(unroll)
#define IBQ_UNROLL_BY(count) IBQ_PRAGMA(unroll count)

namespace ibq::cuda {

// The address of a shared-memory byte as ldmatrix and cp.async want it.
using SharedAddress = uint32_t;

IBQ_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// The block's dynamic shared memory, 128-byte aligned.
IBQ_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char ibq_dynamic_shared[];
  return ibq_dynamic_shared;
}

// Copies `bytes` (0 to 16) of the 16 at src to shared memory and fills the rest with zeros, asynchronously,
// past L1. src and dst are 16-byte aligned; src is not read where bytes is 0.
IBQ_DEVICE void cp_async_16(SharedAddress dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(bytes)
               : "memory");
}

// The same for 4 bytes, 4-byte aligned.
IBQ_DEVICE void cp_async_4(SharedAddress dst, const void* src, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

IBQ_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are under way.
template <int kPending>
IBQ_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

IBQ_DEVICE void store_shared_16(SharedAddress dst, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(dst), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Four 8x8 matrices of 16-bit elements (8 rows of 16 bytes each). Lanes 8i..8i+7 give the row addresses of
// matrix i; lane l receives in r[i] the 4 bytes at row l/4, byte 4*(l%4).
IBQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same, each 8x8 matrix transposed on the way: lane l receives the elements of rows 2*(l%4) and 2*(l%4)+1
// at column l/4.
IBQ_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

IBQ_DEVICE uint32_t load_shared_4(SharedAddress src) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(x) : "r"(src) : "memory");
  return x;
}

IBQ_DEVICE uint16_t load_shared_2(SharedAddress src) {
  uint16_t x;
  asm volatile("ld.shared.b16 %0, [%1];\n" : "=h"(x) : "r"(src) : "memory");
  return x;
}

// c += a * b on a 16x8 tile, 32 bytes deep. With g = lane / 4 and t = lane % 4, as 4-byte words:
//   a[0] row g, word t; a[1] row g+8, word t; a[2] row g, word t+4; a[3] row g+8, word t+4
//   b0 column g, word t; b1 column g, word t+4
//   c[0] (g, 2t), c[1] (g, 2t+1), c[2] (g+8, 2t), c[3] (g+8, 2t+1)
// A word holds two 16-bit elements (k = 16 deep) or one tf32 (k = 8 deep).
#define IBQ_MMA(name, shape_and_types)                                                    \
  IBQ_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned." shape_and_types                                      \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));         \
  }

IBQ_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
IBQ_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
IBQ_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef IBQ_MMA

// Rounds to the 11 significant bits of tf32, ties away from zero. cvt leaves the low 13 bits open; they are
// cleared, so that the result is also exact when read as a float.
IBQ_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(y) : "f"(x));
  return y & 0xffffe000u;
}

IBQ_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

IBQ_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

IBQ_DEVICE float f16_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(x) : "h"(bits));
  return x;
}

// Two floats rounded to bf16, the first in the low half.
IBQ_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x within 2 units in the last place; subnormal results become 0.
IBQ_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two, or NaN where either is NaN (fmaxf would drop the NaN).
IBQ_DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The larger of two; a NaN loses.
IBQ_DEVICE float larger(float a, float b) { return fmaxf(a, b); }

IBQ_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
IBQ_DEVICE int32_t shuffle_xor(int32_t x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
IBQ_DEVICE double shuffle_xor(double x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// The lanes of the full warp for which the condition holds.
IBQ_DEVICE uint32_t lanes_where(bool condition) { return __ballot_sync(0xffffffffu, condition); }

// The lanes of the full warp that hold the same value as this one.
IBQ_DEVICE uint32_t lanes_with_same(int32_t value) { return __match_any_sync(0xffffffffu, value); }
IBQ_DEVICE int first_lane(uint32_t lanes) { return __ffs(static_cast<int>(lanes)) - 1; }
IBQ_DEVICE int count_lanes(uint32_t lanes) { return __popc(lanes); }

IBQ_DEVICE void atomic_add_shared(uint32_t* address, uint32_t value) { atomicAdd(address, value); }
IBQ_DEVICE void atomic_add_global(int64_t* address, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

IBQ_DEVICE void atomic_add_global(float* address, float value) { atomicAdd(address, value); }

IBQ_DEVICE void block_barrier() { __syncthreads(); }

}  // namespace ibq::cuda

#endif
