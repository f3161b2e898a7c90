// Argument checks shared by every device's glue. The Python wrappers raise the friendly ValueErrors; these
// guard callers who reach the ops directly, so that a kernel never reads past an operand.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace ibq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_operands(const Tensor& z, const Tensor& codebook, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(z.dim() == 2, "z: expected [N, D], got ", z.dim(), " dimensions");
  STD_TORCH_CHECK(codebook.dim() == 2, "codebook: expected [K, D], got ", codebook.dim(), " dimensions");
  STD_TORCH_CHECK(codebook.size(0) >= 1 && codebook.size(1) >= 1,
                  "codebook: expected K >= 1 and D >= 1, got [", codebook.size(0), ", ", codebook.size(1),
                  "]");
  STD_TORCH_CHECK(z.size(1) == codebook.size(1), "z: expected dimension ", codebook.size(1),
                  " (the codebook's), got ", z.size(1));
  STD_TORCH_CHECK(z.scalar_type() == codebook.scalar_type(), "codebook: expected the dtype of z");
  STD_TORCH_CHECK(codebook.size(0) <= INT32_MAX, "codebook: expected at most 2^31 - 1 codes, got ",
                  codebook.size(0));
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == codebook.size(0), "bias: expected [K]");
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, "bias: expected float32");
  }
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                        ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, ": expected ", shape.size(),
                  " dimensions, got ", t.dim());
  int64_t axis = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(t.size(axis) == size, name, ": expected size ", size, " in dimension ", axis, ", got ",
                    t.size(axis));
    ++axis;
  }
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": wrong dtype");
}

inline Tensor new_of(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape), dtype);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

}  // namespace ibq
