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

// A [rows, d] block starting at row `row`, transposed into panels of `width` rows: out[panel][d][width].
// Rows past `rows` up to the panel's end are zero.
template <DType T>
void pack_panels_of(const void* src, int64_t row, int64_t rows, int64_t d, int width, float* out) {
  for (int64_t p = 0; p < rows; p += width) {
    int live = (int)(rows - p < width ? rows - p : width);
    float* panel = out + p * d;
    // Sixteen columns at a time: each source line is read once while its destination lines stay in L1.
    for (int64_t j0 = 0; j0 < d; j0 += 16) {
      int64_t j1 = j0 + 16 < d ? j0 + 16 : d;
      for (int i = 0; i < live; ++i) {
        int64_t base = (row + p + i) * d;
        for (int64_t j = j0; j < j1; ++j) panel[j * width + i] = element<T>(src, base + j);
      }
    }
    for (int64_t j = 0; j < d; ++j)
      for (int i = live; i < width; ++i) panel[j * width + i] = 0.0f;
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
