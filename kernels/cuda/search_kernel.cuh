// codebook_search on mma.sync tensor cores: index and value of the maximum of every row of
// S = scale * z @ codebook^T + bias and, by option, its log-sum-exp. S never leaves the registers.
//
// STATUS: UNRUN ON A GPU. Compiled for sm_80, sm_90a and sm_100a without spills and executed on the CPU by
// the emulator in kernels/tests, which checks indexing, masking, pipelining and merging, not speed.
//
// Contract    z [N, D], codebook [K, D] dense rows of bf16, fp16 or float32, any N, K < 2^31, D >= 1, any
//             alignment the type has; bias [K] float32 or null. Statistics are float32. Ties go to the lowest
//             code; a row of S with a NaN gives index 0 and NaN. Deterministic: the cut over blocks depends
//             on the sizes and the device only, and nothing is atomic.
// Accuracy    bf16, fp16: exact products, float32 accumulation in the tensor core.
//             float32: each operand is split into two tf32 parts, x = hi + lo (hi, lo rounded to 11 bits
//             each), and hi*hi + hi*lo + lo*hi is formed by three mma ("tf32x3"). Tensor cores truncate when
//             they add, so every 8-deep product is made from zero and added to the accumulator by an ordinary
//             rounded addition. Bound: |S - exact| <= (2^-21 + D/8 * 2^-24) * scale * sum_d |z_d e_d|,
//             against D * 2^-24 for a chain of float32 FMAs: better from D = 8 on upwards. Infinite inputs
//             turn into NaN here (inf - inf in the split), in 16-bit types they behave as in IEEE. exp is
//             ex2.approx: 2 units in the last place per term, terms below 2^-126 of the maximum are 0.
// Cost        2*N*K*D FLOP (three times that in float32) and, with lse, N*K exponentials. Device memory: the
//             codebook once for each group of row tiles that runs together, z once per split.
// Tiles       A block owns 128 rows, walks its split of the codes 128 at a time and D 128 bytes at a time.
// Its
//             4 warps hold 64×64 each: 128 accumulators a thread, the largest square that leaves room for
//             fragments and row state under 255 registers. A warp then reads 4 KB of shared memory for 131
//             kFLOP, half of sm_80's rate; 64×32 (3 KB for 65 kFLOP) would take three quarters. float32 walks
//             64 codes at a time, 64×32 a warp: with 64×64 the tf32 parts of the fragments spilled 376 bytes.
//             Two blocks share a multiprocessor, so one block's exponentials (at D = 256 a quarter to a half
//             of the multiply time on the MUFU unit) overlap with the other's products. z's tile stays in
//             shared memory where it fits (search_plan.h).
// Steps       cp.async moves 128-byte row pieces into a ring of 2 to 4 stages; 16-byte pieces are XORed with
//             the row's low three bits, so ldmatrix reads and cp.async writes both meet every bank once.
// Index       Tracking the index per element costs two instructions beside the maximum. Instead the 16 logits
//             of a row that a thread holds are reduced by max.NaN, and only when that beats the running
//             maximum (about ln(tiles) times per row) are they searched for the first that attains it.
#pragma once

#include "../common/row_stats.h"
#include "intrinsics.cuh"
#include "search_plan.h"

namespace ibq::cuda {

enum class Element : int { f32 = 0, bf16 = 1, f16 = 2 };

struct SearchArguments {
  const unsigned char* z;
  const unsigned char* codebook;
  const float* bias;  // null: none
  float scale;
  int64_t N, K, row_bytes;
  int access;  // 16, 4 or 2: the widest load, in bytes, that every row of z and codebook is aligned for
  SearchPlan plan;
  float* split_max;      // [splits, N]
  int32_t* split_index;  // [splits, N]
  float* split_sum;      // [splits, N], with lse
};

namespace search {

constexpr int kWarpRowFragments = 4;  // × 16 rows
constexpr int kRowSlots = 2 * kWarpRowFragments;
constexpr float kLog2E = 1.4426950408889634f;

// The codes of a step: two warps side by side, each kFragments × 8 codes.
template <Element kElement>
struct CodeTile {
  static constexpr int kCodes = search_tile_codes(kElement == Element::f32 ? 4 : 2);
  static constexpr int kBytes = kCodes * kChunkBytes;
  static constexpr int kWarpCodes = kCodes / 2;
  static constexpr int kFragments = kWarpCodes / 8;
  using Accumulator = float[kWarpRowFragments][kFragments][4];
};

// Where 16-byte piece `piece` (0 to 7) of row `row` of a tile lies.
IBQ_DEVICE SharedAddress tile_address(SharedAddress tile, int row, int piece) {
  return tile + static_cast<SharedAddress>(row * kChunkBytes + ((piece ^ (row & 7)) << 4));
}

// 16 bytes through registers, for rows that cp.async cannot address: 16-bit elements at odd places.
IBQ_DEVICE void copy_piece_by_element(SharedAddress dst, const unsigned char* src, int bytes) {
  const uint16_t* element = reinterpret_cast<const uint16_t*>(src);
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 4 * i < bytes ? element[2 * i] : 0u;
    const uint32_t high = 4 * i + 2 < bytes ? element[2 * i + 1] : 0u;
    word[i] = low | (high << 16);
  }
  store_shared_16(dst, word[0], word[1], word[2], word[3]);
}

// Brings kTileRows rows × 128 bytes of a matrix, from row `first_row` and byte `first_byte` of each row, into
// a tile. What lies outside the matrix becomes zero, which adds nothing to a dot product.
template <int kTileRows>
IBQ_DEVICE void load_tile(SharedAddress tile, const unsigned char* matrix, int64_t rows, int64_t row_bytes,
                          int64_t first_row, int64_t first_byte, int access) {
  constexpr int kRowsPerPass = kSearchThreads / 8;
  const int thread = static_cast<int>(threadIdx.x);
  const int piece = thread & 7;
  const int row = thread >> 3;
  const int64_t byte = first_byte + piece * 16;
  const int64_t left = row_bytes - byte;
  const int bytes = left >= 16 ? 16 : (left > 0 ? static_cast<int>(left) : 0);
  const unsigned char* src = matrix + (first_row + row) * row_bytes + byte;
  SharedAddress dst = tile_address(tile, row, piece);  // 16 rows further the swizzle is the same
  if (access == 16) {
#pragma unroll
    for (int pass = 0; pass < kTileRows / kRowsPerPass; ++pass) {
      const bool inside = bytes > 0 && first_row + row + pass * kRowsPerPass < rows;
      cp_async_16(dst, inside ? src : matrix, inside ? bytes : 0);
      src += kRowsPerPass * row_bytes;
      dst += kRowsPerPass * kChunkBytes;
    }
    return;
  }
#pragma unroll 1
  for (int pass = 0; pass < kTileRows / kRowsPerPass; ++pass) {
    const int valid = first_row + row + pass * kRowsPerPass < rows ? bytes : 0;
    if (access == 4) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int word_bytes = valid > 4 * word ? 4 : 0;
        cp_async_4(dst + 4 * word, word_bytes ? src + 4 * word : matrix, word_bytes);
      }
    } else {
      copy_piece_by_element(dst, valid ? src : matrix, valid);
    }
    src += kRowsPerPass * row_bytes;
    dst += kRowsPerPass * kChunkBytes;
  }
}

IBQ_DEVICE void split_tf32(const uint32_t (&x)[4], uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high[i] = round_to_tf32(as_float(x[i]));
    low[i] = round_to_tf32(as_float(x[i]) - as_float(high[i]));
  }
}

// c += a * b by tf32x3, small terms first, rounded once into c.
IBQ_DEVICE void mma_tf32x3(float (&c)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                           uint32_t b0_high, uint32_t b1_high, uint32_t b0_low, uint32_t b1_low) {
  float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_tf32(product, a_low, b0_high, b1_high);
  mma_tf32(product, a_high, b0_low, b1_low);
  mma_tf32(product, a_high, b0_high, b1_high);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += product[i];
}

// accumulator += z tile * code tile^T over one chunk of 128 bytes, for this warp's part.
template <Element kElement>
IBQ_DEVICE void multiply_chunk(typename CodeTile<kElement>::Accumulator& accumulator, SharedAddress z_tile,
                               SharedAddress code_tile) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  // ldmatrix row addresses. z: matrices are (rows 0-7, 8-15) × (first, second 16 bytes), rows fastest, as the
  // mma's A wants them; codes: two 8-code fragments × (first, second 16 bytes), bytes fastest.
  const int z_row = (warp >> 1) * 64 + (lane & 15);
  const int z_half = lane >> 4;
  const int code_row = (warp & 1) * CodeTile<kElement>::kWarpCodes + (lane & 7) + ((lane >> 4) << 3);
  const int code_half = (lane >> 3) & 1;
#pragma unroll(kElement == Element::f32 ? 1 : kChunkBytes / 32)
  for (int step = 0; step < kChunkBytes / 32; ++step) {
    uint32_t a[kWarpRowFragments][4];
#pragma unroll
    for (int m = 0; m < kWarpRowFragments; ++m)
      ldmatrix_x4(a[m], tile_address(z_tile, z_row, step * 2 + z_half) + m * 16 * kChunkBytes);
    if constexpr (kElement == Element::f32) {
      uint32_t a_low[kWarpRowFragments][4];
#pragma unroll
      for (int m = 0; m < kWarpRowFragments; ++m) split_tf32(a[m], a[m], a_low[m]);
#pragma unroll
      for (int pair = 0; pair < CodeTile<kElement>::kFragments / 2; ++pair) {
        uint32_t b[4], b_low[4];
        ldmatrix_x4(b, tile_address(code_tile, code_row, step * 2 + code_half) + pair * 16 * kChunkBytes);
        split_tf32(b, b, b_low);
#pragma unroll
        for (int m = 0; m < kWarpRowFragments; ++m) {
          mma_tf32x3(accumulator[m][2 * pair], a[m], a_low[m], b[0], b[1], b_low[0], b_low[1]);
          mma_tf32x3(accumulator[m][2 * pair + 1], a[m], a_low[m], b[2], b[3], b_low[2], b_low[3]);
        }
      }
    } else {
#pragma unroll
      for (int pair = 0; pair < CodeTile<kElement>::kFragments / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, tile_address(code_tile, code_row, step * 2 + code_half) + pair * 16 * kChunkBytes);
#pragma unroll
        for (int m = 0; m < kWarpRowFragments; ++m) {
          if constexpr (kElement == Element::bf16) {
            mma_bf16(accumulator[m][2 * pair], a[m], b[0], b[1]);
            mma_bf16(accumulator[m][2 * pair + 1], a[m], b[2], b[3]);
          } else {
            mma_f16(accumulator[m][2 * pair], a[m], b[0], b[1]);
            mma_f16(accumulator[m][2 * pair + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  }
}

// What a thread knows of the 8 rows it shares: row slot 2m+h is row 16m + 8h + lane/4 of the warp's 64.
struct ThreadRows {
  float max[kRowSlots];
  float sum[kRowSlots];
  int32_t index[kRowSlots];
};

// Turns the accumulator into logits and folds them into the row state. first_code is this thread's first
// column: fragment f, element e is code first_code + 8f + e.
template <bool kWithLse, int kFragments>
IBQ_DEVICE void fold_tile(ThreadRows& rows, float (&s)[kWarpRowFragments][kFragments][4],
                          const SearchArguments& args, int64_t tile_end, int32_t first_code) {
  const int32_t K = static_cast<int32_t>(args.K);
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t code = first_code + 8 * f + e;
      const float bias = args.bias != nullptr && code < K ? args.bias[code] : 0.0f;
#pragma unroll
      for (int m = 0; m < kWarpRowFragments; ++m) {
        s[m][f][e] = s[m][f][e] * args.scale + bias;
        s[m][f][e + 2] = s[m][f][e + 2] * args.scale + bias;
      }
    }
  }
  if (tile_end > args.K) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first_code + 8 * f + e < K) continue;
#pragma unroll
        for (int m = 0; m < kWarpRowFragments; ++m) s[m][f][e] = s[m][f][e + 2] = negative_infinity();
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kWarpRowFragments; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int slot = 2 * m + h;
      float tile_max = s[m][0][2 * h];
#pragma unroll
      for (int i = 1; i < 2 * kFragments; ++i) tile_max = max_or_nan(tile_max, s[m][i / 2][2 * h + i % 2]);
      if (tile_max > rows.max[slot]) {
        int32_t code = 0;
#pragma unroll
        for (int i = 2 * kFragments - 1; i >= 0; --i)
          if (s[m][i / 2][2 * h + i % 2] == tile_max) code = first_code + 8 * (i / 2) + i % 2;
        rows.index[slot] = code;
      }
      const float old_max = rows.max[slot];
      const float new_max = max_or_nan(old_max, tile_max);
      rows.max[slot] = new_max;
      if constexpr (kWithLse) {
        const float base = new_max == negative_infinity() ? 0.0f : new_max;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * kFragments; ++i)
          sum += exp2_approximate((s[m][i / 2][2 * h + i % 2] - base) * kLog2E);
        rows.sum[slot] = rows.sum[slot] * exp2_approximate((old_max - base) * kLog2E) + sum;
      }
    }
  }
}

// Joins the row states of the 4 lanes that share a row, then of the 2 warps, and writes the split's result.
template <bool kWithLse>
IBQ_DEVICE void write_split(const ThreadRows& rows, const SearchArguments& args, int64_t row_tile,
                            int64_t split) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int warp = thread >> 5;
  RowStats* joined = reinterpret_cast<RowStats*>(dynamic_shared());  // [2 halves of the codes][rows]
  cp_async_wait<0>();
  block_barrier();  // the tiles are read: their memory is free
#pragma unroll
  for (int slot = 0; slot < kRowSlots; ++slot) {
    RowStats row{rows.max[slot], rows.sum[slot], rows.index[slot]};
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      const RowStats other{shuffle_xor(row.max, lanes), kWithLse ? shuffle_xor(row.sum, lanes) : 0.0f,
                           shuffle_xor(row.index, lanes)};
      row = merge(row, other);
    }
    const int tile_row = (warp >> 1) * 64 + slot * 8 + (lane >> 2);
    if ((lane & 3) == 0) joined[(warp & 1) * kSearchTileRows + tile_row] = row;
  }
  block_barrier();
  const int64_t row_index = row_tile * kSearchTileRows + thread;
  if (row_index >= args.N) return;
  const RowStats row = merge(joined[thread], joined[kSearchTileRows + thread]);
  const int64_t place = split * args.N + row_index;
  args.split_max[place] = row.max;
  args.split_index[place] = row.index;
  if constexpr (kWithLse) args.split_sum[place] = row.sum;
}

}  // namespace search

// Grid: plan.schedule.blocks() blocks of kSearchThreads, plan.shared_bytes of dynamic shared memory.
template <Element kElement, bool kWithLse>
IBQ_KERNEL(kSearchThreads, 2)
codebook_search_kernel(const SearchArguments args) {
  using namespace search;
  using Tile = CodeTile<kElement>;
  const SearchPlan& plan = args.plan;
  const int64_t row_tile = plan.schedule.row_tile(blockIdx.x);
  const int32_t first_tile = static_cast<int32_t>(plan.schedule.first_tile(blockIdx.x));
  const int32_t end_tile = static_cast<int32_t>(plan.schedule.end_tile(blockIdx.x));
  const int32_t chunks = static_cast<int32_t>(plan.chunks);

  // Shared memory: resident z [chunks] tiles, then a ring of stages, each a code tile and, when z is
  // streamed, a z tile.
  const SharedAddress shared = shared_address(dynamic_shared());
  const SharedAddress stage_bytes = Tile::kBytes + (plan.z_resident ? 0 : kRowTileBytes);
  const SharedAddress ring =
      shared + (plan.z_resident ? static_cast<SharedAddress>(chunks) * kRowTileBytes : 0);
  const SharedAddress ring_end = ring + plan.stages * stage_bytes;

  int32_t load_tile_index = first_tile, load_chunk = 0;
  SharedAddress load_stage = ring;
  const auto load_next = [&] {
    if (load_tile_index < end_tile) {
      const int64_t byte = int64_t{load_chunk} * kChunkBytes;
      load_tile<Tile::kCodes>(load_stage, args.codebook, args.K, args.row_bytes,
                              int64_t{load_tile_index} * Tile::kCodes, byte, args.access);
      if (!plan.z_resident || load_tile_index == first_tile) {
        const SharedAddress z_tile = plan.z_resident
                                         ? shared + static_cast<SharedAddress>(load_chunk) * kRowTileBytes
                                         : load_stage + Tile::kBytes;
        load_tile<kSearchTileRows>(z_tile, args.z, args.N, args.row_bytes, row_tile * kSearchTileRows, byte,
                                   args.access);
      }
      if (++load_chunk == chunks) {
        load_chunk = 0;
        ++load_tile_index;
      }
      load_stage += stage_bytes;
      if (load_stage == ring_end) load_stage = ring;
    }
    cp_async_commit();  // also when there was nothing to load: the count of groups is what is waited for
  };

  ThreadRows rows;
#pragma unroll
  for (int slot = 0; slot < kRowSlots; ++slot) {
    rows.max[slot] = negative_infinity();
    rows.sum[slot] = 0.0f;
    rows.index[slot] = 0;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int thread_code = ((thread >> 5) & 1) * Tile::kWarpCodes + (thread & 3) * 2;

  for (int stage = 0; stage < plan.stages - 1; ++stage) load_next();
  SharedAddress stage = ring;
  for (int32_t tile = first_tile; tile < end_tile; ++tile) {
    typename Tile::Accumulator s;
#pragma unroll
    for (int i = 0; i < kWarpRowFragments * Tile::kFragments * 4; ++i)
      s[i / 4 / Tile::kFragments][i / 4 % Tile::kFragments][i % 4] = 0.0f;
#pragma unroll 1
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      if (plan.stages == 4) {
        cp_async_wait<2>();
      } else if (plan.stages == 3) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      block_barrier();  // this stage has arrived for all, and all are done with the one before
      load_next();      // into the place of the one before
      multiply_chunk<kElement>(
          s,
          plan.z_resident ? shared + static_cast<SharedAddress>(chunk) * kRowTileBytes : stage + Tile::kBytes,
          stage);
      stage += stage_bytes;
      if (stage == ring_end) stage = ring;
    }
    fold_tile<kWithLse>(rows, s, args, (int64_t{tile} + 1) * Tile::kCodes, tile * Tile::kCodes + thread_code);
  }
  write_split<kWithLse>(rows, args, row_tile, plan.schedule.split(blockIdx.x));
}

constexpr int kFinishThreads = 256;

// Joins the splits of each row and writes the results. Grid: ceil(N / kFinishThreads) blocks.
template <bool kWithLse>
IBQ_KERNEL(kFinishThreads, 1)
codebook_search_finish_kernel(const SearchArguments args, int64_t* indices, float* max, float* lse) {
  const int64_t row = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (row >= args.N) return;
  RowStats joined = empty_row_stats();
  for (int64_t split = 0; split < args.plan.schedule.splits; ++split) {
    const int64_t place = split * args.N + row;
    const RowStats part{args.split_max[place], kWithLse ? args.split_sum[place] : 0.0f,
                        args.split_index[place]};
    joined = merge(joined, part);
  }
  indices[row] = joined.index;
  max[row] = joined.max;
  if constexpr (kWithLse) lse[row] = log_sum_exp(joined);
}

}  // namespace ibq::cuda
