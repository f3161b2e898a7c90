// Arguments of the kernels that follow the search, one struct for each, passed by value. Plain C++.
#pragma once

#include "sweep_plan.h"

namespace ibq::cuda {

// What a sweep over S makes of a tile of logits.
enum class Sweep : int {
  probability = 0,  // P as weights; column sums of p; row sums of p_ij c_j; tile bounds: each if asked for
  select = 1,       // dS of the select group, in which codes are selected by straight-through
  entropy = 2,      // dS of the entropy group
  both = 3,         // dS of both
  cross = 4,        // dS of the cross entropy
};

// A rectangle of S: rows [first_row, first_row + rows), codes [first_code, first_code + codes), the firsts
// multiples of 128. Null outputs are not written.
struct SweepArguments {
  const unsigned char* z;           // [N, D]
  const unsigned char* cotangents;  // g [N, D], for select and both
  const unsigned char* codebook;    // [K, D]
  const float* bias;                // [K] or null
  const float* column_weights;      // c_j less its mean, [K]: entropy, both, and probability with row_parts
  const RowConstants* rows;         // [N rounded up to 128]
  const double* lse;                // [N], cross entropy
  float scale, inverse_tau;
  float share;  // entropy: 1 / (N tau), the factor of c_j in dS; cross entropy: q of the other classes, e / K
  float smoothing;
  float gap;  // negligible_gap
  int64_t N, K, row_bytes;
  int access;
  int64_t first_row, first_code;
  SweepPlan plan;
  // Tiles that the forward found dead are left out: [2][bound_tiles][bound_blocks] of the whole call, or
  // null.
  const float* tile_bound;
  float* tile_bound_out;  // probability: written instead
  int64_t bound_tiles, bound_blocks;
  int use_select, use_entropy;  // which of P and p the sweep is about
  unsigned char* weights;       // [rows, weights_pitch] of weight_bytes, whole tiles
  int64_t weights_pitch;        // in elements
  uint8_t* live;                // [row tiles][code tiles] of the rectangle: whether W's tile was written
  float*
      row_parts;  // [splits][2][whole tiles' rows]: sums of the rows' dS less winners, or p_ij c_j in [.][1]
  float* column_parts;  // [row tiles][whole tiles' codes]: column sums of dS less winners, or of p
  int32_t* winners;     // [2][N], -1 before the first rectangle
};

// out[i, :] += factor * sum over the depth of W[i, k] B[k, :], or of W[k, i] with `transposed`.
struct ProductArguments {
  const unsigned char* weights;  // [rows, weights_pitch] whole tiles
  int64_t weights_pitch;         // in elements
  int64_t weight_rows;           // whole tiles
  const uint8_t* live;           // [row tiles][code tiles]
  int64_t code_tiles;
  const unsigned char* operand;  // B, from row operand_row on: [operand_rows, D]
  int64_t operand_row, operand_rows, row_bytes;
  int access;
  int64_t rows, D;  // of the output
  float factor;
  ProductPlan plan;
  float* partial;  // [splits][rows][D], or null: splits add to `out` at once
  int atomic;      // whether adding to `out` must be atomic, as more than one split does it
  float* out;      // [rows][D]
};

// out[i] += factor * sum of the splits' partial[i].
struct AddPartsArguments {
  const float* partial;
  int64_t count, splits;
  float factor;
  float* out;
};

// Sums of `parts` vectors, in order.
struct AddColumnsArguments {
  const float* parts;  // [count][stride]
  int64_t count, stride, columns;
  double factor;
  float* out;  // [columns], added to
};

struct AddRowsArguments {
  const float* parts;  // [splits][2][stride]
  int64_t splits, stride, rows, first_row, N;
  double* others;       // [2][N], added to; or null:
  float offset_factor;  // rows[i].offset += offset_factor * sum of group 1
  RowConstants* constants;
};

// Fills RowConstants from the forward's results; null groups are left out.
struct RowConstantsArguments {
  int64_t N, D;
  float inverse_tau;
  const double* lse;                // select group or cross entropy
  const unsigned char* cotangents;  // select backward: g [N, D]
  const float* readout;             // select backward: o [N, D]
  const double* lse_tau;            // entropy group
  const float* row_entropy;         // entropy backward
  const float* grad_row_entropy;    // entropy backward
  const float* grad_loss;           // cross entropy backward
  const int64_t* targets;           // cross entropy backward
  int64_t ignore_index, K;
  RowConstants* rows;  // [N rounded up to 128]
};

// The search's splits joined, with float64 log-sum-exps.
struct StatisticsArguments {
  int64_t N, K, splits;
  const float* split_max;
  const int32_t* split_index;
  const float* split_sum;
  const float* split_tempered_sum;
  const float* split_tempered_moment;
  float inverse_tau;
  int64_t* indices;
  float* max;
  double* lse;
  double* lse_tau;
  float* row_entropy;
  // cross entropy
  const float* target_logit;
  const float* split_logits;
  const int64_t* targets;
  int64_t ignore_index;
  double smoothing;
  float* loss;
};

struct NormBiasArguments {
  const unsigned char* codebook;
  const float* bias;
  float norm_weight;
  int64_t K, D;
  float* out;  // [K]
};

// grad_codebook_j -= 2 norm_weight * column_sum_j * E_j
struct NormGradientArguments {
  const unsigned char* codebook;
  const float* column_sums;  // [K]
  float norm_weight;
  int64_t K, D;
  float* grad_codebook;
};

struct CenterArguments {
  const float* values;
  int64_t K;
  float* out;  // values less their mean
};

// Winners' dS: spent on grad_z here, and left as keys and weights for the scatter into dE.
struct WinnersArguments {
  const int32_t* winners;  // [2][N]
  const double* others;    // [2][N]
  const unsigned char* codebook;
  float scale;
  int64_t N, D;
  float* grad_z;
  int64_t* keys;     // [N], -1 for none
  float* gradients;  // [N]
};

// out[keys_i] += first_i + second_i + scale * gradients_i * rows_i and column_sums[keys_i] += gradients_i,
// null terms left out, in order of i. Keys outside [0, K) are left out.
struct ScatterArguments {
  const int64_t* keys;
  int64_t N, K, D;
  const unsigned char* first;
  const unsigned char* second;
  const unsigned char* rows;
  const float* gradients;
  float scale;
  float* out;
  float* column_sums;
};

}  // namespace ibq::cuda
