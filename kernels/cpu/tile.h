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

// Operands come in two forms. Single: float32. Pairs: bfloat16, two consecutive terms of the product in one
// 32-bit word, multiplied and added in one instruction; half the words, twice the rate. Only a translation
// unit compiled for AVX512-BF16 has pairs; elsewhere bfloat16 is widened to float32 while packing.
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// 32-bit words that `terms` terms of a product take.
template <bool kPairs>
IBQ_INLINE int64_t words(int64_t terms) {
  return kPairs ? (terms + 1) / 2 : terms;
}

template <bool kPairs>
IBQ_INLINE F multiply_add(F a, F b, F c) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  // Said outright where it exists, not left to the compiler: the exact search settles scores by the same
  // operations in scalar code.
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// One word in every lane. A pair must keep its bits, so no arithmetic touches it.
template <bool kPairs>
IBQ_INLINE F broadcast(const float* p) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return (F)_mm512_set1_epi32(bits);
  }
#endif
  return set1(*p);
}

// acc[i][v] += sum_k A[k * a_step + i * kAStride] * B[k * b_step + v * kWidth], steps and strides in words
template <bool kPairs, int kAStride>
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
      F av = broadcast<kPairs>(a + i * kAStride);
#pragma GCC unroll 2
      for (int v = 0; v < kNV; ++v) acc[i][v] = multiply_add<kPairs>(av, bv[v], acc[i][v]);
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
// rows: one packed tile [depth][kMR]; codes: [panels][depth][kNR], depth in words; bias: [kBlock].
template <bool kPairs>
void logits_tile(const float* rows, const float* codes, int64_t depth, int panels, float scale,
                 const float* bias, float* out) {
  const F scale_v = set1(scale);
  for (int p = 0; p < panels; ++p) {
    F acc[kMR][kNV];
    clear(acc);
    multiply<kPairs, 1>(rows, kMR, codes + (int64_t)p * kNR * depth, kNR, depth, acc);
#pragma GCC unroll 16
    for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kNV; ++v) {
        int column = p * kNR + v * kWidth;
        store(out + i * kBlock + column, multiply_add<false>(acc[i][v], scale_v, load(bias + column)));
      }
  }
}

#if defined(__AVX512BF16__)
// Rounds `count` floats (a multiple of 32) to bfloat16, in order: neighbours become a pair.
IBQ_INLINE void round_row(const float* x, int64_t count, float* out) {
  for (int64_t j = 0; j < count; j += 2 * kWidth) {
    __m512bh h = _mm512_cvtne2ps_pbh((__m512)load(x + j + kWidth), (__m512)load(x + j));
    store(out + j / 2, (F)h);
  }
}

// out[j] = pair of (low[j], high[j]) rounded to bfloat16.
IBQ_INLINE F round_pair(F low, F high) {
  __m512i l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)low));
  __m512i h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)high));
  return (F)_mm512_or_si512(l, _mm512_slli_epi32(h, 16));
}
#endif

// out[i][:padded] = out[i] * alpha[i] + sum_k weights[i][k] * rows[k] for the kMR rows of a tile.
// weights: [kMR][kBlock], zero from `count` to the next multiple of kNR; rows: [words(count)][padded].
template <bool kPairs>
void combine_tile(const float* weights, const float* rows, int64_t count, int64_t padded, const float* alpha,
                  float* out) {
  constexpr int kStride = kPairs ? kBlock / 2 : kBlock;
#if defined(__AVX512BF16__)
  alignas(64) float rounded[kPairs ? kMR * kStride : 1];
  if constexpr (kPairs) {
    const int64_t whole = (count + kNR - 1) / kNR * kNR;
    for (int i = 0; i < kMR; ++i) round_row(weights + i * kBlock, whole, rounded + i * kStride);
    weights = rounded;
  }
#endif
  for (int64_t c = 0; c < padded; c += kNR) {
    F acc[kMR][kNV];
    clear(acc);
    multiply<kPairs, kStride>(weights, 1, rows + c, padded, words<kPairs>(count), acc);
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
// weights: [count][kBlock], count <= kGroup; rows: [words(count)][padded]; out: [codes rounded up to
// kMR][padded].
template <bool kPairs>
void accumulate_transposed(const float* weights, const float* rows, int64_t count, int64_t codes,
                           int64_t padded, float* out) {
#if defined(__AVX512BF16__)
  alignas(64) float rounded[kPairs ? kGroup / 2 * kBlock : 1];
  if constexpr (kPairs) {
    for (int64_t r = 0; r < count; r += 2)
      for (int64_t j = 0; j < codes; j += kWidth) {
        const F high = r + 1 < count ? load(weights + (r + 1) * kBlock + j) : F{};
        store(rounded + r / 2 * kBlock + j, round_pair(load(weights + r * kBlock + j), high));
      }
    weights = rounded;
  }
#endif
  for (int64_t c = 0; c < padded; c += kNR)
    for (int64_t j = 0; j < codes; j += kMR) {
      F acc[kMR][kNV];
#pragma GCC unroll 16
      for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kNV; ++v) acc[i][v] = load(out + (j + i) * padded + c + v * kWidth);
      multiply<kPairs, 1>(weights + j, kBlock, rows + c, padded, words<kPairs>(count), acc);
#pragma GCC unroll 16
      for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kNV; ++v) store(out + (j + i) * padded + c + v * kWidth, acc[i][v]);
    }
}
