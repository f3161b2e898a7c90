// A rectangle of S = scale * z @ codebook^T + bias, tile by tile, and what the forward's second pass or the
// backward makes of it: the weights W (P or dS) that product_kernel.cuh multiplies by, column sums (mean
// probabilities, dbias), row sums and tile bounds.
//
// STATUS: UNRUN ON A GPU. Compiled for sm_80, sm_90a and sm_100a without spills, and executed on the CPU by
// the emulator in kernels/tests, which checks indexing, masking, pipelining and arithmetic, not speed.
//
// Contract. Operands as in search_kernel.cuh, S bit for bit as there, g [N, D] of z's type. W is bf16 beside
// bf16 operands, float32 beside others (tf32 for fp16: rounded to 11 bits). Deterministic: no atomics, every
// output has one writer. Accuracy of S, and of G = g @ codebook^T: as in search_kernel.cuh; exp is expf with
// float32 operands, ex2.approx (2 units in the last place) with others.
//
// Cost. 2*N*K*D operations for S, as many for G (select, both); one or two exponentials an entry.
//
// Tiles. 128 rows × 128 codes by 8 warps of 64×32: half the search's codes a warp, because the select group
// holds S and G at once (2×64 accumulators a thread). The row tile (z, and g) stays in shared memory where
// that fits; otherwise it streams with the codes.
//
// Winners. A code that has more than 3/4 of its row is left out of W and of the sums; its dS is minus the sum
// of the row's others (row_parts), which rows_kernels.cuh spends.
//
// Tried. The four k-steps of a chunk unrolled, as the search has them: the select group's sweep then spills
// 24 bytes on sm_100a. Two of them unrolled (search_tiles.cuh): none anywhere.
//
// Skipping. A tile whose bound from the forward lies `gap` below is not computed at all; one whose logits
// turn out to is not exponentiated; either way `live` tells the products to leave it out. A thread leaves out
// the eight entries of a row that it holds when all are negligible.
#pragma once

#include "search_tiles.cuh"
#include "sweep_epilogue.cuh"
#include "tile_ring.cuh"

namespace ibq::cuda {

namespace sweep {

// Whether the forward's bounds leave a tile of the rectangle worth computing.
IBQ_DEVICE bool may_matter(const SweepArguments& args, int64_t row_tile, int64_t tile) {
  if (args.tile_bound == nullptr) return true;
  const int64_t row = args.first_row / kSweepTileRows + row_tile;
  const int64_t place = row * args.bound_blocks + args.first_code / kSweepTileCodes + tile;
  const int64_t group = args.bound_tiles * args.bound_blocks;
  return (args.use_select && is_live(args.tile_bound[place], args.gap)) ||
         (args.use_entropy && is_live(args.tile_bound[group + place], args.gap));
}

}  // namespace sweep

// Grid: plan.schedule.blocks() blocks of kSweepThreads, plan.shared_bytes of dynamic shared memory.
template <Element kElement, Sweep kSweep>
IBQ_KERNEL(kSweepThreads, 1)
sweep_kernel(const SweepArguments args) {
  using namespace sweep;
  using search::load_tile;
  constexpr int kOperands = kSweep == Sweep::select || kSweep == Sweep::both ? 2 : 1;
  const SweepPlan& plan = args.plan;
  const int64_t row_tile = plan.schedule.row_tile(blockIdx.x);
  const int32_t first_tile = static_cast<int32_t>(plan.schedule.first_tile(blockIdx.x));
  const int32_t end_tile = static_cast<int32_t>(plan.schedule.end_tile(blockIdx.x));
  const int32_t chunks = static_cast<int32_t>(plan.chunks);
  const int64_t first_row = args.first_row + row_tile * kSweepTileRows;

  // Shared memory: resident row tiles [chunks][z, g], a ring of stages, each a code tile and, when they are
  // streamed, the row tiles; then the scratch of the epilogue.
  const SharedAddress shared = shared_address(dynamic_shared());
  const SharedAddress resident_bytes =
      plan.resident ? static_cast<SharedAddress>(chunks) * kOperands * kSweepTileBytes : 0;
  const SharedAddress stage_bytes = kSweepTileBytes * (plan.resident ? 1 : 1 + kOperands);
  TileRing ring(shared + resident_bytes, plan.stages, stage_bytes);
  float* scratch = reinterpret_cast<float*>(dynamic_shared() + resident_bytes + plan.stages * stage_bytes);

  const auto next_live = [&](int32_t tile) {
    while (tile < end_tile && !may_matter(args, row_tile, tile)) ++tile;
    return tile;
  };
  const int32_t first_live = next_live(first_tile);
  int32_t load_tile_index = first_live, load_chunk = 0;
  const auto load_next = [&] {
    if (load_tile_index < end_tile) {
      const int64_t byte = int64_t{load_chunk} * kChunkBytes;
      const SharedAddress stage = ring.next_load();
      load_tile<kSweepTileCodes, kSweepThreads>(stage, args.codebook, args.K, args.row_bytes,
                                                args.first_code + int64_t{load_tile_index} * kSweepTileCodes,
                                                byte, args.access);
      if (!plan.resident || load_tile_index == first_live) {
        const SharedAddress rows =
            plan.resident ? shared + static_cast<SharedAddress>(load_chunk) * kOperands * kSweepTileBytes
                          : stage + kSweepTileBytes;
        load_tile<kSweepTileRows, kSweepThreads>(rows, args.z, args.N, args.row_bytes, first_row, byte,
                                                 args.access);
        if constexpr (kOperands == 2)
          load_tile<kSweepTileRows, kSweepThreads>(rows + kSweepTileBytes, args.cotangents, args.N,
                                                   args.row_bytes, first_row, byte, args.access);
      }
      if (++load_chunk == chunks) {
        load_chunk = 0;
        load_tile_index = next_live(load_tile_index + 1);
      }
    }
    cp_async_commit();  // also when there was nothing to load: the count of groups is what is waited for
  };

  RowSums sums;
  IBQ_UNROLL
  for (int slot = 0; slot < kRowSlots; ++slot) sums.first[slot] = sums.second[slot] = 0.0f;
  for (int stage = 0; stage < plan.stages - 1; ++stage) load_next();
  for (int32_t tile = first_tile; tile < end_tile; ++tile) {
    if (!may_matter(args, row_tile, tile)) {
      leave_out_tile(args, row_tile, tile);
      continue;
    }
    Accumulator s, g;
    IBQ_UNROLL
    for (int i = 0; i < kWarpRowFragments * kFragments * 4; ++i) {
      s[i / 4 / kFragments][i / 4 % kFragments][i % 4] = 0.0f;
      g[i / 4 / kFragments][i / 4 % kFragments][i % 4] = 0.0f;
    }
    IBQ_UNROLL_BY(1)
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      ring.wait();
      block_barrier();  // this stage has arrived for all, and all are done with the one before
      load_next();      // into the place of the one before
      const SharedAddress stage = ring.next_read();
      const SharedAddress rows =
          plan.resident ? shared + static_cast<SharedAddress>(chunk) * kOperands * kSweepTileBytes
                        : stage + kSweepTileBytes;
      search::multiply_chunk<kElement, kWarpColumns, kFragments>(s, rows, stage);
      if constexpr (kOperands == 2)
        search::multiply_chunk<kElement, kWarpColumns, kFragments>(g, rows + kSweepTileBytes, stage);
    }
    finish_tile<kElement, kSweep>(args, row_tile, tile, s, g, sums, scratch);
  }
  if (args.row_parts != nullptr) {
    cp_async_wait<0>();
    write_row_parts(args, row_tile, plan.schedule.split(blockIdx.x), sums);
  }
}

}  // namespace ibq::cuda
