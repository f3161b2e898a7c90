// How one search is run on one device: tile sizes, pipeline depth, shared memory, the cut over blocks, the
// layout of the workspace and the kernels' arguments. Plain C++ without any CUDA include, so that it is
// tested on the CPU and serves hosts that launch the kernels by other means.
#pragma once

#include "../common/tile_schedule.h"

namespace ibq::cuda {

enum class Element : int { f32 = 0, bf16 = 1, f16 = 2 };

IBQ_HD constexpr int bytes_of(Element element) { return element == Element::f32 ? 4 : 2; }

constexpr int kSearchTileRows = 128;  // rows of z in a block
constexpr int kSearchThreads = 128;   // 4 warps: 2 halves of the rows × 2 halves of the codes
constexpr int kChunkBytes = 128;      // depth of a step: 64 16-bit or 32 float32 elements of D
constexpr int kRowTileBytes = kSearchTileRows * kChunkBytes;

// Codes in a step. float32 keeps the two tf32 parts of its fragments in registers, so it has room for half.
IBQ_HD constexpr int search_tile_codes(int element_bytes) { return element_bytes == 4 ? 64 : 128; }

struct DeviceLimits {
  int multiprocessors;
  int64_t shared_per_multiprocessor;
  int64_t shared_per_block;  // what a kernel may opt in to
};

// What the runtime keeps of shared memory for itself in each block (compute capability 8.0 and later).
constexpr int64_t kReservedSharedBytes = 1024;

struct SearchPlan {
  TileSchedule schedule;
  int64_t chunks;   // steps over D
  int stages;       // steps in flight, 2 to 4; 0 says that no configuration fits
  bool z_resident;  // z's tile stays in shared memory for the whole split instead of being streamed
  int blocks_per_multiprocessor;
  int64_t shared_bytes;
};

IBQ_HD int64_t search_shared_bytes(int64_t chunks, int tile_codes, int stages, bool z_resident) {
  const int64_t code_bytes = int64_t{stages} * tile_codes * kChunkBytes;
  return code_bytes + (z_resident ? chunks : stages) * kRowTileBytes;
}

// In order of preference: two blocks on a multiprocessor (one computes exponentials while the other
// multiplies), then z resident (half the traffic from L2), then depth of the pipeline. Resident z with two
// stages comes after streamed z with three: a step is short and two stages hide little.
IBQ_HD SearchPlan plan_search(int64_t N, int64_t K, int64_t D, int element_bytes,
                              const DeviceLimits& device) {
  SearchPlan plan{};
  const int tile_codes = search_tile_codes(element_bytes);
  plan.chunks = ceil_div(D * element_bytes, int64_t{kChunkBytes});
  for (int blocks = 2; blocks >= 1 && plan.stages == 0; --blocks) {
    int64_t room = device.shared_per_multiprocessor / blocks - kReservedSharedBytes;
    if (room > device.shared_per_block) room = device.shared_per_block;
    struct {
      int stages;
      bool resident;
    } const choices[] = {{4, true}, {3, true}, {4, false}, {3, false}, {2, true}, {2, false}};
    for (const auto& choice : choices) {
      const int64_t bytes = search_shared_bytes(plan.chunks, tile_codes, choice.stages, choice.resident);
      if (bytes > room) continue;
      plan.stages = choice.stages;
      plan.z_resident = choice.resident;
      plan.blocks_per_multiprocessor = blocks;
      plan.shared_bytes = bytes;
      break;
    }
  }
  const int64_t slots = int64_t{device.multiprocessors} * (plan.stages ? plan.blocks_per_multiprocessor : 1);
  plan.schedule = make_tile_schedule(N, K, kSearchTileRows, tile_codes, slots);
  return plan;
}

// The workspace holds, split by split, max [N], index [N] and, with lse, sum [N], 4 bytes each.
IBQ_HD int64_t search_workspace_bytes(int64_t N, const SearchPlan& plan, bool with_lse) {
  return plan.schedule.splits * N * (with_lse ? 12 : 8);
}

// What a sweep keeps of each row beside index, maximum and the sum of exponentials.
enum class Extra : int {
  none = 0,
  entropy = 1,  // sums of e^y and of y e^y, y = (S - max) / tau
  target = 2,   // the logit of the row's target and, with split_logits, the sum of the logits
};

struct SearchArguments {
  const unsigned char* z;
  const unsigned char* codebook;
  const float* bias;  // null: none
  float scale;
  int64_t N, K, row_bytes;
  int access;  // 16, 4 or 2: the widest load, in bytes, that every row of z and codebook is aligned for
  SearchPlan plan;
  float* split_max;      // [splits, N]
  int32_t* split_index;  // [splits, N]
  float* split_sum;      // [splits, N], with lse
  // Extra::entropy
  float inverse_tau;
  float* split_tempered_sum;     // [splits, N]
  float* split_tempered_moment;  // [splits, N]
  // Extra::target
  const int64_t* targets;  // [N]
  float* target_logit;     // [N], written where the target is in [0, K)
  float* split_logits;     // [splits, N] or null
};

// The widest of 16, 4 and 2 bytes that divides every address and row length or-ed into `bits`.
IBQ_HD int widest_access(uint64_t bits) { return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2; }

}  // namespace ibq::cuda
