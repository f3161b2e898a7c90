// What the glue to the CUDA kernels shares: dtypes, devices, streams, errors.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "csrc/arguments.h"
#include "kernels/cuda/ibq_cuda.h"

// torch's C shim declares it only under USE_CUDA; CUDA builds of every supported torch export it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace ibq {

inline ibq_dtype cuda_dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return IBQ_F32;
    case ScalarType::BFloat16:
      return IBQ_BF16;
    case ScalarType::Half:
      return IBQ_F16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline void check_cuda(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, "ibq_fast: ", what, " failed: ", ibq_cuda_error_string(error));
}

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  ": expected the CUDA device of the first argument");
}

// Makes the tensor's device current while it lives, and knows that device's current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace ibq
