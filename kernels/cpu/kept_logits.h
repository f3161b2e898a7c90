// Kept logits: tiles of S that the forward's first sweep leaves in memory for the sweeps behind it (the mean
// of p, the backward's row constants and its dS), which otherwise compute S again. As many blocks of codes as
// the call's buffer has room for, the first ones: all of a small S, a part of a large one.
//
// The buffer, best of candidate_bytes(n, k, d): a header of two int32, the tasks that listed candidates (0:
// none) and the blocks kept; kept tiles, block by block; the lists at its end. A peaked P lives in so few
// tiles that keeping the others would cost more than it saves, so nothing is kept there; lists (candidates.h)
// are for what does not fit.
#pragma once

constexpr int64_t kHeaderBytes = 64;

inline int64_t logit_bytes(int64_t n, int64_t k) {
  int64_t tiles, blocks;
  tile_grid(n, k, &tiles, &blocks);
  return tiles * blocks * kMR * kBlock * (int64_t)sizeof(float);
}

inline int64_t candidate_bytes(int64_t n, int64_t k, int64_t d) {
  if (k < kBoundedFrom) return 0;
  const int64_t gradient = k * d * (int64_t)sizeof(float);
  return min_of(kHeaderBytes + logit_bytes(n, k), gradient > kCandidateBytes ? gradient : kCandidateBytes);
}

struct KeptLogits {
  int64_t row_tiles = 0, blocks = 0;  // blocks kept
  float* tiles = nullptr;             // [blocks][row_tiles][kMR][kBlock]

  KeptLogits() = default;
  // In `bytes` of a buffer.
  KeptLogits(void* buffer, int64_t bytes, const Problem& p) {
    int64_t all;
    tile_grid(p.n, p.k, &row_tiles, &all);
    if (!buffer || row_tiles == 0 || bytes < kHeaderBytes) return;
    const int64_t each = row_tiles * kMR * kBlock * (int64_t)sizeof(float);
    blocks = min_of((bytes - kHeaderBytes) / each, all);
    tiles = reinterpret_cast<float*>(static_cast<char*>(buffer) + kHeaderBytes);
  }
  // As a forward left them.
  static KeptLogits written(const void* buffer, int64_t bytes, const Problem& p) {
    KeptLogits kept(const_cast<void*>(buffer), bytes, p);
    kept.blocks = buffer ? static_cast<const int32_t*>(buffer)[1] : 0;
    return kept;
  }
  // Whether so much is kept that lists would save less: they spare two products of S, kept logits three.
  bool nearly_all(int64_t k) const { return 8 * blocks >= 7 * ((k + kBlock - 1) / kBlock); }
  bool has(int64_t code0) const { return code0 / kBlock < blocks; }
  IBQ_INLINE float* at(int64_t row, int64_t code0) const {
    return tiles + (code0 / kBlock * row_tiles + row / kMR) * (kMR * kBlock);
  }
};

// Past the caches: what is kept is read when they hold something else. finish_keeping() before others read.
IBQ_INLINE void keep_tile(const float* logits, int columns, float* kept) {
  for (int i = 0; i < kMR; ++i)
    for (int j = 0; j < columns; j += kWidth) {
      const F x = load(logits + i * kBlock + j);
#if defined(__AVX512F__)
      _mm512_stream_ps(kept + i * kBlock + j, (__m512)x);
#elif defined(__AVX2__)
      _mm256_stream_ps(kept + i * kBlock + j, (__m256)x);
#else
      store(kept + i * kBlock + j, x);
#endif
    }
}

IBQ_INLINE void finish_keeping() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

IBQ_INLINE void take_tile(const float* kept, int columns, float* logits) {
  for (int i = 0; i < kMR; ++i)
    for (int j = 0; j < columns; j += kWidth) store(logits + i * kBlock + j, load(kept + i * kBlock + j));
}

// The tile that will be wanted next, while the present one is computed with.
IBQ_INLINE void prefetch_tile(const float* kept) {
  for (int i = 0; i < kMR * kBlock; i += 16) __builtin_prefetch(kept + i, 0, 2);
}

// A block of codes of which only S is wanted: packed where its logits are computed, not where they were kept.
template <bool kPairs>
Block load_logit_block(const Problem& p, const Plan& plan, const KeptLogits& kept, int64_t code0,
                       int64_t code1, float* packed, float* bias) {
  if (!kept.has(code0)) return load_block<kPairs>(p, plan, code0, code1, packed, nullptr, bias);
  Block b = {};
  b.code0 = code0;
  b.codes = min_of(kBlock, code1 - code0);
  b.panels = (int)((b.codes + kNR - 1) / kNR);
  return b;
}
