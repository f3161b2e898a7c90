// The queue (launch.h) of a CUDA stream, for kernels that nvcc compiled into the same source file. That file
// says which kernel a tag means: auto kernel_of(Tag) { return kernel; }. UNRUN ON A GPU.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace ibq::cuda {

class CudaQueue {
 public:
  explicit CudaQueue(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  int limits(DeviceLimits* limits) const {
    int device = 0, per_multiprocessor = 0, per_block = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error =
          cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    limits->shared_per_multiprocessor = per_multiprocessor;
    limits->shared_per_block = per_block;
    return error;
  }

  int fill(void* at, int byte, int64_t bytes) const {
    return cudaMemsetAsync(at, byte, static_cast<size_t>(bytes), stream_);
  }

  template <typename Tag, typename... Arguments>
  int launch(Tag tag, const Grid& grid, const Arguments&... arguments) const {
    const typename Tag::Function kernel = kernel_of(tag);
    if (grid.blocks > INT32_MAX) return kInvalidConfiguration;
    // What every kernel may have without asking.
    if (grid.shared_bytes > 48 * 1024) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(grid.shared_bytes));
      if (error != cudaSuccess) return error;
    }
    kernel<<<static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.threads),
             static_cast<size_t>(grid.shared_bytes), stream_>>>(arguments...);
    return cudaGetLastError();
  }

 private:
  cudaStream_t stream_;
};

}  // namespace ibq::cuda
