// Arguments of the cross-entropy kernels. The Problem's z is the hidden state h [N, C], its codebook the head
// W [K, C] (C = Problem::d), its bias the classes' bias; S = h W^T + bias [N, K] is never stored; the scale
// is not used.
#pragma once

#include <cstdint>

namespace ibq::cpu {

// Rows whose target is ignore_index take no part and cost nothing.
struct CrossEntropy {
  const int64_t* targets = nullptr;  // [N], each in [0, K) or ignore_index
  int64_t ignore_index = -100;
  float label_smoothing = 0.0f;  // e: the target distribution is q = (1 - e) onehot + e / K
};

// loss_i = lse_i - sum_j q_ij S_ij, lse_i = log sum_j exp S_ij (float64); both 0 in ignored rows.
// Cost: one sweep of 2NKC.
struct CrossEntropyForward : CrossEntropy {
  float* loss = nullptr;
  double* lse = nullptr;
};

// dS_ij = grad_loss_i (P_ij - q_ij), P = exp(S - lse); dh = dS W, dW = dS^T h, dbias = column sums of dS.
// Outputs are overwritten, dh and dW in the dtype of the problem; grad_bias may be null. Cost: S, dh, dW =
// 6NKC.
struct CrossEntropyBackward : CrossEntropy {
  const float* grad_loss = nullptr;  // [N]
  const double* lse = nullptr;       // [N] from the forward
  void* grad_hidden = nullptr;       // [N, C]
  void* grad_head = nullptr;         // [K, C]
  float* grad_bias = nullptr;        // [K]
};

}  // namespace ibq::cpu
