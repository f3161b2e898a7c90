// The frame of the Hopper kernels that form logits: rows stay in shared memory and codes stream past them, or
// both are streamed.
//
// One producer thread drives the copy engine; two consumer warpgroups multiply. The codebook comes through a
// ring of panels of 64 columns (16 KB for 128 codes), each read by both warpgroups; the resident rows keep
// all columns (up to 256).
//   * A warpgroup multiplies two pairs of 64 rows and 128 codes in a step: 2 × m64n128, 128 accumulators a
//     thread. A panel is 8 wgmma of 64 cycles that read 6 KB of shared memory each (96 of 128 bytes a cycle).
//   * WideRows: 256 resident rows (of one matrix, or 128 of z and 128 of g) and one tile of codes. A step
//   costs
//     4096 tensor cycles at D = 256 for 64 KB of L2 traffic, 16 bytes a cycle and multiprocessor. 128 + 6 ×
//     16 KB.
//   * WideCodes: 128 resident rows and two tiles, 32 bytes a cycle; for work cut in 128 rows. 64 + 5 × 32 KB.
//   * The warpgroups take turns on the tensor cores (named barriers): while one multiplies (2048 cycles at
//     D = 256) the other runs its epilogue. The turn passes when only the last panel of a step is still in
//     flight, so the tensor cores never run dry.
//   * StreamedRows, StreamedCodes, for rows of more than 256 columns: a stage of the ring holds a panel of
//   the
//     rows beside the codes', 48 KB for 1024 tensor cycles. Nobody takes turns: a warpgroup that runs its
//     epilogue leaves the tensor cores to the other, which the ring of 4 stages lets go on for as long, and
//     they stay apart from then on. At C = 1,024 an epilogue is a fifteenth of a step.
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

// A place in the ring, and the parity of the phase that is awaited there, in one register.
struct RingPlace {
  int packed = 0;
  IBQ_DEVICE int stage() const { return packed & 255; }
  IBQ_DEVICE uint32_t parity() const { return static_cast<uint32_t>(packed) >> 8; }
  IBQ_DEVICE void advance(int stages) { packed = stage() + 1 == stages ? (packed & 256) ^ 256 : packed + 1; }
};

// Where 128 rows come from.
struct Box {
  const TensorMap* map;
  int row;
};

// A Task says what the work is, to producer and consumers alike:
//   schedule()               its items
//   codes(tile)              Box of a tile of codes
//   rows(row_tile, i)        Box i of its rows
//   live(row_tile, tile)     whether the tile is formed at all
template <typename Shape, typename Task>
IBQ_DEVICE bool step_is_live(const Task& task, int row_tile, int tile, int end_tile) {
  return task.live(row_tile, tile) ||
         (Shape::kTiles == 2 && tile + 1 < end_tile && task.live(row_tile, tile + 1));
}

// 0 or 1, of a consumer.
IBQ_DEVICE int consumer_warpgroup() { return fresh_thread() / 128 - 1; }

// Parity of the phase in which the resident rows of an item come.
IBQ_DEVICE uint32_t parity_of_item(int item) { return static_cast<uint32_t>(item) / gridDim.x & 1; }

template <typename Shape, typename Task>
IBQ_DEVICE void produce(const Task& task, const StreamPlan& plan, SharedAddress shared,
                        const Barriers& barriers) {
  constexpr int kStageBytes = stage_boxes<Shape>() * kBoxBytes;
  constexpr int kCodesAt = kStageBytes - Shape::kTiles * kBoxBytes;
  const int row_bytes = Shape::kStreamed ? 0 : plan.panels * Shape::kRowBoxes * kBoxBytes;
  const SharedAddress ring = shared + static_cast<SharedAddress>(row_bytes);
  const TileSchedule schedule = task.schedule();
  const int items = static_cast<int>(schedule.blocks());
  RingPlace place;
  IBQ_UNROLL_BY(1)
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const int row_tile = static_cast<int>(schedule.row_tile(item));
    if constexpr (!Shape::kStreamed) {
      barrier_wait(barriers.rows_empty(),
                   parity_of_item(item) ^ 1);  // at first for the phase before: no wait
      barrier_arrive_expect(barriers.rows_full(), row_bytes);
      IBQ_UNROLL_BY(1)
      for (int piece = 0; piece < plan.panels * Shape::kRowBoxes; ++piece) {
        const Box box = task.rows(row_tile, piece % Shape::kRowBoxes);
        copy_box(shared + static_cast<SharedAddress>(piece * kBoxBytes), *box.map,
                 piece / Shape::kRowBoxes * kMapColumns, box.row, barriers.rows_full());
      }
    }
    const int end_tile = static_cast<int>(schedule.end_tile(item));
    IBQ_UNROLL_BY(1)
    for (int tile = static_cast<int>(schedule.first_tile(item)); tile < end_tile; tile += Shape::kTiles) {
      if (!step_is_live<Shape>(task, row_tile, tile, end_tile)) continue;
      IBQ_UNROLL_BY(1)
      for (int panel = 0; panel < plan.panels; ++panel) {
        const SharedAddress stage = ring + static_cast<SharedAddress>(place.stage() * kStageBytes);
        barrier_wait(barriers.empty(place.stage()), place.parity() ^ 1);
        barrier_arrive_expect(barriers.full(place.stage()), kStageBytes);
        IBQ_UNROLL
        for (int i = 0; Shape::kStreamed && i < Shape::kRowBoxes; ++i) {
          const Box box = task.rows(row_tile, i);
          copy_box(stage + static_cast<SharedAddress>(i * kBoxBytes), *box.map, panel * kMapColumns, box.row,
                   barriers.full(place.stage()));
        }
        IBQ_UNROLL
        for (int i = 0; i < Shape::kTiles; ++i) {
          const Box box = task.codes(tile + i);
          copy_box(stage + static_cast<SharedAddress>(kCodesAt + i * kBoxBytes), *box.map,
                   panel * kMapColumns, box.row, barriers.full(place.stage()));
        }
        place.advance(plan.stages);
      }
    }
  }
}

// An Epilogue, one to a thread, does the rest:
//   begin(row_tile)              before the first tile of an item
//   prepare(tile)                loads, while the products are under way
//   fold(row_tile, tile, end_tile, s0, s1)
//                                the products: WideRows, the warpgroup's two blocks of 64 rows with the
//                                tile's codes; WideCodes, its 64 rows with the codes of tile and, before
//                                end_tile, of tile + 1
//   skip(row_tile, tile, end_tile)  instead of both where the step is not live
//   end(row_tile, split)
// The calling warpgroup's rows are 64 from first_block and 64 from second_block on.
template <bool kBf16, typename Shape, typename Task, typename Epilogue>
IBQ_DEVICE void consume(const Task& task, Epilogue& epilogue, const StreamPlan& plan, SharedAddress shared,
                        const Barriers& barriers, int first_block, int second_block) {
  constexpr int kStageBytes = stage_boxes<Shape>() * kBoxBytes;
  constexpr int kCodesAt = kStageBytes - Shape::kTiles * kBoxBytes;
  constexpr bool kTurns = !Shape::kStreamed;
  const auto lane_is_0 = [] { return (fresh_thread() & 31) == 0; };
  const SharedAddress ring =
      shared + static_cast<SharedAddress>(Shape::kStreamed ? 0 : plan.panels * Shape::kRowBoxes * kBoxBytes);
  const TileSchedule schedule = task.schedule();
  const int items = static_cast<int>(schedule.blocks());
  RingPlace place;
  // The first turn of warpgroup 0 is handed over here; the last that warpgroup 1 hands over is taken at the
  // end.
  if (kTurns && consumer_warpgroup() == 1) named_barrier_arrive<256>(kTurnBarrier);
  IBQ_UNROLL_BY(1)
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const int row_tile = static_cast<int>(schedule.row_tile(item));
    epilogue.begin(row_tile);
    const int32_t end_tile = static_cast<int32_t>(schedule.end_tile(item));
    if constexpr (!Shape::kStreamed) barrier_wait(barriers.rows_full(), parity_of_item(item));
    IBQ_UNROLL_BY(1)
    for (int32_t tile = static_cast<int32_t>(schedule.first_tile(item)); tile < end_tile;
         tile += Shape::kTiles) {
      if (!step_is_live<Shape>(task, row_tile, tile, end_tile)) {
        epilogue.skip(row_tile, tile, end_tile);
        continue;
      }
      float s0[kBlockRegisters], s1[kBlockRegisters];
      if constexpr (kTurns) named_barrier_sync<256>(kTurnBarrier + consumer_warpgroup());
      int held = 0;  // the stage of the panel before
      IBQ_UNROLL_BY(1)
      for (int panel = 0; panel < plan.panels; ++panel) {
        barrier_wait(barriers.full(place.stage()), place.parity());
        const SharedAddress stage = ring + static_cast<SharedAddress>(place.stage() * kStageBytes);
        const SharedAddress codes = stage + static_cast<SharedAddress>(kCodesAt);
        const SharedAddress rows =
            Shape::kStreamed ? stage
                             : shared + static_cast<SharedAddress>(panel * Shape::kRowBoxes * kBoxBytes);
        const uint64_t rows0 = along_columns(rows, first_block);
        const uint64_t rows1 = along_columns(rows, second_block);
        const uint64_t codes0 = along_columns(codes, 0);
        const uint64_t codes1 = along_columns(codes, (Shape::kTiles - 1) * kStreamCodes);
        wgmma_fence();
        IBQ_UNROLL
        for (int step = 0; step < kPanelColumns / kDepth; ++step) {
          wgmma<kBf16, Major::depth, Major::depth>(s0, columns_further(rows0, step),
                                                   columns_further(codes0, step), panel + step > 0);
          wgmma<kBf16, Major::depth, Major::depth>(s1, columns_further(rows1, step),
                                                   columns_further(codes1, step), panel + step > 0);
        }
        wgmma_commit();
        if (panel > 0) {
          wgmma_wait<1>();
          if (lane_is_0()) barrier_arrive(barriers.empty(held));
        }
        held = place.stage();
        place.advance(plan.stages);
      }
      if constexpr (kTurns) named_barrier_arrive<256>(kTurnBarrier + 1 - consumer_warpgroup());
      epilogue.prepare(tile);
      wgmma_wait<0>();
      hold(s0);
      hold(s1);
      if (lane_is_0()) barrier_arrive(barriers.empty(held));
      epilogue.fold(row_tile, tile, end_tile, s0, s1);
    }
    if (!Shape::kStreamed && lane_is_0()) barrier_arrive(barriers.rows_empty());
    epilogue.end(row_tile, static_cast<int>(schedule.split(item)));
  }
  if (kTurns && consumer_warpgroup() == 0) named_barrier_sync<256>(kTurnBarrier);
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
