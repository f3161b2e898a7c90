// What a sweep makes of one tile of S (and of G) in registers; sweep_kernel.cuh says what for.
//
// Thread layout: row slot 2m + h of a thread is row 64 * (warp / 4) + 16m + 8h + lane / 4 of the tile;
// element e of fragment f is code 32 * (warp % 4) + 8f + 2 * (lane % 4) + e.
#pragma once

#include "../common/softmax_rules.h"
#include "search_tiles.cuh"
#include "sweep_arguments.h"

namespace ibq::cuda::sweep {

using search::kWarpRowFragments;

constexpr int kWarpColumns = 4;
constexpr int kFragments = 4;
constexpr int kRowSlots = 2 * kWarpRowFragments;
constexpr int kColumns = 2 * kFragments;  // that a thread holds of each of its rows
constexpr int kWarps = kSweepThreads / 32;

using Accumulator = float[kWarpRowFragments][kFragments][4];

// Sums over the split of each row a thread shares: of the select and of the entropy group's dS, winners left
// out; in the probability sweep `second` is the sum of p_ij c_j.
struct RowSums {
  float first[kRowSlots], second[kRowSlots];
};

IBQ_DEVICE int thread_row() {
  return (static_cast<int>(threadIdx.x) >> 7) * 64 + ((static_cast<int>(threadIdx.x) >> 2) & 7);
}
IBQ_DEVICE int thread_column() {
  return ((static_cast<int>(threadIdx.x) >> 5) & 3) * 32 + (static_cast<int>(threadIdx.x) & 3) * 2;
}
IBQ_DEVICE constexpr int slot_row(int slot) { return slot * 8; }
IBQ_DEVICE constexpr int column_code(int column) { return column / 2 * 8 + column % 2; }

template <Element kElement>
IBQ_DEVICE float exponential(float x) {
  if constexpr (kElement == Element::f32) {
    return expf(x);
  } else {
    return exp2_approximate(x * 1.4426950408889634f);
  }
}

IBQ_DEVICE float& element(Accumulator& s, int slot, int column) {
  return s[slot / 2][column / 2][slot % 2 * 2 + column % 2];
}

// S = product * scale + bias; codes past the codebook become -inf.
IBQ_DEVICE void form_logits(const SweepArguments& args, int64_t first_code, Accumulator& s) {
  IBQ_UNROLL
  for (int column = 0; column < kColumns; ++column) {
    const int64_t code = first_code + column_code(column);
    const float bias = args.bias == nullptr ? 0.0f : args.bias[code < args.K ? code : args.K - 1];
    IBQ_UNROLL
    for (int slot = 0; slot < kRowSlots; ++slot) {
      float& x = element(s, slot, column);
      x = code < args.K ? x * args.scale + bias : negative_infinity();
    }
  }
}

IBQ_DEVICE float row_maximum(Accumulator& s, int slot) {
  float most = element(s, slot, 0);
  IBQ_UNROLL
  for (int column = 1; column < kColumns; ++column) most = max_or_nan(most, element(s, slot, column));
  return most;
}

IBQ_DEVICE float select_log(const RowConstants& row, float x) {
  return (x - row.select_high) - row.select_low;
}
IBQ_DEVICE float entropy_log(const RowConstants& row, float x, float inverse_tau) {
  return (x - row.entropy_high) * inverse_tau - row.entropy_low;
}

// The greatest log P and log p of the tile, known to all threads. In the cross entropy a tile that holds a
// row's target counts as P = 1.
struct Tops {
  float select, entropy;
};

template <Sweep kSweep>
IBQ_DEVICE Tops tile_tops(const SweepArguments& args, const RowConstants* rows, int64_t tile_code,
                          Accumulator& s, float* scratch) {
  Tops top{negative_infinity(), negative_infinity()};
  IBQ_UNROLL
  for (int slot = 0; slot < kRowSlots; ++slot) {
    const RowConstants row = rows[slot_row(slot)];
    const float most = row_maximum(s, slot);
    if constexpr (kSweep != Sweep::entropy) top.select = max_or_nan(top.select, select_log(row, most));
    if constexpr (kSweep != Sweep::select && kSweep != Sweep::cross)
      top.entropy = max_or_nan(top.entropy, entropy_log(row, most, args.inverse_tau));
    if constexpr (kSweep == Sweep::cross) {
      if (row.target >= tile_code && row.target < tile_code + kSweepTileCodes)
        top.select = max_or_nan(top.select, 0.0f);
    }
  }
  IBQ_UNROLL
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    top.select = max_or_nan(top.select, shuffle_xor(top.select, lanes));
    top.entropy = max_or_nan(top.entropy, shuffle_xor(top.entropy, lanes));
  }
  const int thread = static_cast<int>(threadIdx.x);
  if ((thread & 31) == 0) {
    scratch[thread >> 5] = top.select;
    scratch[kWarps + (thread >> 5)] = top.entropy;
  }
  block_barrier();
  top = {scratch[0], scratch[kWarps]};
  IBQ_UNROLL
  for (int warp = 1; warp < kWarps; ++warp) {
    top.select = max_or_nan(top.select, scratch[warp]);
    top.entropy = max_or_nan(top.entropy, scratch[kWarps + warp]);
  }
  return top;
}

// The tile of W, `live` and the column sums of a tile that nothing was computed of.
IBQ_DEVICE void leave_out_tile(const SweepArguments& args, int64_t row_tile, int64_t tile) {
  const int64_t code_tiles = args.plan.schedule.code_tiles;
  const int thread = static_cast<int>(threadIdx.x);
  if (args.live != nullptr && thread == 0) args.live[row_tile * code_tiles + tile] = 0;
  if (args.column_parts != nullptr && thread < kSweepTileCodes)
    args.column_parts[(row_tile * code_tiles + tile) * kSweepTileCodes + thread] = 0.0f;
}

// Takes a winner out: remembers its code and returns 0 in place of its dS.
IBQ_DEVICE float without_winner(const SweepArguments& args, int group, int64_t row, int64_t code, float p,
                                float ds) {
  if (p > kWinner) {
    args.winners[group * args.N + row] = static_cast<int32_t>(code);
    return 0.0f;
  }
  return ds;
}

// One row of the tile: its logits become its part of W, and its column sums go to `columns`.
template <Element kElement, Sweep kSweep>
IBQ_DEVICE void finish_row(const SweepArguments& args, const RowConstants& row, int64_t row_index,
                           int64_t first_code, int slot, const float (&c)[kColumns], Accumulator& s,
                           Accumulator& g, RowSums& sums, float (&columns)[kColumns]) {
  const float most = row_maximum(s, slot);
  constexpr bool kSelect = kSweep == Sweep::select || kSweep == Sweep::both;
  constexpr bool kEntropy = kSweep == Sweep::entropy || kSweep == Sweep::both;
  if constexpr (kSweep == Sweep::probability) {
    const bool select = args.use_select && is_live(select_log(row, most), args.gap);
    const bool entropy = args.use_entropy && is_live(entropy_log(row, most, args.inverse_tau), args.gap);
    IBQ_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      float& x = element(s, slot, column);
      const float p = entropy ? exponential<kElement>(entropy_log(row, x, args.inverse_tau)) : 0.0f;
      columns[column] += p;
      sums.second[slot] += p * c[column];
      x = select ? exponential<kElement>(select_log(row, x)) : 0.0f;
    }
  } else if constexpr (kSweep == Sweep::cross) {
    IBQ_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      float& x = element(s, slot, column);
      const int64_t code = first_code + column_code(column);
      float ds = exponential<kElement>(select_log(row, x)) - args.share;
      if (code == row.target)
        ds = static_cast<float>(expm1(static_cast<double>(x) - args.lse[row_index]) +
                                (static_cast<double>(args.smoothing) - args.share));
      x = row.delta == 0.0f ? 0.0f : row.delta * ds;
      columns[column] += x;
    }
  } else {
    const bool select = kSelect && is_live(select_log(row, most), args.gap);
    const bool entropy = kEntropy && is_live(entropy_log(row, most, args.inverse_tau), args.gap);
    IBQ_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      float& x = element(s, slot, column);
      const int64_t code = first_code + column_code(column);
      float ds = 0.0f;
      if constexpr (kSelect) {
        if (select) {
          const float p = exponential<kElement>(select_log(row, x));
          ds = without_winner(args, 0, row_index, code, p, p * (element(g, slot, column) - row.delta));
          sums.first[slot] += ds;
        }
      }
      if constexpr (kEntropy) {
        if (entropy) {
          const float log_p = entropy_log(row, x, args.inverse_tau);
          const float p = exponential<kElement>(log_p);
          const float own =
              p * (larger(log_p, kLeastLogProb) * row.slope + (c[column] * args.share + row.offset));
          const float others = without_winner(args, 1, row_index, code, p, own);
          sums.second[slot] += others;
          ds += others;
        }
      }
      x = ds;
      columns[column] += ds;
    }
  }
}

// A row's part of W to the workspace, in the form the products read.
template <Element kElement>
IBQ_DEVICE void write_weights(const SweepArguments& args, int64_t place, int slot, Accumulator& s) {
  IBQ_UNROLL
  for (int f = 0; f < kFragments; ++f) {
    const float first = element(s, slot, 2 * f), second = element(s, slot, 2 * f + 1);
    if constexpr (kElement == Element::bf16) {
      reinterpret_cast<uint32_t*>(args.weights)[(place + 8 * f) / 2] = pack_bf16(first, second);
    } else {
      struct alignas(8) Pair {
        float first, second;
      };
      Pair pair{first, second};
      if constexpr (kElement == Element::f16)
        pair = {as_float(round_to_tf32(first)), as_float(round_to_tf32(second))};
      reinterpret_cast<Pair*>(args.weights)[(place + 8 * f) / 2] = pair;
    }
  }
}

// Adds the columns' sums up over the rows of the tile and writes them.
IBQ_DEVICE void write_column_parts(const SweepArguments& args, int64_t row_tile, int64_t tile,
                                   float (&columns)[kColumns], float* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  IBQ_UNROLL
  for (int column = 0; column < kColumns; ++column) {
    IBQ_UNROLL
    for (int lanes = 4; lanes < 32; lanes *= 2) columns[column] += shuffle_xor(columns[column], lanes);
    if ((thread & 31) < 4)
      scratch[(thread >> 7) * kSweepTileCodes + thread_column() + column_code(column)] = columns[column];
  }
  block_barrier();
  if (thread < kSweepTileCodes)
    args.column_parts[(row_tile * args.plan.schedule.code_tiles + tile) * kSweepTileCodes + thread] =
        scratch[thread] + scratch[kSweepTileCodes + thread];
}

template <Element kElement, Sweep kSweep>
IBQ_DEVICE void finish_tile(const SweepArguments& args, int64_t row_tile, int64_t tile, Accumulator& s,
                            Accumulator& g, RowSums& sums, float* scratch) {
  const int64_t code_tiles = args.plan.schedule.code_tiles;
  const int64_t tile_code = args.first_code + tile * kSweepTileCodes;
  const int64_t first_code = tile_code + thread_column();
  const int64_t tile_row = row_tile * kSweepTileRows + thread_row();
  const RowConstants* rows = args.rows + args.first_row + tile_row;
  const bool leader = threadIdx.x == 0;
  form_logits(args, first_code, s);
  const Tops top = tile_tops<kSweep>(args, rows, tile_code, s, scratch);
  bool live;
  if constexpr (kSweep == Sweep::probability) {
    if (args.tile_bound_out != nullptr && leader) {
      const int64_t row = args.first_row / kSweepTileRows + row_tile;
      const int64_t place = row * args.bound_blocks + tile_code / kSweepTileCodes;
      args.tile_bound_out[place] = top.select;
      args.tile_bound_out[args.bound_tiles * args.bound_blocks + place] = top.entropy;
    }
    live = (args.use_select && is_live(top.select, args.gap)) ||
           (args.use_entropy && is_live(top.entropy, args.gap));
    if (args.live != nullptr && leader)
      args.live[row_tile * code_tiles + tile] = args.use_select && is_live(top.select, args.gap);
  } else {
    live = (kSweep != Sweep::entropy && is_live(top.select, args.gap)) ||
           (kSweep != Sweep::select && kSweep != Sweep::cross && is_live(top.entropy, args.gap));
    if (leader) args.live[row_tile * code_tiles + tile] = live;
  }
  if (!live) {
    if (args.column_parts != nullptr && threadIdx.x < kSweepTileCodes)
      args.column_parts[(row_tile * code_tiles + tile) * kSweepTileCodes + threadIdx.x] = 0.0f;
    return;
  }
  float c[kColumns] = {}, columns[kColumns] = {};
  if (kSweep != Sweep::select && kSweep != Sweep::cross && args.column_weights != nullptr) {
    IBQ_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      const int64_t code = first_code + column_code(column);
      c[column] = args.column_weights[code < args.K ? code : args.K - 1];
    }
  }
  IBQ_UNROLL
  for (int slot = 0; slot < kRowSlots; ++slot) {
    const RowConstants row = rows[slot_row(slot)];
    finish_row<kElement, kSweep>(args, row, args.first_row + tile_row + slot_row(slot), first_code, slot, c,
                                 s, g, sums, columns);
    if (args.weights != nullptr)
      write_weights<kElement>(
          args, (tile_row + slot_row(slot)) * args.weights_pitch + tile * kSweepTileCodes + thread_column(),
          slot, s);
  }
  if (args.column_parts != nullptr) write_column_parts(args, row_tile, tile, columns, scratch + 2 * kWarps);
}

// Joins the row sums of the 4 lanes and the 4 warps that share a row; the ring's memory is free by now.
IBQ_DEVICE void write_row_parts(const SweepArguments& args, int64_t row_tile, int64_t split, RowSums& sums) {
  float* parts = reinterpret_cast<float*>(dynamic_shared());  // [kWarpColumns][2][rows]
  const int thread = static_cast<int>(threadIdx.x);
  block_barrier();
  IBQ_UNROLL
  for (int slot = 0; slot < kRowSlots; ++slot) {
    IBQ_UNROLL
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      sums.first[slot] += shuffle_xor(sums.first[slot], lanes);
      sums.second[slot] += shuffle_xor(sums.second[slot], lanes);
    }
    if ((thread & 3) == 0) {
      float* place = parts + ((thread >> 5) & 3) * 2 * kSweepTileRows + thread_row() + slot_row(slot);
      place[0] = sums.first[slot];
      place[kSweepTileRows] = sums.second[slot];
    }
  }
  block_barrier();
  float sum = 0.0f;
  IBQ_UNROLL
  for (int column = 0; column < kWarpColumns; ++column) sum += parts[column * 2 * kSweepTileRows + thread];
  const int64_t stride = args.plan.schedule.row_tiles * kSweepTileRows;
  args.row_parts[(split * 2 + thread / kSweepTileRows) * stride + row_tile * kSweepTileRows +
                 thread % kSweepTileRows] = sum;
}

}  // namespace ibq::cuda::sweep
