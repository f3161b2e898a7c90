// out [M, N] = x [M, C] W^T for few rows, W row-major as it is stored: each element is a dot product of two
// contiguous vectors, kWidth partial sums (pairs: 2 kWidth terms) added by a fixed tree at the end.
//
// An element's sum therefore has one order whatever M is and whoever computes it: results are the same bits
// for any batch and any number of threads. Rows of W are read once, eight (or four) at a time, straight from
// where the model keeps them; nothing is packed, so float32 needs no second copy of the weights.
//
// Cost: 2MNC operations, N*C weights read. Up to M = 3 eight rows of W meet all of x (16 to 24 sums in
// registers, AVX-512), beyond that four rows meet up to six rows of x. A tile reads 64 bytes of each of its
// rows in turn, but asks memory for what the next tile needs, into L2, in the order in which it lies there:
// at C = 1024 float32 rows are 4 KiB apart, which L1 would not hold.
#pragma once

#if IBQ_WIDTH == 16
constexpr int kMaxRows = 6;   // rows of x against four rows of W
constexpr int kWideRows = 3;  // rows of x against eight
#else
constexpr int kMaxRows = 3;
constexpr int kWideRows = 1;
#endif
constexpr int kQuad = 4;

// A type's weights in memory, and what they are multiplied with.
template <WeightType W>
struct Weights {
  static constexpr bool kPairs = kHasPairs && W == WeightType::kBFloat16;
  static constexpr int64_t kBytes = W == WeightType::kFloat32 ? 4 : W == WeightType::kInt8 ? 1 : 2;
  static constexpr int64_t kPerLine = 64 / kBytes;                // weights
  static constexpr int64_t kStep = kPairs ? 2 * kWidth : kWidth;  // terms of one multiply_add
};

// Rows of x as a product takes them: float32, or bfloat16 where pairs are multiplied, zero from C up to a
// multiple of 64, and rows apart by a line more, so that they do not all fall on the same places in L1.
template <WeightType W>
struct Activations {
  typedef typename std::conditional<Weights<W>::kPairs, uint16_t, float>::type Element;
  static IBQ_INLINE int64_t stride(int64_t c) { return (c + 63) / 64 * 64 + 32; }
  static IBQ_INLINE void put(Element* row, int64_t i, F v, int64_t live) {
    store_narrow<Weights<W>::kPairs ? DType::kBFloat16 : DType::kFloat32>(row, i, v, live);
  }
  static IBQ_INLINE void finish(Element* row, int64_t c) {
    for (int64_t i = c; i < stride(c); ++i) row[i] = 0;
  }
};

// kWidth consecutive numbers as float32.
template <WeightType W>
IBQ_INLINE F widened(const char* p) {
  if constexpr (W == WeightType::kFloat32) {
    return load(reinterpret_cast<const float*>(p));
  } else if constexpr (W == WeightType::kBFloat16) {
    H h;
    __builtin_memcpy(&h, p, sizeof(h));
    return (F)(__builtin_convertvector(h, U) << 16);
  } else if constexpr (W == WeightType::kInt8) {
    // by hand: GCC 12 converts such a vector element by element
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (F)_mm512_maskz_cvtepi32_ps((__mmask16)-1, _mm512_maskz_cvtepi8_epi32((__mmask16)-1, bytes));
#elif defined(__AVX2__)
    return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    F v;
    for (int l = 0; l < kWidth; ++l) v[l] = static_cast<float>(reinterpret_cast<const int8_t*>(p)[l]);
    return v;
#endif
  } else {
#if defined(__AVX512F__)
    return (F)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    return load_as_float<DType::kFloat16>(p, 0);
#endif
  }
}

// The same for a product: pairs stay as they are.
template <WeightType W>
IBQ_INLINE F load_weights(const char* p) {
  if constexpr (Weights<W>::kPairs) {
    F pairs;  // a row of pairs may begin anywhere
    __builtin_memcpy(&pairs, p, sizeof(pairs));
    return pairs;
  } else {
    return widened<W>(p);
  }
}

template <typename Element>
IBQ_INLINE F load_activations(const Element* p) {
  return load(reinterpret_cast<const float*>(p));
}

// The sums of four vectors' lanes.
typedef float Sums __attribute__((vector_size(16)));
IBQ_INLINE Sums sums_of(F a, F b, F c, F d) {
#if defined(__AVX512F__)
  const F ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const F cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  F all = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  all = all + __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  all = all + __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return __builtin_shufflevector(all, all, 0, 4, 8, 12);
#elif defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  return (Sums)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  Sums s;
  const F v[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) s[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
  return s;
#endif
}

#if defined(__AVX512F__)
// Lanes of a and b in turns of kRun: what a shuffle would do in the place of any other instruction.
template <int kRun>
IBQ_INLINE F in_turns(F a, F b) {
  constexpr __mmask16 kOfB = kRun == 8 ? 0xff00 : 0xcccc;
  return (F)_mm512_mask_blend_ps(kOfB, (__m512)a, (__m512)b);
}

// Lane 4 m + r: the sum of v[m][r]'s lanes, added by the tree of sums_of, with 20 shuffles for its 36.
IBQ_INLINE F sums_of_sixteen(const F (&v)[4][4]) {
  F columns[4], pairs[2];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {  // eight lanes of each of two rows
      const F a = v[2 * i][r], b = v[2 * i + 1][r];
      pairs[i] = in_turns<8>(a, b) +
                 __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
    }
    const F a = pairs[0], b = pairs[1];  // four of each of four
    columns[r] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                 __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // in every quarter two of each of two columns
    const F a = columns[2 * i], b = columns[2 * i + 1];
    pairs[i] = in_turns<2>(a, b) +
               __builtin_shufflevector(a, b, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
  }
  const F a = pairs[0], b = pairs[1];
  return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}
#endif

// out[m * out_stride + 0..3]: the sums of columns [first, first + 4) of acc.
template <int kM, int kR>
IBQ_INLINE void store_sums(const F (&acc)[kM][kR], int first, float* out, int64_t out_stride) {
  const auto put = [&](int m, Sums s) { __builtin_memcpy(out + m * out_stride, &s, sizeof(s)); };
  int m = 0;
#if defined(__AVX512F__)
#pragma GCC unroll 2
  for (; m + 4 <= kM; m += 4) {
    F v[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) v[i][r] = acc[m + i][first + r];
    const F s = sums_of_sixteen(v);
    put(m, __builtin_shufflevector(s, s, 0, 1, 2, 3));
    put(m + 1, __builtin_shufflevector(s, s, 4, 5, 6, 7));
    put(m + 2, __builtin_shufflevector(s, s, 8, 9, 10, 11));
    put(m + 3, __builtin_shufflevector(s, s, 12, 13, 14, 15));
  }
#endif
#pragma GCC unroll 6
  for (; m < kM; ++m) put(m, sums_of(acc[m][first], acc[m][first + 1], acc[m][first + 2], acc[m][first + 3]));
}

// One line of every weight row against the same terms of kM rows of x.
template <WeightType W, int kM, int kR, typename Element>
IBQ_INLINE void multiply_line(const char* const (&rows)[kR], int64_t at, const Element* x, int64_t x_stride,
                              F (&acc)[kM][kR]) {
#pragma GCC unroll 16
  for (int64_t s = 0; s < Weights<W>::kPerLine; s += Weights<W>::kStep) {
    F xs[kM];
#pragma GCC unroll 6
    for (int m = 0; m < kM; ++m) xs[m] = load_activations(x + m * x_stride + s);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const F w = load_weights<W>(rows[r] + at + s * Weights<W>::kBytes);
#pragma GCC unroll 6
      for (int m = 0; m < kM; ++m) acc[m][r] = multiply_add<Weights<W>::kPairs>(xs[m], w, acc[m][r]);
    }
  }
}

// out[g][m * out_stride + 0..3] for kR / 4 groups of four weight rows; `ahead`: bytes from a group to the one
// that is read after it.
template <WeightType W, int kM, int kR, typename Element>
__attribute__((noinline)) void skinny_tile(const char* const (&rows)[kR], const Element* x, int64_t x_stride,
                                           int64_t c, int64_t ahead, float* const* out, int64_t out_stride) {
  constexpr int64_t kPerLine = Weights<W>::kPerLine;
  F acc[kM][kR];
#pragma GCC unroll 6
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) acc[m][r] = F{};
  const int64_t lines = c / kPerLine;
  for (int64_t l = 0; l < lines; ++l) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r)
      __builtin_prefetch(rows[r / kQuad * kQuad] + ahead + (l * kQuad + r % kQuad) * 64, 0, 2);
    multiply_line<W, kM, kR>(rows, l * 64, x + l * kPerLine, x_stride, acc);
  }
  if (lines * kPerLine < c) {
    char tails[kR][64] = {};
    const char* tail_rows[kR];
    for (int r = 0; r < kR; ++r) {
      memcpy(tails[r], rows[r] + lines * 64, (size_t)((c - lines * kPerLine) * Weights<W>::kBytes));
      tail_rows[r] = tails[r];
    }
    multiply_line<W, kM, kR>(tail_rows, 0, x + lines * kPerLine, x_stride, acc);
  }
#pragma GCC unroll 2
  for (int g = 0; g < kR / kQuad; ++g) store_sums(acc, kQuad * g, out[g], out_stride);
}

// The tile for m rows of x, at most kM.
template <WeightType W, int kR, int kM, typename Element>
IBQ_INLINE void skinny_tile_of(int m, const char* const (&rows)[kR], const Element* x, int64_t x_stride,
                               int64_t c, int64_t ahead, float* const* out, int64_t out_stride) {
  if (m == kM) return skinny_tile<W, kM, kR>(rows, x, x_stride, c, ahead, out, out_stride);
  if constexpr (kM > 1) skinny_tile_of<W, kR, kM - 1>(m, rows, x, x_stride, c, ahead, out, out_stride);
}

// Four rows of W from `first` and four from `second`, of which `live` and `second_live` exist (past them the
// last one is read again), against m rows of x, into out and second_out [m][out_stride], four columns each.
template <WeightType W, typename Element>
void eight_rows(const Matrix& w, int64_t first, int64_t live, int64_t second, int64_t second_live,
                int64_t step, const Element* x, int64_t m, float* out, float* second_out,
                int64_t out_stride) {
  const int64_t bytes = w.c * Weights<W>::kBytes, x_stride = Activations<W>::stride(w.c);
  const char* const base = static_cast<const char*>(w.rows);
  const char *eight[8], *four[4], *other[4];
  for (int r = 0; r < 4; ++r) {
    eight[r] = four[r] = base + (first + min_of(r, live - 1)) * bytes;
    if (second_live > 0) eight[4 + r] = other[r] = base + (second + min_of(r, second_live - 1)) * bytes;
  }
  const int64_t blocks = (m + kMaxRows - 1) / kMaxRows, ahead = step * bytes;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t from = m * b / blocks;
    const int count = (int)(m * (b + 1) / blocks - from);
    const Element* xb = x + from * x_stride;
    float* outs[2] = {out + from * out_stride, second_out + from * out_stride};
    if (count <= kWideRows && second_live > 0) {
      skinny_tile_of<W, 8, kWideRows>(count, eight, xb, x_stride, w.c, ahead, outs, out_stride);
      continue;
    }
    skinny_tile_of<W, 4, kMaxRows>(count, four, xb, x_stride, w.c, ahead, outs, out_stride);
    if (second_live > 0)
      skinny_tile_of<W, 4, kMaxRows>(count, other, xb, x_stride, w.c, ahead, outs + 1, out_stride);
  }
}

// Rows [first, last) of W against m prepared rows of x: out [m][out_stride], column j being row first + j.
// Writes up to a multiple of eight columns.
template <WeightType W, typename Element>
void skinny_product(const Matrix& w, int64_t first, int64_t last, const Element* x, int64_t m, float* out,
                    int64_t out_stride) {
  for (int64_t n = first; n < last; n += 8)
    eight_rows<W>(w, n, min_of(4, last - n), n + 4, min_of(4, last - n - 4), 8, x, m, out + (n - first),
                  out + (n - first) + 4, out_stride);
}

// As much of W, from row `first` on, into L2 as fits there beside the rest.
template <WeightType W>
void prefetch_rows(const Matrix& w, int64_t first) {
  const int64_t bytes = w.c * Weights<W>::kBytes;
  const char* const from = static_cast<const char*>(w.rows) + first * bytes;
  const int64_t count = min_of(64 << 10, (w.n - first) * bytes);
  for (int64_t i = 0; i < count; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Rows of W that a thread takes at a time: about 64 KiB of them, a multiple of eight.
constexpr int64_t kItemRows = 128;
inline int64_t item_rows(int64_t n, int64_t row_bytes, int threads) {
  int64_t rows = (64 << 10) / row_bytes;
  rows = min_of(rows, n / (4 * threads));
  rows = min_of(rows / 8 * 8, kItemRows);
  return rows < 8 ? 8 : rows;
}

// Rows of x that meet an item together: at 192 columns they stay in L1 while W's rows go by.
constexpr int64_t kBlockRows = 4 * kMaxRows;

template <WeightType W>
bool skinny_linear_of(const SkinnyLinear& p, const Parallel& parallel) {
  typedef typename Activations<W>::Element Element;
  const int64_t n = p.weight.n, c = p.weight.c, stride = Activations<W>::stride(c);
  const int64_t step = item_rows(n, c * Weights<W>::kBytes, parallel.threads);
  const int64_t items = (n + step - 1) / step;
  const int tasks = (int)min_of(parallel.threads, items);
  const int64_t blocks = (p.m + kBlockRows - 1) / kBlockRows;
  Element* x;
  float* columns;
  Workspace workspace;
  workspace.add(&x, p.m * stride);
  workspace.add(&columns, tasks * kBlockRows * kItemRows);
  if (!workspace.allocate()) return false;
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t i = 0; i < c; i += kWidth)
      Activations<W>::put(x + m * stride, i, load_live<DType::kFloat32>(p.x, m * c + i, c - i), c - i);
    Activations<W>::finish(x + m * stride, c);
  }
  run_tasks(parallel, tasks, [&](int t) {
    float* const mine = columns + t * kBlockRows * kItemRows;
    for (int64_t i = items * t / tasks * blocks; i < items * (t + 1) / tasks * blocks; ++i) {
      const int64_t first = i / blocks * step, last = min_of(first + step, n);
      const int64_t from = p.m * (i % blocks) / blocks, to = p.m * (i % blocks + 1) / blocks;
      skinny_product<W>(p.weight, first, last, x + from * stride, to - from, mine, kItemRows);
      for (int64_t m = from; m < to; ++m)
        for (int64_t j = first; j < last; j += kWidth) {
          F v = load_live<DType::kFloat32>(mine, (m - from) * kItemRows + j - first, last - j);
          if constexpr (W == WeightType::kInt8)
            v = v * load_live<DType::kFloat32>(p.weight.scale, j, last - j);
          if (p.bias) v = v + load_live<DType::kFloat32>(p.bias, j, last - j);
          store_narrow<DType::kFloat32>(p.out, m * n + j, v, last - j);
        }
    }
  });
  return true;
}

// body called with a value whose type carries the weights' type.
template <WeightType W>
struct WeightTypeOf {
  static constexpr WeightType value = W;
};
template <typename Body>
IBQ_INLINE bool for_weight_type(WeightType t, const Body& body) {
  switch (t) {
    case WeightType::kFloat32:
      return body(WeightTypeOf<WeightType::kFloat32>());
    case WeightType::kBFloat16:
      return body(WeightTypeOf<WeightType::kBFloat16>());
    case WeightType::kFloat16:
      return body(WeightTypeOf<WeightType::kFloat16>());
    case WeightType::kInt8:
      return body(WeightTypeOf<WeightType::kInt8>());
  }
  return false;
}

inline bool skinny_linear(const SkinnyLinear& p, const Parallel& parallel) {
  return for_weight_type(p.type,
                         [&](auto type) { return skinny_linear_of<decltype(type)::value>(p, parallel); });
}
