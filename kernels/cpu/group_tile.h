// Products of a group of rows with a block of codes, for dimensions beyond what backward.h's tile by tile
// sweep keeps in cache: at d = 1024 a packed row tile alone fills L1, a packed block most of L2.
//
//   group_logits      S = rows . codes^T + bias
//   group_combine     dRows += dS . codes         a strip of codes stays in L1 for all row tiles of the group
//   group_transposed  dCodes += dS^T . rows       a strip of rows stays near for all code tiles of the block
//
// A strip is kNR columns of a matrix stored together, [strip][row][kNR]: rows of a row-major [., 1024] matrix
// lie 4 KiB apart and would meet in one set of L1. For the same reason rows of S are kLine apart, not kBlock.
// Each product then reads 4 to 11 bytes a cycle from L2 and below 2 from L3, so that group and block need not
// fit L2 together. One thread of a core that can do 239 GFLOP/s, d = 1024: 200 to 215 in each of the three.
// Tried and lost: cutting the depth of group_logits in slices that leave a panel in L1 (202 against 212);
// groups of 8 and 16 tiles (3 and 2 % in the backward); 86 tiles were no faster than 32; the
// loop over rows outside the one over panels in group_logits: no difference.
//
// bfloat16 multiplies pairs (tile.h) where the CPU does: the depth is in words of two terms, of the dimension
// in S, of codes in dRows, of rows in dCodes; dS is rounded to bfloat16 once for each of the last two.
#pragma once

constexpr int64_t kGroupTiles = 32;
constexpr int64_t kGroupRows = kGroupTiles * kMR;
constexpr int64_t kLine = kBlock + kWidth;  // floats between rows of S

// Adds acc to the kMR rows of a strip at p, which fetch_strip asked for while the product was formed.
IBQ_INLINE void fetch_strip(const float* p) {
  for (int i = 0; i < kMR * kNR; i += 16) __builtin_prefetch(p + i, 1);
}
IBQ_INLINE void add_to_strip(float* p, const F (&acc)[kMR][kNV]) {
#pragma GCC unroll 16
  for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kNV; ++v) {
      float* at = p + i * kNR + v * kWidth;
      store(at, load(at) + acc[i][v]);
    }
}

// s[tiles * kMR][kLine] = rows . codes^T + bias. rows: packed tiles [tile][depth][kMR]; codes:
// [panels][depth][kNR]; depth in words.
template <bool kPairs>
void group_logits(const float* rows, int64_t tiles, const float* codes, int64_t depth, int panels,
                  const float* bias, float* s) {
  for (int p = 0; p < panels; ++p)
    for (int64_t t = 0; t < tiles; ++t) {
      float* out = s + t * kMR * kLine + p * kNR;
      F acc[kMR][kNV];
      clear(acc);
      multiply<kPairs, 1>(rows + t * kMR * depth, kMR, codes + (int64_t)p * kNR * depth, kNR, depth, acc);
#pragma GCC unroll 16
      for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kNV; ++v)
          store(out + i * kLine + v * kWidth, acc[i][v] + load(bias + p * kNR + v * kWidth));
    }
}

// Row tiles of a group that matter, as runs of neighbours.
struct Runs {
  int count = 0;
  int64_t begin[kGroupTiles], end[kGroupTiles];  // tiles
  void add(int64_t tile) {
    if (count > 0 && end[count - 1] == tile) {
      ++end[count - 1];
    } else {
      begin[count] = tile;
      end[count++] = tile + 1;
    }
  }
};

// A tile's dS as the products want it. Pairs: in place of x the rows rounded to pairs of codes, for
// group_combine; in `paired` [kMR / 2][kLine] pairs of rows, for group_transposed. Single: x is both.
template <bool kPairs>
IBQ_INLINE void round_tile([[maybe_unused]] float* x, [[maybe_unused]] int columns,
                           [[maybe_unused]] float* paired) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    static_assert(kMR % 2 == 0, "pairs of rows must not cross tiles");
    for (int i = 0; i < kMR; i += 2)
      for (int j = 0; j < columns; j += kWidth)
        store(paired + i / 2 * kLine + j, round_pair(load(x + i * kLine + j), load(x + (i + 1) * kLine + j)));
    for (int i = 0; i < kMR; ++i) round_row(x + i * kLine, columns, x + i * kLine);
  }
#endif
}

// out += ds . codes for the tiles of runs. ds: [row][kLine] words; codes: strips
// [strips][words(kBlock)][kNR]; out: the group's rows in strips [strips][stride][kNR].
template <bool kPairs>
void group_combine(const Runs& runs, const float* ds, const float* codes, int64_t count, int64_t strips,
                   int64_t stride, float* out) {
  for (int64_t c = 0; c < strips; ++c)
    for (int q = 0; q < runs.count; ++q)
      for (int64_t t = runs.begin[q]; t < runs.end[q]; ++t) {
        float* p = out + (c * stride + t * kMR) * kNR;
        F acc[kMR][kNV];
        fetch_strip(p);
        clear(acc);
        multiply<kPairs, kLine>(ds + t * kMR * kLine, 1, codes + c * words<kPairs>(kBlock) * kNR, kNR,
                                words<kPairs>(count), acc);
        add_to_strip(p, acc);
      }
}

// out += ds^T . rows over the rows of runs, at most `live` of the group. ds: [words(rows)][kLine]; rows: the
// group's rows in strips [strips][stride][kNR], stride in words; out: strips [strips][kBlock][kNR].
template <bool kPairs>
void group_transposed(const Runs& runs, int64_t live, const float* ds, const float* rows, int64_t codes,
                      int64_t strips, int64_t stride, float* out) {
  for (int64_t c = 0; c < strips; ++c)
    for (int64_t j = 0; j < codes; j += kMR) {
      float* p = out + (c * kBlock + j) * kNR;
      F acc[kMR][kNV];
      fetch_strip(p);
      clear(acc);
      for (int q = 0; q < runs.count; ++q) {
        const int64_t r0 = words<kPairs>(runs.begin[q] * kMR);
        const int64_t r1 = words<kPairs>(min_of(runs.end[q] * kMR, live));
        multiply<kPairs, 1>(ds + r0 * kLine + j, kLine, rows + (c * stride + r0) * kNR, kNR, r1 - r0, acc);
      }
      add_to_strip(p, acc);
    }
}

// Rows [row, row + rows) of a [., d] matrix as strips [strip][stride][kNR], columns past d zero.
template <DType T>
void pack_strips_of(const void* src, int64_t row, int64_t rows, int64_t d, int64_t stride, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t base = (row + i) * d;
    int64_t j = 0;
    for (; j + kNR <= d; j += kNR)
#pragma GCC unroll 2
      for (int v = 0; v < kNV; ++v)
        store(out + j * stride + i * kNR + v * kWidth, load_as_float<T>(src, base + j + v * kWidth));
    for (int64_t e = j; j < d && e < j + kNR; ++e)
      out[j * stride + i * kNR + e - j] = e < d ? element<T>(src, base + e) : 0.0f;
  }
}

#if defined(__AVX512BF16__)
// The same in pairs of rows, [strip][stride][kNR] with the stride in words: low half the even row, high half
// the odd one, zero past the end.
inline void pack_strip_pairs(const void* src, int64_t row, int64_t rows, int64_t d, int64_t stride,
                             float* out) {
  const uint16_t* from = static_cast<const uint16_t*>(src) + row * d;
  for (int64_t i = 0; i < rows; i += 2) {
    const uint16_t* low = from + i * d;
    for (int64_t j = 0; j < d; j += kNR)
      for (int v = 0; v < kNV; ++v) {
        const int64_t at = j + v * kWidth, left = d - at;
        const __mmask16 live = left >= kWidth ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        const __mmask16 high = i + 1 < rows ? live : 0;
        const __m512i l = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, low + at));
        const __m512i h = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, low + d + at));
        store(out + j * stride + i / 2 * kNR + v * kWidth, (F)_mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
      }
  }
}
#endif

template <bool kPairs>
void pack_strips(DType t, const void* src, int64_t row, int64_t rows, int64_t d, int64_t stride, float* out) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return pack_strip_pairs(src, row, rows, d, stride, out);
#endif
  switch (t) {
    case DType::kFloat32:
      return pack_strips_of<DType::kFloat32>(src, row, rows, d, stride, out);
    case DType::kBFloat16:
      return pack_strips_of<DType::kBFloat16>(src, row, rows, d, stride, out);
    case DType::kFloat16:
      return pack_strips_of<DType::kFloat16>(src, row, rows, d, stride, out);
  }
}
