// The multiplying part of every kernel that forms logits (search_kernel.cuh says why it looks so): tiles of
// rows and of codes come into swizzled shared memory by cp.async and are multiplied by mma.sync. A warp holds
// 64 rows by 8 * kFragments codes; kWarpColumns warps stand side by side.
#pragma once

#include "intrinsics.cuh"
#include "search_plan.h"

namespace ibq::cuda {

namespace search {

constexpr int kWarpRowFragments = 4;  // × 16 rows

// The codes of a step: two warps side by side, each kFragments × 8 codes.
template <Element kElement>
struct CodeTile {
  static constexpr int kCodes = search_tile_codes(kElement == Element::f32 ? 4 : 2);
  static constexpr int kBytes = kCodes * kChunkBytes;
  static constexpr int kWarpCodes = kCodes / 2;
  static constexpr int kFragments = kWarpCodes / 8;
  using Accumulator = float[kWarpRowFragments][kFragments][4];
};

// Where 16-byte piece `piece` (0 to 7) of row `row` of a tile lies.
IBQ_DEVICE SharedAddress tile_address(SharedAddress tile, int row, int piece) {
  return tile + static_cast<SharedAddress>(row * kChunkBytes + ((piece ^ (row & 7)) << 4));
}

// 16 bytes through registers, for rows that cp.async cannot address: 16-bit elements at odd places.
IBQ_DEVICE void copy_piece_by_element(SharedAddress dst, const unsigned char* src, int bytes) {
  const uint16_t* element = reinterpret_cast<const uint16_t*>(src);
  uint32_t word[4];
  IBQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 4 * i < bytes ? element[2 * i] : 0u;
    const uint32_t high = 4 * i + 2 < bytes ? element[2 * i + 1] : 0u;
    word[i] = low | (high << 16);
  }
  store_shared_16(dst, word[0], word[1], word[2], word[3]);
}

// Brings kTileRows rows × 128 bytes of a matrix, from row `first_row` and byte `first_byte` of each row, into
// a tile. What lies outside the matrix becomes zero, which adds nothing to a dot product.
template <int kTileRows, int kThreads = kSearchThreads>
IBQ_DEVICE void load_tile(SharedAddress tile, const unsigned char* matrix, int64_t rows, int64_t row_bytes,
                          int64_t first_row, int64_t first_byte, int access) {
  constexpr int kRowsPerPass = kThreads / 8;
  const int thread = static_cast<int>(threadIdx.x);
  const int piece = thread & 7;
  const int row = thread >> 3;
  const int64_t byte = first_byte + piece * 16;
  const int64_t left = row_bytes - byte;
  const int bytes = left >= 16 ? 16 : (left > 0 ? static_cast<int>(left) : 0);
  const unsigned char* src = matrix + (first_row + row) * row_bytes + byte;
  SharedAddress dst = tile_address(tile, row, piece);  // 8 rows further the swizzle is the same
  if (access == 16) {
    IBQ_UNROLL
    for (int pass = 0; pass < kTileRows / kRowsPerPass; ++pass) {
      const bool inside = bytes > 0 && first_row + row + pass * kRowsPerPass < rows;
      cp_async_16(dst, inside ? src : matrix, inside ? bytes : 0);
      src += kRowsPerPass * row_bytes;
      dst += kRowsPerPass * kChunkBytes;
    }
    return;
  }
  IBQ_UNROLL_BY(1)
  for (int pass = 0; pass < kTileRows / kRowsPerPass; ++pass) {
    const int valid = first_row + row + pass * kRowsPerPass < rows ? bytes : 0;
    if (access == 4) {
      IBQ_UNROLL
      for (int word = 0; word < 4; ++word) {
        const int word_bytes = valid > 4 * word ? 4 : 0;
        cp_async_4(dst + 4 * word, word_bytes ? src + 4 * word : matrix, word_bytes);
      }
    } else {
      copy_piece_by_element(dst, valid ? src : matrix, valid);
    }
    src += kRowsPerPass * row_bytes;
    dst += kRowsPerPass * kChunkBytes;
  }
}

// x becomes its leading tf32 part, low what is left of it.
IBQ_DEVICE void split_tf32(uint32_t (&x)[4], uint32_t (&low)[4]) {
  IBQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float whole = as_float(x[i]);
    x[i] = round_to_tf32(whole);
    low[i] = round_to_tf32(whole - as_float(x[i]));
  }
}

// c += a * b by tf32x3, small terms first, rounded once into c.
IBQ_DEVICE void mma_tf32x3(float (&c)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                           uint32_t b0_high, uint32_t b1_high, uint32_t b0_low, uint32_t b1_low) {
  float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  mma_tf32(product, a_low, b0_high, b1_high);
  mma_tf32(product, a_high, b0_low, b1_low);
  mma_tf32(product, a_high, b0_high, b1_high);
  IBQ_UNROLL
  for (int i = 0; i < 4; ++i) c[i] += product[i];
}

// accumulator += row tile * code tile^T over one chunk of 128 bytes, for this warp's part.
template <Element kElement, int kWarpColumns, int kFragments>
IBQ_DEVICE void multiply_chunk(float (&accumulator)[kWarpRowFragments][kFragments][4], SharedAddress z_tile,
                               SharedAddress code_tile) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  // ldmatrix row addresses. z: matrices are (rows 0-7, 8-15) × (first, second 16 bytes), rows fastest, as the
  // mma's A wants them; codes: two 8-code fragments × (first, second 16 bytes), bytes fastest.
  const int z_row = (warp / kWarpColumns) * 64 + (lane & 15);
  const int z_half = lane >> 4;
  const int code_row = (warp % kWarpColumns) * (8 * kFragments) + (lane & 7) + ((lane >> 4) << 3);
  const int code_half = (lane >> 3) & 1;
  IBQ_UNROLL_BY(kElement == Element::f32 ? 1 : kFragments < 8 ? 2 : kChunkBytes / 32)
  for (int step = 0; step < kChunkBytes / 32; ++step) {
    uint32_t a[kWarpRowFragments][4];
    IBQ_UNROLL
    for (int m = 0; m < kWarpRowFragments; ++m)
      ldmatrix_x4(a[m], tile_address(z_tile, z_row, step * 2 + z_half) + m * 16 * kChunkBytes);
    if constexpr (kElement == Element::f32) {
      uint32_t a_low[kWarpRowFragments][4];
      IBQ_UNROLL
      for (int m = 0; m < kWarpRowFragments; ++m) split_tf32(a[m], a_low[m]);
      IBQ_UNROLL
      for (int pair = 0; pair < kFragments / 2; ++pair) {
        uint32_t b[4], b_low[4];
        ldmatrix_x4(b, tile_address(code_tile, code_row, step * 2 + code_half) + pair * 16 * kChunkBytes);
        split_tf32(b, b_low);
        IBQ_UNROLL
        for (int m = 0; m < kWarpRowFragments; ++m) {
          mma_tf32x3(accumulator[m][2 * pair], a[m], a_low[m], b[0], b[1], b_low[0], b_low[1]);
          mma_tf32x3(accumulator[m][2 * pair + 1], a[m], a_low[m], b[2], b[3], b_low[2], b_low[3]);
        }
      }
    } else {
      IBQ_UNROLL
      for (int pair = 0; pair < kFragments / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, tile_address(code_tile, code_row, step * 2 + code_half) + pair * 16 * kChunkBytes);
        IBQ_UNROLL
        for (int m = 0; m < kWarpRowFragments; ++m) {
          if constexpr (kElement == Element::bf16) {
            mma_bf16(accumulator[m][2 * pair], a[m], b[0], b[1]);
            mma_bf16(accumulator[m][2 * pair + 1], a[m], b[2], b[3]);
          } else {
            mma_f16(accumulator[m][2 * pair], a[m], b[0], b[1]);
            mma_f16(accumulator[m][2 * pair + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  }
}

}  // namespace search

}  // namespace ibq::cuda
