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
// groups of 8 and 16 tiles (3 and 2 % in the backward); 86 tiles were no faster than 32.
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

// s[tiles * kMR][kLine] = rows . codes^T + bias. rows: packed tiles [tile][d][kMR]; codes: [panels][d][kNR].
inline void group_logits(const float* rows, int64_t tiles, const float* codes, int64_t d, int panels,
                         const float* bias, float* s) {
  for (int p = 0; p < panels; ++p)
    for (int64_t t = 0; t < tiles; ++t) {
      float* out = s + t * kMR * kLine + p * kNR;
      F acc[kMR][kNV];
      clear(acc);
      multiply<false, 1>(rows + t * kMR * d, kMR, codes + (int64_t)p * kNR * d, kNR, d, acc);
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

// out += ds . codes for the tiles of runs. codes: strips [strips][kBlock][kNR]; out: the group's rows in
// strips [strips][stride][kNR].
inline void group_combine(const Runs& runs, const float* ds, const float* codes, int64_t count,
                          int64_t strips, int64_t stride, float* out) {
  for (int64_t c = 0; c < strips; ++c)
    for (int q = 0; q < runs.count; ++q)
      for (int64_t t = runs.begin[q]; t < runs.end[q]; ++t) {
        float* p = out + (c * stride + t * kMR) * kNR;
        F acc[kMR][kNV];
        fetch_strip(p);
        clear(acc);
        multiply<false, kLine>(ds + t * kMR * kLine, 1, codes + c * kBlock * kNR, kNR, count, acc);
        add_to_strip(p, acc);
      }
}

// out += ds^T . rows over the rows of runs, at most `live` of the group. rows: the group's rows in strips
// [strips][stride][kNR]; out: strips [strips][kBlock][kNR].
inline void group_transposed(const Runs& runs, int64_t live, const float* ds, const float* rows,
                             int64_t codes, int64_t strips, int64_t stride, float* out) {
  for (int64_t c = 0; c < strips; ++c)
    for (int64_t j = 0; j < codes; j += kMR) {
      float* p = out + (c * kBlock + j) * kNR;
      F acc[kMR][kNV];
      fetch_strip(p);
      clear(acc);
      for (int q = 0; q < runs.count; ++q) {
        const int64_t r0 = runs.begin[q] * kMR, r1 = min_of(runs.end[q] * kMR, live);
        multiply<false, 1>(ds + r0 * kLine + j, kLine, rows + (c * stride + r0) * kNR, kNR, r1 - r0, acc);
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

inline void pack_strips(DType t, const void* src, int64_t row, int64_t rows, int64_t d, int64_t stride,
                        float* out) {
  switch (t) {
    case DType::kFloat32:
      return pack_strips_of<DType::kFloat32>(src, row, rows, d, stride, out);
    case DType::kBFloat16:
      return pack_strips_of<DType::kBFloat16>(src, row, rows, d, stride, out);
    case DType::kFloat16:
      return pack_strips_of<DType::kFloat16>(src, row, rows, d, stride, out);
  }
}
