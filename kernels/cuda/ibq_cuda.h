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

// allow = 0 makes every later call of the process use the portable kernels. The start is 1, or 0 where the
// environment variable IBQ_FAST_HOPPER is "off".
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

// --- Training: softmax over the codebook, forward and backward
// ----------------------------------------------
//
// All of these take their operands in structs, whose null outputs are not computed, and a workspace of the
// bytes that the function of the same name with _workspace asks for on the current device: 16-byte aligned,
// scratch. It is bounded by a constant (64 MiB of weights, partial sums of one tile for each block that runs
// at once) plus terms in N and in K alone. With N = 0 nothing is written.

// S = scale * z @ codebook^T + bias - norm_weight * |codebook_j|^2 [N, K], never stored.
typedef struct ibq_problem {
  const void* z;         // [N, D]
  const void* codebook;  // [K, D]
  const float* bias;     // [K] or null
  int64_t N, K, D;
  ibq_dtype dtype;
  float scale;
  float norm_weight;
  // Share of a row's softmax that may be left out to skip work (IBQ_NEGLIGIBLE_MASS); 0 skips nothing.
  float dropped_mass;
} ibq_problem;

#define IBQ_NEGLIGIBLE_MASS 2.3283064365386963e-10f /* 2^-32 */

// Tiles of `tile_bound`: *row_tiles by *code_tiles, both 0 where K is too small for bounds to pay.
void ibq_cuda_bound_grid(int64_t N, int64_t K, int64_t* row_tiles, int64_t* code_tiles);

// The select group (lse, readout) and the entropy group at temperature tau (lse_tau, row_entropy, and, if not
// null, mean_prob), either left out by null pointers, at least one there.
//   indices, max   as in ibq_cuda_codebook_search
//   lse, lse_tau   [N] float64, log sum exp of S and of S / tau
//   readout        [N, D] float32, softmax(S) @ codebook
//   row_entropy    [N] float32, of the rows of softmax(S / tau); mean_prob [K] float32, their mean
//   tile_bound     [2, row tiles, code tiles] float32: the greatest log-probability of each tile, by group;
//                  only with readout or mean_prob
// Cost: 2NKD (statistics), +2NKD with readout or mean_prob, +2NKD with readout.
typedef struct ibq_softmax_forward {
  int64_t* indices;
  float* max;
  double* lse;
  float* readout;
  float temperature;
  double* lse_tau;
  float* row_entropy;
  float* mean_prob;
  float* tile_bound;
} ibq_softmax_forward;

int ibq_cuda_softmax_forward_workspace(const ibq_problem* problem, const ibq_softmax_forward* out,
                                       int64_t* bytes);
int ibq_cuda_softmax_forward(const ibq_problem* problem, const ibq_softmax_forward* out, int deterministic,
                             void* workspace, int64_t workspace_bytes, void* stream);

// Gradients of either group or of both at once.
//   select group (grad_z_q given)     dS = P (g_i . E_j - g_i . o_i); and, with indices, the hard path
//                                     grad_codebook[indices_i] += grad_z_q_i + grad_codes_i
//   entropy group (row_entropy given) dS = p / tau [-a_i (log p + H_i) + (c_j - sum_k p_ik c_k) / N]
//   grad_z [N, D], grad_codebook [K, D], grad_bias [K] or null: float32, overwritten.
// `deterministic`: 1 gives the same bits every time; 0 adds the splits of a product by float32 atomics
// instead of storing them and adding them up. Cost: select 8NKD, entropy 8NKD, both 10NKD.
typedef struct ibq_softmax_backward {
  const void* grad_z_q;    // [N, D], dtype of the problem
  const void* grad_codes;  // [N, D] or null
  const int64_t* indices;  // [N] or null; values outside [0, K) are left out
  const double* lse;       // [N]
  const float* readout;    // [N, D]
  float temperature;
  const double* lse_tau;          // [N]
  const float* row_entropy;       // [N]
  const float* grad_row_entropy;  // [N]
  const float* grad_mean_prob;    // [K]
  const float* tile_bound;        // as the forward left it, or null
  float* grad_z;
  float* grad_codebook;
  float* grad_bias;
} ibq_softmax_backward;

int ibq_cuda_softmax_backward_workspace(const ibq_problem* problem, const ibq_softmax_backward* args,
                                        int64_t* bytes);
int ibq_cuda_softmax_backward(const ibq_problem* problem, const ibq_softmax_backward* args, int deterministic,
                              void* workspace, int64_t workspace_bytes, void* stream);

// Cross entropy of a linear head: problem.z is the hidden state [N, C], problem.codebook the head [K, C];
// scale is 1 and norm_weight 0. q = (1 - label_smoothing) onehot(target) + label_smoothing / K.
//   forward   loss_i = lse_i - sum_j q_ij S_ij; loss and lse are 0 where targets_i = ignore_index. A target
//             outside [0, K) cannot be reported without waiting for the device: its loss, and in the backward
//             its gradients, are NaN.
//   backward  dS_ij = grad_loss_i (P_ij - q_ij); grad_hidden [N, C], grad_head [K, C], grad_bias [K] or null:
//             float32, overwritten. Cost: 2NKC forward, 6NKC backward.
typedef struct ibq_cross_entropy {
  const int64_t* targets;  // [N]
  int64_t ignore_index;
  double label_smoothing;
  float* loss;             // forward [N] float32
  double* lse;             // [N] float64: written by the forward, read by the backward
  const float* grad_loss;  // backward [N]
  float* grad_hidden;
  float* grad_head;
  float* grad_bias;
} ibq_cross_entropy;

int ibq_cuda_cross_entropy_forward_workspace(const ibq_problem* problem, const ibq_cross_entropy* args,
                                             int64_t* bytes);
int ibq_cuda_cross_entropy_forward(const ibq_problem* problem, const ibq_cross_entropy* args, void* workspace,
                                   int64_t workspace_bytes, void* stream);
int ibq_cuda_cross_entropy_backward_workspace(const ibq_problem* problem, const ibq_cross_entropy* args,
                                              int64_t* bytes);
int ibq_cuda_cross_entropy_backward(const ibq_problem* problem, const ibq_cross_entropy* args,
                                    int deterministic, void* workspace, int64_t workspace_bytes,
                                    void* stream);

#ifdef __cplusplus
}
#endif
