// The frame of the Hopper kernels that form logits: rows stay in shared memory, codes stream past them.
//
// One producer thread drives the copy engine; two consumer warpgroups multiply. 256 rows × all columns (up to
// 256) are resident; the codebook comes through a ring of panels, 128 codes × 64 columns (16 KB), each read
// by both warpgroups. At D = 256 that is 128 KB + 6 × 16 KB.
//   * A warpgroup multiplies two blocks of 64 resident rows by 128 codes: 2 × m64n128, 128 accumulators a
//     thread. The blocks are 128 rows of one matrix, or 64 rows each of two (z and g). A panel is 8 wgmma of
//     64 cycles that read 6 KB of shared memory each (96 of 128 bytes a cycle).
//   * 256 resident rows: a code tile costs 4096 tensor cycles at D = 256 for 64 KB of L2 traffic, 16 bytes a
//     cycle and multiprocessor, half of what L2 sustains. 128 rows × 256 codes reads less shared memory (80
//     bytes a cycle) but needs twice the L2 traffic, or clusters.
//   * The warpgroups take turns on the tensor cores (named barriers): while one multiplies (2048 cycles at
//     D = 256) the other runs its epilogue. The turn passes when only the last panel of a tile is still in
//     flight, so the tensor cores never run dry.
//   * setmaxnreg moves registers from the producer (24) to the consumers (240).
// Work items are (row tile, split of the codes), row tile first, so that blocks of one wave walk the same
// codes. A block takes every gridDim-th item.
#pragma once

#include "operand.cuh"
#include "stream_plan.h"

namespace ibq::cuda::hopper {

constexpr int kStreamFragments = kStreamCodes / 8;
constexpr int kBlockRegisters = 4 * kStreamFragments;  // accumulators of 64 rows × 128 codes
constexpr int kConsumerWarps = 8;
constexpr int kTurnBarrier = 1;  // and 2: one for each warpgroup's turn

// Addresses of the block's barriers. A stage is full when its bytes have come, empty when all consumer warps
// have left it; the same for the resident rows.
struct Barriers {
  SharedAddress base;
  IBQ_DEVICE SharedAddress full(int stage) const { return base + 16 * stage; }
  IBQ_DEVICE SharedAddress empty(int stage) const { return base + 16 * stage + 8; }
  IBQ_DEVICE SharedAddress rows_full() const { return full(kMaxStages); }
  IBQ_DEVICE SharedAddress rows_empty() const { return empty(kMaxStages); }
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

// Task (the same object's members serve producer and consumers):
//   resident(item, half, column) -> Box     the map and first row of 128 of the resident rows
//   live(item, tile)                        whether the tile is formed at all; the same for every thread
struct Box {
  const TensorMap* map;
  int row;
};

template <typename Task>
IBQ_DEVICE void produce(const Task& task, const StreamPlan& plan, const TensorMap& codebook,
                        SharedAddress shared, const Barriers& barriers) {
  const SharedAddress ring = shared + static_cast<SharedAddress>(plan.panels * kRowPanelBytes);
  prefetch_tensor_map(codebook);
  RingPlace place;
  uint32_t rows_parity = 1;  // a wait for the phase before the first returns at once
  IBQ_UNROLL_BY(1)
  for (int64_t item = blockIdx.x; item < plan.schedule.blocks(); item += gridDim.x) {
    const Box first = task.resident(item, 0), second = task.resident(item, 1);
    barrier_wait(barriers.rows_empty(), rows_parity);
    rows_parity ^= 1;
    barrier_arrive_expect(barriers.rows_full(), plan.panels * kRowPanelBytes);
    IBQ_UNROLL_BY(1)
    for (int panel = 0; panel < plan.panels; ++panel) {
      const SharedAddress dst = shared + static_cast<SharedAddress>(panel * kRowPanelBytes);
      copy_box(dst, *first.map, panel * kMapColumns, first.row, barriers.rows_full());
      copy_box(dst + kRowPanelBytes / 2, *second.map, panel * kMapColumns, second.row, barriers.rows_full());
    }
    const int end_tile = static_cast<int>(plan.schedule.end_tile(item));
    IBQ_UNROLL_BY(1)
    for (int tile = static_cast<int>(plan.schedule.first_tile(item)); tile < end_tile; ++tile) {
      if (!task.live(item, tile)) continue;
      IBQ_UNROLL_BY(1)
      for (int panel = 0; panel < plan.panels; ++panel) {
        barrier_wait(barriers.empty(place.stage), place.parity ^ 1);
        barrier_arrive_expect(barriers.full(place.stage), kCodePanelBytes);
        copy_box(ring + static_cast<SharedAddress>(place.stage * kCodePanelBytes), codebook,
                 panel * kMapColumns, tile * kStreamCodes, barriers.full(place.stage));
        place.advance(plan.stages);
      }
    }
  }
}

// Epilogue, one to a thread:
//   begin(item)           before the first tile
//   prepare(tile)         loads, while the products are under way
//   fold(tile, s0, s1)    the products of the two blocks
//   skip(tile)            instead of both where the tile is not live
//   end(item)
// Blocks are the resident rows first_block + 64 rows, and `second_block`.
template <bool kBf16, typename Task, typename Epilogue>
IBQ_DEVICE void consume(const Task& task, Epilogue& epilogue, const StreamPlan& plan, SharedAddress shared,
                        const Barriers& barriers, int warpgroup, int first_block, int second_block) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const SharedAddress ring = shared + static_cast<SharedAddress>(plan.panels * kRowPanelBytes);
  RingPlace place;
  uint32_t rows_parity = 0;
  // Every turn is handed over by the other's last one; the first of warpgroup 0 by this, and the one that
  // warpgroup 1 would hand over at the end is taken below.
  if (warpgroup == 1) named_barrier_arrive<256>(kTurnBarrier);
  IBQ_UNROLL_BY(1)
  for (int64_t item = blockIdx.x; item < plan.schedule.blocks(); item += gridDim.x) {
    epilogue.begin(item);
    const int32_t end_tile = static_cast<int32_t>(plan.schedule.end_tile(item));
    barrier_wait(barriers.rows_full(), rows_parity);
    rows_parity ^= 1;
    IBQ_UNROLL_BY(1)
    for (int32_t tile = static_cast<int32_t>(plan.schedule.first_tile(item)); tile < end_tile; ++tile) {
      if (!task.live(item, tile)) {
        epilogue.skip(tile);
        continue;
      }
      float s0[kBlockRegisters], s1[kBlockRegisters];
      named_barrier_sync<256>(kTurnBarrier + warpgroup);
      int held = 0;  // the stage of the panel before
      IBQ_UNROLL_BY(1)
      for (int panel = 0; panel < plan.panels; ++panel) {
        barrier_wait(barriers.full(place.stage), place.parity);
        const SharedAddress rows = shared + static_cast<SharedAddress>(panel * kRowPanelBytes);
        const uint64_t rows0 = along_columns(rows, first_block);
        const uint64_t rows1 = along_columns(rows, second_block);
        const uint64_t codes =
            along_columns(ring + static_cast<SharedAddress>(place.stage * kCodePanelBytes), 0);
        wgmma_fence();
        IBQ_UNROLL
        for (int step = 0; step < kPanelColumns / kDepth; ++step) {
          wgmma<kBf16, Major::depth, Major::depth>(s0, columns_further(rows0, step),
                                                   columns_further(codes, step), panel + step > 0);
          wgmma<kBf16, Major::depth, Major::depth>(s1, columns_further(rows1, step),
                                                   columns_further(codes, step), panel + step > 0);
        }
        wgmma_commit();
        if (panel > 0) {
          wgmma_wait<1>();
          if (lane == 0) barrier_arrive(barriers.empty(held));
        }
        held = place.stage;
        place.advance(plan.stages);
      }
      named_barrier_arrive<256>(kTurnBarrier + 1 - warpgroup);
      epilogue.prepare(tile);
      wgmma_wait<0>();
      hold(s0);
      hold(s1);
      if (lane == 0) barrier_arrive(barriers.empty(held));
      epilogue.fold(tile, s0, s1);
    }
    if (lane == 0) barrier_arrive(barriers.rows_empty());
    epilogue.end(item);
  }
  if (warpgroup == 0) named_barrier_sync<256>(kTurnBarrier);
}

// What every kernel of this frame begins with; all threads of the block call it.
IBQ_DEVICE Barriers begin_stream(const StreamPlan& plan, SharedAddress shared) {
  const Barriers barriers{shared + static_cast<SharedAddress>(plan.barriers_at)};
  if (threadIdx.x == 0) {
    IBQ_UNROLL_BY(1)
    for (int stage = 0; stage <= kMaxStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), kConsumerWarps);
    }
    barrier_init_fence();
  }
  block_barrier();
  return barriers;
}

}  // namespace ibq::cuda::hopper
