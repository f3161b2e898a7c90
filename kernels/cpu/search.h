// Search: index and value of every row's greatest logit, and nothing else of S. 2NKD operations.
//
// The register tile is logits_tile's with its sides exchanged: codes by vectors of rows. Codes are read where
// they lie, row-major, by broadcasts; only the rows are packed, once, kNR of them in a panel. A lane is a
// row, so a vector of logits costs one instruction beyond its products, the maximum with its lanes' best so
// far, and is stored only where a best rises: about log(K) times a row, one tile in six at K = 16,384. Then
// the codes are told apart in memory (raise_best).
//
// One thread, N = 256, K = 16,384, against logits_tile with an epilogue that kept maximum and index of each
// lane (bfloat16 / float32): D = 8 2.1x / 1.6x, 32 1.3x / 1.2x, 64 1.2x / 1.15x, 256 1.1x / 1.07x.
// Tried and lost: raise_best inlined (its registers push accumulators out of the product's loop: 0.8x);
// remembering the group of three codes in which the maximum rose and scoring it again at the end, without a
// branch (as fast from K = 16,384 on, 0.8x at K = 256).
//
// Strict comparison in code order: the lowest index wins. NaN compares greater than nothing, so a NaN logit
// is passed over, and a row without one above -inf gives index 0 and maximum NaN.
#pragma once

struct SearchContext {
  const Problem& problem;
  const Forward& out;
  const Plan& plan;
  bool plain;  // logits are the products themselves
  int64_t row = 0, chunk_rows = 0;
  float* panels = nullptr;   // packed rows of the chunk [panel][words(d)][kNR]
  float* best = nullptr;     // [code_tasks][chunk]
  int32_t* index = nullptr;  // [code_tasks][chunk]
  float* scratch = nullptr;  // per task: bias [kBlock], codes [kBlock][words(d)]
  int64_t scratch_stride = 0;
};

// Codes of a tile of kVectors vectors of rows: a single one needs more, for products in flight.
template <int kVectors>
constexpr int kTileCodes = kVectors == 1 && kMR < 8 ? 2 * kMR : kMR;
static_assert(kBlock % kTileCodes<1> == 0 && kTileCodes<1> % kTileCodes<kNV> == 0, "blocks hold whole tiles");

template <bool kPairs>
void read_code(const Problem& p, int64_t code, float* out) {
  if constexpr (kPairs) {
    out[words<kPairs>(p.d) - 1] = 0.0f;  // an odd row's last word has one term
    memcpy(out, static_cast<const uint16_t*>(p.codebook) + code * p.d, sizeof(uint16_t) * p.d);
    return;
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return widen_rows_of<DType::kFloat32>(p.codebook, code, 1, p.d, p.d, out);
    case DType::kBFloat16:
      return widen_rows_of<DType::kBFloat16>(p.codebook, code, 1, p.d, p.d, out);
    case DType::kFloat16:
      return widen_rows_of<DType::kFloat16>(p.codebook, code, 1, p.d, p.d, out);
  }
}

// Rows of words(d) words: the codes [code0, code0 + codes), and from there to `count` the last one again,
// which cannot win. The source itself where it is that, else scratch.
template <bool kPairs>
const float* code_rows(const Problem& p, int64_t code0, int64_t codes, int64_t count, float* scratch) {
  const int64_t depth = words<kPairs>(p.d);
  const bool in_place = kPairs ? p.d % 2 == 0 : p.dtype == DType::kFloat32;
  if (in_place && codes == count) return static_cast<const float*>(p.codebook) + code0 * depth;
  for (int64_t j = 0; j < count; ++j)
    read_code<kPairs>(p, code0 + (j < codes ? j : codes - 1), scratch + j * depth);
  return scratch;
}

// What a code's scaled product has added, |E|^2 summed as subtract_norms does. code: its words.
template <bool kPairs>
float bias_of(const Problem& p, int64_t index, const float* code) {
  const float bias = p.bias ? p.bias[index] : 0.0f;
  if (p.norm_weight == 0.0f) return bias;
  F sum = F{};
  for (int64_t s = 0; s < words<kPairs>(p.d); ++s) {
    const F e = broadcast<kPairs>(code + s);
    sum = multiply_add<kPairs>(e, e, sum);
  }
  return (set1(bias) - sum * set1(p.norm_weight))[0];
}

// Raises best and index [kVectors * kWidth] by a tile's logits x [kTileCodes][kVectors * kWidth].
template <int kVectors>
__attribute__((noinline)) void raise_best(const float* x, int32_t code0, float* best, int32_t* index) {
  for (int v = 0; v < kVectors; ++v) {
    F top = load(best + v * kWidth);
    I at = load_i(index + v * kWidth);
    for (int i = 0; i < kTileCodes<kVectors>; ++i) {
      const F y = load(x + (i * kVectors + v) * kWidth);
      const I greater = y > top;
      top = greater ? y : top;
      at = greater ? set1_i(code0 + i) : at;
    }
    store(best + v * kWidth, top);
    store_i(index + v * kWidth, at);
  }
}

// acc = the products of kCodes codes [kCodes][depth] with the kVectors first vectors of a packed panel of
// rows.
template <bool kPairs, int kCodes, int kVectors>
IBQ_INLINE void meet_codes(const float* codes, const float* rows, int64_t depth, F (&acc)[kCodes][kVectors]) {
#pragma GCC unroll 16
  for (int i = 0; i < kCodes; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = F{};
  for (int64_t s = 0; s < depth; ++s) {
    F bv[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) bv[v] = load(rows + s * kNR + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kCodes; ++i) {
      const F av = broadcast<kPairs>(codes + i * depth + s);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = multiply_add<kPairs>(av, bv[v], acc[i][v]);
    }
  }
}

// Meets a packed panel of rows with `count` codes, whole tiles. kPlain: products are the logits. fetch: these
// codes come from memory, and nothing but this asks for them in time.
template <bool kPairs, bool kPlain, int kVectors>
void search_panel(const float* rows, const float* codes, int64_t depth, int count, float scale,
                  const float* bias, int32_t code0, bool fetch, float* best, int32_t* index) {
  constexpr int kCodes = kTileCodes<kVectors>;
  for (int j = 0; j < count; j += kCodes) {
    const float* a = codes + j * depth;
    const float* next = a + kCodes * depth;
    for (int64_t w = 0; fetch && j + kCodes < count && w < kCodes * depth; w += 16)
      __builtin_prefetch(next + w);
    F acc[kCodes][kVectors];
    meet_codes<kPairs, kCodes, kVectors>(a, rows, depth, acc);
    bool rises = false;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const F top = load(best + v * kWidth);
      F highest = top;
#pragma GCC unroll 16
      for (int i = 0; i < kCodes; ++i) {
        if (!kPlain) acc[i][v] = multiply_add<false>(acc[i][v], set1(scale), set1(bias[j + i]));
        highest = max_of(acc[i][v], highest);
      }
      rises |= any_greater(highest, top);
    }
    if (__builtin_expect(!rises, 1)) continue;
    float x[kCodes * kVectors * kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kCodes; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(x + (i * kVectors + v) * kWidth, acc[i][v]);
    raise_best<kVectors>(x, code0 + j, best, index);
  }
}

template <bool kPairs, bool kPlain>
void search_task(const SearchContext& c, int task) {
  const Plan& plan = c.plan;
  const Problem& p = c.problem;
  const Range range(plan, c.chunk_rows, task);
  const int64_t depth = words<kPairs>(plan.d);
  float* bias = c.scratch + c.scratch_stride * task;
  float* best = c.best + (int64_t)range.code_task * plan.chunk;
  int32_t* index = c.index + (int64_t)range.code_task * plan.chunk;
  for (int64_t r = range.row0; r < range.row1; ++r) best[r] = -__builtin_inff(), index[r] = 0;
  for (int64_t code0 = range.code0; code0 < range.code1; code0 += kBlock) {
    const int64_t codes = min_of(kBlock, range.code1 - code0), count = round_up(codes, kTileCodes<1>);
    const float* rows = code_rows<kPairs>(p, code0, codes, count, bias + kBlock);
    for (int64_t j = 0; j < count && !kPlain; ++j)
      bias[j] = bias_of<kPairs>(p, code0 + (j < codes ? j : codes - 1), rows + j * depth);
    for (int64_t r = range.row0; r < range.row1; r += kNR) {
      const bool one = c.chunk_rows - r <= kWidth;  // live vectors of rows
      const auto meet = one ? &search_panel<kPairs, kPlain, 1> : &search_panel<kPairs, kPlain, kNV>;
      meet(c.panels + r * depth, rows, depth, (int)count, p.scale, bias, (int32_t)code0, r == range.row0,
           best + r, index + r);
    }
  }
}

// Merges the code tasks' states of a row, in code order.
inline void merge_search(const SearchContext& c, int64_t r) {
  float best = -__builtin_inff();
  int64_t index = 0;
  for (int t = 0; t < c.plan.code_tasks; ++t) {
    const int64_t at = t * c.plan.chunk + r;
    if (c.best[at] > best) best = c.best[at], index = c.index[at];
  }
  const bool none = !(best > -__builtin_inff());
  if (c.out.indices) c.out.indices[c.row + r] = index;
  if (c.plain) best += 0.0f;  // as adding no bias makes 0 of -0
  if (c.out.max) c.out.max[c.row + r] = none ? __builtin_nanf("") : best;
}

template <bool kPairs>
bool run_search(const Problem& p, const Forward& out, const Parallel& parallel) {
  const Plan plan(p, parallel.threads, kNR);
  SearchContext c{p, out, plan, p.scale == 1.0f && !p.bias && p.norm_weight == 0.0f};
  Workspace workspace;
  const int64_t depth = words<kPairs>(p.d), states = (int64_t)plan.code_tasks * plan.chunk;
  c.scratch_stride = round_up(kBlock + kBlock * depth, 16);
  workspace.add(&c.panels, plan.chunk * depth);
  workspace.add(&c.best, states);
  workspace.add(&c.index, states);
  workspace.add(&c.scratch, c.scratch_stride * plan.tasks());
  if (!workspace.allocate()) return false;
  for (c.row = 0; c.row < plan.n; c.row += plan.chunk) {
    c.chunk_rows = min_of(plan.chunk, plan.n - c.row);
    pack_row_tiles<kPairs>(p, p.z, c.row, c.chunk_rows, c.panels, parallel, kNR);
    run_tasks(parallel, plan.tasks(),
              [&](int t) { c.plain ? search_task<kPairs, true>(c, t) : search_task<kPairs, false>(c, t); });
    for_rows(parallel, c.chunk_rows, [&](int64_t r) { merge_search(c, r); });
  }
  return true;
}
