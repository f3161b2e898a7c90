// Elements of a matrix read one at a time as float32, and sums over a warp: for the kernels that are bound by
// memory.
#pragma once

#include "intrinsics.cuh"
#include "sweep_plan.h"

namespace ibq::cuda {

template <Element kElement>
IBQ_DEVICE float read_element(const unsigned char* matrix, int64_t at) {
  if constexpr (kElement == Element::f32) {
    return reinterpret_cast<const float*>(matrix)[at];
  } else if constexpr (kElement == Element::bf16) {
    return as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(matrix)[at]) << 16);
  } else {
    return f16_to_float(reinterpret_cast<const uint16_t*>(matrix)[at]);
  }
}

IBQ_DEVICE double sum_over_warp(double x) {
  IBQ_UNROLL
  for (int lanes = 16; lanes >= 1; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

// The row that this warp owns in a grid of one warp a row.
IBQ_DEVICE int64_t warp_row() { return (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) >> 5; }

}  // namespace ibq::cuda
