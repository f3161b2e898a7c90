// codebook_search for compute capability 9.0: index and value of the maximum of every row of
// S = scale * z @ codebook^T + bias and, by option, its log-sum-exp, by wgmma in the frame of stream.cuh; and
// with the sums that training needs (Extra), what ../search_kernel.cuh makes of them.
//
// STATUS: NEVER RUN ON A GPU. Compiled for sm_90a without spills; executed on the CPU under
// kernels/tests/hopper_emulator.h, which decodes tensor maps, swizzles and descriptors by the PTX ISA's
// rules.
//
// Contract. As ../search_kernel.cuh, for bf16 and fp16 where stream_refusal (stream_plan.h) is null; more
// than 256 columns for Extra::target alone, the generator's loss.
//
// Cost. 2*N*K*D FLOP and, with lse, N*K exponentials. A work item is 256 rows. The epilogue of a tile is 128
// logits a thread: 128 exponentials at 8 cycles a warp on the MUFU unit, about 1100 cycles with the rest,
// against the 2048 (D = 256) in which the other warpgroup multiplies. The index is searched for only where a
// tile's maximum beats the row's so far, as in the portable kernel.
#pragma once

#include "../search_kernel.cuh"
#include "parameters.h"
#include "stream.cuh"

namespace ibq::cuda::hopper {

namespace search {

constexpr float kLog2E = 1.4426950408889634f;

struct Task {
  const SearchParameters& p;
  IBQ_DEVICE TileSchedule schedule() const { return p.schedule; }
  IBQ_DEVICE Box codes(int tile) const { return {&p.codebook, tile * kStreamCodes}; }
  IBQ_DEVICE Box rows(int row_tile, int i) const { return {&p.z, row_tile * kSearchRows + i * kBoxRows}; }
  IBQ_DEVICE bool live(int, int) const { return true; }
};

// What a thread knows of the 4 rows it shares with 3 others: slot 2m + h is row 64m + 16 warp + lane/4 + 8h
// of its warpgroup's 128.
template <bool kWithLse, Extra kExtra>
struct Epilogue {
  static constexpr bool kEntropy = kExtra == Extra::entropy, kTarget = kExtra == Extra::target;

  const SearchParameters& p;
  const int64_t first_row;    // of the warpgroup in the item
  const int32_t thread_code;  // of the thread in a tile
  float max[4];
  float sum[4];
  int32_t index[4];
  float tempered_sum[4], tempered_moment[4];  // with Extra::entropy
  int32_t target[4];                          // with Extra::target: -1 for none
  float logits[4];                            // the same
  float bias[2 * kStreamFragments];
  int32_t item_row = 0;

  IBQ_DEVICE Epilogue(const SearchParameters& p, int64_t first_row)
      : p(p), first_row(first_row), thread_code((static_cast<int32_t>(threadIdx.x) & 3) * 2) {}

  IBQ_DEVICE int64_t row_of(int slot) const {
    const int lane = fresh_thread() & 31, warp = fresh_thread() >> 5 & 3;
    return item_row + first_row + slot / 2 * 64 + 16 * warp + (lane >> 2) + slot % 2 * 8;
  }

  IBQ_DEVICE void begin(int row_tile) {
    item_row = row_tile * kSearchRows;
    IBQ_UNROLL
    for (int slot = 0; slot < 4; ++slot) {
      max[slot] = negative_infinity();
      sum[slot] = 0.0f;
      index[slot] = 0;
      if constexpr (kEntropy) tempered_sum[slot] = tempered_moment[slot] = 0.0f;
      if constexpr (kTarget) {
        const int64_t row = row_of(slot);
        const int64_t wanted = row < p.N ? p.targets[row] : -1;
        target[slot] = wanted >= 0 && wanted < p.K ? static_cast<int32_t>(wanted) : -1;
        logits[slot] = 0.0f;
      }
    }
  }

  IBQ_DEVICE void prepare(int32_t tile) {
    const int32_t first_code = tile * kStreamCodes + thread_code;
    const int32_t last = static_cast<int32_t>(p.K) - 1;
    IBQ_UNROLL
    for (int i = 0; i < 2 * kStreamFragments; ++i) {
      const int32_t code = first_code + 8 * (i / 2) + i % 2;
      bias[i] = p.bias != nullptr ? p.bias[code < last ? code : last] : 0.0f;
    }
  }

  IBQ_DEVICE void skip(int, int, int) {}

  IBQ_DEVICE void fold(int, int32_t tile, int, float (&s0)[kBlockRegisters], float (&s1)[kBlockRegisters]) {
    fold_block(0, s0, tile * kStreamCodes + thread_code);
    fold_block(1, s1, tile * kStreamCodes + thread_code);
  }

  IBQ_DEVICE void fold_block(int m, float (&s)[kBlockRegisters], int32_t first_code) {
    const int32_t K = static_cast<int32_t>(p.K);
    IBQ_UNROLL
    for (int i = 0; i < kBlockRegisters; ++i) s[i] = s[i] * p.scale + bias[i / 4 * 2 + i % 2];
    if (first_code > K - kStreamCodes) {
      IBQ_UNROLL
      for (int i = 0; i < kBlockRegisters; ++i)
        if (first_code + 8 * (i / 4) + i % 2 >= K) s[i] = negative_infinity();
    }
    IBQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int slot = 2 * m + h;
      float tile_max = s[2 * h];
      IBQ_UNROLL
      for (int i = 1; i < 2 * kStreamFragments; ++i)
        tile_max = max_or_nan(tile_max, s[4 * (i / 2) + 2 * h + i % 2]);
      if (tile_max > max[slot]) {
        int32_t code = 0;
        IBQ_UNROLL
        for (int i = 2 * kStreamFragments - 1; i >= 0; --i)
          if (s[4 * (i / 2) + 2 * h + i % 2] == tile_max) code = first_code + 8 * (i / 2) + i % 2;
        index[slot] = code;
      }
      const float old_max = max[slot];
      const float new_max = max_or_nan(old_max, tile_max);
      max[slot] = new_max;
      if constexpr (kWithLse) {
        // exp2(s log2e - base log2e) by one multiply-add each: base log2e is rounded once, to half a unit in
        // the last place of the log-sum-exp itself.
        const float base = new_max == negative_infinity() ? 0.0f : new_max;
        const float shift = base * kLog2E;
        float sums[2] = {0.0f, 0.0f};
        IBQ_UNROLL
        for (int i = 0; i < 2 * kStreamFragments; ++i)
          sums[i % 2] += exp2_approximate(s[4 * (i / 2) + 2 * h + i % 2] * kLog2E - shift);
        sum[slot] = sum[slot] * exp2_approximate((old_max - base) * kLog2E) + (sums[0] + sums[1]);
        if constexpr (kEntropy) fold_tempered(slot, s, old_max, base);
      }
      if constexpr (kTarget) fold_target(slot, s, first_code);
    }
  }

  // As ibq::cuda::search::fold_tempered.
  IBQ_DEVICE void fold_tempered(int slot, const float (&s)[kBlockRegisters], float old_max, float base) {
    const float shift = (old_max - base) * p.inverse_tau;
    const float decay = exp2_approximate(shift * kLog2E);
    float total = 0.0f, moment = 0.0f;
    IBQ_UNROLL
    for (int i = 0; i < 2 * kStreamFragments; ++i) {
      const float y = (s[4 * (i / 2) + 2 * (slot % 2) + i % 2] - base) * p.inverse_tau;
      const float e = exp2_approximate(y * kLog2E);
      total += e;
      moment += e * larger(y, kLeastLogProb);
    }
    if (decay > 0.0f) moment += decay * (tempered_moment[slot] + shift * tempered_sum[slot]);
    tempered_moment[slot] = moment;
    tempered_sum[slot] = tempered_sum[slot] * decay + total;
  }

  IBQ_DEVICE void fold_target(int slot, const float (&s)[kBlockRegisters], int32_t first_code) {
    const int32_t offset = target[slot] - first_code;
    if (offset >= 0 && offset < kStreamCodes && offset % 8 < 2) {
      IBQ_UNROLL
      for (int i = 0; i < 2 * kStreamFragments; ++i)
        if (8 * (i / 2) + i % 2 == offset)
          p.target_logit[row_of(slot)] = s[4 * (i / 2) + 2 * (slot % 2) + i % 2];
    }
    if (p.split_logits == nullptr) return;
    IBQ_UNROLL
    for (int i = 0; i < 2 * kStreamFragments; ++i)
      if (first_code + 8 * (i / 2) + i % 2 < static_cast<int32_t>(p.K))
        logits[slot] += s[4 * (i / 2) + 2 * (slot % 2) + i % 2];
  }

  // Joins the four lanes that share a row and writes the split's result.
  IBQ_DEVICE void end(int, int split) {
    IBQ_UNROLL
    for (int slot = 0; slot < 4; ++slot) {
      RowStats row{max[slot], sum[slot], index[slot]};
      IBQ_UNROLL
      for (int lanes = 1; lanes <= 2; lanes *= 2) {
        const RowStats other{shuffle_xor(row.max, lanes), kWithLse ? shuffle_xor(row.sum, lanes) : 0.0f,
                             shuffle_xor(row.index, lanes)};
        row = merge(row, other);
      }
      float first = 0.0f, second = 0.0f;  // the lane's extra sums, about the row's maximum
      if constexpr (kEntropy) {
        const double shift =
            max[slot] == row.max ? 0.0 : (static_cast<double>(max[slot]) - row.max) * p.inverse_tau;
        TemperedSums all{0.0, 0.0};
        add_tempered(all, {tempered_sum[slot], tempered_moment[slot]}, shift);
        first = static_cast<float>(all.sum);
        second = static_cast<float>(all.moment);
      }
      if constexpr (kTarget) first = logits[slot];
      IBQ_UNROLL
      for (int lanes = 1; kExtra != Extra::none && lanes <= 2; lanes *= 2) {
        first += shuffle_xor(first, lanes);
        second += shuffle_xor(second, lanes);
      }
      const int64_t row_index = row_of(slot);
      if ((fresh_thread() & 3) != 0 || row_index >= p.N) continue;
      const int64_t place = split * p.N + row_index;
      p.split_max[place] = row.max;
      p.split_index[place] = row.index;
      if constexpr (kWithLse) p.split_sum[place] = row.sum;
      if constexpr (kEntropy) {
        p.split_tempered_sum[place] = first;
        p.split_tempered_moment[place] = second;
      }
      if (kTarget && p.split_logits != nullptr) p.split_logits[place] = first;
    }
  }
};

}  // namespace search

// Grid: stream_blocks(schedule, multiprocessors) blocks of kStreamThreads, plan.shared_bytes of dynamic
// shared memory.
template <bool kBf16, bool kWithLse, Extra kExtra = Extra::none, typename Shape = WideRows>
IBQ_KERNEL(kStreamThreads, 1)
hopper_search_kernel(const IBQ_GRID_CONSTANT SearchParameters p) {
  const SharedAddress shared = shared_address(swizzled_shared());
  const Barriers barriers = begin_stream(p.plan, shared);
  const search::Task task{p};
  if (threadIdx.x < 128) {
    give_up_registers<24>();
    if (threadIdx.x == 0) produce<Shape>(task, p.plan, shared, barriers);
  } else {
    take_registers<240>();
    const int first_row = consumer_warpgroup() * kBoxRows;
    search::Epilogue<kWithLse, kExtra> epilogue(p, first_row);
    consume<kBf16, Shape>(task, epilogue, p.plan, shared, barriers, first_row, first_row + 64);
  }
}

// The workspace holds, split by split, max [N], index [N] and, with lse, sum [N], 4 bytes each.
IBQ_HD int64_t search_workspace_bytes(int64_t N, const TileSchedule& schedule, bool with_lse) {
  return schedule.splits * N * (with_lse ? 12 : 8);
}

}  // namespace ibq::cuda::hopper
