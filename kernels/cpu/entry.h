// From the operands and what is asked for to the template instance that computes it.
#pragma once

template <bool kPairs>
bool forward_of(const Problem& p, const Forward& out, const Parallel& parallel) {
  const bool lse = out.lse, readout = out.readout, entropy = out.row_entropy;
  if (!lse && !readout && !entropy) return run_search<kPairs>(p, out, parallel);
  if (readout)
    return entropy ? run_forward<kPairs, true, true, true>(p, out, parallel)
                   : run_forward<kPairs, true, true, false>(p, out, parallel);
  if (lse)
    return entropy ? run_forward<kPairs, true, false, true>(p, out, parallel)
                   : run_forward<kPairs, true, false, false>(p, out, parallel);
  return run_forward<kPairs, false, false, true>(p, out, parallel);
}

inline bool forward(const Problem& p, const Forward& out, const Parallel& parallel) {
#if defined(__AVX512BF16__)
  const bool search = !out.lse && !out.readout && !out.row_entropy;
  if (out.rounded_first && search && p.dtype == DType::kFloat32 && p.norm_weight == 0.0f &&
      p.k >= kExactFromCodes && p.d >= kExactFromDim && p.n >= kExactFromRows)
    return exact_search(p, out, parallel);
#endif
  if (kHasPairs && p.dtype == DType::kBFloat16) return forward_of<kHasPairs>(p, out, parallel);
  return forward_of<false>(p, out, parallel);
}

template <bool kPairs>
bool backward_of(const Problem& p, const Backward& in, const Parallel& parallel) {
  const bool select = in.grad_z_q, entropy = in.row_entropy;
  if (select && entropy) return run_backward<kPairs, true, true>(p, in, parallel);
  if (select) return run_backward<kPairs, true, false>(p, in, parallel);
  return run_backward<kPairs, false, true>(p, in, parallel);
}

inline bool backward(const Problem& p, const Backward& in, const Parallel& parallel) {
  if (kHasPairs && p.dtype == DType::kBFloat16) return backward_of<kHasPairs>(p, in, parallel);
  return backward_of<false>(p, in, parallel);
}
