// Writing float32 as any supported dtype, rounded to nearest, ties to even: the counterpart of pack.h's
// reading.
#pragma once

IBQ_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

IBQ_INLINE uint16_t to_bf16(float f) {
  const uint32_t u = bits_of(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);  // NaN stays one
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

IBQ_INLINE uint16_t to_f16(float f) {
  const uint32_t u = bits_of(f), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);  // 2^16 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 1/2 leaves the multiple of 2^-24, rounded, in the low bits.
    float m;
    __builtin_memcpy(&m, &magnitude, 4);
    return (uint16_t)(sign | (bits_of(m + 0.5f) - 0x3f000000u));
  }
  // Rounding may carry into the exponent, up to infinity's.
  return (uint16_t)(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

template <DType T>
IBQ_INLINE void store_element(void* out, int64_t i, float f) {
  if (T == DType::kFloat32)
    static_cast<float*>(out)[i] = f;
  else
    static_cast<uint16_t*>(out)[i] = T == DType::kBFloat16 ? to_bf16(f) : to_f16(f);
}

typedef uint32_t U __attribute__((vector_size(4 * IBQ_WIDTH)));
typedef uint16_t H __attribute__((vector_size(2 * IBQ_WIDTH)));

// As to_bf16, a vector.
IBQ_INLINE H to_bf16(F v) {
  const U u = (U)v, high = u >> 16;
  const U rounded = (u + 0x7fffu + (high & 1u)) >> 16;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? high | 0x40u : rounded, H);
}

// The first `live` elements of v, or all, into consecutive elements of out.
template <DType T>
IBQ_INLINE void store_narrow(void* out, int64_t i, F v, int64_t live) {
  if (live >= kWidth && T == DType::kFloat32) return store(static_cast<float*>(out) + i, v);
  if (live >= kWidth && T == DType::kBFloat16) {
    const H h = to_bf16(v);
    __builtin_memcpy(static_cast<uint16_t*>(out) + i, &h, sizeof(h));
    return;
  }
  for (int l = 0; l < min_of(live, kWidth); ++l) store_element<T>(out, i + l, v[l]);
}

// The first `live` elements, or kWidth, the others zero.
template <DType T>
IBQ_INLINE F load_live(const void* p, int64_t i, int64_t live) {
  if (live >= kWidth) return load_as_float<T>(p, i);
  F v = F{};
  for (int l = 0; l < live; ++l) v[l] = element<T>(p, i + l);
  return v;
}

// body called with a value whose type carries the dtype (C++17 has no template lambdas).
template <DType T>
struct DTypeOf {
  static constexpr DType value = T;
};
template <typename Body>
IBQ_INLINE void for_dtype(DType t, const Body& body) {
  switch (t) {
    case DType::kFloat32:
      return body(DTypeOf<DType::kFloat32>());
    case DType::kBFloat16:
      return body(DTypeOf<DType::kBFloat16>());
    case DType::kFloat16:
      return body(DTypeOf<DType::kFloat16>());
  }
}

inline int64_t element_bytes(DType t) { return t == DType::kFloat32 ? 4 : 2; }
