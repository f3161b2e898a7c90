// The C surface of the CUDA kernels: raw device pointers, 64-bit sizes, the stream as void*.
//
// No CUDA header and no PyTorch header is needed to include this file. Every function
//   * only enqueues work on `stream` (a cudaStream_t; null is the legacy default stream): it neither
//     synchronises nor allocates, so it can be captured in a CUDA graph;
//   * returns 0 or a cudaError_t as int: a bad argument is cudaErrorInvalidValue (1), anything else is what
//     the launch reported. ibq_cuda_error_string turns it into words;
//   * runs on the calling thread's current device, which must own the pointers.
// Matrices are dense, row-major. Any alignment that the element type itself has is accepted; 16-byte aligned
// rows (pointers and D * element size multiples of 16) are the fast case.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ibq_dtype { IBQ_F32 = 0, IBQ_BF16 = 1, IBQ_F16 = 2 } ibq_dtype;

const char* ibq_cuda_error_string(int error);

// Which kernels the functions below use for bf16 and fp16: null says those for compute capability 9.0 (tensor
// memory accelerator, wgmma), otherwise the reason why the portable ones serve. Null pointers stand for
// aligned ones. The string is a literal.
const char* ibq_cuda_hopper_refusal(const void* z, const void* codebook, int64_t N, int64_t K, int64_t D,
                                    ibq_dtype dtype);

// allow = 0 makes every later call of the process use the portable kernels; the start is 1.
void ibq_cuda_allow_hopper(int allow);

// Bytes of workspace for ibq_cuda_codebook_search on the current device into *bytes. It grows with N and the
// number of splits, whose product is bounded: at most 12 * (N + 4 * 256 * blocks the device runs at once).
int ibq_cuda_codebook_search_workspace(int64_t N, int64_t K, int64_t D, ibq_dtype dtype, int with_lse,
                                       int64_t* bytes);

// For each row of S = scale * z @ codebook^T + bias: the lowest index of its maximum, the maximum and,
// where lse is not null, log(sum(exp(S))). S exists only in registers.
//   z [N, D], codebook [K, D] of dtype; bias [K] float32 or null
//   indices [N] int64, max [N] float32, lse [N] float32 or null
//   workspace: what the function above asks for, 16-byte aligned; contents are scratch
// 0 <= N; 1 <= K < 2^31; 1 <= D; the two products N*D, K*D below 2^62 bytes.
// A row of S that holds a NaN gives index 0 and max = lse = NaN.
int ibq_cuda_codebook_search(const void* z, const void* codebook, const float* bias, float scale, int64_t N,
                             int64_t K, int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse,
                             void* workspace, int64_t workspace_bytes, void* stream);

// counts[k] = how many of indices [N] equal k, counts [K] int64 (overwritten). Indices outside [0, K) are
// not counted, so that sum(counts) < N shows them.
int ibq_cuda_code_histogram(const int64_t* indices, int64_t N, int64_t K, int64_t* counts, void* stream);

// out[i] = codebook[indices[i]] for rows of D elements; `second`, where not null, receives the same rows.
// An index outside [0, K) gives a row of zeros.
int ibq_cuda_gather_codes(const void* codebook, const int64_t* indices, int64_t N, int64_t K, int64_t D,
                          ibq_dtype dtype, void* out, void* second, void* stream);

#ifdef __cplusplus
}
#endif
