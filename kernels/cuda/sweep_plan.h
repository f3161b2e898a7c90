// How the passes after the search are cut: a rectangle of S at a time (rows × codes), whose weights W (P or
// dS) stand in a workspace of constant size between the kernel that makes them (sweep_kernel.cuh) and the two
// that multiply by them (product_kernel.cuh). Plain C++ without any CUDA include.
//
// Why W passes through memory. Kept in registers, as attention kernels do, dz and dE need a pass of their own
// each, and S and g E^T are formed in both: 12 NKD operations for the select group instead of 8, 14 instead
// of 10 for both groups; an output wider than the registers (the generator's C = 1,024) needs one more S for
// each 256 columns: 20 NKC instead of 6 for the cross entropy's backward. Against that stand 6 bytes of
// traffic for 8 D operations, most of it in L2 (the rectangle holds 64 MiB). Everything is also deterministic
// at no cost.
#pragma once

#include "../common/softmax_rules.h"
#include "search_plan.h"

namespace ibq::cuda {

constexpr int kSweepTileRows = 128;
constexpr int kSweepTileCodes = 128;
constexpr int kSweepThreads = 256;  // 8 warps: 2 halves of the rows × 4 quarters of the codes
constexpr int kSweepTileBytes = 128 * kChunkBytes;
// What a sweep keeps in shared memory beside its tiles: tops of 8 warps, column sums of 2 halves.
constexpr int64_t kSweepScratchBytes = 8 * 2 * 4 + 2 * kSweepTileCodes * 4;
// Codebooks from this size on carry tile bounds from the forward to the backward.
constexpr int64_t kBoundedFrom = 8192;

constexpr int64_t kWeightsBytes = int64_t{64} << 20;
constexpr int64_t kRectangleRows = 8192;  // at most; the rest of the rectangle are codes

// bf16 weights stand beside bf16 operands. fp16 would lose small P (its least number is 6e-8, a flat row of
// 262,144 codes holds 4e-6 and its dS far less), so fp16 and float32 operands have float32 weights.
IBQ_HD constexpr int weight_bytes(Element element) { return element == Element::bf16 ? 2 : 4; }

IBQ_HD int64_t round_up(int64_t x, int64_t multiple) { return ceil_div(x, multiple) * multiple; }
IBQ_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
IBQ_HD int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows and codes of a rectangle, multiples of 128.
struct Rectangle {
  int64_t rows, codes;
};

IBQ_HD Rectangle plan_rectangle(int64_t N, int64_t K, int weight_bytes, int64_t bytes = kWeightsBytes,
                                int64_t most_rows = kRectangleRows) {
  Rectangle r;
  r.rows = smaller(round_up(greater(N, 1), kSweepTileRows), most_rows);
  const int64_t fit = bytes / (r.rows * weight_bytes) / kSweepTileCodes * kSweepTileCodes;
  r.codes = smaller(round_up(K, kSweepTileCodes), greater(fit, kSweepTileCodes));
  return r;
}

// One sweep over a rectangle: every block owns a row tile and walks a split of the code tiles.
struct SweepPlan {
  TileSchedule schedule;
  int64_t chunks;  // steps over D
  int stages;      // 0: no configuration fits
  bool resident;   // the row tile (z, and with products g) stays in shared memory
  int64_t shared_bytes;
};

IBQ_HD int64_t sweep_shared_bytes(int64_t chunks, int row_operands, int stages, bool resident) {
  const int64_t tiles = stages * (resident ? 1 : 1 + row_operands) + (resident ? chunks * row_operands : 0);
  return tiles * kSweepTileBytes + kSweepScratchBytes;
}

// Preferences as in plan_search; one block of 8 warps to a multiprocessor. row_operands: 1, or 2 with g.
IBQ_HD SweepPlan plan_sweep(int64_t rows, int64_t codes, int64_t D, Element element, int row_operands,
                            const DeviceLimits& device) {
  SweepPlan plan{};
  plan.chunks = ceil_div(D * bytes_of(element), int64_t{kChunkBytes});
  int64_t room = device.shared_per_multiprocessor - kReservedSharedBytes;
  if (room > device.shared_per_block) room = device.shared_per_block;
  struct {
    int stages;
    bool resident;
  } const choices[] = {{4, true}, {3, true}, {4, false}, {3, false}, {2, true}, {2, false}};
  for (const auto& choice : choices) {
    const int64_t bytes = sweep_shared_bytes(plan.chunks, row_operands, choice.stages, choice.resident);
    if (bytes > room) continue;
    plan.stages = choice.stages;
    plan.resident = choice.resident;
    plan.shared_bytes = bytes;
    break;
  }
  plan.schedule = make_tile_schedule(rows, codes, kSweepTileRows, kSweepTileCodes, device.multiprocessors);
  return plan;
}

// One product W B or W^T B: output tiles of 128 rows × columns of D, times splits of the depth.
struct ProductPlan {
  int64_t row_tiles, column_tiles;
  int64_t depth_tiles;  // of 128
  int64_t splits, tiles_per_split;
  int stages;
  int64_t shared_bytes;

  IBQ_HD int64_t blocks() const { return row_tiles * column_tiles * splits; }
};

constexpr int kProductThreads = 128;  // 4 warps: 2 halves of the rows × 2 halves of the columns
constexpr int kProductTileRows = 128;
constexpr int kDepthTile = 128;

// float32 operands keep two tf32 parts of their fragments in registers, so they have room for half.
IBQ_HD constexpr int product_columns(Element element) { return element == Element::f32 ? 64 : 128; }
// Depth of a step: 128 bytes of a row of W.
IBQ_HD constexpr int product_depth(Element element) { return kChunkBytes / weight_bytes(element); }
IBQ_HD constexpr int64_t product_stage_bytes(Element element) {
  return kProductTileRows * kChunkBytes +
         int64_t{product_depth(element)} * product_columns(element) * bytes_of(element);
}

// The kernels between the sweeps (rows_kernels.cuh, columns_kernels.cuh, scatter_kernel.cuh).
constexpr int kRowThreads = 256;
constexpr int kCenterThreads = 1024;
constexpr int kScatterThreads = 256;
constexpr int kScatterList = 1024;  // rows that a block lists before it spends them
constexpr int64_t kScatterSharedBytes = kScatterList * 12 + 2 * (kScatterThreads / 32) * 4;

// As many splits as fill the device once: their partial sums then stay below one tile a slot.
IBQ_HD ProductPlan plan_product(int64_t rows, int64_t depth, int64_t D, Element element,
                                const DeviceLimits& device) {
  ProductPlan plan{};
  plan.row_tiles = ceil_div(rows, int64_t{kProductTileRows});
  plan.column_tiles = ceil_div(D, int64_t{product_columns(element)});
  plan.depth_tiles = ceil_div(depth, int64_t{kDepthTile});
  int blocks = 0;
  for (int wanted = 2; wanted >= 1 && plan.stages == 0; --wanted) {
    int64_t room = device.shared_per_multiprocessor / wanted - kReservedSharedBytes;
    if (room > device.shared_per_block) room = device.shared_per_block;
    for (int stages = 4; stages >= 2; --stages) {
      if (stages * product_stage_bytes(element) > room) continue;
      plan.stages = stages;
      plan.shared_bytes = stages * product_stage_bytes(element);
      blocks = wanted;
      break;
    }
  }
  const int64_t tiles = plan.row_tiles * plan.column_tiles;
  const int64_t slots = int64_t{device.multiprocessors} * greater(blocks, 1);
  const int64_t wanted = smaller(greater(slots / greater(tiles, 1), 1), plan.depth_tiles);
  plan.tiles_per_split = ceil_div(plan.depth_tiles, greater(wanted, 1));
  plan.splits = ceil_div(plan.depth_tiles, greater(plan.tiles_per_split, 1));
  return plan;
}

// Floats that the partial sums of any product need: products with more than one split fill the device once.
IBQ_HD int64_t partial_floats(Element element, const DeviceLimits& device) {
  return int64_t{device.multiprocessors} * 2 * kProductTileRows * product_columns(element);
}

}  // namespace ibq::cuda
