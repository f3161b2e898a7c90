// codebook_search for compute capability 9.0: index and value of the maximum of every row of
// S = scale * z @ codebook^T + bias and, by option, its log-sum-exp, by wgmma.
//
// STATUS: NEVER RUN ON A GPU. Compiled for sm_90a without spills; executed on the CPU under
// kernels/tests/hopper_emulator.h, which decodes tensor maps, swizzles and descriptors by the PTX ISA's
// rules.
//
// Contract. As search_kernel.cuh, for bf16 and fp16, D = 64, 128, 192 or 256, rows 16-byte aligned, N < 2^31.
//
// Cost. 2*N*K*D FLOP and, with lse, N*K exponentials. A block reads each code from L2 once for 256 rows.
//
// Structure. One producer thread drives the copy engine; two consumer warpgroups of 128 rows each multiply.
// z (256 rows, all columns) stays in shared memory; the codebook streams through a ring of panels, 128 codes
// × 64 columns (16 KB), each read by both warpgroups. At D = 256 that is 128 KB + 6 × 16 KB.
//   * A warpgroup's tile is 128 rows × 128 codes: 2 × m64n128, 128 accumulators a thread. A panel is then
//     8 wgmma of 64 cycles that read 6 KB of shared memory each (96 of 128 bytes a cycle).
//   * 256 rows rather than 128: a code tile costs 4096 tensor cycles for 64 KB of L2 traffic, 16 bytes a
//   cycle
//     and multiprocessor, half of what L2 sustains. 128 rows × 256 codes reads less shared memory (80 bytes a
//     cycle) but needs twice the L2 traffic, or clusters.
//   * The warpgroups take turns on the tensor cores (named barriers): while one multiplies (2048 cycles at
//     D = 256) the other runs its epilogue (128 logits a thread: 128 MUFU operations at 8 cycles a warp,
//     about 1100 cycles with the rest). The turn passes when only the last panel of a tile is still in
//     flight, so the tensor cores never run dry.
//   * setmaxnreg moves registers from the producer (24) to the consumers (240).
//
// Work items are (row tile, split of the codes), row tile first, so that blocks of one wave walk the same
// codes. A block takes every gridDim-th item.
#pragma once

#include "../search_kernel.cuh"
#include "operand.cuh"
#include "search_plan.h"

namespace ibq::cuda::hopper {

struct SearchParameters {
  TensorMap z;         // boxes of 128 rows
  TensorMap codebook;  // boxes of 128 rows
  const float* bias;   // null: none
  float scale;
  int64_t N, K;
  SearchPlan plan;
  float* split_max;      // [splits, N]
  int32_t* split_index;  // [splits, N]
  float* split_sum;      // [splits, N], with lse
};

namespace search {

constexpr int kWarpgroupRows = kSearchRows / 2;
constexpr int kFragments = kSearchCodes / 8;
constexpr int kConsumerWarps = 8;
constexpr int kTurnBarrier = 1;  // and 2: one for each warpgroup's turn
constexpr float kLog2E = 1.4426950408889634f;

// Addresses of the block's barriers. A stage is full when its bytes have come, empty when all consumer warps
// have left it; the same for z.
struct Barriers {
  SharedAddress base;
  IBQ_DEVICE SharedAddress full(int stage) const { return base + 16 * stage; }
  IBQ_DEVICE SharedAddress empty(int stage) const { return base + 16 * stage + 8; }
  IBQ_DEVICE SharedAddress z_full() const { return full(kMaxSearchStages); }
  IBQ_DEVICE SharedAddress z_empty() const { return empty(kMaxSearchStages); }
};

// A place in the ring and the parity of the phase that is awaited there.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  IBQ_DEVICE void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What a thread knows of the 4 rows it shares with 3 others: slot 2m + h is row 64m + 16 warp + lane/4 + 8h.
struct Rows {
  float max[4];
  float sum[4];
  int32_t index[4];
};

IBQ_DEVICE void produce(const SearchParameters& p, SharedAddress shared, const Barriers& barriers) {
  const SearchPlan& plan = p.plan;
  const SharedAddress ring = shared + static_cast<SharedAddress>(plan.panels * kRowPanelBytes);
  prefetch_tensor_map(p.z);
  prefetch_tensor_map(p.codebook);
  RingPlace place;
  uint32_t z_parity = 1;  // a wait for the phase before the first returns at once
  for (int64_t item = blockIdx.x; item < plan.schedule.blocks(); item += gridDim.x) {
    barrier_wait(barriers.z_empty(), z_parity);
    z_parity ^= 1;
    const int first_row = static_cast<int>(plan.schedule.row_tile(item)) * kSearchRows;
    barrier_arrive_expect(barriers.z_full(), plan.panels * kRowPanelBytes);
    for (int panel = 0; panel < plan.panels; ++panel) {
      const SharedAddress dst = shared + static_cast<SharedAddress>(panel * kRowPanelBytes);
      copy_box(dst, p.z, panel * kMapColumns, first_row, barriers.z_full());
      copy_box(dst + kRowPanelBytes / 2, p.z, panel * kMapColumns, first_row + kSearchRows / 2,
               barriers.z_full());
    }
    const int end_tile = static_cast<int>(plan.schedule.end_tile(item));
    for (int tile = static_cast<int>(plan.schedule.first_tile(item)); tile < end_tile; ++tile) {
      for (int panel = 0; panel < plan.panels; ++panel) {
        barrier_wait(barriers.empty(place.stage), place.parity ^ 1);
        barrier_arrive_expect(barriers.full(place.stage), kCodePanelBytes);
        copy_box(ring + static_cast<SharedAddress>(place.stage * kCodePanelBytes), p.codebook,
                 panel * kMapColumns, tile * kSearchCodes, barriers.full(place.stage));
        place.advance(plan.stages);
      }
    }
  }
}

// Turns the products of one 64-row block into logits and folds them into the row state.
template <bool kWithLse>
IBQ_DEVICE void fold(Rows& rows, int m, float (&s)[4 * kFragments], const float (&bias)[2 * kFragments],
                     float scale, int32_t first_code, int32_t K) {
  IBQ_UNROLL
  for (int f = 0; f < kFragments; ++f) {
    IBQ_UNROLL
    for (int e = 0; e < 4; ++e) s[4 * f + e] = s[4 * f + e] * scale + bias[2 * f + e % 2];
  }
  // This thread's last column is 121 codes after its first.
  if (first_code > K - kSearchCodes) {
    IBQ_UNROLL
    for (int f = 0; f < kFragments; ++f) {
      IBQ_UNROLL
      for (int e = 0; e < 2; ++e)
        if (first_code + 8 * f + e >= K) s[4 * f + e] = s[4 * f + e + 2] = negative_infinity();
    }
  }
  IBQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int slot = 2 * m + h;
    float tile_max = s[2 * h];
    IBQ_UNROLL
    for (int i = 1; i < 2 * kFragments; ++i) tile_max = max_or_nan(tile_max, s[4 * (i / 2) + 2 * h + i % 2]);
    if (tile_max > rows.max[slot]) {
      int32_t code = 0;
      IBQ_UNROLL
      for (int i = 2 * kFragments - 1; i >= 0; --i)
        if (s[4 * (i / 2) + 2 * h + i % 2] == tile_max) code = first_code + 8 * (i / 2) + i % 2;
      rows.index[slot] = code;
    }
    const float old_max = rows.max[slot];
    const float new_max = max_or_nan(old_max, tile_max);
    rows.max[slot] = new_max;
    if constexpr (kWithLse) {
      // exp2(s log2e - base log2e) by one multiply-add each: base log2e is rounded once, to half a unit in
      // the last place of the log-sum-exp itself.
      const float base = new_max == negative_infinity() ? 0.0f : new_max;
      const float shift = base * kLog2E;
      float sum0 = 0.0f, sum1 = 0.0f;
      IBQ_UNROLL
      for (int f = 0; f < kFragments; ++f) {
        sum0 += exp2_approximate(s[4 * f + 2 * h] * kLog2E - shift);
        sum1 += exp2_approximate(s[4 * f + 2 * h + 1] * kLog2E - shift);
      }
      rows.sum[slot] = rows.sum[slot] * exp2_approximate((old_max - base) * kLog2E) + (sum0 + sum1);
    }
  }
}

// Joins the four lanes that share a row and writes the split's result.
template <bool kWithLse>
IBQ_DEVICE void write_split(const Rows& rows, const SearchParameters& p, int64_t first_row, int64_t split) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>(threadIdx.x) >> 5 & 3;
  IBQ_UNROLL
  for (int slot = 0; slot < 4; ++slot) {
    RowStats row{rows.max[slot], rows.sum[slot], rows.index[slot]};
    IBQ_UNROLL
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      const RowStats other{shuffle_xor(row.max, lanes), kWithLse ? shuffle_xor(row.sum, lanes) : 0.0f,
                           shuffle_xor(row.index, lanes)};
      row = merge(row, other);
    }
    const int64_t row_index = first_row + slot / 2 * 64 + 16 * warp + (lane >> 2) + slot % 2 * 8;
    if ((lane & 3) != 0 || row_index >= p.N) continue;
    const int64_t place = split * p.N + row_index;
    p.split_max[place] = row.max;
    p.split_index[place] = row.index;
    if constexpr (kWithLse) p.split_sum[place] = row.sum;
  }
}

template <bool kBf16, bool kWithLse>
IBQ_DEVICE void consume(const SearchParameters& p, SharedAddress shared, const Barriers& barriers,
                        int warpgroup) {
  const SearchPlan& plan = p.plan;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const SharedAddress ring = shared + static_cast<SharedAddress>(plan.panels * kRowPanelBytes);
  const int32_t K = static_cast<int32_t>(p.K);
  RingPlace place;
  uint32_t z_parity = 0;
  if (warpgroup == 1) named_barrier_arrive<256>(kTurnBarrier);  // the first turn is the other's
  for (int64_t item = blockIdx.x; item < plan.schedule.blocks(); item += gridDim.x) {
    Rows rows;
    IBQ_UNROLL
    for (int slot = 0; slot < 4; ++slot) {
      rows.max[slot] = negative_infinity();
      rows.sum[slot] = 0.0f;
      rows.index[slot] = 0;
    }
    const bool last_item = item + gridDim.x >= plan.schedule.blocks();
    const int32_t end_tile = static_cast<int32_t>(plan.schedule.end_tile(item));
    barrier_wait(barriers.z_full(), z_parity);
    z_parity ^= 1;
    for (int32_t tile = static_cast<int32_t>(plan.schedule.first_tile(item)); tile < end_tile; ++tile) {
      float s0[4 * kFragments], s1[4 * kFragments];
      named_barrier_sync<256>(kTurnBarrier + warpgroup);
      int held = 0;  // the stage of the panel before
      IBQ_UNROLL_BY(1)
      for (int panel = 0; panel < plan.panels; ++panel) {
        barrier_wait(barriers.full(place.stage), place.parity);
        const SharedAddress z_panel = shared + static_cast<SharedAddress>(panel * kRowPanelBytes);
        const uint64_t z0 = along_columns(z_panel, warpgroup * kWarpgroupRows);
        const uint64_t z1 = along_columns(z_panel, warpgroup * kWarpgroupRows + 64);
        const uint64_t codes =
            along_columns(ring + static_cast<SharedAddress>(place.stage * kCodePanelBytes), 0);
        wgmma_fence();
        IBQ_UNROLL
        for (int step = 0; step < kPanelColumns / kDepth; ++step) {
          wgmma_ab<kBf16>(s0, columns_further(z0, step), columns_further(codes, step), panel + step > 0);
          wgmma_ab<kBf16>(s1, columns_further(z1, step), columns_further(codes, step), panel + step > 0);
        }
        wgmma_commit();
        if (panel > 0) {
          wgmma_wait<1>();
          if (lane == 0) barrier_arrive(barriers.empty(held));
        }
        held = place.stage;
        place.advance(plan.stages);
      }
      // The other's turn; after the very last tile of warpgroup 1 nobody waits for one.
      if (warpgroup == 0 || tile + 1 < end_tile || !last_item)
        named_barrier_arrive<256>(kTurnBarrier + 1 - warpgroup);
      const int32_t first_code = tile * kSearchCodes + (lane & 3) * 2;
      float bias[2 * kFragments] = {};
      if (p.bias != nullptr) {
        IBQ_UNROLL
        for (int i = 0; i < 2 * kFragments; ++i) {
          const int32_t code = first_code + 8 * (i / 2) + i % 2;
          bias[i] = p.bias[code < K ? code : K - 1];
        }
      }
      wgmma_wait<0>();
      hold(s0);
      hold(s1);
      if (lane == 0) {
        barrier_arrive(barriers.empty(held));
        if (tile + 1 == end_tile) barrier_arrive(barriers.z_empty());
      }
      fold<kWithLse>(rows, 0, s0, bias, p.scale, first_code, K);
      fold<kWithLse>(rows, 1, s1, bias, p.scale, first_code, K);
    }
    const int64_t first_row = plan.schedule.row_tile(item) * kSearchRows + warpgroup * kWarpgroupRows;
    write_split<kWithLse>(rows, p, first_row, plan.schedule.split(item));
  }
}

}  // namespace search

// Grid: plan.blocks blocks of kSearchThreads, plan.shared_bytes of dynamic shared memory.
template <bool kBf16, bool kWithLse>
IBQ_KERNEL(kSearchThreads, 1)
hopper_search_kernel(const IBQ_GRID_CONSTANT SearchParameters p) {
  const SharedAddress shared = shared_address(swizzled_shared());
  const search::Barriers barriers{shared + static_cast<SharedAddress>(p.plan.barriers_at)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage <= kMaxSearchStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), search::kConsumerWarps);
    }
    barrier_init_fence();
  }
  block_barrier();
  if (threadIdx.x < 128) {
    give_up_registers<24>();
    if (threadIdx.x == 0) search::produce(p, shared, barriers);
  } else {
    take_registers<240>();
    search::consume<kBf16, kWithLse>(p, shared, barriers, static_cast<int>(threadIdx.x) / 128 - 1);
  }
}

}  // namespace ibq::cuda::hopper
