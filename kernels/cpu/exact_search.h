// Exact search of float32 operands at bfloat16's speed: rounded scores keep candidates, float32 settles them.
// The result is the float32 search's own, bit for bit: index, maximum and ties.
//
// Let a' be a rounded to bfloat16. Then |a.e - a'.e'| <= |a - a'| |e| + |a'| |e - e'|, and both this sweep
// and the float32 sweep add up D terms with a relative error below gamma = (D + 8) 2^-23 of |a| |e|. With
// these norms at hand (per row, and the largest of a block of codes) every score has a bound:
//   |x' - x32| < scale ( |a - a'| max|e| + |a'| max|e - e'| + 2 gamma |a| max|e| ) + 2^-21 |x'| =: w.
// low is the greatest x' - w seen; a code with x' + w <= low cannot be the float32 maximum. What remains (one
// to three codes a row on random data, a whole cluster where codes crowd) is scored again, kWidth codes at a
// time, as the float32 tile does it: term by term in order. A row with more than kCandidates (many equal
// codes) is searched in float32 as a whole.
//
// The sweep is search.h's tile: a lane is a row, a vector of scores costs one instruction beyond its
// products, and a tile is stored only where some row gains a candidate.
#pragma once

#if defined(__AVX512BF16__)

constexpr int kCandidates = 192;

// Below these the float32 sweep is as fast: few rows or short ones do not pay for rounding the codebook.
constexpr int64_t kExactFromCodes = 2048;
constexpr int64_t kExactFromDim = 32;
constexpr int64_t kExactFromRows = 64;

// Relative error of a sum of d products in float32, whatever its order.
inline float gamma_of(int64_t d) { return (float)(d + 8) * 1.1920929e-7f; }

// Of a score's own size, what the roundings of scale and bias and of the comparisons here may come to.
constexpr float kScoreError = 4.7683716e-7f;

struct Candidate {
  float upper;  // x' + w
  int32_t code;
};

struct ExactContext {
  const Problem& problem;
  const Plan& plan;
  int64_t row = 0, chunk_rows = 0;
  float* panels = nullptr;     // rounded rows of the chunk [panel][words(d)][kNR]
  float* norms = nullptr;      // [chunk]: |a|
  float* lost = nullptr;       // [chunk]: |a - a'|
  float* low = nullptr;        // [code_tasks][chunk]; infinite for a row that takes no candidates
  int32_t* count = nullptr;    // [code_tasks][chunk]; kCandidates + 1: too many
  Candidate* lists = nullptr;  // [code_tasks][chunk][kCandidates]
  float* tops = nullptr;       // per task: its codes' largest |e|
  float* scratch = nullptr;    // per task: bias [kBlock], rounded codes [kBlock][words(d)]
  int64_t scratch_stride = 0;
};

// What a block of codes brings to the bound: its largest |e| and |e - e'|.
struct BlockNorms {
  float whole, lost;
};

// At least the norm of d numbers whose squares were added up to `sum`: some of them may have underflown.
inline float norm_above(float sum, int64_t d) { return sqrtf(sum + (float)d * 1.2e-38f) * 1.0001f; }

// Rounds and packs rows of float32 into panels of pairs [panel][words(d)][kNR]; norms and lost receive |a|
// and |a - a'| of each row. Lanes are rows; columns come kWidth at a time through a register transpose.
inline void round_panels(const float* src, int64_t row, int64_t rows, int64_t d, float* out, float* norms,
                         float* lost) {
  for (int64_t p = 0; p < round_up(rows, kNR); p += kWidth) {
    F whole = F{}, gone = F{};
    float* panel = out + p / kNR * kNR * words<true>(d) + p % kNR;
    for (int64_t j0 = 0; j0 < d; j0 += kWidth) {
      F v[kWidth];
      const int64_t columns = min_of(kWidth, d - j0);
      const __mmask16 mask = (__mmask16)((1u << columns) - 1);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        v[i] = p + i < rows ? (F)_mm512_maskz_loadu_ps(mask, src + (row + p + i) * d + j0) : F{};
      exchange_corners<1>(v, std::make_integer_sequence<int, kWidth>());
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; j += 2) {
        if (j0 + j >= d) break;
        const __m512i word = (__m512i)round_pair(v[j], v[j + 1]);
        const F low = v[j] - (F)_mm512_slli_epi32(word, 16);
        const F high = v[j + 1] - (F)_mm512_and_si512(word, _mm512_set1_epi32((int)0xffff0000u));
        whole += v[j] * v[j] + v[j + 1] * v[j + 1];
        gone += low * low + high * high;
        store(panel + (j0 + j) / 2 * kNR, (F)word);
      }
    }
    for (int i = 0; i < kWidth; ++i)
      norms[p + i] = norm_above(whole[i], d), lost[p + i] = norm_above(gone[i], d);
  }
}

// A vector of a code rounded into `to`, its square and its rounding's added up.
IBQ_INLINE void round_vector(F v, __mmask16 even, uint16_t* to, F& whole, F& lost) {
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  const F away = v - (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  whole = multiply_add<false>(v, v, whole);
  lost = multiply_add<false>(away, away, lost);
  if (even == (__mmask16)-1)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  else
    _mm256_mask_storeu_epi16(to, even, half);
}

// Rounds the codes [code0, code0 + codes) into rows of words [words(d)], with zeros from there to `count`.
inline BlockNorms round_codes(const float* src, int64_t code0, int64_t codes, int64_t count, int64_t d,
                              float* out) {
  constexpr __mmask16 kAll = (__mmask16)-1;
  const int64_t depth = words<true>(d);
  float whole = 0, lost = 0;
  for (int64_t c = 0; c < codes; ++c) {
    const float* e = src + (code0 + c) * d;
    uint16_t* to = reinterpret_cast<uint16_t*>(out + c * depth);
    F sums[2] = {}, gone[2] = {};
    int64_t j = 0;
    for (; j + 2 * kWidth <= d; j += 2 * kWidth) {
      round_vector(load(e + j), kAll, to + j, sums[0], gone[0]);
      round_vector(load(e + j + kWidth), kAll, to + j + kWidth, sums[1], gone[1]);
    }
    for (; j < d; j += kWidth) {
      const __mmask16 mask = d - j >= kWidth ? kAll : (__mmask16)((1u << (d - j)) - 1);
      const __mmask16 even = (__mmask16)(mask | mask << 1);  // an odd row's last word has a zero
      round_vector((F)_mm512_maskz_loadu_ps(mask, e + j), even, to + j, sums[0], gone[0]);
    }
    const float size = _mm512_reduce_add_ps((__m512)(sums[0] + sums[1]));
    const float gap = _mm512_reduce_add_ps((__m512)(gone[0] + gone[1]));
    whole = size <= whole ? whole : size;  // NaN stays
    lost = gap <= lost ? lost : gap;
  }
  memset(out + codes * depth, 0, sizeof(float) * (size_t)((count - codes) * depth));
  return {norm_above(whole, d), norm_above(lost, d)};
}

// Scores above it are candidates: x' + w > low, with w's part that grows with |x'|.
IBQ_INLINE F bar_of(F low, F width) {
  const F t = low - width, a = t * (1.0f - 2 * kScoreError), b = t * (1.0f + 2 * kScoreError);
  return a < b ? a : b;
}

// The rows of a panel in one code task.
struct ExactRows {
  float* low;
  int32_t* count;
  Candidate* lists;

  void keep(int64_t r, float upper, int32_t code) const {
    Candidate* const list = lists + r * kCandidates;
    if (count[r] == kCandidates) {  // drop what low has since passed
      int32_t kept = 0;
      for (int q = 0; q < kCandidates; ++q)
        if (list[q].upper > low[r]) list[kept++] = list[q];
      count[r] = kept;
    }
    if (count[r] >= kCandidates) return refuse(r);
    list[count[r]++] = {upper, code};
  }

  // The float32 sweep takes this row.
  void refuse(int64_t r) const {
    count[r] = kCandidates + 1;
    low[r] = __builtin_inff();
  }
};

// Raises low by a tile's scores x [kMR][kNR], of which the first `live` codes exist, then keeps what is
// above.
__attribute__((noinline)) inline void keep_candidates(const float* x, int live, int32_t code0,
                                                      const float* width, const bool (&rises)[kNV],
                                                      const ExactRows& rows) {
  for (int v = 0; v < kNR; v += kWidth) {
    if (!rises[v / kWidth]) continue;
    const F w = load(width + v);
    F low = load(rows.low + v);
    for (int i = 0; i < live; ++i) {
      const F y = load(x + i * kNR + v);
      const F under = y - w - (F)_mm512_abs_ps((__m512)y) * kScoreError;
      low = max_of(under, low);
    }
    store(rows.low + v, low);
    const F bar = bar_of(low, w);
    for (int i = 0; i < live; ++i) {
      const F y = load(x + i * kNR + v);
      __mmask16 hits = _mm512_cmp_ps_mask((__m512)y, (__m512)bar, _CMP_GT_OQ);
      for (; hits; hits &= (__mmask16)(hits - 1)) {
        const int lane = __builtin_ctz(hits), r = v + lane;
        const float score = x[i * kNR + r];
        if (rows.count[r] <= kCandidates)
          rows.keep(r, score + width[r] + fabsf(score) * kScoreError, code0 + i);
      }
    }
  }
}

// Meets a panel of rounded rows with a block of rounded codes, `codes` of them in whole tiles.
inline void exact_panel(const float* panel, const float* rounded, int64_t depth, int codes, float scale,
                        const float* bias, int32_t code0, const float* width, const ExactRows& rows) {
  for (int j = 0; j < codes; j += kMR) {
    F acc[kMR][kNV];
    meet_codes<true, kMR, kNV>(rounded + j * depth, panel, depth, acc);
    bool rises[kNV], any = false;
#pragma GCC unroll 2
    for (int v = 0; v < kNV; ++v) {
      const F bar = bar_of(load(rows.low + v * kWidth), load(width + v * kWidth));
      F highest = bar;
#pragma GCC unroll 16
      for (int i = 0; i < kMR; ++i) {
        acc[i][v] = multiply_add<false>(acc[i][v], set1(scale), set1(bias[j + i]));
        highest = max_of(acc[i][v], highest);
      }
      rises[v] = any_greater(highest, bar);
      any |= rises[v];
    }
    if (__builtin_expect(!any, 1)) continue;
    float x[kMR * kNR];
#pragma GCC unroll 16
    for (int i = 0; i < kMR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kNV; ++v) store(x + i * kNR + v * kWidth, acc[i][v]);
    keep_candidates(x, (int)min_of(kMR, codes - j), code0 + j, width, rises, rows);
  }
}

inline void exact_task(const ExactContext& c, int task) {
  const Plan& plan = c.plan;
  const Problem& p = c.problem;
  const Range range(plan, c.chunk_rows, task);
  const int64_t depth = words<true>(plan.d), state = (int64_t)range.code_task * plan.chunk;
  float* bias = c.scratch + c.scratch_stride * task;
  float* rounded = bias + kBlock;
  const float scale = fabsf(p.scale), gamma = 2 * gamma_of(plan.d);
  for (int64_t r = range.row0; r < range.row1; ++r) {
    c.low[state + r] = r < c.chunk_rows ? -__builtin_inff() : __builtin_inff();
    c.count[state + r] = 0;
  }
  float top = 0;
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const int64_t codes = min_of(kBlock, range.code1 - code0);
    const BlockNorms most = round_codes(static_cast<const float*>(p.codebook), code0, codes,
                                        round_up(codes, kMR), plan.d, rounded);
    top = most.whole > top ? most.whole : top;
    fill_bias(p, code0, codes, bias);
    for (int64_t r = range.row0; r < range.row1; r += kNR) {
      const ExactRows rows{c.low + state + r, c.count + state + r, c.lists + (state + r) * kCandidates};
      float width[kNR];
      for (int v = 0; v < kNR; v += kWidth) {
        const F norm = load(c.norms + r + v), lost = load(c.lost + r + v);
        const F sum = lost * most.whole + (norm + lost) * most.lost + norm * (gamma * most.whole);
        const F w = sum * (scale * 1.001f) + 1e-30f;
        store(width + v, w);
        // Numbers too large for a bound, or NaN: the float32 sweep has the rules.
        __mmask16 none = _mm512_cmp_ps_mask((__m512)w, (__m512)set1(1e37f), _CMP_NLE_UQ);
        for (; none; none &= (__mmask16)(none - 1)) {
          const int64_t i = v + __builtin_ctz(none);
          if (r + i < c.chunk_rows) rows.refuse(i);
          width[i] = 0;
        }
      }
      exact_panel(c.panels + r * depth, rounded, depth, (int)codes, p.scale, bias, (int32_t)code0, width,
                  rows);
    }
  }
  c.tops[task] = top;
}

// The products of a row with kWidth codes, one to a lane: the float32 tile's operations in its order.
inline F settle_products(const float* a, const float* const* codes, int64_t d) {
  F acc = F{};
  int64_t j0 = 0;
  for (; j0 + kWidth <= d; j0 += kWidth) {
    F v[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) v[i] = load(codes[i] + j0);
    exchange_corners<1>(v, std::make_integer_sequence<int, kWidth>());
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j) acc = multiply_add<false>(set1(a[j0 + j]), v[j], acc);
  }
  for (; j0 < d; ++j0) {
    F v;
    for (int i = 0; i < kWidth; ++i) v[i] = codes[i][j0];
    acc = multiply_add<false>(set1(a[j0]), v, acc);
  }
  return acc;
}

// A row's candidates that wait to be settled together, and the best of those that were.
struct Settling {
  const Problem& p;
  const float* a;
  int count = 0;
  Candidate waiting[kWidth] = {};  // upper: of the quick score
  float score = -__builtin_inff();
  int64_t code = -1;
  bool crowd = false;  // quick scores told none of a group apart: they are not worth their time here
  bool finite = true;  // else the float32 sweep has the rules

  // low: what the row's maximum is known to reach
  void add(const Candidate& candidate, float low) {
    waiting[count++] = candidate;
    if (count == kWidth) settle(low);
  }

  void settle(float low) {
    int live = 0;
    for (int i = 0; i < count; ++i)
      if (!(waiting[i].upper < low)) waiting[live++] = waiting[i];
    count = 0;
    crowd = live == kWidth;
    if (live == 0) return;
    const float* rows[kWidth];
    for (int i = 0; i < kWidth; ++i)
      rows[i] = static_cast<const float*>(p.codebook) + (int64_t)waiting[i < live ? i : 0].code * p.d;
    const F products = settle_products(a, rows, p.d);
    for (int i = 0; i < live; ++i) {
      const int32_t at = waiting[i].code;
      const float x = __builtin_fmaf(products[i], p.scale, p.bias ? p.bias[at] : 0.0f);
      finite &= fabsf(x) <= 3e38f;
      if (x > score || (x == score && at < code)) score = x, code = at;
    }
  }
};

// A candidate's score in float32, its terms added in whatever order is fastest.
inline float quick_score(const Problem& p, const float* a, int32_t code) {
  const float* e = static_cast<const float*>(p.codebook) + (int64_t)code * p.d;
  F sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * kWidth <= p.d; j += 4 * kWidth)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sums[v] = multiply_add<false>(load(a + j + v * kWidth), load(e + j + v * kWidth), sums[v]);
  for (; j < p.d; j += kWidth) {
    const __mmask16 mask = p.d - j >= kWidth ? (__mmask16)-1 : (__mmask16)((1u << (p.d - j)) - 1);
    sums[0] = multiply_add<false>((F)_mm512_maskz_loadu_ps(mask, a + j),
                                  (F)_mm512_maskz_loadu_ps(mask, e + j), sums[0]);
  }
  const float product = _mm512_reduce_add_ps((__m512)((sums[0] + sums[1]) + (sums[2] + sums[3])));
  return __builtin_fmaf(product, p.scale, p.bias ? p.bias[code] : 0.0f);
}

// Candidates stand anywhere in the codebook: without this each would wait for memory in turn.
constexpr int kAhead = 8;
inline void prefetch_code(const Problem& p, int32_t code) {
  const float* e = static_cast<const float*>(p.codebook) + (int64_t)code * p.d;
  for (int64_t j = 0; j < p.d; j += kWidth) __builtin_prefetch(e + j);
}

// Settles a row from its candidates; false when it has to be searched as a whole. Most candidates fall to
// their quick score; the order of the tile decides among the few it cannot tell apart.
inline bool settle_row(const ExactContext& c, int64_t r, const Forward& out) {
  const Plan& plan = c.plan;
  const Problem& p = c.problem;
  const float* a = static_cast<const float*>(p.z) + (c.row + r) * plan.d;
  float low = -__builtin_inff(), top = 0;
  for (int t = 0; t < plan.code_tasks; ++t) {
    top = c.tops[t] > top ? c.tops[t] : top;
    if (c.count[t * plan.chunk + r] > kCandidates) return false;
    low = c.low[t * plan.chunk + r] > low ? c.low[t * plan.chunk + r] : low;
  }
  // What the order of a quick score and the tile's may differ by, but for the part that grows with the score.
  const float order = 2 * gamma_of(p.d) * fabsf(p.scale) * c.norms[r] * top * 1.001f + 1e-30f;
  float quick_low = -__builtin_inff();
  Settling settling{p, a};
  for (int t = 0; t < plan.code_tasks; ++t) {
    const int32_t count = c.count[t * plan.chunk + r];
    const Candidate* const list = c.lists + (t * plan.chunk + r) * kCandidates;
    for (int q = 0; q < count; ++q) {
      if (q + kAhead < count) prefetch_code(p, list[q + kAhead].code);
      if (list[q].upper <= low) continue;
      float upper = __builtin_inff();
      if (!settling.crowd) {
        const float x = quick_score(p, a, list[q].code), width = order + kScoreError * fabsf(x);
        quick_low = x - width > quick_low ? x - width : quick_low;
        upper = x + width;
      }
      if (!(upper < quick_low)) settling.add({upper, list[q].code}, quick_low);
    }
  }
  settling.settle(quick_low);
  if (settling.code < 0 || !settling.finite) return false;
  if (out.indices) out.indices[c.row + r] = settling.code;
  if (out.max) out.max[c.row + r] = settling.score;
  return true;
}

inline bool exact_search(const Problem& p, const Forward& out, const Parallel& parallel) {
  const Plan plan(p, parallel.threads, kNR);
  const int64_t depth = words<true>(plan.d), states = (int64_t)plan.code_tasks * plan.chunk;
  Workspace workspace;
  ExactContext c{p, plan};
  unsigned char* settled = nullptr;
  c.scratch_stride = round_up(kBlock + kBlock * depth, 16);
  workspace.add(&c.panels, plan.chunk * depth);
  workspace.add(&c.norms, plan.chunk);
  workspace.add(&c.lost, plan.chunk);
  workspace.add(&c.low, states);
  workspace.add(&c.count, states);
  workspace.add(&c.lists, states * kCandidates);
  workspace.add(&c.tops, plan.tasks());
  workspace.add(&c.scratch, c.scratch_stride * plan.tasks());
  workspace.add(&settled, plan.chunk);
  if (!workspace.allocate()) return false;
  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    for_rows(parallel, (c.chunk_rows + kNR - 1) / kNR, [&](int64_t panel) {
      const int64_t r = panel * kNR;
      round_panels(static_cast<const float*>(p.z), c.row + r, min_of(kNR, c.chunk_rows - r), plan.d,
                   c.panels + r * depth, c.norms + r, c.lost + r);
    });
    run_tasks(parallel, plan.tasks(), [&](int t) { exact_task(c, t); });
    for_rows(parallel, c.chunk_rows, [&](int64_t r) { settled[r] = settle_row(c, r, out); });
    // Runs of rows with too many candidates, by the float32 sweep.
    for (int64_t r = 0; r < c.chunk_rows; ++r) {
      int64_t end = r;
      while (end < c.chunk_rows && !settled[end]) ++end;
      if (end == r) continue;
      Problem rest = p;
      rest.z = static_cast<const float*>(p.z) + (c.row + r) * plan.d;
      rest.n = end - r;
      Forward rest_out;
      rest_out.indices = out.indices ? out.indices + c.row + r : nullptr;
      rest_out.max = out.max ? out.max + c.row + r : nullptr;
      if (!run_search<false>(rest, rest_out, parallel)) return false;
      r = end;
    }
  }
  return true;
}

#endif
