// Statistics of one row of logits S over a range of codes, and the rule that joins two ranges.
//
// (max, sum, index) with sum = sum_j exp(S_j - max) and index = the lowest j that attains max. A search
// splits a row over lanes, warps and blocks, in any order; `merge` is associative and commutative in
// max and index (exactly) and in sum (up to rounding), so every split gives the same code:
//   * ties go to the lowest index, whichever side of a split it lies on;
//   * a NaN anywhere in a row makes the whole row NaN: index 0, max = lse = NaN;
//   * a row of -inf only has index 0, max = lse = -inf; one with +inf has max = lse = +inf.
#pragma once

#include "host_device.h"

namespace ibq {

struct RowStats {
  float max;
  float sum;
  int32_t index;
};

// The neutral element of merge. Index 0, so that a row of -inf only ends at code 0.
IBQ_HD RowStats empty_row_stats() { return {negative_infinity(), 0.0f, 0}; }

// The statistics of the single logit s of code `index`.
IBQ_HD RowStats single_row_stats(float s, int32_t index) {
  if (is_nan(s)) return {s, 0.0f, 0};
  const bool nothing = s == negative_infinity();
  return {s, nothing ? 0.0f : 1.0f, nothing ? 0 : index};
}

// exp(x - max), for x <= max, where an infinite max would make the difference NaN.
IBQ_HD float shifted_weight(float x, float max) { return x == max ? 1.0f : expf(x - max); }

IBQ_HD RowStats merge(const RowStats& a, const RowStats& b) {
  if (is_nan(a.max) || is_nan(b.max)) return {quiet_nan(), 0.0f, 0};
  const bool a_wins = a.max > b.max || (a.max == b.max && a.index <= b.index);
  const float max = a_wins ? a.max : b.max;
  const float sum = a.sum * shifted_weight(a.max, max) + b.sum * shifted_weight(b.max, max);
  return {max, sum, a_wins ? a.index : b.index};
}

// log sum_j exp(S_j) of a finished row.
IBQ_HD float log_sum_exp(const RowStats& row) {
  if (is_nan(row.max)) return row.max;
  if (row.max == negative_infinity() || row.max == positive_infinity()) return row.max;
  return row.max + logf(row.sum);
}

}  // namespace ibq
