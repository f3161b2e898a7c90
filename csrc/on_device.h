// Where the CUDA glue runs: the namespace and dispatch key of its ops, and the device of a tensor made
// current.
#pragma once

#include <torch/csrc/stable/tensor.h>

#ifdef IBQ_FAST_THROUGH_CUPY

#include "csrc/cupy_queue.h"

// Any device, so that tests see launches without a GPU; the launcher refuses what is not CUDA.
#define IBQ_OPS_NAMESPACE ibq_fast_cupy
#define IBQ_OPS_KEY CompositeExplicitAutograd

namespace ibq {

// Makes the tensor's device the one that launches of this thread go to, while it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : before_(cupy::current_device) {
    cupy::current_device = t.is_cuda() ? t.get_device_index() : -1;
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  ~OnDeviceOf() { cupy::current_device = before_; }
  void* stream() const { return nullptr; }

 private:
  int32_t before_;
};

}  // namespace ibq

#else

#include <torch/csrc/stable/accelerator.h>

#define IBQ_OPS_NAMESPACE ibq_fast
#define IBQ_OPS_KEY CUDA

// torch's C shim declares it only under USE_CUDA; CUDA builds of every supported torch export it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace ibq {

// Makes the tensor's device current while it lives, and knows that device's current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    // (the macro that checks this is of torch 2.12)
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_) == AOTI_TORCH_SUCCESS,
                    "cuda:", t.get_device_index(), ": torch has no current stream for it");
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace ibq

#endif
