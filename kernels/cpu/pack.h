// Reading operands of any supported dtype as float32, and packing them for the register tiles.
#pragma once

IBQ_INLINE float from_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

IBQ_INLINE float from_f16(uint16_t h) {
  // Exponent rebias by multiplication keeps subnormals exact; inf and NaN get their exponent by hand.
  uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
  float f;
  __builtin_memcpy(&f, &magnitude, 4);
  f *= 5.192296858534828e33f;  // 2^112
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  if ((h & 0x7c00u) == 0x7c00u) u = magnitude | 0x7f800000u;
  u |= (uint32_t)(h & 0x8000u) << 16;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

template <DType T>
IBQ_INLINE float element(const void* p, int64_t i) {
  if (T == DType::kFloat32) return static_cast<const float*>(p)[i];
  uint16_t h = static_cast<const uint16_t*>(p)[i];
  return T == DType::kBFloat16 ? from_bf16(h) : from_f16(h);
}

// kWidth consecutive elements as float32.
template <DType T>
IBQ_INLINE F load_as_float(const void* p, int64_t i) {
  if (T == DType::kFloat32) return load(static_cast<const float*>(p) + i);
  F v;
  for (int l = 0; l < kWidth; ++l) v[l] = element<T>(p, i + l);
  return v;
}

// Transposes a kWidth x kWidth block in registers: log2(kWidth) rounds, round s exchanging the off-diagonal
// s x s corners of every pair (i, i + s).
template <int kStep, int... kLane>
IBQ_INLINE void exchange_corners(F (&v)[kWidth], std::integer_sequence<int, kLane...> lanes) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    const F a = v[i], b = v[i + kStep];
    v[i] = __builtin_shufflevector(a, b, ((kLane & kStep) ? kWidth + kLane - kStep : kLane)...);
    v[i + kStep] = __builtin_shufflevector(a, b, ((kLane & kStep) ? kWidth + kLane : kLane + kStep)...);
  }
  if constexpr (2 * kStep < kWidth) exchange_corners<2 * kStep>(v, lanes);
}

// Columns [0, d) of kWidth rows of src, the first at element `base`, into out[j * width + l].
template <DType T>
IBQ_INLINE void transpose_rows(const void* src, int64_t base, int64_t d, int width, float* out) {
  int64_t j = 0;
  for (; j + kWidth <= d; j += kWidth) {
    F v[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) v[i] = load_as_float<T>(src, base + i * d + j);
    exchange_corners<1>(v, std::make_integer_sequence<int, kWidth>());
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) store(out + (j + i) * width, v[i]);
  }
  for (; j < d; ++j)
    for (int i = 0; i < kWidth; ++i) out[j * width + i] = element<T>(src, base + i * d + j);
}

// A [rows, d] block starting at row `row`, transposed into panels of `width` rows: out[panel][d][width].
// Rows past `rows` up to the panel's end are zero.
template <DType T>
void pack_panels_of(const void* src, int64_t row, int64_t rows, int64_t d, int width, float* out) {
  for (int64_t p = 0; p < rows; p += width) {
    int live = (int)(rows - p < width ? rows - p : width);
    float* panel = out + p * d;
    int i = 0;
    for (; i + kWidth <= live; i += kWidth) transpose_rows<T>(src, (row + p + i) * d, d, width, panel + i);
    for (; i < live; ++i)
      for (int64_t j = 0; j < d; ++j) panel[j * width + i] = element<T>(src, (row + p + i) * d + j);
    for (; i < width; ++i)
      for (int64_t j = 0; j < d; ++j) panel[j * width + i] = 0.0f;
  }
}

inline void pack_panels(DType t, const void* src, int64_t row, int64_t rows, int64_t d, int width,
                        float* out) {
  switch (t) {
    case DType::kFloat32:
      return pack_panels_of<DType::kFloat32>(src, row, rows, d, width, out);
    case DType::kBFloat16:
      return pack_panels_of<DType::kBFloat16>(src, row, rows, d, width, out);
    case DType::kFloat16:
      return pack_panels_of<DType::kFloat16>(src, row, rows, d, width, out);
  }
}

template <DType T>
void widen_rows_of(const void* src, int64_t row, int64_t rows, int64_t d, int64_t padded, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < d; ++j) out[i * padded + j] = element<T>(src, (row + i) * d + j);
    for (int64_t j = d; j < padded; ++j) out[i * padded + j] = 0.0f;
  }
}

// Rows as float32 with the dimension padded by zeros to `padded`. Where the source already is that, no
// copy is made and the source's own address comes back.
inline const float* widen_rows(DType t, const void* src, int64_t row, int64_t rows, int64_t d, int64_t padded,
                               float* scratch) {
  switch (t) {
    case DType::kFloat32:
      if (padded == d) return static_cast<const float*>(src) + row * d;
      widen_rows_of<DType::kFloat32>(src, row, rows, d, padded, scratch);
      break;
    case DType::kBFloat16:
      widen_rows_of<DType::kBFloat16>(src, row, rows, d, padded, scratch);
      break;
    case DType::kFloat16:
      widen_rows_of<DType::kFloat16>(src, row, rows, d, padded, scratch);
      break;
  }
  return scratch;
}

#if defined(__AVX512BF16__)
// bfloat16 operands as pairs: see tile.h.

// As pack_panels, words of two columns each: out[panel][(d + 1) / 2][width].
inline void pack_pair_panels(const void* src, int64_t row, int64_t rows, int64_t d, int width, float* out) {
  if (d % 2 == 0)  // a row of pairs already is a row of words
    return pack_panels_of<DType::kFloat32>(src, row, rows, d / 2, width, out);
  const uint16_t* from = static_cast<const uint16_t*>(src);
  const int64_t depth = (d + 1) / 2;
  for (int64_t p = 0; p < rows; p += width)
    for (int i = 0; i < width; ++i)
      for (int64_t j = 0; j < depth; ++j) {
        uint32_t word = 0;
        if (p + i < rows) {
          const uint16_t* at = from + (row + p + i) * d + 2 * j;
          word = at[0] | (2 * j + 1 < d ? (uint32_t)at[1] << 16 : 0);
        }
        __builtin_memcpy(out + p * depth + j * width + i, &word, 4);
      }
}

// Rows two by two: out[r / 2][padded], low half row r, high half row r + 1 (zero past the end).
inline void pair_rows(const void* src, int64_t row, int64_t rows, int64_t d, int64_t padded, float* out) {
  const uint16_t* from = static_cast<const uint16_t*>(src);
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t* low = from + (row + r) * d;
    const uint16_t* high = low + d;
    const bool both = r + 1 < rows;
    float* to = out + r / 2 * padded;
    int64_t j = 0;
    for (; j + kWidth <= d; j += kWidth) {
      __m512i l = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + j)));
      __m512i h = both ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + j)))
                       : _mm512_setzero_si512();
      store(to + j, (F)_mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
    }
    for (; j < padded; ++j) {
      uint32_t word = j < d ? low[j] | (both ? (uint32_t)high[j] << 16 : 0) : 0;
      __builtin_memcpy(to + j, &word, 4);
    }
  }
}
#endif

// Either form, by template: panels for logits_tile, and rows for the second operand of the other products.
template <bool kPairs>
void pack_operand(DType t, const void* src, int64_t row, int64_t rows, int64_t d, int width, float* out) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return pack_pair_panels(src, row, rows, d, width, out);
#endif
  pack_panels(t, src, row, rows, d, width, out);
}

template <bool kPairs>
const float* rows_operand(DType t, const void* src, int64_t row, int64_t rows, int64_t d, int64_t padded,
                          float* scratch) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    pair_rows(src, row, rows, d, padded, scratch);
    return scratch;
  }
#endif
  return widen_rows(t, src, row, rows, d, padded, scratch);
}

template <DType T>
void add_scaled_row_of(const void* src, int64_t row, int64_t d, float scale, float* out) {
  for (int64_t j = 0; j < d; ++j) out[j] += scale * element<T>(src, row * d + j);
}

// out += scale * row of src.
inline void add_scaled_row(DType t, const void* src, int64_t row, int64_t d, float scale, float* out) {
  switch (t) {
    case DType::kFloat32:
      return add_scaled_row_of<DType::kFloat32>(src, row, d, scale, out);
    case DType::kBFloat16:
      return add_scaled_row_of<DType::kBFloat16>(src, row, d, scale, out);
    case DType::kFloat16:
      return add_scaled_row_of<DType::kFloat16>(src, row, d, scale, out);
  }
}
