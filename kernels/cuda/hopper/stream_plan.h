// How the kernels that keep rows in shared memory and stream codes past them are cut: tiles, pipeline depth,
// shared memory, work items. Plain arithmetic.
#pragma once

#include "../../common/tile_schedule.h"

namespace ibq::cuda::hopper {

constexpr int kStreamThreads = 384;     // a producer and two consumer warpgroups
constexpr int kResidentRows = 256;      // in shared memory: 4 blocks of 64, two for each consumer
constexpr int kBoxRows = 128;           // rows that one copy brings
constexpr int kStreamCodes = kBoxRows;  // codes in a streamed tile
constexpr int kPanelColumns = 64;
constexpr int kRowPanelBytes = kResidentRows * 128;
constexpr int kCodePanelBytes = kStreamCodes * 128;
constexpr int kMaxStages = 8;
constexpr int64_t kMaxColumns = 256;

struct StreamPlan {
  TileSchedule schedule;
  int panels;  // of 64 columns
  int stages;  // code panels in flight; 0: does not fit
  int64_t barriers_at;
  int64_t shared_bytes;
  int64_t blocks;  // launched; each takes every blocks-th work item
};

// Resident rows, then the ring, then two barriers a stage and two for the rows. tile_rows: rows of the output
// in a work item, 256, or 128 where two operands of 128 rows are resident.
IBQ_HD StreamPlan plan_stream(int64_t N, int64_t K, int64_t D, int tile_rows, int multiprocessors,
                              int64_t shared_limit) {
  StreamPlan plan{};
  plan.panels = static_cast<int>(ceil_div(D, int64_t{kPanelColumns}));
  const int64_t row_bytes = int64_t{plan.panels} * kRowPanelBytes;
  const int64_t barrier_bytes = (2 * kMaxStages + 2) * 8;
  const int64_t room = shared_limit - row_bytes - barrier_bytes;
  int64_t stages = room > 0 ? room / kCodePanelBytes : 0;
  if (stages > kMaxStages) stages = kMaxStages;
  // One warpgroup goes through all panels of a tile before the other begins: fewer stages would deadlock.
  plan.stages = stages >= 2 && stages >= plan.panels ? static_cast<int>(stages) : 0;
  plan.barriers_at = row_bytes + plan.stages * int64_t{kCodePanelBytes};
  plan.shared_bytes = plan.barriers_at + barrier_bytes;
  plan.schedule = make_tile_schedule(N, K, tile_rows, kStreamCodes, multiprocessors);
  const int64_t items = plan.schedule.blocks();
  plan.blocks = items < multiprocessors ? items : multiprocessors;
  return plan;
}

// What the copy engine and the tiles ask of a matrix of 16-bit elements; null if it can be taken.
inline const char* stream_refusal(int64_t N, int64_t K, int64_t D, bool is_16_bit, uint64_t address_bits) {
  if (!is_16_bit) return "float32 operands";
  if (D % kPanelColumns != 0 || D > kMaxColumns) return "D is not 64, 128, 192 or 256";
  if (address_bits % 16 != 0) return "rows are not 16-byte aligned";
  if (N > (int64_t{1} << 31) - kResidentRows || K > (int64_t{1} << 31) - kStreamCodes)
    return "more rows than the copy engine addresses";
  return nullptr;
}

}  // namespace ibq::cuda::hopper
