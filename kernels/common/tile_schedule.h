// How a search over N rows and K codes is cut into blocks: tiles of rows times splits of the codes.
//
// A block owns one tile of rows and a contiguous range of code tiles (a split); splits of one row tile are
// joined afterwards with ibq::merge. Blocks are numbered row tile first, so that blocks which run at the
// same time walk the same range of the codebook and share it in the L2 cache.
#pragma once

#include "host_device.h"

namespace ibq {

struct TileSchedule {
  int64_t row_tiles;
  int64_t code_tiles;
  int64_t splits;
  int64_t tiles_per_split;  // every split but the last holds exactly so many

  IBQ_HD int64_t blocks() const { return row_tiles * splits; }
  IBQ_HD int64_t row_tile(int64_t block) const { return block % row_tiles; }
  IBQ_HD int64_t split(int64_t block) const { return block / row_tiles; }
  IBQ_HD int64_t first_tile(int64_t block) const { return split(block) * tiles_per_split; }
  IBQ_HD int64_t end_tile(int64_t block) const {
    const int64_t end = first_tile(block) + tiles_per_split;
    return end < code_tiles ? end : code_tiles;
  }
};

// What a block costs beside its tiles (filling the pipeline, reading z, writing statistics), in code tiles.
constexpr int64_t kBlockOverheadTiles = 2;
// More splits than this many per wave of blocks never pay: the statistics would outgrow the gain.
constexpr int64_t kMaxWaves = 4;

// Picks the number of splits that minimises the time of the slowest slot, counted in code tiles:
// waves of blocks × (tiles in a split + overhead). slots = blocks the device runs at the same time. Of equal
// costs the fewest splits win. K >= 1; N = 0 gives a schedule without blocks.
IBQ_HD TileSchedule make_tile_schedule(int64_t N, int64_t K, int64_t tile_rows, int64_t tile_codes,
                                       int64_t slots) {
  TileSchedule best{ceil_div(N, tile_rows), ceil_div(K, tile_codes), 1, ceil_div(K, tile_codes)};
  if (best.row_tiles == 0) return best;
  int64_t limit = ceil_div(kMaxWaves * slots, best.row_tiles);
  if (limit > best.code_tiles) limit = best.code_tiles;
  int64_t best_cost = ceil_div(best.row_tiles, slots) * (best.code_tiles + kBlockOverheadTiles);
  for (int64_t wanted = 2; wanted <= limit; ++wanted) {
    const int64_t tiles = ceil_div(best.code_tiles, wanted);
    const int64_t splits = ceil_div(best.code_tiles, tiles);  // no split is left empty
    const int64_t cost = ceil_div(best.row_tiles * splits, slots) * (tiles + kBlockOverheadTiles);
    if (cost < best_cost) {
      best_cost = cost;
      best.splits = splits;
      best.tiles_per_split = tiles;
    }
  }
  return best;
}

}  // namespace ibq
