// The second product of a sweep: out += factor * W B (a row tile of W meets the codebook: readout, dz) or
// factor * W^T B (a code tile meets z: dE), W being what sweep_kernel.cuh left of a rectangle of S.
//
// STATUS: UNRUN ON A GPU. Compiled for sm_80, sm_90a and sm_100a without spills, and executed on the CPU by
// the emulator in kernels/tests.
//
// Contract. W [rows, codes] in whole tiles of 128×128, tiles that are not `live` are never read; B [depth, D]
// of z's type, what lies outside it counts as zero. Splits of the depth go to `partial`, summed in order by
// add_parts_kernel, or, where a caller gives up bitwise repeatability for that traffic, are added to `out` by
// float32 atomics. Without splits each output has one writer.
//
// Accuracy. bf16: W rounded to 8 bits, exact products, float32 sums. fp16: W rounded to 11 bits (tf32), fp16
// operands are exact in tf32. float32: tf32x3 as in search_kernel.cuh.
//
// Cost. 2 * rows * depth * D operations (three times that in float32, twice in fp16, by rate).
//
// Tiles. 128×128 (float32: 128×64) of the output by 4 warps of 64×64 (64×32), 128 bytes of a row of W deep.
// Where the contracted index runs down the rows of a tile (B always, W when transposed), 16-bit fragments
// come by transposing ldmatrix; 4-byte ones element by element, as ldmatrix cannot transpose them.
#pragma once

#include "search_tiles.cuh"
#include "sweep_arguments.h"
#include "tile_ring.cuh"

namespace ibq::cuda {

namespace product {

using search::kWarpRowFragments;

template <Element kElement, bool kTransposed>
struct Tile {
  static constexpr int kDepth = product_depth(kElement);
  static constexpr int kColumns = product_columns(kElement);
  static constexpr int kFragments = kColumns / 16;  // two warps side by side
  static constexpr int kStepsPerDepthTile = kDepthTile / kDepth;
  static constexpr int kPanelBytes = kDepth * kChunkBytes;  // kDepth rows of 128 bytes
  static constexpr int kWeightPanels = weight_bytes(kElement);
  static constexpr int kOperandPanels = kColumns * bytes_of(kElement) / kChunkBytes;
  static constexpr int kWeightTileBytes = kProductTileRows * kChunkBytes;
  using Accumulator = float[kWarpRowFragments][kFragments][4];
};

IBQ_DEVICE SharedAddress byte_address(SharedAddress panel, int row, int byte) {
  return search::tile_address(panel, row, byte >> 4) + static_cast<SharedAddress>(byte & 15);
}

// Brings step `step` of a depth tile into a stage: W's part first, B's after it. output_row, column: of the
// output tile, in elements.
template <Element kElement, bool kTransposed>
IBQ_DEVICE void load_step(const ProductArguments& args, SharedAddress stage, int64_t depth_tile, int step,
                          int64_t output_row, int64_t column) {
  using T = Tile<kElement, kTransposed>;
  const int64_t depth = depth_tile * kDepthTile + step * T::kDepth;
  const int64_t pitch = args.weights_pitch * weight_bytes(kElement);
  if constexpr (kTransposed) {
    IBQ_UNROLL
    for (int panel = 0; panel < T::kWeightPanels; ++panel)
      search::load_tile<T::kDepth>(stage + panel * T::kPanelBytes, args.weights, args.weight_rows, pitch,
                                   depth, output_row * weight_bytes(kElement) + panel * kChunkBytes, 16);
  } else {
    search::load_tile<kProductTileRows>(stage, args.weights, args.weight_rows, pitch, output_row,
                                        depth * weight_bytes(kElement), 16);
  }
  IBQ_UNROLL
  for (int panel = 0; panel < T::kOperandPanels; ++panel)
    search::load_tile<T::kDepth>(stage + T::kWeightTileBytes + panel * T::kPanelBytes, args.operand,
                                 args.operand_rows, args.row_bytes, args.operand_row + depth,
                                 column * bytes_of(kElement) + panel * kChunkBytes, args.access);
}

// bf16: steps of 16.
template <bool kTransposed>
IBQ_DEVICE void multiply_pairs(typename Tile<Element::bf16, kTransposed>::Accumulator& sums,
                               SharedAddress stage) {
  using T = Tile<Element::bf16, kTransposed>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp_row = static_cast<int>(threadIdx.x) >> 6;
  const int warp_column = (static_cast<int>(threadIdx.x) >> 5) & 1;
  const SharedAddress operand = stage + T::kWeightTileBytes + warp_column * T::kPanelBytes;
  const int depth_row = (lane & 7) + ((lane >> 3) & 1) * 8;
  IBQ_UNROLL
  for (int step = 0; step < T::kDepth / 16; ++step) {
    uint32_t a[kWarpRowFragments][4];
    IBQ_UNROLL
    for (int m = 0; m < kWarpRowFragments; ++m) {
      if constexpr (kTransposed) {
        ldmatrix_x4_transposed(
            a[m], search::tile_address(stage + warp_row * T::kPanelBytes,
                                       step * 16 + (lane & 7) + (lane >> 4) * 8, 2 * m + ((lane >> 3) & 1)));
      } else {
        ldmatrix_x4(
            a[m], search::tile_address(stage, warp_row * 64 + m * 16 + (lane & 15), step * 2 + (lane >> 4)));
      }
    }
    IBQ_UNROLL
    for (int pair = 0; pair < T::kFragments / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, search::tile_address(operand, step * 16 + depth_row, pair * 2 + (lane >> 4)));
      IBQ_UNROLL
      for (int m = 0; m < kWarpRowFragments; ++m) {
        mma_bf16(sums[m][2 * pair], a[m], b[0], b[1]);
        mma_bf16(sums[m][2 * pair + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// fp16 and float32: steps of 8 in tf32.
template <Element kElement, bool kTransposed>
IBQ_DEVICE void multiply_words(typename Tile<kElement, kTransposed>::Accumulator& sums, SharedAddress stage) {
  using T = Tile<kElement, kTransposed>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int group = lane >> 2, word = lane & 3;
  const int warp_row = static_cast<int>(threadIdx.x) >> 6;
  const int warp_column = (static_cast<int>(threadIdx.x) >> 5) & 1;
  const SharedAddress operand = stage + T::kWeightTileBytes + warp_column * T::kPanelBytes;
  IBQ_UNROLL_BY(1)
  for (int step = 0; step < T::kDepth / 8; ++step) {
    uint32_t a[kWarpRowFragments][4], a_low[kWarpRowFragments][4];
    IBQ_UNROLL
    for (int m = 0; m < kWarpRowFragments; ++m) {
      if constexpr (kTransposed) {
        IBQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = warp_row * 64 + m * 16 + (i & 1) * 8 + group;
          a[m][i] = load_shared_4(byte_address(stage + (row / 32) * T::kPanelBytes,
                                               step * 8 + (i >> 1) * 4 + word, row % 32 * 4));
        }
      } else {
        ldmatrix_x4(
            a[m], search::tile_address(stage, warp_row * 64 + m * 16 + (lane & 15), step * 2 + (lane >> 4)));
      }
      if constexpr (kElement == Element::f32) search::split_tf32(a[m], a_low[m]);
    }
    IBQ_UNROLL
    for (int f = 0; f < T::kFragments; ++f) {
      uint32_t b[4] = {};
      IBQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = step * 8 + i * 4 + word, column = f * 8 + group;
        if constexpr (kElement == Element::f32) {
          b[i] = load_shared_4(byte_address(operand, row, column * 4));
        } else {
          b[i] = as_bits(f16_to_float(load_shared_2(byte_address(operand, row, column * 2))));
        }
      }
      if constexpr (kElement == Element::f32) {
        uint32_t b_low[4];
        search::split_tf32(b, b_low);
        IBQ_UNROLL
        for (int m = 0; m < kWarpRowFragments; ++m)
          search::mma_tf32x3(sums[m][f], a[m], a_low[m], b[0], b[1], b_low[0], b_low[1]);
      } else {
        IBQ_UNROLL
        for (int m = 0; m < kWarpRowFragments; ++m) mma_tf32(sums[m][f], a[m], b[0], b[1]);
      }
    }
  }
}

}  // namespace product

// Grid: plan.blocks() blocks of kProductThreads, plan.shared_bytes of dynamic shared memory. Blocks that run
// together share a row tile of W first, then B.
template <Element kElement, bool kTransposed>
IBQ_KERNEL(kProductThreads, 2)
product_kernel(const ProductArguments args) {
  using T = product::Tile<kElement, kTransposed>;
  const ProductPlan& plan = args.plan;
  const int64_t block = blockIdx.x;
  const int64_t column = block % plan.column_tiles * T::kColumns;
  const int64_t row_tile = block / plan.column_tiles % plan.row_tiles;
  const int64_t split = block / (plan.column_tiles * plan.row_tiles);
  const int64_t first_tile = split * plan.tiles_per_split;
  const int64_t end_tile = first_tile + plan.tiles_per_split < plan.depth_tiles
                               ? first_tile + plan.tiles_per_split
                               : plan.depth_tiles;
  const int64_t output_row = row_tile * kProductTileRows;

  const auto next_live = [&](int64_t tile) {
    while (tile < end_tile &&
           !args.live[kTransposed ? tile * args.code_tiles + row_tile : row_tile * args.code_tiles + tile])
      ++tile;
    return tile;
  };
  TileRing ring(shared_address(dynamic_shared()), plan.stages, product_stage_bytes(kElement));
  int64_t load_tile_index = next_live(first_tile);
  int load_part = 0;
  const auto load_next = [&] {
    if (load_tile_index < end_tile) {
      product::load_step<kElement, kTransposed>(args, ring.next_load(), load_tile_index, load_part,
                                                output_row, column);
      if (++load_part == T::kStepsPerDepthTile) {
        load_part = 0;
        load_tile_index = next_live(load_tile_index + 1);
      }
    }
    cp_async_commit();
  };

  typename T::Accumulator sums;
  IBQ_UNROLL
  for (int i = 0; i < search::kWarpRowFragments * T::kFragments * 4; ++i)
    sums[i / 4 / T::kFragments][i / 4 % T::kFragments][i % 4] = 0.0f;
  for (int stage = 0; stage < plan.stages - 1; ++stage) load_next();
  for (int64_t tile = next_live(first_tile); tile < end_tile; tile = next_live(tile + 1)) {
    IBQ_UNROLL_BY(1)
    for (int step = 0; step < T::kStepsPerDepthTile; ++step) {
      ring.wait();
      block_barrier();  // this stage has arrived for all, and all are done with the one before
      load_next();      // into the place of the one before
      const SharedAddress stage = ring.next_read();
      if constexpr (kElement == Element::bf16) {
        product::multiply_pairs<kTransposed>(sums, stage);
      } else {
        product::multiply_words<kElement, kTransposed>(sums, stage);
      }
    }
  }

  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int64_t thread_row = output_row + (static_cast<int>(threadIdx.x) >> 6) * 64 + (lane >> 2);
  const int64_t thread_column =
      column + ((static_cast<int>(threadIdx.x) >> 5) & 1) * (T::kColumns / 2) + (lane & 3) * 2;
  IBQ_UNROLL
  for (int m = 0; m < search::kWarpRowFragments; ++m) {
    IBQ_UNROLL
    for (int f = 0; f < T::kFragments; ++f) {
      IBQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t row = thread_row + m * 16 + i / 2 * 8, at = thread_column + f * 8 + i % 2;
        if (row >= args.rows || at >= args.D) continue;
        const float sum = sums[m][f][i];
        if (args.partial != nullptr) {
          args.partial[(split * args.rows + row) * args.D + at] = sum;
        } else if (args.atomic) {
          atomic_add_global(&args.out[row * args.D + at], args.factor * sum);
        } else {
          args.out[row * args.D + at] += args.factor * sum;
        }
      }
    }
  }
}

}  // namespace ibq::cuda
