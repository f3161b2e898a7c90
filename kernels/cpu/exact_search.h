// Exact search of float32 operands at bfloat16's speed: rounded scores keep candidates, float32 settles them.
// The result is the float32 search's own, bit for bit: index, maximum and ties.
//
// Let a' be a rounded to bfloat16. Then |a.e - a'.e'| <= |a - a'| |e| + |a'| |e - e'|, and both this sweep
// and the float32 sweep add up D terms with a relative error below gamma = (D + 8) 2^-23 of |a| |e|. With
// these norms at hand (per row, and the largest of a block of codes) every score has a bound:
//   |x' - x32| <= scale ( |a - a'| max|e| + |a'| max|e - e'| + 2 gamma |a| max|e| ) + 2^-21 |x'| =: w.
// low is the greatest x' - w seen; a code with x' + w < low cannot be the float32 maximum. What remains (one
// to three codes a row on random data, a whole cluster where codes crowd) is scored again, kWidth codes at a
// time, as the float32 tile does it: term by term in order. A row with more than kCandidates (many equal
// codes) is searched in float32 as a whole.
#pragma once

#if defined(__AVX512BF16__)

constexpr int kCandidates = 192;

// Below these the float32 sweep is as fast: few rows or short ones do not pay for rounding the codebook.
constexpr int64_t kExactFromCodes = 2048;
constexpr int64_t kExactFromDim = 32;
constexpr int64_t kExactFromNumbers = 32768;  // of rows times dimensions

// Relative error of a sum of d products in float32, whatever its order.
inline float gamma_of(int64_t d) { return (float)(d + 8) * 1.1920929e-7f; }

struct Candidate {
  float upper;  // x' + w
  int32_t code;
};

// A row's state in one code task.
struct ExactRow {
  float low;
  int count;  // kCandidates + 1: too many
  Candidate list[kCandidates];
};

struct ExactContext {
  const Problem& problem;
  const Plan& plan;
  int64_t row = 0, chunk_rows = 0;
  float* tiles = nullptr;      // rounded rows, packed in pairs
  float* row_norms = nullptr;  // [chunk][3]: |a|, |a - a'|, |a'|
  ExactRow* state = nullptr;   // [code_tasks][chunk]
  float* scratch = nullptr;
  int64_t scratch_stride = 0;
};

// Rounds and packs rows of float32 into panels of pairs [panel][words(d)][width]; norms, when given, receive
// (|a|, |a - a'|, |a'|) of each row.
inline void round_panels(const float* src, int64_t row, int64_t rows, int64_t d, int width, float* out,
                         float* norms) {
  const int64_t depth = words<true>(d);
  for (int64_t p = 0; p < rows; p += width)
    for (int i0 = 0; i0 < width; i0 += kWidth) {
      // Lanes are rows; columns come kWidth at a time through a register transpose.
      F whole = F{}, lost = F{}, kept = F{};
      float* panel = out + p * depth + i0;
      const int lanes = (int)min_of(kWidth, width - i0);
      for (int64_t j0 = 0; j0 < d; j0 += kWidth) {
        F v[kWidth];
        const int64_t columns = min_of(kWidth, d - j0);
        const __mmask16 mask = (__mmask16)((1u << columns) - 1);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          const bool live = i < lanes && p + i0 + i < rows;
          v[i] = live ? (F)_mm512_maskz_loadu_ps(mask, src + (row + p + i0 + i) * d + j0) : F{};
        }
        exchange_corners<1>(v, std::make_integer_sequence<int, kWidth>());
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; j += 2) {
          if (j0 + j >= d) break;
          const __m512i word = (__m512i)round_pair(v[j], v[j + 1]);
          const F low = (F)_mm512_slli_epi32(word, 16);
          const F high = (F)_mm512_and_si512(word, _mm512_set1_epi32((int)0xffff0000u));
          whole += v[j] * v[j] + v[j + 1] * v[j + 1];
          lost += (v[j] - low) * (v[j] - low) + (v[j + 1] - high) * (v[j + 1] - high);
          kept += low * low + high * high;
          const __mmask16 store_mask = (__mmask16)((1u << lanes) - 1);
          _mm512_mask_storeu_ps(panel + (j0 + j) / 2 * width, store_mask, (__m512)word);
        }
      }
      for (int i = 0; i < lanes && norms && p + i0 + i < rows; ++i) {
        float* n = norms + 3 * (p + i0 + i);
        // rounded up: they stand in a bound
        n[0] = sqrtf(whole[i]) * 1.0001f;
        n[1] = sqrtf(lost[i]) * 1.0001f;
        n[2] = sqrtf(kept[i]) * 1.0001f;
      }
    }
}

inline void keep_candidates(const float* x, int columns, float width, int32_t code0, ExactRow* row) {
  const F bar = set1(row->low - width);
  for (int j = 0; j < columns; j += kWidth) {
    const F v = load(x + j);
    __mmask16 hits = _mm512_cmp_ps_mask((__m512)v, (__m512)bar, _CMP_GE_OQ);
    while (hits) {
      const int l = __builtin_ctz(hits);
      hits &= (__mmask16)(hits - 1);
      if (row->count == kCandidates) {  // drop what the bar has since passed
        int kept = 0;
        for (int q = 0; q < kCandidates; ++q)
          if (row->list[q].upper >= row->low) row->list[kept++] = row->list[q];
        row->count = kept;
      }
      if (row->count >= kCandidates) {
        row->count = kCandidates + 1;
        return;
      }
      row->list[row->count++] = {x[j + l] + width, code0 + j + l};
    }
  }
}

inline void exact_task(const ExactContext& c, int task) {
  const Plan& plan = c.plan;
  const Problem& p = c.problem;
  const Range range(plan, c.chunk_rows, task);
  float* packed = c.scratch + c.scratch_stride * task;
  float* bias = packed + kBlock * words<true>(plan.d);
  float* logits = bias + kBlock;
  float* norms = logits + kMR * kBlock;
  const float scale = fabsf(p.scale);
  const float gamma = gamma_of(plan.d);
  ExactRow* state = c.state + (int64_t)range.code_task * plan.chunk;
  for (int64_t r = range.row0; r < range.row1; ++r) {
    state[r].low = -__builtin_inff();
    state[r].count = 0;
  }
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const int64_t codes = min_of(kBlock, range.code1 - code0);
    const int panels = (int)((codes + kNR - 1) / kNR), columns = panels * kNR;
    const float* codebook = static_cast<const float*>(p.codebook);
    round_panels(codebook, code0, codes, plan.d, kNR, packed, norms);
    float top = 0, top_lost = 0;
    for (int64_t j = 0; j < codes; ++j) {
      top = norms[3 * j] > top ? norms[3 * j] : top;
      top_lost = norms[3 * j + 1] > top_lost ? norms[3 * j + 1] : top_lost;
    }
    fill_bias(p, code0, codes, bias);
    for (int64_t r = range.row0; r < range.row1; r += kMR) {
      logits_tile<true>(c.tiles + r * words<true>(plan.d), packed, words<true>(plan.d), panels, p.scale, bias,
                        logits);
      for (int i = 0; i < kMR && r + i < c.chunk_rows; ++i) {
        ExactRow* row = state + r + i;
        const float* n = c.row_norms + 3 * (r + i);
        const float* x = logits + i * kBlock;
        const float best = horizontal_max(lane_maxima(x, columns));
        if (best != best) {  // a NaN among the codes or the row: the float32 sweep has the rules
          row->count = kCandidates + 1;
          continue;
        }
        const float w = scale * (n[1] * top + n[2] * top_lost + 2 * gamma * n[0] * top) * 1.001f +
                        4.7683716e-7f * fabsf(best) + 1e-30f;
        if (!(best + w >= row->low)) continue;
        if (best - w > row->low) row->low = best - w;
        if (row->count <= kCandidates) keep_candidates(x, columns, w, (int32_t)code0, row);
      }
    }
  }
}

// The products of a row with kWidth codes, one to a lane: the float32 tile's operations in its order.
inline F settle_products(const float* a, const float* const* codes, int64_t d) {
  F acc = F{};
  for (int64_t j0 = 0; j0 < d; j0 += kWidth) {
    const int64_t columns = min_of(kWidth, d - j0);
    const __mmask16 mask = (__mmask16)((1u << columns) - 1);
    F v[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) v[i] = (F)_mm512_maskz_loadu_ps(mask, codes[i] + j0);
    exchange_corners<1>(v, std::make_integer_sequence<int, kWidth>());
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j)
      if (j < columns) acc = (F)_mm512_fmadd_ps((__m512)set1(a[j0 + j]), (__m512)v[j], (__m512)acc);
  }
  return acc;
}

// The best code among kWidth candidates or fewer.
struct Best {
  float score = -__builtin_inff();
  int64_t code = -1;

  void settle(const Problem& p, const float* a, const int32_t* candidates, int count) {
    const float* rows[kWidth];
    for (int i = 0; i < kWidth; ++i)
      rows[i] = static_cast<const float*>(p.codebook) + (int64_t)candidates[i < count ? i : 0] * p.d;
    const F products = settle_products(a, rows, p.d);
    for (int i = 0; i < count; ++i) {
      const float x = __builtin_fmaf(products[i], p.scale, p.bias ? p.bias[candidates[i]] : 0.0f);
      if (x > score || (x == score && candidates[i] < code)) score = x, code = candidates[i];
    }
  }
};

// A candidate's score in float32, its terms added in whatever order is fastest, and what that order and the
// tile's may differ by.
struct Score {
  float value, width;
};

inline Score quick_score(const Problem& p, const float* a, float norm, int32_t code) {
  const float* e = static_cast<const float*>(p.codebook) + (int64_t)code * p.d;
  F products[2] = {}, squares[2] = {};
  for (int64_t j = 0; j < p.d; j += 2 * kWidth)
    for (int v = 0; v < 2; ++v) {
      const int64_t left = p.d - j - v * kWidth;
      const __mmask16 mask = left >= kWidth ? (__mmask16)-1 : (__mmask16)((1u << (left > 0 ? left : 0)) - 1);
      const F x = (F)_mm512_maskz_loadu_ps(mask, a + j + v * kWidth);
      const F y = (F)_mm512_maskz_loadu_ps(mask, e + j + v * kWidth);
      products[v] = (F)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)products[v]);
      squares[v] = (F)_mm512_fmadd_ps((__m512)y, (__m512)y, (__m512)squares[v]);
    }
  const float product = (float)horizontal_sum(products[0] + products[1]);
  const float size = sqrtf((float)horizontal_sum(squares[0] + squares[1])) * 1.0001f;
  const float value = __builtin_fmaf(product, p.scale, p.bias ? p.bias[code] : 0.0f);
  return {value,
          2 * gamma_of(p.d) * fabsf(p.scale) * norm * size * 1.001f + 4.7683716e-7f * fabsf(value) + 1e-30f};
}

// Candidates stand anywhere in the codebook: without this each would wait for memory in turn.
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
  float low = -__builtin_inff();
  for (int t = 0; t < plan.code_tasks; ++t) {
    const ExactRow& row = c.state[(int64_t)t * plan.chunk + r];
    if (row.count > kCandidates) return false;
    low = row.low > low ? row.low : low;
  }
  float quick_low = -__builtin_inff();
  for (int t = 0; t < plan.code_tasks; ++t) {
    ExactRow& row = c.state[(int64_t)t * plan.chunk + r];
    for (int q = 0; q < row.count; ++q) {
      if (row.list[q].upper < low) continue;
      if (q + 2 < row.count) prefetch_code(p, row.list[q + 2].code);
      const Score s = quick_score(p, a, c.row_norms[3 * r], row.list[q].code);
      if (!(fabsf(s.value) <= 3e38f)) return false;  // the float32 sweep has the rules
      row.list[q].upper = s.value + s.width;
      quick_low = s.value - s.width > quick_low ? s.value - s.width : quick_low;
    }
  }
  Best best;
  int32_t waiting[kWidth];
  int count = 0;
  for (int t = 0; t < plan.code_tasks; ++t) {
    const ExactRow& row = c.state[(int64_t)t * plan.chunk + r];
    for (int q = 0; q < row.count; ++q) {
      // bars rise: what the first sweep ruled out stays below quick_low as well
      if (row.list[q].upper < low || row.list[q].upper < quick_low) continue;
      waiting[count++] = row.list[q].code;
      if (count == kWidth) best.settle(p, a, waiting, count), count = 0;
    }
  }
  if (count > 0) best.settle(p, a, waiting, count);
  if (best.code < 0) return false;
  if (out.indices) out.indices[c.row + r] = best.code;
  if (out.max) out.max[c.row + r] = best.score;
  return true;
}

inline bool exact_search(const Problem& p, const Forward& out, const Parallel& parallel) {
  const Plan plan(p, parallel.threads);
  Workspace workspace;
  ExactContext c{p, plan};
  unsigned char* settled = nullptr;
  c.scratch_stride = round_up(kBlock * words<true>(plan.d) + kBlock + kMR * kBlock + 3 * kBlock, 16);
  workspace.add(&c.tiles, plan.chunk * words<true>(plan.d));
  workspace.add(&c.row_norms, plan.chunk * 3);
  workspace.add(&c.state, plan.code_tasks * plan.chunk);
  workspace.add(&c.scratch, c.scratch_stride * plan.tasks());
  workspace.add(&settled, plan.chunk);
  if (!workspace.allocate()) return false;
  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    const int64_t tiles = (c.chunk_rows + kMR - 1) / kMR;
    for_rows(parallel, tiles, [&](int64_t t) {
      const int64_t r = t * kMR;
      round_panels(static_cast<const float*>(p.z), c.row + r, min_of(kMR, c.chunk_rows - r), plan.d, kMR,
                   c.tiles + r * words<true>(plan.d), c.row_norms + 3 * r);
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
