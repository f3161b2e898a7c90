// How the Hopper search is cut: tiles, pipeline depth, shared memory, work items. Plain arithmetic.
#pragma once

#include "../../common/tile_schedule.h"

namespace ibq::cuda::hopper {

constexpr int kSearchRows = 256;   // resident rows of z: 2 warpgroups × 2 × 64
constexpr int kSearchCodes = 128;  // codes in a streamed tile
constexpr int kSearchThreads = 384;
constexpr int kMaxSearchStages = 8;
constexpr int kPanelColumns = 64;
constexpr int kRowPanelBytes = kSearchRows * 128;
constexpr int kCodePanelBytes = kSearchCodes * 128;

struct SearchPlan {
  TileSchedule schedule;
  int panels;  // of 64 columns
  int stages;  // code panels in flight; 0: does not fit
  int64_t barriers_at;
  int64_t shared_bytes;
  int64_t blocks;  // launched; each takes every blocks-th work item
};

// Resident z, then the ring, then two barriers a stage and two for z.
IBQ_HD SearchPlan plan_search(int64_t N, int64_t K, int64_t D, int multiprocessors, int64_t shared_limit) {
  SearchPlan plan{};
  plan.panels = static_cast<int>(ceil_div(D, int64_t{kPanelColumns}));
  const int64_t z_bytes = int64_t{plan.panels} * kRowPanelBytes;
  const int64_t barrier_bytes = (2 * kMaxSearchStages + 2) * 8;
  const int64_t room = shared_limit - z_bytes - barrier_bytes;
  int64_t stages = room > 0 ? room / kCodePanelBytes : 0;
  if (stages > kMaxSearchStages) stages = kMaxSearchStages;
  // One warpgroup goes through all panels of a tile before the other begins: fewer stages would deadlock.
  plan.stages = stages >= 2 && stages >= plan.panels ? static_cast<int>(stages) : 0;
  plan.barriers_at = z_bytes + plan.stages * int64_t{kCodePanelBytes};
  plan.shared_bytes = plan.barriers_at + barrier_bytes;
  plan.schedule = make_tile_schedule(N, K, kSearchRows, kSearchCodes, multiprocessors);
  const int64_t items = plan.schedule.blocks();
  plan.blocks = items < multiprocessors ? items : multiprocessors;
  return plan;
}

IBQ_HD int64_t search_workspace_bytes(int64_t N, const SearchPlan& plan, bool with_lse) {
  return plan.schedule.splits * N * (with_lse ? 12 : 8);
}

}  // namespace ibq::cuda::hopper
