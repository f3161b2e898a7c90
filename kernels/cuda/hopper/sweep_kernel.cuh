// The sweeps over S of ../sweep_kernel.cuh for compute capability 9.0: the same arguments, the same outputs,
// with S (and G) by wgmma in the frame of stream.cuh.
//
// STATUS: NEVER RUN ON A GPU. Compiled for sm_90a without spills; executed on the CPU under
// kernels/tests/hopper_emulator.h, whole forward and backward sequences at a time.
//
// Contract. bf16 operands where stream_refusal (stream_plan.h) is null; more than 256 columns for cross
// alone. Row tiles, splits and everything in the workspace are the portable kernel's, so either may make what
// the other kernels read. Deterministic.
//
// Cost. 2*N*K*D operations for S, as many for G. select and both keep 128 rows of z and of g resident and
// form S and G of one code tile (WideRows); the others keep z alone and form S of two (WideCodes). A thread
// then holds 128 logits and products a step, and has the 2048 cycles (D = 256) of the other warpgroup's
// products for them.
//
// Between the warpgroups. Each has 64 of the tile's 128 rows and runs at its own time. Tops and column sums
// go through shared memory, warp by warp, from both to warpgroup 1, which writes what needs the whole tile;
// warpgroup 0 does not wait (barrier.arrive). A slot is used again two steps later, when the turns on the
// tensor cores have made sure that it was read; streaming, the last panel of that step came only after every
// warp had left a panel of the step between, as a step has more panels than half the ring.
//
// Skipping. As in the portable kernel, but a tile found negligible only after its products is still written,
// as zeros: deciding for the whole tile first would make the warpgroups wait for each other.
#pragma once

#include "../sweep_kernel.cuh"
#include "parameters.h"
#include "stream.cuh"

namespace ibq::cuda::hopper {

namespace sweeps {

constexpr int kColumns = 2 * kStreamFragments;  // that a thread holds of each of its two rows of a tile
constexpr int kExchangeBarrier = 3;             // and the three after it, one a slot

IBQ_HD constexpr bool has_cotangents(Sweep sweep) { return sweep == Sweep::select || sweep == Sweep::both; }

template <Sweep kSweep>
struct ShapeOf {
  using Type = WideCodes;
};
template <>
struct ShapeOf<Sweep::select> {
  using Type = WideRows;
};
template <>
struct ShapeOf<Sweep::both> {
  using Type = WideRows;
};

struct Task {
  const SweepParameters& p;
  IBQ_DEVICE TileSchedule schedule() const { return p.args.plan.schedule; }
  IBQ_DEVICE Box codes(int tile) const {
    return {&p.codebook, static_cast<int>(p.args.first_code) + tile * kStreamCodes};
  }
  IBQ_DEVICE Box rows(int row_tile, int i) const {
    return {i == 0 ? &p.z : &p.cotangents, static_cast<int>(p.args.first_row) + row_tile * kBoxRows};
  }
  IBQ_DEVICE bool live(int row_tile, int tile) const { return sweep::may_matter(p.args, row_tile, tile); }
};

// One step of add_over_rows: of every 2 * kStride entries a lane keeps one half, by its kBit.
template <int kBit, int kStride>
IBQ_DEVICE void add_half(float (&v)[kColumns]) {
  const bool upper = (threadIdx.x & kBit) != 0;
  IBQ_UNROLL
  for (int i = 0; i < kColumns * kBit / 32; ++i) {
    const int low = i / kStride * 2 * kStride + i % kStride;
    const float keep = upper ? v[low + kStride] : v[low];
    const float send = upper ? v[low] : v[low + kStride];
    v[i] = keep + shuffle_xor(send, kBit);
  }
}

// v[i] of lane l becomes the sum, over the 8 lanes that share l % 4, of their v[8 * i + l / 4], for i < 4.
IBQ_DEVICE void add_over_rows(float (&v)[kColumns]) {
  add_half<16, 4>(v);
  add_half<8, 2>(v);
  add_half<4, 1>(v);
}

template <Sweep kSweep, typename Shape>
struct Epilogue {
  static constexpr bool kSelect = kSweep == Sweep::select || kSweep == Sweep::both;
  static constexpr bool kEntropy = kSweep == Sweep::entropy || kSweep == Sweep::both;
  static constexpr bool kCross = kSweep == Sweep::cross;
  static constexpr int kTiles = Shape::kTiles;

  const SweepArguments& args;
  const Task& task;
  const StreamPlan& plan;
  int step = 0;
  float first[2], second[2];  // sums over the split, as sweep::RowSums

  IBQ_DEVICE Epilogue(const SweepParameters& p, const Task& task) : args(p.args), task(task), plan(p.plan) {}

  IBQ_DEVICE void begin(int) { first[0] = first[1] = second[0] = second[1] = 0.0f; }

  IBQ_DEVICE void prepare(int32_t) {}

  // The thread's row h of a row tile, in the rectangle, and its first column of a tile.
  IBQ_DEVICE int32_t row_of(int row_tile, int h) const {
    const int thread = fresh_thread() - 128;  // among the consumers: 16 rows a warp
    return row_tile * kSweepTileRows + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
  }
  IBQ_DEVICE static int32_t thread_column() { return (fresh_thread() & 3) * 2; }

  // Read again for every tile: there is no room to keep them.
  IBQ_DEVICE RowConstants row_constants(int row_tile, int h) const {
    return args.rows[args.first_row + row_of(row_tile, h)];
  }

  IBQ_DEVICE void skip(int row_tile, int32_t tile, int end_tile) {
    IBQ_UNROLL
    for (int i = 0; i < kTiles; ++i)
      if (tile + i < end_tile) leave_out(row_tile, tile + i);
  }

  // What is written of a tile that was not formed.
  IBQ_DEVICE void leave_out(int row_tile, int32_t tile) {
    if (consumer_warpgroup() == 0) return;
    const int thread = fresh_thread() & 127;
    const int64_t place = int64_t{row_tile} * args.plan.schedule.code_tiles + tile;
    if (args.live != nullptr && thread == 0) args.live[place] = 0;
    if (args.column_parts != nullptr) args.column_parts[place * kSweepTileCodes + thread] = 0.0f;
  }

  IBQ_DEVICE void fold(int row_tile, int32_t tile, int end_tile, float (&s0)[kBlockRegisters],
                       float (&s1)[kBlockRegisters]) {
    const int slot = (step & 1) * kTiles;
    ++step;
    if constexpr (kTiles == 1) {
      finish(row_tile, tile, slot, s0, s1);
    } else {
      if (task.live(row_tile, tile)) {
        finish(row_tile, tile, slot, s0, s0);
      } else {
        leave_out(row_tile, tile);
      }
      if (tile + 1 >= end_tile) return;
      if (task.live(row_tile, tile + 1)) {
        finish(row_tile, tile + 1, slot + 1, s1, s1);
      } else {
        leave_out(row_tile, tile + 1);
      }
    }
  }

  // g: the products with the cotangents, for select and both.
  IBQ_DEVICE void finish(int row_tile, int32_t tile, int slot, float (&s)[kBlockRegisters],
                         float (&g)[kBlockRegisters]) {
    const int32_t first_code =
        static_cast<int32_t>(args.first_code) + tile * kSweepTileCodes + thread_column();
    float* const slot_tops = reinterpret_cast<float*>(swizzled_shared() + plan.extra_at) + slot * kSlotFloats;
    float* const slot_columns = slot_tops + kSlotTops;
    const int lane = fresh_thread() & 31;
    const int warp = fresh_thread() / 32 - 4;  // among the consumers
    form_logits(first_code, s);
    float most[2];
    write_tops(row_tile, first_code, s, most, slot_tops, lane, warp);

    finish_row(row_tile, 0, most[0], tile, first_code, s, g);
    finish_row(row_tile, 1, most[1], tile, first_code, s, g);
    if (args.column_parts != nullptr) {
      float columns[kColumns];
      IBQ_UNROLL
      for (int i = 0; i < kColumns; ++i) columns[i] = s[4 * (i / 2) + i % 2] + s[4 * (i / 2) + 2 + i % 2];
      add_over_rows(columns);
      IBQ_UNROLL
      for (int i = 0; i < kColumns / 8; ++i) {
        const int column = i * 8 + (lane >> 2);
        slot_columns[warp * kStreamCodes + column / 2 * 8 + column % 2 + thread_column()] = columns[i];
      }
    }
    if (consumer_warpgroup() == 0) {
      named_barrier_arrive<256>(kExchangeBarrier + slot);
    } else {
      named_barrier_sync<256>(kExchangeBarrier + slot);
      write_tile(row_tile, tile, slot_tops, slot_columns);
    }
  }

  // Entry i of a thread's columns of a vector over the codes, 0 past its end or where there is none.
  IBQ_DEVICE float of_code(const float* vector, int32_t first_code, int i) const {
    const int offset = 8 * (i / 2) + i % 2;
    return vector != nullptr && first_code + offset < static_cast<int32_t>(args.K)
               ? (vector + first_code)[offset]
               : 0.0f;
  }

  // S = product * scale + bias; codes past the codebook become -inf.
  IBQ_DEVICE void form_logits(int32_t first_code, float (&s)[kBlockRegisters]) {
    IBQ_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const float bias = of_code(args.bias, first_code, i);
      const bool inside = first_code + 8 * (i / 2) + i % 2 < static_cast<int32_t>(args.K);
      IBQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        float& x = s[4 * (i / 2) + 2 * h + i % 2];
        x = inside ? x * args.scale + bias : negative_infinity();
      }
    }
  }

  // Each row's maximum of the thread, and the warp's greatest log P and log p; a row's target counts as P
  // = 1.
  IBQ_DEVICE void write_tops(int row_tile, int32_t first_code, const float (&s)[kBlockRegisters],
                             float (&most)[2], float* tops, int lane, int warp) {
    float select = negative_infinity(), entropy = negative_infinity();
    IBQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const RowConstants row = row_constants(row_tile, h);
      most[h] = s[2 * h];
      IBQ_UNROLL
      for (int i = 1; i < kColumns; ++i) most[h] = max_or_nan(most[h], s[4 * (i / 2) + 2 * h + i % 2]);
      if constexpr (kSweep != Sweep::entropy) select = max_or_nan(select, sweep::select_log(row, most[h]));
      if constexpr (kSweep != Sweep::select && !kCross)
        entropy = max_or_nan(entropy, sweep::entropy_log(row, most[h], args.inverse_tau));
      const int64_t target = row.target - (first_code - thread_column());
      if (kCross && target >= 0 && target < kSweepTileCodes) select = max_or_nan(select, 0.0f);
    }
    IBQ_UNROLL
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      if constexpr (kSweep != Sweep::entropy) select = max_or_nan(select, shuffle_xor(select, lanes));
      if constexpr (kSweep != Sweep::select && !kCross)
        entropy = max_or_nan(entropy, shuffle_xor(entropy, lanes));
    }
    if (lane == 0) {
      tops[warp] = select;
      tops[kConsumerWarps + warp] = entropy;
    }
  }

  // One row: its part of W goes out, and its logits become what the column sums are made of.
  IBQ_DEVICE void finish_row(int row_tile, int h, float most, int32_t tile, int32_t first_code,
                             float (&s)[kBlockRegisters], float (&g)[kBlockRegisters]) {
    const RowConstants row = row_constants(row_tile, h);
    const bool select = (kSelect || (kSweep == Sweep::probability && args.use_select)) &&
                        is_live(sweep::select_log(row, most), args.gap);
    const bool entropy = (kEntropy || (kSweep == Sweep::probability && args.use_entropy)) &&
                         is_live(sweep::entropy_log(row, most, args.inverse_tau), args.gap);
    const int64_t place = row_of(row_tile, h) * args.weights_pitch + tile * kSweepTileCodes;
    uint32_t* const out = args.weights == nullptr
                              ? nullptr
                              : reinterpret_cast<uint32_t*>(args.weights) + (place + thread_column()) / 2;
    int winners[2] = {-1, -1};
    const Target target = kCross ? target_of(row, row_tile, h, first_code, s) : Target{-1, 0.0f};
    IBQ_UNROLL
    for (int f = 0; f < kStreamFragments; ++f) {
      float weight[2];
      IBQ_UNROLL
      for (int e = 0; e < 2; ++e)
        weight[e] = finish_entry(row, h, select, entropy, first_code, 2 * f + e, winners, target,
                                 s[4 * f + 2 * h + e], g[4 * f + 2 * h + e]);
      if (out != nullptr) out[4 * f] = pack_bf16(weight[0], weight[1]);
    }
    if constexpr (kSelect) write_winner(0, row_tile, h, first_code, winners[0]);
    if constexpr (kEntropy) write_winner(1, row_tile, h, first_code, winners[1]);
  }

  // Where a row's target is among the thread's columns (8 apart in pairs), -1 if it is not, and its P - q.
  struct Target {
    int column;
    float value;
  };

  IBQ_DEVICE Target target_of(const RowConstants& row, int row_tile, int h, int32_t first_code,
                              const float (&s)[kBlockRegisters]) const {
    const int64_t offset = row.target - first_code;
    if (offset < 0 || offset >= kStreamCodes || offset % 8 >= 2) return {-1, 0.0f};
    float x = 0.0f;
    IBQ_UNROLL
    for (int i = 0; i < kColumns; ++i)
      if (8 * (i / 2) + i % 2 == offset) x = s[4 * (i / 2) + 2 * h + i % 2];
    const double own = expm1(static_cast<double>(x) - args.lse[args.first_row + row_of(row_tile, h)]);
    return {static_cast<int>(offset),
            static_cast<float>(own + (static_cast<double>(args.smoothing) - args.share))};
  }

  // Returns an entry of W; x becomes its term of the column sum.
  IBQ_DEVICE float finish_entry(const RowConstants& row, int h, bool select, bool entropy, int32_t first_code,
                                int i, int (&winners)[2], const Target& target, float& x, float g) {
    if constexpr (kCross) {
      const bool own = 8 * (i / 2) + i % 2 == target.column;
      const float ds = own ? target.value : exponent(sweep::select_log(row, x)) - args.share;
      x = row.delta == 0.0f ? 0.0f : row.delta * ds;
      return x;
    }
    const float c = kSweep == Sweep::select ? 0.0f : of_code(args.column_weights, first_code, i);
    if constexpr (kSweep == Sweep::probability) {
      const float weight = select ? exponent(sweep::select_log(row, x)) : 0.0f;
      x = entropy ? exponent(sweep::entropy_log(row, x, args.inverse_tau)) : 0.0f;
      second[h] += x * c;
      return weight;
    }
    float ds = 0.0f;
    if constexpr (kSelect) {
      if (select) {
        const float p = exponent(sweep::select_log(row, x));
        ds = without_winner(winners[0], i, p, p * (g - row.delta));
        first[h] += ds;
      }
    }
    if constexpr (kEntropy) {
      if (entropy) {
        const float log_p = sweep::entropy_log(row, x, args.inverse_tau);
        const float p = exponent(log_p);
        const float own = p * (larger(log_p, kLeastLogProb) * row.slope + (c * args.share + row.offset));
        const float others = without_winner(winners[1], i, p, own);
        second[h] += others;
        ds += others;
      }
    }
    x = ds;
    return ds;
  }

  // Takes a winner out, as sweep::without_winner, but only remembers which entry it was.
  IBQ_DEVICE static float without_winner(int& winner, int i, float p, float ds) {
    if (p > kWinner) winner = i;
    return p > kWinner ? 0.0f : ds;
  }

  IBQ_DEVICE void write_winner(int group, int row_tile, int h, int32_t first_code, int winner) {
    if (winner < 0) return;
    args.winners[group * args.N + args.first_row + row_of(row_tile, h)] =
        first_code + winner / 2 * 8 + winner % 2;
  }

  IBQ_DEVICE static float exponent(float x) { return sweep::exponential<Element::bf16>(x); }

  // Warpgroup 1, once both have left their parts: what is said of the whole tile.
  IBQ_DEVICE void write_tile(int row_tile, int32_t tile, const float* tops, const float* columns) {
    const int thread = fresh_thread() & 127;
    const int64_t place = int64_t{row_tile} * args.plan.schedule.code_tiles + tile;
    if (args.column_parts != nullptr) {
      float sum = 0.0f;
      IBQ_UNROLL
      for (int warp = 0; warp < kConsumerWarps; ++warp) sum += columns[warp * kStreamCodes + thread];
      args.column_parts[place * kSweepTileCodes + thread] = sum;
    }
    if (thread != 0) return;
    float select = tops[0], entropy = tops[kConsumerWarps];
    IBQ_UNROLL
    for (int warp = 1; warp < kConsumerWarps; ++warp) {
      select = max_or_nan(select, tops[warp]);
      entropy = max_or_nan(entropy, tops[kConsumerWarps + warp]);
    }
    if constexpr (kSweep == Sweep::probability) {
      if (args.tile_bound_out != nullptr) {
        const int64_t row = args.first_row / kSweepTileRows + row_tile;
        const int64_t bound = row * args.bound_blocks + args.first_code / kSweepTileCodes + tile;
        args.tile_bound_out[bound] = select;
        args.tile_bound_out[args.bound_tiles * args.bound_blocks + bound] = entropy;
      }
      if (args.live != nullptr) args.live[place] = args.use_select && is_live(select, args.gap);
    } else {
      args.live[place] = (kSweep != Sweep::entropy && is_live(select, args.gap)) ||
                         (kSweep != Sweep::select && !kCross && is_live(entropy, args.gap));
    }
  }

  IBQ_DEVICE void end(int row_tile, int split) {
    if (args.row_parts == nullptr) return;
    const int64_t stride = args.plan.schedule.row_tiles * kSweepTileRows;
    IBQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      IBQ_UNROLL
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        first[h] += shuffle_xor(first[h], lanes);
        second[h] += shuffle_xor(second[h], lanes);
      }
      if ((threadIdx.x & 3) != 0) continue;
      args.row_parts[split * 2 * stride + row_of(row_tile, h)] = first[h];
      args.row_parts[(split * 2 + 1) * stride + row_of(row_tile, h)] = second[h];
    }
  }
};

}  // namespace sweeps

// Grid: stream_blocks(schedule, multiprocessors) blocks of kStreamThreads, plan.shared_bytes of dynamic
// shared memory.
template <Sweep kSweep, typename Shape = typename sweeps::ShapeOf<kSweep>::Type>
IBQ_KERNEL(kStreamThreads, 1)
hopper_sweep_kernel(const IBQ_GRID_CONSTANT SweepParameters p) {
  const SharedAddress shared = shared_address(swizzled_shared());
  const Barriers barriers = begin_stream(p.plan, shared);
  const sweeps::Task task{p};
  if (threadIdx.x < 128) {
    give_up_registers<24>();
    if (threadIdx.x == 0) produce<Shape>(task, p.plan, shared, barriers);
  } else {
    take_registers<240>();
    const int first_row = consumer_warpgroup() * 64;
    sweeps::Epilogue<kSweep, Shape> epilogue(p, task);
    // Blocks of 64 rows: z's and g's, or z's twice.
    constexpr int kSecond = sweeps::has_cotangents(kSweep) ? kBoxRows : 0;
    consume<true, Shape>(task, epilogue, p.plan, shared, barriers, first_row, kSecond + first_row);
  }
}

}  // namespace ibq::cuda::hopper
