// A vector of kWidth floats for the instruction set this translation unit is compiled for, written with
// the compilers' vector extensions so that one source serves AVX-512, AVX2 and everything else.
// Included inside an ISA's own anonymous namespace (see isa.inl): nothing here may be shared between
// translation units, because a function compiled for AVX-512 must never be picked by the linker for a
// CPU without it. For the same reason no std:: template is used in these files.
#pragma once

#if defined(__AVX512F__)
#define IBQ_WIDTH 16
#elif defined(__AVX2__)
#define IBQ_WIDTH 8
#else
#define IBQ_WIDTH 4
#endif

#define IBQ_INLINE inline __attribute__((always_inline))

constexpr int kWidth = IBQ_WIDTH;

typedef float F __attribute__((vector_size(4 * IBQ_WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * IBQ_WIDTH)));
typedef float FUnaligned __attribute__((vector_size(4 * IBQ_WIDTH), aligned(4), may_alias));
typedef int32_t IUnaligned __attribute__((vector_size(4 * IBQ_WIDTH), aligned(4), may_alias));

IBQ_INLINE F load(const float* p) { return *reinterpret_cast<const FUnaligned*>(p); }
IBQ_INLINE void store(float* p, F v) { *reinterpret_cast<FUnaligned*>(p) = v; }
IBQ_INLINE I load_i(const int32_t* p) { return *reinterpret_cast<const IUnaligned*>(p); }
IBQ_INLINE void store_i(int32_t* p, I v) { *reinterpret_cast<IUnaligned*>(p) = v; }
IBQ_INLINE F set1(float x) { return x - F{}; }
IBQ_INLINE I set1_i(int32_t x) { return x - I{}; }
IBQ_INLINE F max_of(F a, F b) { return a > b ? a : b; }
IBQ_INLINE I iota() {
  I v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

IBQ_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether any lane of a is greater than b's.
IBQ_INLINE bool any_greater(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  I m = a > b;
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= m[i];
  return any != 0;
#endif
}

// Whether any lane of a is not below b's: NaN counts as not below.
IBQ_INLINE bool any_not_below(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)) != 0;
#else
  I m = ~(a < b);
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= m[i];
  return any != 0;
#endif
}

IBQ_INLINE float horizontal_max(F v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
IBQ_INLINE double horizontal_sum(F v) {
  double s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
}

// exp(x) for x <= about 88; 0 below -87.3 (no denormals), NaN stays NaN. Relative error below 1.2e-7:
// x = n ln2 + r, |r| <= ln2/2, degree-6 polynomial in r, exponent added to the bits. ln2 is split in
// two so that n ln2 is exact in float32.
IBQ_INLINE F exp_of(F x) {
  const F lowest = set1(-87.3f);
  I zero_mask = x < lowest;
  F xc = zero_mask ? lowest : x;
  const F magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  F t = xc * 1.44269504088896341f + magic;
  F nf = t - magic;
  F r = nf * -0.693359375f + xc;
  r = nf * 2.12194440e-4f + r;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  F e = (p * r) * r + r + 1.0f;
  I n = (I)t;  // low bits of the magic sum hold n
  I bits = (I)e + (n << 23);
  return zero_mask ? F{} : (F)bits;
}
