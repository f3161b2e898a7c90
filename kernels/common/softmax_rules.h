// What the sweeps over S agree on, forward and backward, device and host (docs/architecture.md, "Numbers"):
// how log-probabilities are formed from a stored log-sum-exp, how entropy sums are joined, which entries are
// negligible, and what a backward keeps of each row.
#pragma once

#include "host_device.h"

namespace ibq {

// An entry of P below this share of 1 / K may be left out: all K of them add up to less than it.
constexpr float kNegligibleMass = 2.3283064365386963e-10f;  // 2^-32
// A code with more than this of its row gets its dS as minus the sum of the row's others. Well above 1/2, so
// that two codes never both win.
constexpr float kWinner = 0.75f;
// Stands in for log p = -inf where it is multiplied by p = 0.
constexpr float kLeastLogProb = -1e4f;

// How far below its row's log-sum-exp a logit is negligible among K; infinite when nothing may be dropped.
IBQ_HD float negligible_gap(int64_t K, float dropped_mass) {
  if (!(dropped_mass > 0.0f)) return positive_infinity();
  return static_cast<float>(log(static_cast<double>(K)) - log(static_cast<double>(dropped_mass)));
}

// Whether a tile whose greatest log-probability is `top` may matter. A NaN does.
IBQ_HD bool is_live(float top, float gap) { return !(top < -gap); }

// log p = (x - high) * inverse_tau - low for a float64 log-sum-exp of S / tau: `high` is the float32 logit
// nearest to tau * lse, so that no large x / tau is ever rounded.
struct LogScale {
  float high, low;
};

IBQ_HD LogScale log_scale(double lse, float inverse_tau) {
  const float high = static_cast<float>(lse / inverse_tau);
  return {high, static_cast<float>(lse - static_cast<double>(high) * inverse_tau)};
}

// Sums of e^y and y e^y over codes, y = (S - reference) / tau.
struct TemperedSums {
  double sum, moment;
};

// Adds a part whose reference lies `shift` / tau-units from that of `all` (shift <= 0, tau divided out).
IBQ_HD void add_tempered(TemperedSums& all, const TemperedSums& part, double shift) {
  const double weight = exp(shift);
  all.sum += part.sum * weight;
  if (weight > 0.0) all.moment += (part.moment + shift * part.sum) * weight;
}

// Entropy of a row's softmax: exactly 0 where one code has it all, without the cancellation of lse - E[y].
IBQ_HD double entropy_of(const TemperedSums& row) { return log(row.sum) - row.moment / row.sum; }

// What a sweep over S needs of a row, written before it. 32 bytes, read as two 16-byte words.
//   select   log P = (x - select_high) - select_low; dS = P (G - delta). In the cross entropy delta holds the
//            row's incoming gradient.
//   entropy  log p = (x - entropy_high) / tau - entropy_low; dS = p (log p * slope + c_j * share + offset)
struct alignas(16) RowConstants {
  float select_high, select_low, delta;
  float slope;
  float entropy_high, entropy_low, offset;
  int32_t target;  // cross entropy: the row's class, or -1
};

// A row past the end of the matrix: all its probabilities are 0, and so is its dS.
IBQ_HD RowConstants no_row() {
  return {positive_infinity(), 0.0f, 0.0f, 0.0f, positive_infinity(), 0.0f, 0.0f, -1};
}

// Winners stand in a row's place as its code, -1 for none. Either group may have one; both then have the
// same.
IBQ_HD int32_t winner_code(int32_t select, int32_t entropy) { return select > entropy ? select : entropy; }

// The winner's dS, given the sums of the row's other entries.
IBQ_HD double winner_gradient(int32_t select, double select_others, int32_t entropy, double entropy_others) {
  return -((select >= 0 ? select_others : 0.0) + (entropy >= 0 ? entropy_others : 0.0));
}

}  // namespace ibq
