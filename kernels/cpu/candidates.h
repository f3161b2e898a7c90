// Candidates: the entries of S that can count in p = softmax(S / tau), listed while the forward's first sweep
// has them in L1, so that neither the mean of p nor the backward's row constants need S again.
//
// An entry is listed when it is within candidate_gap of its row's maximum so far: those below it stay under
// 2^-25 of their row together, whatever K. Where p is spread (training: 5 to 12 % of the entries) lists are
// short; where it is flat they would be S itself, and the call is dense: no lists, sweeps of S as before.
//
// At the end of the call's buffer (kept_logits.h), listed_bytes of it, which is room for a quarter of
// S's entries and at most half of the buffer: the rows' first pages, and pages, which each of the
// forward's tasks takes from its own share as its rows need them (rows differ much in how many entries they
// list). A row's pages are a chain for each task, codes ascending. The header says how many tasks there were,
// so that a backward with other threads can read the lists; 0 says dense. When pages run short, rows drop
// what their maximum has left behind since; when that does not make enough room the call is dense.
#pragma once

inline int64_t listed_bytes(int64_t buffer_bytes, const Problem& p) {
  return min_of(2 * p.n * p.k, buffer_bytes / 2) / 64 * 64;
}

// In units of S / tau.
inline float candidate_gap(const Problem& p) {
  const double mass = p.dropped_mass > 0x1p-25f ? p.dropped_mass : 0x1p-25f;
  return (float)(log((double)p.k) - log(mass));
}

struct CandidatePage {
  static constexpr int kFull = 240;  // an emptier page has room for a vector more
  int32_t next;                      // page of the same task, or -1
  int32_t fill;
  int32_t unused[14];
  int32_t codes[256];
  float logits[256];
};
static_assert(CandidatePage::kFull + 16 == 256 && kWidth <= 16 && kBlock <= CandidatePage::kFull,
              "a block of codes takes at most one more page of a row");

// The lists of a call. A task's pages are numbered from 0.
struct Candidates {
  int parts = 0;  // 0: no lists
  int64_t rows = 0, pages_each = 0;
  int32_t* heads = nullptr;  // [parts][rows], first pages or -1
  CandidatePage* pages = nullptr;

  Candidates() = default;
  // buffer: the call's, or null. No lists where their part of it is too small to be worth filling.
  Candidates(void* buffer, int64_t buffer_bytes, const Problem& p, int tasks) {
    const int64_t head_bytes = round_up(sizeof(int32_t) * tasks * p.n, 64);
    const int64_t bytes = listed_bytes(buffer_bytes, p) - head_bytes;
    if (!buffer || tasks < 1 || bytes / 8 < p.n * p.k / 24) return;
    parts = tasks;
    rows = p.n;
    pages_each = bytes / parts / (int64_t)sizeof(CandidatePage);
    char* at = static_cast<char*>(buffer) + buffer_bytes / 64 * 64 - listed_bytes(buffer_bytes, p);
    heads = reinterpret_cast<int32_t*>(at);
    pages = reinterpret_cast<CandidatePage*>(at + head_bytes);
  }
  // As a forward left them.
  static Candidates written(const void* buffer, int64_t bytes, const Problem& p) {
    return Candidates(const_cast<void*>(buffer), bytes, p, buffer ? *static_cast<const int32_t*>(buffer) : 0);
  }
  IBQ_INLINE CandidatePage& page(int part, int32_t i) const { return pages[part * pages_each + i]; }
  IBQ_INLINE int32_t& head(int part, int64_t row) const { return heads[part * rows + row]; }
};

// One task's pages: those never used yet and a chain of those given back.
struct CandidatePool {
  int32_t used, free_page, free_count;
};

// Where a list is written or read next.
struct CandidateCursor {
  int32_t page, at;
};

// Lists are read long after they left the caches, a few hundred entries at a time: too short for the hardware
// to foresee.
IBQ_INLINE void prefetch_entries(const CandidatePage& page, int at) {
  for (int i = at; i < at + 64; i += 16) {
    __builtin_prefetch(page.codes + i);
    __builtin_prefetch(page.logits + i);
  }
}

// What a task does with its part of the lists.
struct CandidatePart {
  const Candidates& lists;
  int task;
  CandidatePool& pool;

  int64_t left() const { return lists.pages_each - pool.used + pool.free_count; }
  int32_t take() const {
    int32_t i = pool.free_page;
    if (i < 0) {
      i = pool.used++;
    } else {
      pool.free_page = lists.page(task, i).next;
      --pool.free_count;
    }
    lists.page(task, i).next = -1;
    lists.page(task, i).fill = 0;
    return i;
  }
  void give_back(int32_t chain) const {
    while (chain >= 0) {
      CandidatePage& page = lists.page(task, chain);
      const int32_t next = page.next;
      page.next = pool.free_page;
      pool.free_page = chain;
      ++pool.free_count;
      chain = next;
    }
  }
};

// Puts the lanes with logit >= threshold and code < end at `count`; returns how many. Writes kWidth slots.
IBQ_INLINE int keep_lanes(F logits, I codes, F threshold, I end, CandidatePage& to, int count) {
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)logits, (__m512)threshold, _CMP_GE_OQ) &
                         _mm512_cmplt_epi32_mask((__m512i)codes, (__m512i)end);
  store(to.logits + count, (F)_mm512_maskz_compress_ps(kept, (__m512)logits));
  store_i(to.codes + count, (I)_mm512_maskz_compress_epi32(kept, (__m512i)codes));
  return __builtin_popcount(kept);
#else
  int more = 0;
  if (!any_not_below(logits, threshold)) return 0;
  for (int l = 0; l < kWidth; ++l)
    if (logits[l] >= threshold[0] && codes[l] < end[l]) {
      to.logits[count + more] = logits[l];
      to.codes[count + more++] = codes[l];
    }
  return more;
#endif
}

// Lists the entries of a row of a tile that reach the threshold; *last: the row's last page. The task has a
// page left.
IBQ_INLINE void append(const CandidatePart& part, int64_t row, int32_t* last, const float* x, int columns,
                       int32_t code0, int32_t end, float threshold) {
  if (*last < 0) *last = part.lists.head(part.task, row) = part.take();
  CandidatePage* page = &part.lists.page(part.task, *last);
  int fill = page->fill;
  for (int j = 0; j < columns; j += kWidth) {
    if (fill > CandidatePage::kFull) {
      page->fill = fill;
      *last = page->next = part.take();
      page = &part.lists.page(part.task, *last);
      fill = 0;
    }
    fill += keep_lanes(load(x + j), iota() + set1_i(code0 + j), set1(threshold), set1_i(end), *page, fill);
  }
  page->fill = fill;
}

// Drops what lies below the threshold from a row's list and gives the pages back that this empties.
inline void shrink(const CandidatePart& part, int64_t row, int32_t* last, float threshold) {
  if (*last < 0) return;
  int32_t to = part.lists.head(part.task, row);
  int kept = 0;  // in page `to`, which is never ahead of what is being read
  for (int32_t from = to; from >= 0;) {
    const CandidatePage& page = part.lists.page(part.task, from);
    const int32_t fill = page.fill, next = page.next;
    for (int i = 0; i < fill; i += kWidth) {
      const I codes = load_i(page.codes + i);
      const I end = iota() < set1_i(fill - i) ? codes + 1 : codes;  // slots past the fill are no entries
      if (kept > CandidatePage::kFull && to != from) {
        part.lists.page(part.task, to).fill = kept;
        to = part.lists.page(part.task, to).next;
        kept = 0;
      }
      kept += keep_lanes(load(page.logits + i), codes, set1(threshold), end, part.lists.page(part.task, to),
                         kept);
    }
    from = next;
  }
  CandidatePage& end = part.lists.page(part.task, to);
  end.fill = kept;
  part.give_back(end.next);
  end.next = -1;
  *last = to;
}

// The first `live` logits of a list from `at`; the other lanes hold `otherwise`.
IBQ_INLINE F listed_logits(const float* at, int live, F otherwise) {
  return iota() < set1_i(live) ? load(at) : otherwise;
}

// table[codes[l]] of the first `live` lanes, 0 in the others.
IBQ_INLINE F gather(const float* table, const int32_t* codes, int live) {
#if defined(__AVX512F__)
  const __mmask16 mask = (__mmask16)((1u << live) - 1);
  return (F)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, (__m512i)load_i(codes), table, 4);
#else
  F v = F{};
  for (int l = 0; l < live; ++l) v[l] = table[codes[l]];
  return v;
#endif
}

// sums[codes[l] - base] += terms[l] of the first `live` lanes. In float64, lane by lane: a third of the time
// that vector gathers and scatters of float32 sums and their rounding take.
IBQ_INLINE void add_at(double* sums, const int32_t* codes, int32_t base, F terms, int live) {
  float at[kWidth];
  store(at, terms);
  if (live == kWidth)
    for (int l = 0; l < kWidth; ++l) sums[codes[l] - base] += at[l];
  else
    for (int l = 0; l < live; ++l) sums[codes[l] - base] += at[l];
}

// Codes whose sums stay in L1 while all rows pass by.
constexpr int kSegment = 4096;
