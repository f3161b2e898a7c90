// Rules shared by all backends: how partial row statistics join, how a search is cut over blocks, what the
// random numbers are. Each is compared with the plain thing it stands for.
#include <algorithm>
#include <random>
#include <vector>

#include "../common/philox.h"
#include "../common/row_stats.h"
#include "../common/tile_schedule.h"
#include "../cuda/search_plan.h"
#include "check.h"

namespace {

using namespace ibq;

struct Truth {
  float max;
  double lse;
  int32_t index;
};

// One row, start to end, in double.
Truth plain_loop(const std::vector<float>& row) {
  Truth truth{negative_infinity(), 0.0, 0};
  for (float s : row)
    if (is_nan(s)) return {s, static_cast<double>(s), 0};
  for (size_t j = 0; j < row.size(); ++j) {
    if (row[j] > truth.max) {
      truth.max = row[j];
      truth.index = static_cast<int32_t>(j);
    }
  }
  if (std::isinf(truth.max)) return {truth.max, truth.max, truth.index};
  double sum = 0.0;
  for (float s : row) sum += std::exp(static_cast<double>(s) - truth.max);
  truth.lse = truth.max + std::log(sum);
  return truth;
}

void check_row(const RowStats& stats, const Truth& truth, const char* what) {
  CHECK(stats.index == truth.index, "%s: index %d, expected %d", what, stats.index, truth.index);
  CHECK(is_nan(stats.max) == is_nan(truth.max), "%s: max %g, expected %g", what, stats.max, truth.max);
  const float lse = log_sum_exp(stats);
  if (is_nan(truth.max)) {
    CHECK(is_nan(lse), "%s: lse %g, expected NaN", what, lse);
    return;
  }
  CHECK(stats.max == truth.max, "%s: max %g, expected %g", what, stats.max, truth.max);
  const bool close = std::isinf(truth.lse)
                         ? lse == static_cast<float>(truth.lse)
                         : std::fabs(lse - truth.lse) <= 4e-6 * (1.0 + std::fabs(truth.lse));
  CHECK(close, "%s: lse %.9g, expected %.9g", what, lse, truth.lse);
}

std::vector<std::vector<float>> rows_of_every_kind(std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 5.0f);
  std::uniform_int_distribution<int> few(-2, 2);
  std::vector<std::vector<float>> rows;
  for (size_t length : {1, 2, 3, 64, 257, 1000}) {
    std::vector<float> row(length);
    for (float& s : row) s = normal(random);
    rows.push_back(row);
    row[length / 2] = quiet_nan();
    rows.push_back(row);
    for (float& s : row) s = static_cast<float>(few(random));  // ties everywhere
    rows.push_back(row);
    row[length - 1] = negative_infinity();
    rows.push_back(row);
    std::fill(row.begin(), row.end(), negative_infinity());
    rows.push_back(row);
    row[length / 2] = positive_infinity();
    row[length - 1] = positive_infinity();
    rows.push_back(row);
    std::fill(row.begin(), row.end(), -3e38f);
    rows.push_back(row);
  }
  return rows;
}

void test_merge_equals_plain_loop() {
  std::mt19937 random(1);
  for (const auto& row : rows_of_every_kind(random)) {
    const Truth truth = plain_loop(row);
    RowStats in_order = empty_row_stats();
    std::vector<RowStats> parts;
    for (size_t j = 0; j < row.size(); ++j) {
      parts.push_back(single_row_stats(row[j], static_cast<int32_t>(j)));
      in_order = merge(in_order, parts.back());
    }
    check_row(in_order, truth, "in order");
    while (parts.size() > 1) {  // any tree over any permutation
      std::shuffle(parts.begin(), parts.end(), random);
      const RowStats last = parts.back();
      parts.pop_back();
      parts.back() = merge(parts.back(), last);
    }
    check_row(parts[0], truth, "random tree");
    check_row(merge(parts[0], empty_row_stats()), truth, "with nothing");
  }
}

// The schedule and the merge together, as the kernels use them: every tile of every split, then the splits.
void test_schedule_and_merge_equal_plain_loop() {
  std::mt19937 random(2);
  for (const auto& row : rows_of_every_kind(random)) {
    const auto K = static_cast<int64_t>(row.size());
    for (int64_t slots : {1, 7, 264}) {
      const TileSchedule schedule = make_tile_schedule(1, K, 16, 8, slots);
      RowStats joined = empty_row_stats();
      for (int64_t block = schedule.blocks() - 1; block >= 0; --block) {
        RowStats split = empty_row_stats();
        for (int64_t tile = schedule.first_tile(block); tile < schedule.end_tile(block); ++tile)
          for (int64_t j = tile * 8; j < std::min(K, tile * 8 + 8); ++j)
            split = merge(split, single_row_stats(row[static_cast<size_t>(j)], static_cast<int32_t>(j)));
        joined = merge(joined, split);
      }
      check_row(joined, plain_loop(row), "schedule");
    }
  }
}

void test_schedule_covers_each_tile_once() {
  for (int64_t N : {0, 1, 127, 128, 129, 1000, 16384}) {
    for (int64_t K : {1, 128, 129, 1000, 8192, 20000}) {
      for (int64_t slots : {1, 3, 108, 264}) {
        const TileSchedule schedule = make_tile_schedule(N, K, 128, 128, slots);
        std::vector<int> seen(static_cast<size_t>(schedule.row_tiles * schedule.code_tiles), 0);
        bool empty_split = false;
        for (int64_t block = 0; block < schedule.blocks(); ++block) {
          empty_split |= schedule.first_tile(block) >= schedule.end_tile(block);
          for (int64_t tile = schedule.first_tile(block); tile < schedule.end_tile(block); ++tile)
            ++seen[static_cast<size_t>(schedule.row_tile(block) * schedule.code_tiles + tile)];
        }
        const bool once = std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; });
        CHECK(once && !empty_split, "N %ld K %ld slots %ld", static_cast<long>(N), static_cast<long>(K),
              static_cast<long>(slots));
        CHECK(schedule.splits * N <= N + kMaxWaves * slots * 128, "statistics outgrow their bound");
      }
    }
  }
}

void test_schedule_fills_the_device() {
  // One row tile and 2,048 code tiles on 264 slots: 8 tiles a split, 256 blocks.
  const TileSchedule narrow = make_tile_schedule(128, 262144, 128, 128, 264);
  CHECK(narrow.splits == 256 && narrow.tiles_per_split == 8, "splits %ld", static_cast<long>(narrow.splits));
  // 128 row tiles: two splits fit one wave of 264.
  const TileSchedule wide = make_tile_schedule(16384, 262144, 128, 128, 264);
  CHECK(wide.splits == 2, "splits %ld", static_cast<long>(wide.splits));
  // One row tile more than slots would double the time without splits.
  const TileSchedule tail = make_tile_schedule(265 * 128, 262144, 128, 128, 264);
  CHECK(tail.splits > 1, "splits %ld", static_cast<long>(tail.splits));
}

void test_search_plan() {
  const cuda::DeviceLimits a100{108, 164 * 1024, 163 * 1024}, h100{132, 228 * 1024, 227 * 1024};
  const cuda::DeviceLimits ada{128, 100 * 1024, 99 * 1024};
  for (const auto& device : {a100, h100, ada}) {
    for (int64_t D : {1, 59, 64, 128, 256, 300, 1024, 100000}) {
      for (int element : {2, 4}) {
        const cuda::SearchPlan plan = cuda::plan_search(1024, 16384, D, element, device);
        CHECK(plan.stages >= 2 && plan.stages <= 4, "D %ld: %d stages", static_cast<long>(D), plan.stages);
        CHECK(plan.shared_bytes <= device.shared_per_block &&
                  plan.blocks_per_multiprocessor * (plan.shared_bytes + 1024) <=
                      device.shared_per_multiprocessor,
              "D %ld: %ld bytes of shared memory", static_cast<long>(D),
              static_cast<long>(plan.shared_bytes));
        CHECK(plan.chunks * cuda::kChunkBytes >= D * element, "D %ld not covered", static_cast<long>(D));
        // write_split reuses the tiles for two halves of RowStats.
        CHECK(plan.shared_bytes >= 2 * cuda::kSearchTileRows * static_cast<int64_t>(sizeof(RowStats)),
              "too small");
      }
    }
  }
  const cuda::SearchPlan hopper = cuda::plan_search(16384, 262144, 256, 2, h100);
  CHECK(hopper.z_resident && hopper.stages == 3 && hopper.blocks_per_multiprocessor == 2,
        "Hopper at D = 256");
  CHECK(cuda::plan_search(1, 1, 64, 2, {1, 16 * 1024, 16 * 1024}).stages == 0, "no configuration fits 16 KB");
}

void test_philox_known_answers() {
  // From the published implementation's known-answer file (Random123, philox4x32, 10 rounds).
  struct {
    Philox4 counter;
    uint32_t key[2];
    Philox4 expected;
  } const cases[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}},
       {0xffffffffu, 0xffffffffu},
       {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       {0xa4093822u, 0x299f31d0u},
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
  };
  for (const auto& c : cases) {
    const Philox4 got = philox_4x32_10(c.counter, c.key[0], c.key[1]);
    for (int i = 0; i < 4; ++i)
      CHECK(got.word[i] == c.expected.word[i], "word %d: %08x, expected %08x", i, got.word[i],
            c.expected.word[i]);
  }
}

void test_uniform_open() {
  CHECK(uniform_open(0) > 0.0f, "%g", uniform_open(0));
  CHECK(uniform_open(0xffffffffu) < 1.0f, "%.9g", uniform_open(0xffffffffu));
  constexpr int kBins = 64, kDraws = 64 * 2000;
  int counts[kBins] = {};
  for (uint64_t offset = 0; offset < kDraws / 4; ++offset) {
    const Philox4 draw = philox_draw(7, 3, offset);
    for (uint32_t word : draw.word) ++counts[static_cast<int>(uniform_open(word) * kBins)];
  }
  double chi_squared = 0.0;
  for (int count : counts) chi_squared += (count - 2000.0) * (count - 2000.0) / 2000.0;
  CHECK(chi_squared > 30.0 && chi_squared < 115.0, "chi-squared %g on 63 degrees of freedom", chi_squared);
}

}  // namespace

int main() {
  test_merge_equals_plain_loop();
  test_schedule_and_merge_equal_plain_loop();
  test_schedule_covers_each_tile_once();
  test_schedule_fills_the_device();
  test_search_plan();
  test_philox_known_answers();
  test_uniform_open();
  return ibq::test::finish("test_common");
}
