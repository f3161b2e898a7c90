// The register tile: kMR x (kNV * kWidth) accumulators, one broadcast of A against kNV vectors of B per
// step. 12 x 32 fills 24 of AVX-512's 32 registers (6 x 16: 12 of AVX2's 16): two loads of B and twelve
// memory-operand broadcasts feed 24 fused multiply-adds, so both FMA pipes stay busy.
// 14 x 32 was no faster and leaves no register for the epilogue; 8 x 48 reads B too often.
#pragma once

#if IBQ_WIDTH == 16
constexpr int kMR = 12;
#elif IBQ_WIDTH == 8
constexpr int kMR = 6;
#else
constexpr int kMR = 4;
#endif
constexpr int kNV = 2;
constexpr int kNR = kNV * kWidth;

// Codes in a block: a multiple of kNR (as columns of S) and of kMR (as rows of dE). 192 codes of 256
// floats are 192 KiB: a packed and a row-major copy and the block's gradient stay in a 1 MiB L2.
constexpr int kBlock = 192;
static_assert(kBlock % kNR == 0 && kBlock % kMR == 0, "block must hold whole tiles both ways");
// Rows whose dS is gathered before the dE product: long enough to amortise its accumulators' traffic.
constexpr int kGroup = 8 * kMR;

// acc[i][v] += sum_k A[k * a_step + i * kAStride] * B[k * b_step + v * kWidth]
template <int kAStride>
IBQ_INLINE void multiply(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t steps,
                         F (&acc)[kMR][kNV]) {
  for (int64_t s = 0; s < steps; ++s) {
    __builtin_prefetch(b + 8 * b_step);
    __builtin_prefetch(b + 8 * b_step + kWidth);
    F bv[kNV];
#pragma GCC unroll 2
    for (int v = 0; v < kNV; ++v) bv[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kMR; ++i) {
      F av = set1(a[i * kAStride]);
#pragma GCC unroll 2
      for (int v = 0; v < kNV; ++v) acc[i][v] += av * bv[v];
    }
    a += a_step;
    b += b_step;
  }
}

IBQ_INLINE void clear(F (&acc)[kMR][kNV]) {
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kNV; ++v) acc[i][v] = F{};
}

// out[kMR][kBlock] = scale * rows . codes^T + bias for `panels` panels of a packed block.
// rows: one packed tile [d][kMR]; codes: [panels][d][kNR]; bias: [kBlock].
inline void logits_tile(const float* rows, const float* codes, int64_t d, int panels, float scale,
                        const float* bias, float* out) {
  const F scale_v = set1(scale);
  for (int p = 0; p < panels; ++p) {
    F acc[kMR][kNV];
    clear(acc);
    multiply<1>(rows, kMR, codes + (int64_t)p * kNR * d, kNR, d, acc);
#pragma GCC unroll 16
    for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kNV; ++v) {
        int column = p * kNR + v * kWidth;
        store(out + i * kBlock + column, acc[i][v] * scale_v + load(bias + column));
      }
  }
}

// out[i][:padded] = out[i] * alpha[i] + sum_k weights[i][k] * rows[k] for the kMR rows of a tile.
// weights: [kMR][kBlock]; rows: [count][padded].
inline void combine_tile(const float* weights, const float* rows, int64_t count, int64_t padded,
                         const float* alpha, float* out) {
  for (int64_t c = 0; c < padded; c += kNR) {
    F acc[kMR][kNV];
    clear(acc);
    multiply<kBlock>(weights, 1, rows + c, padded, count, acc);
#pragma GCC unroll 16
    for (int i = 0; i < kMR; ++i) {
      F scale = set1(alpha[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kNV; ++v) {
        float* p = out + i * padded + c + v * kWidth;
        store(p, load(p) * scale + acc[i][v]);
      }
    }
  }
}

// out[j][:padded] += sum_r weights[r][j] * rows[r] for all codes j of a block.
// weights: [count][kBlock]; rows: [count][padded]; out: [codes rounded up to kMR][padded].
inline void accumulate_transposed(const float* weights, const float* rows, int64_t count, int64_t codes,
                                  int64_t padded, float* out) {
  for (int64_t c = 0; c < padded; c += kNR)
    for (int64_t j = 0; j < codes; j += kMR) {
      F acc[kMR][kNV];
#pragma GCC unroll 16
      for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kNV; ++v) acc[i][v] = load(out + (j + i) * padded + c + v * kWidth);
      multiply<1>(weights + j, kBlock, rows + c, padded, count, acc);
#pragma GCC unroll 16
      for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kNV; ++v) store(out + (j + i) * padded + c + v * kWidth, acc[i][v]);
    }
}
