// How tiles lie in shared memory and how wgmma is told about them.
//
// A tile is R rows (a multiple of 8) of up to 256 columns of 16-bit elements, cut into panels of 64 columns.
// A panel is R rows of 128 bytes, 1024-byte aligned, as copy_box leaves it: 16-byte piece p of row r lies at
// 128 r + 16 (p ^ (r % 8)). The same panel serves two ways, without a copy:
//   along its columns ("K-major": the products sum over columns, as in z codebook^T): 16 columns are 32 bytes
//     of each row, groups of 8 rows are 1024 bytes apart;
//   along its rows ("MN-major": the products sum over rows, as in P codebook): 16 rows are 2048 bytes, groups
//     of 8 rows are 1024 bytes apart, the next 64 columns are a panel further.
// Descriptor fields by the PTX ISA, "Matrix Descriptor Format": bits 0-13 address / 16, 16-29 leading byte
// offset / 16, 32-45 stride byte offset / 16, 62-63 swizzle (1: 128B).
#pragma once

#include "ptx.cuh"

namespace ibq::cuda::hopper {

constexpr int kPanelRowBytes = 128;
constexpr int kDepth = 16;  // of one wgmma

IBQ_HD constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }

constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kEightRows = uint64_t{8 * kPanelRowBytes / 16} << 32;

// Summing over columns: rows first_row.. of a panel. The leading offset is not used by this layout.
IBQ_DEVICE uint64_t along_columns(SharedAddress panel, int first_row) {
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 |
         ((panel + static_cast<SharedAddress>(first_row * kPanelRowBytes)) >> 4);
}

// The same, `step` times 16 columns further (0 to 3 within a panel).
IBQ_DEVICE uint64_t columns_further(uint64_t operand, int step) {
  return operand + static_cast<uint64_t>(step * kDepth * 2 / 16);
}

// Summing over rows, all panels of a tile of kRows rows side by side.
template <int kRows>
IBQ_DEVICE uint64_t along_rows(SharedAddress tile) {
  return kSwizzle128 | kEightRows | uint64_t{panel_bytes(kRows) / 16} << 16 | (tile >> 4);
}

// The same, `step` times 16 rows further.
IBQ_DEVICE uint64_t rows_further(uint64_t operand, int step) {
  return operand + static_cast<uint64_t>(step * kDepth * kPanelRowBytes / 16);
}

}  // namespace ibq::cuda::hopper
