// How the kernels that keep rows in shared memory and stream codes past them are cut: tiles, pipeline depth,
// shared memory, work items. Plain arithmetic.
#pragma once

#include "../../common/tile_schedule.h"

namespace ibq::cuda::hopper {

constexpr int kStreamThreads = 384;     // a producer and two consumer warpgroups
constexpr int kBoxRows = 128;           // rows that one copy brings
constexpr int kStreamCodes = kBoxRows;  // codes in a tile
constexpr int kPanelColumns = 64;
constexpr int kBoxBytes = kBoxRows * 128;
constexpr int kMaxStages = 8;
constexpr int64_t kMaxColumns = 256;

// What meets in a step: boxes of 128 rows and tiles of 128 codes. Up to kMaxColumns columns the rows stay in
// shared memory and the codes pass by; wider rows are streamed, panel by panel beside the codes.
struct WideRows {  // 256 rows of one matrix, or 128 of two
  static constexpr int kRowBoxes = 2, kTiles = 1;
  static constexpr bool kStreamed = false;
};
struct WideCodes {  // 128 rows and two tiles
  static constexpr int kRowBoxes = 1, kTiles = 2;
  static constexpr bool kStreamed = false;
};
struct StreamedRows : WideRows {
  static constexpr bool kStreamed = true;
};
struct StreamedCodes : WideCodes {
  static constexpr bool kStreamed = true;
};

// Boxes of 128 rows by 64 columns that a stage of the ring holds.
template <typename Shape>
IBQ_HD constexpr int stage_boxes() {
  return Shape::kTiles + (Shape::kStreamed ? Shape::kRowBoxes : 0);
}

struct StreamPlan {
  int panels;  // of 64 columns
  int stages;  // panels of a step in flight; 0: does not fit
  int64_t barriers_at;
  int64_t extra_at;  // what the epilogue asked for
  int64_t shared_bytes;
};

// Resident rows, then the ring, then two barriers a stage and two for the rows, then extra_bytes.
template <typename Shape>
IBQ_HD StreamPlan plan_stream(int64_t D, int64_t extra_bytes, int64_t shared_limit) {
  StreamPlan plan{};
  plan.panels = static_cast<int>(ceil_div(D, int64_t{kPanelColumns}));
  const int64_t row_bytes = Shape::kStreamed ? 0 : int64_t{plan.panels} * Shape::kRowBoxes * kBoxBytes;
  const int64_t stage_bytes = int64_t{stage_boxes<Shape>()} * kBoxBytes;
  const int64_t barrier_bytes = (2 * kMaxStages + 2) * 8;
  const int64_t room = shared_limit - row_bytes - barrier_bytes - extra_bytes;
  int64_t stages = room > 0 ? room / stage_bytes : 0;
  if (stages > kMaxStages) stages = kMaxStages;
  // Taking turns, one warpgroup goes through all panels of a step before the other begins: fewer stages would
  // deadlock. Streaming, a step has to have more panels than half the ring (stream.cuh).
  const bool fits =
      Shape::kStreamed ? stages >= 3 && 2 * plan.panels > stages : stages >= 2 && stages >= plan.panels;
  plan.stages = fits ? static_cast<int>(stages) : 0;
  plan.barriers_at = row_bytes + plan.stages * stage_bytes;
  plan.extra_at = plan.barriers_at + barrier_bytes;
  plan.shared_bytes = plan.extra_at + extra_bytes;
  return plan;
}

// Blocks that take the items of a schedule in turn.
IBQ_HD int64_t stream_blocks(const TileSchedule& schedule, int multiprocessors) {
  return schedule.blocks() < multiprocessors ? schedule.blocks() : multiprocessors;
}

// What the copy engine and the tiles ask of a matrix of 16-bit elements; null if it can be taken.
inline const char* stream_refusal(int64_t N, int64_t K, int64_t D, bool is_16_bit, uint64_t address_bits,
                                  bool streamed = false) {
  if (!is_16_bit) return "float32 operands";
  if (D % kPanelColumns != 0) return "D is no multiple of 64";
  if (!streamed && D > kMaxColumns) return "D is not 64, 128, 192 or 256";
  if (address_bits % 16 != 0) return "rows are not 16-byte aligned";
  if (N > (int64_t{1} << 31) - 2 * kBoxRows || K > (int64_t{1} << 31) - 2 * kStreamCodes)
    return "more rows than the copy engine addresses";
  return nullptr;
}

}  // namespace ibq::cuda::hopper
