// What the glue to the CUDA kernels shares: dtypes, devices, streams, errors.
#pragma once

#include "csrc/arguments.h"
#include "csrc/on_device.h"
#include "kernels/cuda/ibq_cuda.h"

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
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  ": expected the device of the first argument");
}

}  // namespace ibq
