// The CUDA runtime's side of the launch sequences: a Queue (launch_list.h) on a stream, and one function for
// each family of kernels, compiled apart from the others.
#pragma once

#include <cuda_runtime.h>

#include "launch_list.h"

namespace ibq::cuda {

// The current device, as plans see it.
cudaError_t current_limits(DeviceLimits* limits);

struct Launch {
  Kernel kernel;
  Element element;
  unsigned blocks;
  size_t shared_bytes;
  cudaStream_t stream;
};

// Sweeps by the type of their operands: the largest kernels, a source file each.
cudaError_t launch_sweep_f32(const Launch& launch, const SweepArguments& args);
cudaError_t launch_sweep_bf16(const Launch& launch, const SweepArguments& args);
cudaError_t launch_sweep_f16(const Launch& launch, const SweepArguments& args);

cudaError_t launch_kernel(const Launch& launch, const SearchArguments& args);
cudaError_t launch_kernel(const Launch& launch, const SweepArguments& args);
cudaError_t launch_kernel(const Launch& launch, const ProductArguments& args);
cudaError_t launch_kernel(const Launch& launch, const RowConstantsArguments& args);
cudaError_t launch_kernel(const Launch& launch, const WinnersArguments& args);
cudaError_t launch_kernel(const Launch& launch, const ScatterArguments& args);
cudaError_t launch_kernel(const Launch& launch, const NormBiasArguments& args);
cudaError_t launch_kernel(const Launch& launch, const NormGradientArguments& args);
cudaError_t launch_kernel(const Launch& launch, const StatisticsArguments& args);
cudaError_t launch_kernel(const Launch& launch, const AddRowsArguments& args);
cudaError_t launch_kernel(const Launch& launch, const AddPartsArguments& args);
cudaError_t launch_kernel(const Launch& launch, const AddColumnsArguments& args);
cudaError_t launch_kernel(const Launch& launch, const CenterArguments& args);

// Launches one instance; more than 48 KB of shared memory has to be asked for.
template <typename Arguments>
cudaError_t launch_instance(void (*kernel)(Arguments), const Launch& launch, const Arguments& args) {
  if (launch.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(launch.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<launch.blocks, static_cast<unsigned>(kernel_name(launch.kernel).threads), launch.shared_bytes,
           launch.stream>>>(args);
  return cudaGetLastError();
}

// Launches in order; after a failure, or a plan that does not fit the device, nothing more.
class StreamQueue {
 public:
  explicit StreamQueue(cudaStream_t stream) : stream_(stream) {}

  cudaError_t status() const { return status_; }
  void refuse() {
    if (status_ == cudaSuccess) status_ = cudaErrorInvalidConfiguration;
  }
  void fill(void* at, int byte, int64_t bytes) {
    if (status_ == cudaSuccess) status_ = cudaMemsetAsync(at, byte, static_cast<size_t>(bytes), stream_);
  }
  template <typename Arguments>
  void launch(Kernel kernel, Element element, int64_t blocks, int64_t shared_bytes, const Arguments& args) {
    if (blocks > INT32_MAX) refuse();
    if (status_ != cudaSuccess) return;
    status_ = launch_kernel(
        Launch{kernel, element, static_cast<unsigned>(blocks), static_cast<size_t>(shared_bytes), stream_},
        args);
  }

 private:
  cudaStream_t stream_;
  cudaError_t status_ = cudaSuccess;
};

}  // namespace ibq::cuda
