// Philox-4x32-10 for a vector of neighbouring counters: the words of kernels/common/philox.h, bit for bit.
// Included inside an ISA's anonymous namespace (see simd.h).
//
// A 64-bit lane carries one counter's word; the widening multiply reads its low half, so the halves that
// shifts and xors leave behind never have to be cleared. 8 instructions a round for 2 * kWidth words.
#pragma once

typedef uint64_t U64 __attribute__((vector_size(4 * IBQ_WIDTH)));
typedef uint64_t U64Unaligned __attribute__((vector_size(4 * IBQ_WIDTH), aligned(4), may_alias));

constexpr int kDraws = 2 * kWidth;  // words of one call: kWidth / 2 counters of four

IBQ_INLINE U64 multiply_low(U64 a, uint32_t b) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// What all draws of one row share.
struct DrawKey {
  uint32_t key0, key1, position, image_low, image_high;
};

// words[i] = word of code first + i for i < kDraws; first is a multiple of 4.
IBQ_INLINE void draw_words(const DrawKey& key, int64_t first, uint32_t* words) {
  U64 c0;
  for (int i = 0; i < kWidth / 2; ++i) c0[i] = i;
  c0 += static_cast<uint64_t>(first / 4);
  U64 c1 = U64{} + key.position, c2 = U64{} + key.image_low, c3 = U64{} + key.image_high;
  uint32_t k0 = key.key0, k1 = key.key1;
  for (int round = 0; round < 10; ++round) {
    const U64 product0 = multiply_low(c0, 0xD2511F53u), product1 = multiply_low(c2, 0xCD9E8D57u);
    c0 = (product1 >> 32) ^ c1 ^ (U64{} + k0);
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ (U64{} + k1);
    c3 = product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const U64 low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
#if defined(__AVX512F__)
  const __m512i a = (__m512i)low, b = (__m512i)high;
  const __m512i head = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i tail = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  *reinterpret_cast<U64Unaligned*>(words) = (U64)_mm512_permutex2var_epi64(a, head, b);
  *reinterpret_cast<U64Unaligned*>(words + kWidth) = (U64)_mm512_permutex2var_epi64(a, tail, b);
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi64((__m256i)low, (__m256i)high);
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)low, (__m256i)high);
  *reinterpret_cast<U64Unaligned*>(words) = (U64)_mm256_permute2x128_si256(even, odd, 0x20);
  *reinterpret_cast<U64Unaligned*>(words + kWidth) = (U64)_mm256_permute2x128_si256(even, odd, 0x31);
#else
  for (int i = 0; i < kWidth / 2; ++i) {
    words[4 * i] = static_cast<uint32_t>(low[i]);
    words[4 * i + 1] = static_cast<uint32_t>(low[i] >> 32);
    words[4 * i + 2] = static_cast<uint32_t>(high[i]);
    words[4 * i + 3] = static_cast<uint32_t>(high[i] >> 32);
  }
#endif
}
