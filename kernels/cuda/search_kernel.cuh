// codebook_search on mma.sync tensor cores: index and value of the maximum of every row of
// S = scale * z @ codebook^T + bias and, by option, its log-sum-exp. S never leaves the registers.
//
// STATUS: UNRUN ON A GPU. Compiled for sm_80, sm_90a and sm_100a without spills, and executed on the CPU by
// the emulator in kernels/tests, which checks indexing, masking, pipelining and merging, not speed.
//
// Contract. z [N, D], codebook [K, D] dense rows of bf16, fp16 or float32, any N, K < 2^31, D >= 1, any
// alignment the type has; bias [K] float32 or null. Statistics are float32. Ties go to the lowest code; a
// row of S with a NaN gives index 0 and NaN. Deterministic: the cut over blocks depends on the sizes and the
// device only, and nothing is atomic.
//
// Accuracy. bf16 and fp16: exact products, float32 accumulation in the tensor core. float32: each operand is
// split into two tf32 parts x = hi + lo, rounded to 11 bits each, and hi*hi + hi*lo + lo*hi is formed by
// three mma ("tf32x3"). Tensor cores truncate when they add, so every 8-deep product starts from zero and is
// added to the accumulator by an ordinary rounded addition. Bound, before scale and bias are applied by one
// FMA: |dot - exact| <= (2^-20 + D/8 * 2^-24) * sum_d |z_d e_d|, of which 2^-21 is the split and the rest of
// 2^-20 the truncation; a chain of float32 FMAs has D * 2^-24, which is worse from D = 19 on. Infinite inputs
// become NaN here (inf - inf in the split); in the 16-bit types they behave as in IEEE. exp is ex2.approx: 2
// units in the last place a term, and terms below 2^-126 of the maximum are 0.
//
// Cost. 2*N*K*D FLOP (three times that in float32) and, with lse, N*K exponentials. Device memory: the
// codebook once for each group of row tiles that runs together, z once per split.
//
// Tiles. A block owns 128 rows, walks its split of the codes 128 at a time, and D 128 bytes at a time. Its 4
// warps hold 64×64 each: 128 accumulators a thread, the largest square that leaves room for fragments and row
// state under 255 registers. A warp then reads 4 KB of shared memory for 131 kFLOP, half of sm_80's rate;
// 64×32 (3 KB for 65 kFLOP) would take three quarters. Two blocks share a multiprocessor, so that one block's
// exponentials (at D = 256 a quarter to a half of the multiply time, on the MUFU unit) overlap with the
// other's products. z's tile stays in shared memory where it fits (search_plan.h).
//
// Steps. cp.async moves 128-byte row pieces into a ring of 2 to 4 stages. Within a row, 16-byte pieces are
// XORed with the row's low three bits, so that ldmatrix and cp.async both meet every bank once.
//
// Index. Tracking the index per element costs two instructions beside the maximum. Instead the 16 logits of
// a row that a thread holds are reduced by max.NaN, and only when that beats the running maximum (about
// ln(tiles) times a row and lane) are they searched for the first that attains it.
//
// Tried. float32 with 64×64 a warp: the second tf32 part of the fragments spills (376 bytes on sm_80); 64×32
// with the k-steps unrolled: up to 224 bytes. Hence 64 codes a step and rolled k-steps for float32: none.
#pragma once

#include "../common/row_stats.h"
#include "../common/softmax_rules.h"
#include "search_tiles.cuh"
#include "tile_ring.cuh"

namespace ibq::cuda {

namespace search {

constexpr int kRowSlots = 2 * kWarpRowFragments;
constexpr float kLog2E = 1.4426950408889634f;

// What a thread knows of the 8 rows it shares: row slot 2m+h is row 16m + 8h + lane/4 of the warp's 64.
struct ThreadRows {
  float max[kRowSlots];
  float sum[kRowSlots];
  int32_t index[kRowSlots];
  float tempered_sum[kRowSlots];     // with Extra::entropy
  float tempered_moment[kRowSlots];  // with Extra::entropy
  float logits[kRowSlots];           // with Extra::target
};

// Adds a tile's logits s of one row to the sums of e^y and y e^y, whose reference rises from old_max to base.
template <int kFragments>
IBQ_DEVICE void fold_tempered(float& tempered_sum, float& tempered_moment, const float (&s)[kFragments][4],
                              int h, float old_max, float base, float inverse_tau) {
  const float shift = (old_max - base) * inverse_tau;
  const float decay = exp2_approximate(shift * kLog2E);
  float sum = 0.0f, moment = 0.0f;
  IBQ_UNROLL
  for (int i = 0; i < 2 * kFragments; ++i) {
    const float y = (s[i / 2][2 * h + i % 2] - base) * inverse_tau;
    const float e = exp2_approximate(y * kLog2E);
    sum += e;
    moment += e * larger(y, kLeastLogProb);
  }
  // Against the new reference the old moment sum is moment + shift * sum. Without an old sum shift is -inf.
  if (decay > 0.0f) moment += decay * (tempered_moment + shift * tempered_sum);
  tempered_moment = moment;
  tempered_sum = tempered_sum * decay + sum;
}

// Turns the accumulator into logits and folds them into the row state. first_code is this thread's first
// column: fragment f, element e is code first_code + 8f + e; thread_row: its row of slot 0.
template <bool kWithLse, Extra kExtra, int kFragments>
IBQ_DEVICE void fold_tile(ThreadRows& rows, float (&s)[kWarpRowFragments][kFragments][4],
                          const SearchArguments& args, int64_t thread_row, int64_t tile_end,
                          int32_t first_code) {
  const int32_t K = static_cast<int32_t>(args.K);
  float bias[kFragments][2] = {};
  // All loads come before the first use; past the end they are clamped rather than branched around.
  if (args.bias != nullptr) {
    IBQ_UNROLL
    for (int i = 0; i < 2 * kFragments; ++i) {
      const int32_t code = first_code + 8 * (i / 2) + i % 2;
      bias[i / 2][i % 2] = args.bias[code < K ? code : K - 1];
    }
  }
  IBQ_UNROLL
  for (int m = 0; m < kWarpRowFragments; ++m) {
    IBQ_UNROLL
    for (int f = 0; f < kFragments; ++f) {
      IBQ_UNROLL
      for (int e = 0; e < 4; ++e) s[m][f][e] = s[m][f][e] * args.scale + bias[f][e % 2];
    }
  }
  if (tile_end > args.K) {
    IBQ_UNROLL
    for (int f = 0; f < kFragments; ++f) {
      IBQ_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (first_code + 8 * f + e < K) continue;
        IBQ_UNROLL
        for (int m = 0; m < kWarpRowFragments; ++m) s[m][f][e] = s[m][f][e + 2] = negative_infinity();
      }
    }
  }
  IBQ_UNROLL
  for (int m = 0; m < kWarpRowFragments; ++m) {
    IBQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int slot = 2 * m + h;
      float tile_max = s[m][0][2 * h];
      IBQ_UNROLL
      for (int i = 1; i < 2 * kFragments; ++i) tile_max = max_or_nan(tile_max, s[m][i / 2][2 * h + i % 2]);
      if (tile_max > rows.max[slot]) {
        int32_t code = 0;
        IBQ_UNROLL
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
        IBQ_UNROLL
        for (int i = 0; i < 2 * kFragments; ++i)
          sum += exp2_approximate((s[m][i / 2][2 * h + i % 2] - base) * kLog2E);
        rows.sum[slot] = rows.sum[slot] * exp2_approximate((old_max - base) * kLog2E) + sum;
        if constexpr (kExtra == Extra::entropy)
          fold_tempered(rows.tempered_sum[slot], rows.tempered_moment[slot], s[m], h, old_max, base,
                        args.inverse_tau);
      }
      if constexpr (kExtra == Extra::target) {
        const int64_t row = thread_row + 16 * m + 8 * h;
        const int64_t target = row < args.N ? args.targets[row] : -1;
        if (target >= first_code && target < args.K) {
          IBQ_UNROLL
          for (int i = 0; i < 2 * kFragments; ++i)
            if (first_code + 8 * (i / 2) + i % 2 == target)
              args.target_logit[row] = s[m][i / 2][2 * h + i % 2];
        }
        if (args.split_logits != nullptr) {
          IBQ_UNROLL
          for (int i = 0; i < 2 * kFragments; ++i)
            if (first_code + 8 * (i / 2) + i % 2 < K) rows.logits[slot] += s[m][i / 2][2 * h + i % 2];
        }
      }
    }
  }
}

// The extra sums of the rows, joined as write_split joins the others: row_max is that of row `thread` of the
// tile, whose results go to `place`. Every lane brings its sums to the split's maximum, where they add up.
template <Extra kExtra>
IBQ_DEVICE void write_extra(const ThreadRows& rows, float row_max, const SearchArguments& args,
                            int64_t row_tile, int64_t place) {
  struct Sums {
    float first, second;
  };
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int warp = thread >> 5;
  float* maxima = reinterpret_cast<float*>(dynamic_shared());        // [rows]
  Sums* halves = reinterpret_cast<Sums*>(maxima + kSearchTileRows);  // [2 halves of the codes][rows]
  block_barrier();  // write_split has read what it keeps here
  maxima[thread] = row_max;
  block_barrier();
  IBQ_UNROLL
  for (int slot = 0; slot < kRowSlots; ++slot) {
    const int tile_row = (warp >> 1) * 64 + slot * 8 + (lane >> 2);
    Sums sums{rows.logits[slot], 0.0f};
    if constexpr (kExtra == Extra::entropy) {
      const double shift = rows.max[slot] == maxima[tile_row]
                               ? 0.0
                               : (static_cast<double>(rows.max[slot]) - maxima[tile_row]) * args.inverse_tau;
      TemperedSums all{0.0, 0.0};
      add_tempered(all, {rows.tempered_sum[slot], rows.tempered_moment[slot]}, shift);
      sums = {static_cast<float>(all.sum), static_cast<float>(all.moment)};
    }
    IBQ_UNROLL
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      sums.first += shuffle_xor(sums.first, lanes);
      sums.second += shuffle_xor(sums.second, lanes);
    }
    if ((lane & 3) == 0) halves[(warp & 1) * kSearchTileRows + tile_row] = sums;
  }
  block_barrier();
  if (row_tile * kSearchTileRows + thread >= args.N) return;
  const Sums first = halves[thread], second = halves[kSearchTileRows + thread];
  if constexpr (kExtra == Extra::entropy) {
    args.split_tempered_sum[place] = first.first + second.first;
    args.split_tempered_moment[place] = first.second + second.second;
  } else if (args.split_logits != nullptr) {
    args.split_logits[place] = first.first + second.first;
  }
}

// Joins the row states of the 4 lanes that share a row, then of the 2 warps, and writes the split's result.
template <bool kWithLse, Extra kExtra>
IBQ_DEVICE void write_split(const ThreadRows& rows, const SearchArguments& args, int64_t row_tile,
                            int64_t split) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int warp = thread >> 5;
  RowStats* joined = reinterpret_cast<RowStats*>(dynamic_shared());  // [2 halves of the codes][rows]
  cp_async_wait<0>();
  block_barrier();  // the tiles are read: their memory is free
  IBQ_UNROLL
  for (int slot = 0; slot < kRowSlots; ++slot) {
    RowStats row{rows.max[slot], rows.sum[slot], rows.index[slot]};
    IBQ_UNROLL
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
  const RowStats row = merge(joined[thread], joined[kSearchTileRows + thread]);
  const int64_t place = split * args.N + row_index;
  if (row_index < args.N) {
    args.split_max[place] = row.max;
    args.split_index[place] = row.index;
    if constexpr (kWithLse) args.split_sum[place] = row.sum;
  }
  if constexpr (kExtra != Extra::none) write_extra<kExtra>(rows, row.max, args, row_tile, place);
}

}  // namespace search

// Grid: plan.schedule.blocks() blocks of kSearchThreads, plan.shared_bytes of dynamic shared memory.
template <Element kElement, bool kWithLse, Extra kExtra = Extra::none>
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
  TileRing ring(shared + (plan.z_resident ? static_cast<SharedAddress>(chunks) * kRowTileBytes : 0),
                plan.stages, stage_bytes);

  int32_t load_tile_index = first_tile, load_chunk = 0;
  const auto load_next = [&] {
    if (load_tile_index < end_tile) {
      const int64_t byte = int64_t{load_chunk} * kChunkBytes;
      const SharedAddress load_stage = ring.next_load();
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
    }
    cp_async_commit();  // also when there was nothing to load: the count of groups is what is waited for
  };

  ThreadRows rows;
  IBQ_UNROLL
  for (int slot = 0; slot < kRowSlots; ++slot) {
    rows.max[slot] = negative_infinity();
    rows.sum[slot] = 0.0f;
    rows.index[slot] = 0;
    rows.tempered_sum[slot] = rows.tempered_moment[slot] = rows.logits[slot] = 0.0f;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int thread_code = ((thread >> 5) & 1) * Tile::kWarpCodes + (thread & 3) * 2;
  const int64_t thread_row = row_tile * kSearchTileRows + (thread >> 6) * 64 + ((thread >> 2) & 7);

  for (int stage = 0; stage < plan.stages - 1; ++stage) load_next();
  for (int32_t tile = first_tile; tile < end_tile; ++tile) {
    typename Tile::Accumulator s;
    IBQ_UNROLL
    for (int i = 0; i < kWarpRowFragments * Tile::kFragments * 4; ++i)
      s[i / 4 / Tile::kFragments][i / 4 % Tile::kFragments][i % 4] = 0.0f;
    IBQ_UNROLL_BY(1)
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      ring.wait();
      block_barrier();  // this stage has arrived for all, and all are done with the one before
      load_next();      // into the place of the one before
      const SharedAddress stage = ring.next_read();
      multiply_chunk<kElement, 2, Tile::kFragments>(
          s,
          plan.z_resident ? shared + static_cast<SharedAddress>(chunk) * kRowTileBytes : stage + Tile::kBytes,
          stage);
    }
    fold_tile<kWithLse, kExtra>(rows, s, args, thread_row, (int64_t{tile} + 1) * Tile::kCodes,
                                tile * Tile::kCodes + thread_code);
  }
  write_split<kWithLse, kExtra>(rows, args, row_tile, plan.schedule.split(blockIdx.x));
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
