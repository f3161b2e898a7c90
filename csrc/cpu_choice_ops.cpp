// choose_tokens on the CPU: tensors in, raw pointers to kernels/cpu, tokens out.
#include "csrc/arguments.h"
#include "csrc/cpu_kernels.h"
#include "kernels/cpu/choice_api.h"

namespace ibq {
namespace {

// `filtered` helps backends that cannot look at the rows; this one does.
Tensor choose_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor image,
                     Tensor position, bool) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1, "logits: expected [B, V] with V >= 1");
  STD_TORCH_CHECK(logits.size(1) <= INT32_MAX, "logits: expected at most 2^31 - 1 codes, got ",
                  logits.size(1));
  const int64_t rows = logits.size(0);
  check_shape(logits, "logits", {rows, logits.size(1)}, ScalarType::Float);
  check_shape(temperature, "temperature", {rows}, ScalarType::Float);
  check_shape(top_p, "top_p", {rows}, ScalarType::Float);
  check_shape(top_k, "top_k", {rows}, ScalarType::Long);
  check_shape(seed, "seed", {rows}, ScalarType::Long);
  check_shape(image, "image", {rows}, ScalarType::Long);
  check_shape(position, "position", {rows}, ScalarType::Long);
  for (Tensor* t : {&logits, &temperature, &top_k, &top_p, &seed, &image, &position})
    *t = torch::stable::contiguous(*t);
  Tensor tokens = new_of(logits, {rows}, ScalarType::Long);
  cpu::Choice in;
  in.logits = static_cast<const float*>(logits.const_data_ptr());
  in.temperature = static_cast<const float*>(temperature.const_data_ptr());
  in.top_k = static_cast<const int64_t*>(top_k.const_data_ptr());
  in.top_p = static_cast<const float*>(top_p.const_data_ptr());
  in.seed = static_cast<const int64_t*>(seed.const_data_ptr());
  in.image = static_cast<const int64_t*>(image.const_data_ptr());
  in.position = static_cast<const int64_t*>(position.const_data_ptr());
  in.rows = rows;
  in.codes = logits.size(1);
  in.tokens = data<int64_t>(tokens);
  check_memory(kernels().choose_tokens(in, torch_parallel()));
  return tokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ibq_fast, CPU, m) { m.impl("choose_tokens", TORCH_BOX(&choose_tokens)); }

}  // namespace ibq
