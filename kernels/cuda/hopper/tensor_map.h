// What a tensor map of this project says, in plain numbers: the launchers, the run-time-compiled backend and
// the emulator all make theirs from the same function. No CUDA include.
//
// A map describes a dense row-major matrix of 16-bit elements whose tiles of kMapColumns columns (128 bytes)
// the copy engine brings to shared memory row after row, 128 bytes a row, with the 16-byte pieces of a row
// XORed with its number modulo 8 (128B swizzle). What lies outside the matrix arrives as zeros.
#pragma once

#include "../../common/host_device.h"

namespace ibq::cuda::hopper {

constexpr int kMapColumns = 64;

// The 128 opaque bytes of a CUtensorMap. The copy engine wants them 64-byte aligned, in parameter space; CUDA
// 13 declares 128.
struct alignas(128) TensorMap {
  uint64_t word[16];
};

// Arguments of cuTensorMapEncodeTiled; the enumerations are CUDA's own numbers.
struct TensorMapRequest {
  int data_type;  // CUtensorMapDataType: 6 FLOAT16, 9 BFLOAT16
  const void* address;
  uint64_t dimensions[2];  // elements, fastest first
  uint64_t row_bytes;
  uint32_t box[2];  // elements, fastest first
  uint32_t element_strides[2];
  int interleave;     // CUtensorMapInterleave: 0 none
  int swizzle;        // CUtensorMapSwizzle: 3 is 128B
  int l2_promotion;   // CUtensorMapL2promotion: 3 is 256 bytes
  int out_of_bounds;  // CUtensorMapFloatOOBfill: 0 fills with zeros
};

IBQ_HD TensorMapRequest request_tensor_map(const void* matrix, int64_t rows, int64_t columns, bool is_bf16,
                                           int box_rows) {
  return {is_bf16 ? 9 : 6,
          matrix,
          {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
          static_cast<uint64_t>(columns) * 2,
          {kMapColumns, static_cast<uint32_t>(box_rows)},
          {1, 1},
          0,
          3,
          3,
          0};
}

}  // namespace ibq::cuda::hopper
