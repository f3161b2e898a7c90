// What happens once a code, or once an output, between the sweeps. Bound by memory, small beside the sweeps.
//
// STATUS: UNRUN ON A GPU; executed on the CPU by the emulator in kernels/tests.
#pragma once

#include "element_access.cuh"
#include "sweep_arguments.h"

namespace ibq::cuda {

// out += factor * (sum of the splits). Grid: any; a grid-stride loop.
IBQ_KERNEL(kRowThreads, 1)
add_parts_kernel(const AddPartsArguments args) {
  const int64_t stride = int64_t{gridDim.x} * kRowThreads;
  for (int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x; i < args.count; i += stride) {
    float sum = args.partial[i];
    for (int64_t split = 1; split < args.splits; ++split) sum += args.partial[split * args.count + i];
    args.out[i] += args.factor * sum;
  }
}

// out_j += factor * (sum over the row tiles of their column sums), in float64: every tile may add the same,
// and then every rounding would go the same way. Grid: ceil(columns / kRowThreads) blocks.
IBQ_KERNEL(kRowThreads, 1)
add_columns_kernel(const AddColumnsArguments args) {
  const int64_t column = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (column >= args.columns) return;
  double sum = 0.0;
  for (int64_t part = 0; part < args.count; ++part) sum += args.parts[part * args.stride + column];
  args.out[column] = static_cast<float>(args.out[column] + args.factor * sum);
}

// bias_j - norm_weight * |E_j|^2, the square summed in float64. Grid: one warp a code.
template <Element kElement>
IBQ_KERNEL(kRowThreads, 1)
norm_bias_kernel(const NormBiasArguments args) {
  const int64_t code = warp_row();
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (code >= args.K) return;
  double square = 0.0;
  for (int64_t d = lane; d < args.D; d += 32) {
    const double e = read_element<kElement>(args.codebook, code * args.D + d);
    square += e * e;
  }
  square = sum_over_warp(square);
  if (lane == 0)
    args.out[code] =
        static_cast<float>((args.bias == nullptr ? 0.0f : args.bias[code]) - args.norm_weight * square);
}

// Grid: one warp a code.
template <Element kElement>
IBQ_KERNEL(kRowThreads, 1)
norm_gradient_kernel(const NormGradientArguments args) {
  const int64_t code = warp_row();
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if (code >= args.K) return;
  const float factor = -2.0f * args.norm_weight * args.column_sums[code];
  for (int64_t d = lane; d < args.D; d += 32)
    args.grad_codebook[code * args.D + d] +=
        factor * read_element<kElement>(args.codebook, code * args.D + d);
}

// Values less their mean: a constant in c cancels in c_j - sum_k p_k c_k, so it would only add its rounding.
// Grid: one block. Dynamic shared memory: a double for each warp.
IBQ_KERNEL(kCenterThreads, 1)
center_kernel(const CenterArguments args) {
  double* warps = reinterpret_cast<double*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0.0;
  for (int64_t j = thread; j < args.K; j += kCenterThreads) sum += args.values[j];
  sum = sum_over_warp(sum);
  if ((thread & 31) == 0) warps[thread >> 5] = sum;
  block_barrier();
  sum = 0.0;
  for (int warp = 0; warp < kCenterThreads / 32; ++warp) sum += warps[warp];
  const double mean = sum / static_cast<double>(args.K);
  for (int64_t j = thread; j < args.K; j += kCenterThreads)
    args.out[j] = static_cast<float>(args.values[j] - mean);
}

}  // namespace ibq::cuda
