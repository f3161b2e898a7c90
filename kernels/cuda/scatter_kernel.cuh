// scatter_rows: out[keys_i] += first_i + second_i + scale * gradients_i * rows_i, in the order of i.
//
// STATUS: UNRUN ON A GPU; executed on the CPU by the emulator in kernels/tests.
//
// Contract    keys [N] int64, those outside [0, K) left out; first, second, rows [N, D] of one element type,
// any
//             of them null; gradients [N] with rows; out [K, D] float32; column_sums [K] += gradients, or
//             null. Deterministic: a code belongs to one block, which adds its rows in order; nothing is
//             atomic.
// Cost        the named rows once, out read and written where it is hit, and 8 N bytes of keys for every
// block
//             (from L2: 16,384 keys and 528 blocks are 69 MB, some 20 us, beside a backward of milliseconds).
// Choice      Reading all keys in every block costs less than a sort of them, and needs no workspace. Codes
// are
//             dealt out round robin, so that the few codes of a collapsed codebook fall to different blocks.
//             A block first lists its rows in order, then its threads walk the list, one column each, and
//             keep a run of equal codes in a register.
#pragma once

#include "element_access.cuh"
#include "sweep_arguments.h"

namespace ibq::cuda {

namespace scatter {

// Adds the listed rows to the columns this thread owns; column D stands for the column sums.
template <Element kElement>
IBQ_DEVICE void spend(const ScatterArguments& args, const int64_t* rows, const int32_t* codes, int count) {
  if (count == 0) return;
  for (int64_t d = threadIdx.x; d < args.D + (args.column_sums != nullptr ? 1 : 0); d += kScatterThreads) {
    const auto add = [&](int32_t code, float sum) {
      if (d < args.D) {
        args.out[code * args.D + d] += sum;
      } else {
        args.column_sums[code] += sum;
      }
    };
    int32_t current = codes[0];
    float sum = 0.0f;
    constexpr int kBatch = 4;  // values are loaded before the first of them is needed
    for (int first = 0; first < count; first += kBatch) {
      float value[kBatch];
      IBQ_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        value[i] = 0.0f;
        if (first + i >= count) continue;
        const int64_t row = rows[first + i], at = row * args.D + d;
        if (d == args.D) {
          value[i] = args.gradients[row];
          continue;
        }
        if (args.first != nullptr) value[i] += read_element<kElement>(args.first, at);
        if (args.second != nullptr) value[i] += read_element<kElement>(args.second, at);
        if (args.rows != nullptr)
          value[i] += args.scale * args.gradients[row] * read_element<kElement>(args.rows, at);
      }
      IBQ_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= count) break;
        const int32_t code = codes[first + i];
        if (code != current) {
          add(current, sum);
          current = code;
          sum = 0.0f;
        }
        sum += value[i];
      }
    }
    add(current, sum);
  }
}

}  // namespace scatter

// Grid: any number of blocks up to K. Dynamic shared memory: kScatterSharedBytes.
template <Element kElement>
IBQ_KERNEL(kScatterThreads, 1)
scatter_kernel(const ScatterArguments args) {
  constexpr int kWarps = kScatterThreads / 32;
  int64_t* rows = reinterpret_cast<int64_t*>(dynamic_shared());
  int32_t* codes = reinterpret_cast<int32_t*>(rows + kScatterList);
  int32_t* counts = codes + kScatterList;  // [2][warps]: of this round, and of the one before
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31, warp = thread >> 5;
  int listed = 0, round = 0;
  for (int64_t first = 0; first < args.N; first += kScatterThreads, round ^= 1) {
    const int64_t row = first + thread;
    const int64_t key = row < args.N ? args.keys[row] : -1;
    const bool mine = key >= 0 && key < args.K && static_cast<uint32_t>(key) % gridDim.x == blockIdx.x;
    const uint32_t lanes = lanes_where(mine);
    if (lane == 0) counts[round * kWarps + warp] = count_lanes(lanes);
    block_barrier();
    int place = listed;
    for (int other = 0; other < kWarps; ++other) {
      const int count = counts[round * kWarps + other];
      if (other < warp) place += count;
      listed += count;
    }
    if (mine) {
      place += count_lanes(lanes & ((1u << lane) - 1u));
      rows[place] = row;
      codes[place] = static_cast<int32_t>(key);
    }
    if (listed > kScatterList - kScatterThreads || first + kScatterThreads >= args.N) {
      block_barrier();
      scatter::spend<kElement>(args, rows, codes, listed);
      block_barrier();
      listed = 0;
    }
  }
}

}  // namespace ibq::cuda
