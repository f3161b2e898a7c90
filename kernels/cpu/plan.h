// How one call is cut into tasks, and the workspace it needs.
#pragma once

IBQ_INLINE int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

// Codebooks from this size on keep per-tile bounds: below it there is little to skip, and tasks may then cut
// the codebook anywhere instead of between blocks.
constexpr int kBoundedFrom = 8192;

inline void tile_grid(int64_t n, int64_t k, int64_t* tiles, int64_t* blocks) {
  const bool bounded = k >= kBoundedFrom;
  *tiles = bounded ? (n + kMR - 1) / kMR : 0;
  *blocks = bounded ? (k + kBlock - 1) / kBlock : 0;
}

// Rows are taken in chunks (this bounds the workspace whatever N); inside a chunk, tasks form a grid of
// row ranges x code ranges. Splitting codes shares the packing of a block among all rows and keeps the
// codebook's gradient private to one task, so it comes first; rows are split when there are too few
// codes for the threads. Results of the code ranges are merged in order: same threads, same bits.
struct Plan {
  int64_t n, k, d, padded;  // padded: d rounded up to kNR
  int code_tasks, row_tasks;
  int64_t codes_per_task;        // multiple of kNR, of kBlock where bounds are kept
  int64_t tile;                  // rows that are packed together
  int64_t chunk, rows_per_task;  // multiples of it

  Plan(const Problem& p, int threads, int64_t tile_rows = kMR)
      : n(p.n), k(p.k), d(p.d), padded(round_up(p.d, kNR)), tile(tile_rows) {
    int64_t most = p.k / (2 * kBlock);
    code_tasks = (int)(most < 1 ? 1 : min_of(most, threads));
    codes_per_task = round_up((p.k + code_tasks - 1) / code_tasks, p.k >= kBoundedFrom ? kBlock : kNR);
    code_tasks = (int)((p.k + codes_per_task - 1) / codes_per_task);
    int64_t tiles = (p.n + tile - 1) / tile;
    row_tasks = (int)min_of(threads / code_tasks < 1 ? 1 : threads / code_tasks, tiles < 1 ? 1 : tiles);
    chunk = min_of(round_up(2048, tile) * row_tasks, tiles * tile);
    rows_per_task = round_up((chunk + row_tasks - 1) / row_tasks, tile);
    row_tasks = (int)((chunk + rows_per_task - 1) / rows_per_task);
  }

  int tasks() const { return code_tasks * row_tasks; }
};

// What one task covers: rows [row0, row1) of the chunk (whole tiles), codes [code0, code1).
struct Range {
  int code_task, row_task;
  int64_t row0, row1, code0, code1;

  Range(const Plan& plan, int64_t chunk_rows, int task) {
    code_task = task % plan.code_tasks;
    row_task = task / plan.code_tasks;
    row0 = min_of((int64_t)row_task * plan.rows_per_task, round_up(chunk_rows, plan.tile));
    row1 = min_of(row0 + plan.rows_per_task, round_up(chunk_rows, plan.tile));
    code0 = (int64_t)code_task * plan.codes_per_task;
    code1 = min_of(code0 + plan.codes_per_task, plan.k);
  }
};

// A bump allocator over one aligned block: sizes are added up first, then pointers handed out.
class Workspace {
 public:
  ~Workspace() { free(base_); }
  // Declares a buffer of `count` T; its pointer is set when allocate() succeeds.
  template <typename T>
  void add(T** pointer, int64_t count) {
    slots_[used_++] = Slot{reinterpret_cast<void**>(pointer), size_};
    size_ += round_up(count * (int64_t)sizeof(T), 64) + 64;
  }
  bool allocate() {
    if (posix_memalign(&base_, 4096, size_ < 64 ? 64 : (size_t)size_) != 0) {
      base_ = nullptr;
      return false;
    }
    for (int i = 0; i < used_; ++i) *slots_[i].pointer = static_cast<char*>(base_) + slots_[i].offset;
    return true;
  }

 private:
  struct Slot {
    void** pointer;
    int64_t offset;
  };
  Slot slots_[24];
  int used_ = 0;
  int64_t size_ = 0;
  void* base_ = nullptr;
};

// A code range's block, packed for logits_tile and, when wanted, as padded rows for combine_tile.
struct Block {
  int64_t code0, codes;  // codes <= kBlock
  int panels;
  const float* packed;
  const float* rows;
  const float* bias;  // [kBlock], columns past the codebook hold kMasked
};

// The logit of a column that does not exist: far below any real one, finite so that 0 * it is 0.
constexpr float kMasked = -1e30f;

// bias[j] -= weight * |E_j|^2 for the codes of a packed block; columns past the codebook are zero there.
template <bool kPairs>
void subtract_norms(const float* packed, int64_t depth, int panels, float weight, float* bias) {
  for (int p = 0; p < panels; ++p)
    for (int v = 0; v < kNV; ++v) {
      const float* column = packed + (int64_t)p * kNR * depth + v * kWidth;
      F sum = F{};
      for (int64_t j = 0; j < depth; ++j) {
        const F e = load(column + j * kNR);
        sum = multiply_add<kPairs>(e, e, sum);
      }
      float* b = bias + p * kNR + v * kWidth;
      store(b, load(b) - sum * set1(weight));
    }
}

inline void fill_bias(const Problem& p, int64_t code0, int64_t codes, float* bias) {
  for (int64_t j = 0; j < kBlock; ++j) bias[j] = j >= codes ? kMasked : (p.bias ? p.bias[code0 + j] : 0.0f);
}

template <bool kPairs>
Block load_block(const Problem& p, const Plan& plan, int64_t code0, int64_t code1, float* packed,
                 float* rows_scratch, float* bias) {
  Block b;
  b.code0 = code0;
  b.codes = min_of(kBlock, code1 - code0);
  b.panels = (int)((b.codes + kNR - 1) / kNR);
  pack_operand<kPairs>(p.dtype, p.codebook, code0, b.codes, p.d, kNR, packed);
  b.packed = packed;
  b.rows = rows_scratch
               ? rows_operand<kPairs>(p.dtype, p.codebook, code0, b.codes, p.d, plan.padded, rows_scratch)
               : nullptr;
  fill_bias(p, code0, b.codes, bias);
  if (p.norm_weight != 0.0f)
    subtract_norms<kPairs>(packed, words<kPairs>(p.d), b.panels, p.norm_weight, bias);
  b.bias = bias;
  return b;
}

// How far below its row's log-sum-exp a logit is negligible: the K entries below it add up to less than
// dropped_mass. Infinite when nothing may be dropped.
inline float negligible_gap(const Problem& p) {
  if (!(p.dropped_mass > 0)) return __builtin_inff();
  return (float)(log((double)p.k) - log((double)p.dropped_mass));
}

template <typename Body>
void run_tasks(const Parallel& parallel, int tasks, const Body& body) {
  auto call = [](void* context, int task) { (*static_cast<const Body*>(context))(task); };
  if (parallel.run && tasks > 1) {
    parallel.run(tasks, call, const_cast<Body*>(&body));
  } else {
    for (int t = 0; t < tasks; ++t) body(t);
  }
}

// Packs the rows [row, row + rows) into tiles [tile][words(d)][tile_rows], in parallel.
template <bool kPairs>
void pack_row_tiles(const Problem& p, const void* src, int64_t row, int64_t rows, float* out,
                    const Parallel& parallel, int tile_rows = kMR) {
  int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  int tasks = (int)min_of(parallel.threads, tiles);
  run_tasks(parallel, tasks, [&](int t) {
    int64_t t0 = tiles * t / tasks, t1 = tiles * (t + 1) / tasks;
    int64_t r0 = t0 * tile_rows, r1 = min_of(t1 * tile_rows, rows);
    pack_operand<kPairs>(p.dtype, src, row + r0, r1 - r0, p.d, tile_rows, out + r0 * words<kPairs>(p.d));
  });
}
