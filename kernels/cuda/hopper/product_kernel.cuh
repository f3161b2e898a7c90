// The products of ../product_kernel.cuh for compute capability 9.0: out += factor * W B, or W^T B, with the
// same arguments, by wgmma.
//
// STATUS: NEVER RUN ON A GPU. Compiled for sm_90a without spills; executed on the CPU under
// kernels/tests/hopper_emulator.h.
//
// Contract. As there, for bf16 weights and operand, D a multiple of 64, 16-byte aligned rows.
//
// Cost. 2 * rows * depth * D operations over live tiles. A stage is 16 KB of W and 64 rows of B (32 KB at D =
// 256) for 1024 tensor cycles: 48 bytes a cycle from L2.
//
// Structure. 128 rows × up to 256 columns of the output a block, 64 rows (up to 128 accumulators a thread) a
// warpgroup; blocks side by side cover wider outputs, and columns past the last are zeros of the copy engine.
//  a producer thread fills a ring of stages 64 deep. Both operands are used as they lie: B has its
// columns contiguous, W its codes, which is the depth in W B and the rows of the output in W^T B.
#pragma once

#include "operand.cuh"
#include "parameters.h"
#include "product_plan.h"

namespace ibq::cuda::hopper {

namespace products {

struct Barriers {
  SharedAddress base;
  IBQ_DEVICE SharedAddress full(int stage) const { return base + 16 * stage; }
  IBQ_DEVICE SharedAddress empty(int stage) const { return base + 16 * stage + 8; }
};

// The part of the output that a block forms, and the live tiles of 128 along the depth that it sums over.
struct Part {
  int64_t row_tile;
  int64_t split;
  int32_t first, end;
  int32_t column;  // the first of the output
};

// Column tiles innermost: they read the same weights.
template <int kPanels>
IBQ_DEVICE Part part_of_block(const ProductArguments& args) {
  const ProductPlan& plan = args.plan;
  const int64_t column_tiles = product_column_tiles(args.D);
  const int64_t tile = blockIdx.x / column_tiles;
  const int64_t split = tile / plan.row_tiles;
  const int64_t first = split * plan.tiles_per_split;
  const int64_t end = first + plan.tiles_per_split;
  return {tile % plan.row_tiles, split, static_cast<int32_t>(first),
          static_cast<int32_t>(end < plan.depth_tiles ? end : plan.depth_tiles),
          static_cast<int32_t>(blockIdx.x % column_tiles) * 64 * kPanels};
}

template <bool kTransposed>
IBQ_DEVICE bool is_live(const ProductParameters& p, int64_t row_tile, int32_t depth_tile) {
  return p.args.live[kTransposed ? depth_tile * p.args.code_tiles + row_tile
                                 : row_tile * p.args.code_tiles + depth_tile] != 0;
}

template <bool kTransposed, int kPanels>
IBQ_DEVICE void produce(const ProductParameters& p, const Part& part, SharedAddress shared,
                        const Barriers& barriers) {
  constexpr int kStageBytes = stage_bytes_of(kPanels);
  prefetch_tensor_map(p.weights);
  prefetch_tensor_map(p.operand);
  const int row = static_cast<int>(part.row_tile) * kProductTileRows;
  int stage = 0;
  uint32_t parity = 1;
  IBQ_UNROLL_BY(1)
  for (int32_t tile = part.first; tile < part.end; ++tile) {
    if (!is_live<kTransposed>(p, part.row_tile, tile)) continue;
    IBQ_UNROLL_BY(1)
    for (int half = 0; half < 2; ++half) {
      const int depth = tile * kDepthTile + half * kStageDepth;
      const SharedAddress w = shared + static_cast<SharedAddress>(stage * kStageBytes);
      const SharedAddress b = w + kWeightStageBytes;
      barrier_wait(barriers.empty(stage), parity);
      barrier_arrive_expect(barriers.full(stage), kStageBytes);
      if constexpr (kTransposed) {
        copy_box(w, p.weights, row, depth, barriers.full(stage));
        copy_box(w + kWeightStageBytes / 2, p.weights, row + kMapColumns, depth, barriers.full(stage));
      } else {
        copy_box(w, p.weights, depth, row, barriers.full(stage));
      }
      IBQ_UNROLL
      for (int panel = 0; panel < kPanels; ++panel)
        copy_box(b + panel * panel_bytes(kStageDepth), p.operand, part.column + panel * kMapColumns,
                 static_cast<int>(p.args.operand_row) + depth, barriers.full(stage));
      if (++stage == p.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

template <bool kBf16, bool kTransposed, int kPanels>
IBQ_DEVICE void consume(const ProductParameters& p, const Part& part, SharedAddress shared,
                        const Barriers& barriers, int warpgroup) {
  constexpr int kStageBytes = stage_bytes_of(kPanels);
  constexpr int kRegisters = 32 * kPanels;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>(threadIdx.x) >> 5 & 3;
  float sums[kRegisters];
  int stage = 0, held = -1;  // the stage of the wgmma before
  uint32_t parity = 0;
  IBQ_UNROLL_BY(1)
  for (int32_t tile = part.first; tile < part.end; ++tile) {
    if (!is_live<kTransposed>(p, part.row_tile, tile)) continue;
    IBQ_UNROLL_BY(1)
    for (int half = 0; half < 2; ++half) {
      const SharedAddress w = shared + static_cast<SharedAddress>(stage * kStageBytes);
      const uint64_t b = along_rows<kStageDepth>(w + kWeightStageBytes);
      barrier_wait(barriers.full(stage), parity);
      wgmma_fence();
      IBQ_UNROLL
      for (int step = 0; step < kStageDepth / kDepth; ++step) {
        const bool accumulate = held >= 0 || step > 0;
        if constexpr (kTransposed) {
          const uint64_t a = along_rows<kStageDepth>(w + warpgroup * panel_bytes(kStageDepth));
          wgmma<kBf16, Major::outer, Major::outer>(sums, rows_further(a, step), rows_further(b, step),
                                                   accumulate);
        } else {
          const uint64_t a = along_columns(w, warpgroup * 64);
          wgmma<kBf16, Major::depth, Major::outer>(sums, columns_further(a, step), rows_further(b, step),
                                                   accumulate);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (held >= 0 && lane == 0) barrier_arrive(barriers.empty(held));
      held = stage;
      if (++stage == p.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
  wgmma_wait<0>();
  hold(sums);
  const ProductArguments& args = p.args;
  if (held < 0 && args.partial == nullptr) return;  // nothing was live
  IBQ_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t row = part.row_tile * kProductTileRows + warpgroup * 64 + warp * 16 + (lane >> 2) + 8 * h;
    if (row >= args.rows) continue;
    const int32_t first = part.column + (lane & 3) * 2;
    const int64_t place = row * args.D + first;
    IBQ_UNROLL
    for (int i = 0; i < kRegisters / 2; ++i) {
      const int column = 8 * (i / 2) + i % 2;
      const float sum = sums[4 * (i / 2) + 2 * h + i % 2];
      if (kPanels == kMaxPanels && first + column >= args.D) continue;
      if (args.partial != nullptr) {
        args.partial[part.split * args.rows * args.D + place + column] = held < 0 ? 0.0f : sum;
      } else if (args.atomic) {
        atomic_add_global(args.out + place + column, args.factor * sum);
      } else {
        args.out[place + column] += args.factor * sum;
      }
    }
  }
}

}  // namespace products

// Grid: args.plan.row_tiles * args.plan.splits * product_column_tiles(D) blocks of kStreamThreads,
// ProductStages::shared_bytes of dynamic shared memory.
template <bool kBf16, bool kTransposed, int kPanels>
IBQ_KERNEL(kStreamThreads, 1)
hopper_product_kernel(const IBQ_GRID_CONSTANT ProductParameters p) {
  const SharedAddress shared = shared_address(swizzled_shared());
  const products::Barriers barriers{shared + static_cast<SharedAddress>(p.stages * stage_bytes_of(kPanels))};
  if (threadIdx.x == 0) {
    IBQ_UNROLL_BY(1)
    for (int stage = 0; stage < p.stages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), 8);
    }
    barrier_init_fence();
  }
  block_barrier();
  const products::Part part = products::part_of_block<kPanels>(p.args);
  if (threadIdx.x < 128) {
    give_up_registers<24>();
    if (threadIdx.x == 0) products::produce<kTransposed, kPanels>(p, part, shared, barriers);
  } else {
    take_registers<240>();
    products::consume<kBf16, kTransposed, kPanels>(p, part, shared, barriers,
                                                   static_cast<int>(threadIdx.x) / 128 - 1);
  }
}

}  // namespace ibq::cuda::hopper
