// CUDA implementations of search and histogram: tensors in, raw pointers to kernels/cuda on torch's current
// stream, tensors out. No arithmetic here, and no CUDA header: the kernels' C surface has none. Linked only
// where torch has CUDA. UNRUN ON A GPU.
#include "csrc/cuda_device.h"

namespace ibq {
namespace {

std::tuple<Tensor, Tensor, Tensor> codebook_search(Tensor z, Tensor codebook, std::optional<Tensor> bias,
                                                   double scale, bool with_lse, bool /*exact*/) {
  check_operands(z, codebook, bias);
  check_device(codebook, "codebook", z);
  if (bias) check_device(*bias, "bias", z);
  const ibq_dtype dtype = cuda_dtype_of(z, "z");
  const OnDeviceOf device(z);
  z = torch::stable::contiguous(z);
  codebook = torch::stable::contiguous(codebook);
  bias = contiguous(bias);
  const int64_t n = z.size(0), k = codebook.size(0), d = codebook.size(1);
  Tensor indices = new_of(z, {n}, ScalarType::Long);
  Tensor max = new_of(z, {n}, ScalarType::Float);
  Tensor lse = new_of(z, {with_lse ? n : 0}, ScalarType::Float);
  if (n == 0) return {indices, max, lse};
  int64_t workspace_bytes = 0;
  check_cuda(ibq_cuda_codebook_search_workspace(n, k, d, dtype, with_lse, &workspace_bytes),
             "planning codebook_search");
  // Freed on return while the kernels still run: torch's allocator reuses it on the same stream only.
  Tensor workspace = new_of(z, {workspace_bytes}, ScalarType::Byte);
  check_cuda(ibq_cuda_codebook_search(z.const_data_ptr(), codebook.const_data_ptr(),
                                      bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                                      static_cast<float>(scale), n, k, d, dtype,
                                      static_cast<int64_t*>(indices.mutable_data_ptr()),
                                      static_cast<float*>(max.mutable_data_ptr()),
                                      with_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr,
                                      workspace.mutable_data_ptr(), workspace_bytes, device.stream()),
             "codebook_search");
  return {indices, max, lse};
}

// Unlike on the CPU, indices outside [0, codebook_size) cannot be reported without waiting for the device;
// they are counted nowhere.
Tensor code_histogram(Tensor indices, int64_t codebook_size) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "indices: expected int64");
  STD_TORCH_CHECK(codebook_size >= 1, "codebook_size: expected at least 1, got ", codebook_size);
  const OnDeviceOf device(indices);
  const Tensor flat = torch::stable::contiguous(indices);
  Tensor counts = new_of(indices, {codebook_size}, ScalarType::Long);
  check_cuda(
      ibq_cuda_code_histogram(static_cast<const int64_t*>(flat.const_data_ptr()), flat.numel(), codebook_size,
                              static_cast<int64_t*>(counts.mutable_data_ptr()), device.stream()),
      "code_histogram");
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ibq_fast, CUDA, m) {
  m.impl("codebook_search", TORCH_BOX(&codebook_search));
  m.impl("code_histogram", TORCH_BOX(&code_histogram));
}

}  // namespace ibq
