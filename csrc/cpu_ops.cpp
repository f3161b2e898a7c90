// CPU implementations: tensors in, raw pointers to kernels/cpu, tensors out. No arithmetic here.
#include <cstring>

#include "csrc/arguments.h"
#include "csrc/cpu_kernels.h"
#include "csrc/skip_tolerance.h"
#include "kernels/cpu/codebook.h"
#include "kernels/cpu/cross_entropy_api.h"
#include "kernels/cpu/kept_memory.h"

namespace ibq {
namespace {

cpu::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return cpu::DType::kFloat32;
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case ScalarType::Half:
      return cpu::DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

// Operands made contiguous, and the Problem that points at them.
struct Operands {
  Tensor z, codebook;
  std::optional<Tensor> bias;
  cpu::Problem problem;

  Operands(const Tensor& z_in, const Tensor& codebook_in, const std::optional<Tensor>& bias_in,
           double scale) {
    check_operands(z_in, codebook_in, bias_in);
    z = torch::stable::contiguous(z_in);
    codebook = torch::stable::contiguous(codebook_in);
    bias = contiguous(bias_in);
    problem.dtype = dtype_of(z, "z");
    problem.z = z.const_data_ptr();
    problem.codebook = codebook.const_data_ptr();
    problem.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    problem.n = z.size(0);
    problem.k = codebook.size(0);
    problem.d = codebook.size(1);
    problem.scale = static_cast<float>(scale);
    problem.dropped_mass = skip_tolerance.load();
  }
};

// Uninitialised tensor of kept memory, contiguous: for outputs as large as a codebook.
Tensor large_empty(std::initializer_list<int64_t> shape, ScalarType dtype, int64_t element_bytes) {
  int64_t bytes = element_bytes;
  for (int64_t size : shape) bytes *= size;
  void* memory = cpu::take_memory(bytes);
  STD_TORCH_CHECK(memory != nullptr, "ibq_fast: not enough memory for an output of ", bytes, " bytes");
  const int64_t strides[] = {*(shape.end() - 1), 1};  // of one or two dimensions
  return torch::stable::from_blob(memory, shape, {strides + 2 - shape.size(), shape.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [bytes](void* p) { cpu::return_memory(p, bytes); });
}

std::tuple<Tensor, Tensor, Tensor> codebook_search(Tensor z, Tensor codebook, std::optional<Tensor> bias,
                                                   double scale, bool with_lse, bool exact) {
  const Operands in(z, codebook, bias, scale);
  const int64_t n = in.problem.n;
  Tensor indices = new_of(z, {n}, ScalarType::Long);
  Tensor max = new_of(z, {n}, ScalarType::Float);
  Tensor lse = new_of(z, {with_lse ? n : 0}, ScalarType::Double);
  if (n > 0) {
    cpu::Forward out;
    out.indices = data<int64_t>(indices);
    out.max = data<float>(max);
    out.lse = with_lse ? data<double>(lse) : nullptr;
    out.rounded_first = exact;
    check_memory(kernels().forward(in.problem, out, torch_parallel()));
  }
  return {indices, max, torch::stable::to(lse, ScalarType::Float)};
}

// z_q and codes: the selected rows twice, as two tensors with gradients of their own.
void gather_twice(const Operands& in, const Tensor& indices, const Tensor& z_q, const Tensor& codes) {
  const int64_t row_bytes = in.problem.d * static_cast<int64_t>(in.z.element_size());
  cpu::gather_rows(in.problem.codebook, data<int64_t>(indices), in.problem.n, row_bytes,
                   z_q.mutable_data_ptr(), torch_parallel());
  std::memcpy(codes.mutable_data_ptr(), z_q.const_data_ptr(), static_cast<size_t>(in.problem.n * row_bytes));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> straight_through_select(Tensor z, Tensor codebook,
                                                                           std::optional<Tensor> bias,
                                                                           double scale) {
  const Operands in(z, codebook, bias, scale);
  const int64_t n = in.problem.n, d = in.problem.d;
  Tensor z_q = new_of(z, {n, d}, z.scalar_type());
  Tensor codes = new_of(z, {n, d}, z.scalar_type());
  Tensor indices = new_of(z, {n}, ScalarType::Long);
  Tensor lse = new_of(z, {n}, ScalarType::Double);
  Tensor readout = new_of(z, {n, d}, ScalarType::Float);
  if (n > 0) {
    cpu::Forward out;
    out.indices = data<int64_t>(indices);
    out.lse = data<double>(lse);
    out.readout = data<float>(readout);
    check_memory(kernels().forward(in.problem, out, torch_parallel()));
    gather_twice(in, indices, z_q, codes);
  }
  return {z_q, codes, indices, lse, readout};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Operands& in, cpu::Backward& args) {
  const int64_t n = in.problem.n, k = in.problem.k, d = in.problem.d;
  Tensor grad_z = new_of(in.z, {n, d}, in.z.scalar_type());
  Tensor grad_codebook = large_empty({k, d}, in.z.scalar_type(), in.z.element_size());
  Tensor grad_bias = new_of(in.z, {in.bias ? k : 0}, ScalarType::Float);
  if (n > 0) {
    args.grad_z = grad_z.mutable_data_ptr();
    args.grad_codebook = grad_codebook.mutable_data_ptr();
    args.grad_bias = in.bias ? data<float>(grad_bias) : nullptr;
    check_memory(kernels().backward(in.problem, args, torch_parallel()));
  } else {
    torch::stable::zero_(grad_codebook);
    torch::stable::zero_(grad_bias);
  }
  return {grad_z, grad_codebook, grad_bias};
}

// The hard path: grad_codebook[indices] += grad_z_q + grad_codes.
void scatter_add(const Operands& in, const Tensor& grad_z_q, const Tensor& grad_codes, const Tensor& indices,
                 const Tensor& grad_codebook) {
  const int64_t n = in.problem.n, k = in.problem.k;
  const auto* at = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < k, "indices: expected values in [0, ", k, "), got ", at[i]);
  cpu::scatter_add_rows(in.problem.dtype, grad_z_q.const_data_ptr(), grad_codes.const_data_ptr(), at, n, k,
                        in.problem.d, grad_codebook.mutable_data_ptr(), torch_parallel());
}

std::tuple<Tensor, Tensor, Tensor> straight_through_select_backward(Tensor grad_z_q, Tensor grad_codes,
                                                                    Tensor z, Tensor codebook,
                                                                    std::optional<Tensor> bias, double scale,
                                                                    Tensor indices, Tensor lse,
                                                                    Tensor readout) {
  const Operands in(z, codebook, bias, scale);
  const int64_t n = in.problem.n, d = in.problem.d;
  check_shape(grad_z_q, "grad_z_q", {n, d}, z.scalar_type());
  check_shape(grad_codes, "grad_codes", {n, d}, z.scalar_type());
  check_shape(indices, "indices", {n}, ScalarType::Long);
  check_shape(lse, "lse", {n}, ScalarType::Double);
  check_shape(readout, "readout", {n, d}, ScalarType::Float);
  grad_z_q = torch::stable::contiguous(grad_z_q);
  grad_codes = torch::stable::contiguous(grad_codes);
  indices = torch::stable::contiguous(indices);
  lse = torch::stable::contiguous(lse);
  readout = torch::stable::contiguous(readout);
  cpu::Backward args;
  args.grad_z_q = grad_z_q.const_data_ptr();
  args.lse = static_cast<const double*>(lse.const_data_ptr());
  args.readout = static_cast<const float*>(readout.const_data_ptr());
  auto [grad_z, grad_codebook, grad_bias] = gradients(in, args);
  scatter_add(in, grad_z_q, grad_codes, indices, grad_codebook);
  return {grad_z, grad_codebook, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> softmax_statistics(Tensor z, Tensor codebook, std::optional<Tensor> bias,
                                                      double scale, double temperature) {
  const Operands in(z, codebook, bias, scale);
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);
  const int64_t n = in.problem.n;
  Tensor row_entropy = new_of(z, {n}, ScalarType::Float);
  Tensor mean_prob = new_of(z, {in.problem.k}, ScalarType::Float);
  Tensor lse = new_of(z, {n}, ScalarType::Double);
  if (n > 0) {
    cpu::Forward out;
    out.temperature = static_cast<float>(temperature);
    out.row_entropy = data<float>(row_entropy);
    out.mean_prob = data<float>(mean_prob);
    out.lse_tau = data<double>(lse);
    check_memory(kernels().forward(in.problem, out, torch_parallel()));
  } else {
    torch::stable::zero_(mean_prob);
  }
  return {row_entropy, mean_prob, lse};
}

std::tuple<Tensor, Tensor, Tensor> softmax_statistics_backward(Tensor grad_row_entropy, Tensor grad_mean_prob,
                                                               Tensor z, Tensor codebook,
                                                               std::optional<Tensor> bias, double scale,
                                                               double temperature, Tensor lse,
                                                               Tensor row_entropy) {
  const Operands in(z, codebook, bias, scale);
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);
  const int64_t n = in.problem.n, k = in.problem.k;
  check_shape(grad_row_entropy, "grad_row_entropy", {n}, ScalarType::Float);
  check_shape(grad_mean_prob, "grad_mean_prob", {k}, ScalarType::Float);
  check_shape(lse, "lse", {n}, ScalarType::Double);
  check_shape(row_entropy, "row_entropy", {n}, ScalarType::Float);
  grad_row_entropy = torch::stable::contiguous(grad_row_entropy);
  grad_mean_prob = torch::stable::contiguous(grad_mean_prob);
  lse = torch::stable::contiguous(lse);
  row_entropy = torch::stable::contiguous(row_entropy);
  cpu::Backward args;
  args.temperature = static_cast<float>(temperature);
  args.lse_tau = static_cast<const double*>(lse.const_data_ptr());
  args.row_entropy = static_cast<const float*>(row_entropy.const_data_ptr());
  args.grad_row_entropy = static_cast<const float*>(grad_row_entropy.const_data_ptr());
  args.grad_mean_prob = static_cast<const float*>(grad_mean_prob.const_data_ptr());
  return gradients(in, args);
}

// Both groups in one sweep: the training step's forward.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> index_backprop(
    Tensor z, Tensor codebook, std::optional<Tensor> bias, double scale, double norm_weight,
    double temperature) {
  Operands in(z, codebook, bias, scale);
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);
  in.problem.norm_weight = static_cast<float>(norm_weight);
  const int64_t n = in.problem.n, k = in.problem.k, d = in.problem.d;
  int64_t tiles, blocks;
  kernels().tile_grid(n, k, &tiles, &blocks);
  Tensor z_q = new_of(z, {n, d}, z.scalar_type());
  Tensor codes = new_of(z, {n, d}, z.scalar_type());
  Tensor indices = new_of(z, {n}, ScalarType::Long);
  Tensor lse = new_of(z, {n}, ScalarType::Double);
  Tensor readout = new_of(z, {n, d}, ScalarType::Float);
  Tensor row_entropy = new_of(z, {n}, ScalarType::Float);
  Tensor mean_prob = new_of(z, {k}, ScalarType::Float);
  Tensor lse_tau = new_of(z, {n}, ScalarType::Double);
  Tensor tile_bound = new_of(z, {2, tiles, blocks}, ScalarType::Float);
  Tensor candidates = large_empty({kernels().candidate_bytes(n, k, d)}, ScalarType::Byte, 1);
  if (n > 0) {
    cpu::Forward out;
    out.indices = data<int64_t>(indices);
    out.lse = data<double>(lse);
    out.readout = data<float>(readout);
    out.temperature = static_cast<float>(temperature);
    out.row_entropy = data<float>(row_entropy);
    out.mean_prob = data<float>(mean_prob);
    out.lse_tau = data<double>(lse_tau);
    out.tile_bound = tiles > 0 ? data<float>(tile_bound) : nullptr;
    out.candidates = candidates.numel() > 0 ? candidates.mutable_data_ptr() : nullptr;
    out.candidate_bytes = candidates.numel();
    // without skipping no bounds are kept; zeros say that every tile may matter, should a backward ask
    if (in.problem.dropped_mass == 0) torch::stable::zero_(tile_bound);
    check_memory(kernels().forward(in.problem, out, torch_parallel()));
    gather_twice(in, indices, z_q, codes);
  } else {
    torch::stable::zero_(mean_prob);
  }
  return {z_q, codes, indices, lse, readout, row_entropy, mean_prob, lse_tau, tile_bound, candidates};
}

std::tuple<Tensor, Tensor, Tensor> index_backprop_backward(
    Tensor grad_z_q, Tensor grad_codes, Tensor grad_row_entropy, Tensor grad_mean_prob, Tensor z,
    Tensor codebook, std::optional<Tensor> bias, double scale, double norm_weight, double temperature,
    Tensor indices, Tensor lse, Tensor readout, Tensor row_entropy, Tensor lse_tau, Tensor tile_bound,
    Tensor candidates) {
  Operands in(z, codebook, bias, scale);
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);
  in.problem.norm_weight = static_cast<float>(norm_weight);
  const int64_t n = in.problem.n, k = in.problem.k, d = in.problem.d;
  int64_t tiles, blocks;
  kernels().tile_grid(n, k, &tiles, &blocks);
  check_shape(grad_z_q, "grad_z_q", {n, d}, z.scalar_type());
  check_shape(grad_codes, "grad_codes", {n, d}, z.scalar_type());
  check_shape(grad_row_entropy, "grad_row_entropy", {n}, ScalarType::Float);
  check_shape(grad_mean_prob, "grad_mean_prob", {k}, ScalarType::Float);
  check_shape(indices, "indices", {n}, ScalarType::Long);
  check_shape(lse, "lse", {n}, ScalarType::Double);
  check_shape(readout, "readout", {n, d}, ScalarType::Float);
  check_shape(row_entropy, "row_entropy", {n}, ScalarType::Float);
  check_shape(lse_tau, "lse_tau", {n}, ScalarType::Double);
  check_shape(tile_bound, "tile_bound", {2, tiles, blocks}, ScalarType::Float);
  check_shape(candidates, "candidates", {kernels().candidate_bytes(n, k, d)}, ScalarType::Byte);
  for (Tensor* t : {&grad_z_q, &grad_codes, &grad_row_entropy, &grad_mean_prob, &indices, &lse, &readout,
                    &row_entropy, &lse_tau, &tile_bound, &candidates})
    *t = torch::stable::contiguous(*t);
  cpu::Backward args;
  args.grad_z_q = grad_z_q.const_data_ptr();
  args.lse = static_cast<const double*>(lse.const_data_ptr());
  args.readout = static_cast<const float*>(readout.const_data_ptr());
  args.temperature = static_cast<float>(temperature);
  args.lse_tau = static_cast<const double*>(lse_tau.const_data_ptr());
  args.row_entropy = static_cast<const float*>(row_entropy.const_data_ptr());
  args.grad_row_entropy = static_cast<const float*>(grad_row_entropy.const_data_ptr());
  args.grad_mean_prob = static_cast<const float*>(grad_mean_prob.const_data_ptr());
  args.tile_bound = tiles > 0 ? static_cast<const float*>(tile_bound.const_data_ptr()) : nullptr;
  args.candidates = candidates.numel() > 0 ? candidates.const_data_ptr() : nullptr;
  args.candidate_bytes = candidates.numel();
  auto [grad_z, grad_codebook, grad_bias] = gradients(in, args);
  scatter_add(in, grad_z_q, grad_codes, indices, grad_codebook);
  return {grad_z, grad_codebook, grad_bias};
}

// The arguments both directions of the cross entropy share; `targets` keeps the tensor alive.
void set_targets(cpu::CrossEntropy& args, const Operands& in, Tensor& targets, int64_t ignore_index,
                 double label_smoothing) {
  check_shape(targets, "targets", {in.problem.n}, ScalarType::Long);
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
                  "label_smoothing: expected a number from 0 to 1, got ", label_smoothing);
  targets = torch::stable::contiguous(targets);
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.ignore_index = ignore_index;
  args.label_smoothing = static_cast<float>(label_smoothing);
  for (int64_t i = 0; i < in.problem.n; ++i) {
    const int64_t target = args.targets[i];
    STD_TORCH_CHECK(target == ignore_index || (target >= 0 && target < in.problem.k),
                    "targets: expected values in [0, ", in.problem.k, ") or ignore_index ", ignore_index,
                    ", got ", target, " at position ", i);
  }
}

std::tuple<Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor head, std::optional<Tensor> bias,
                                                Tensor targets, int64_t ignore_index,
                                                double label_smoothing) {
  const Operands in(hidden, head, bias, 1.0);
  cpu::CrossEntropyForward out;
  set_targets(out, in, targets, ignore_index, label_smoothing);
  Tensor loss = new_of(hidden, {in.problem.n}, ScalarType::Float);
  Tensor lse = new_of(hidden, {in.problem.n}, ScalarType::Double);
  out.loss = data<float>(loss);
  out.lse = data<double>(lse);
  check_memory(kernels().cross_entropy_forward(in.problem, out, torch_parallel()));
  return {loss, lse};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor head,
                                                                 std::optional<Tensor> bias, Tensor targets,
                                                                 int64_t ignore_index, double label_smoothing,
                                                                 Tensor lse) {
  const Operands in(hidden, head, bias, 1.0);
  const int64_t n = in.problem.n, k = in.problem.k, d = in.problem.d;
  cpu::CrossEntropyBackward args;
  set_targets(args, in, targets, ignore_index, label_smoothing);
  check_shape(grad_loss, "grad_loss", {n}, ScalarType::Float);
  check_shape(lse, "lse", {n}, ScalarType::Double);
  grad_loss = torch::stable::contiguous(grad_loss);
  lse = torch::stable::contiguous(lse);
  Tensor grad_hidden = new_of(hidden, {n, d}, hidden.scalar_type());
  Tensor grad_head = large_empty({k, d}, hidden.scalar_type(), hidden.element_size());
  Tensor grad_bias = new_of(hidden, {in.bias ? k : 0}, ScalarType::Float);
  args.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  args.lse = static_cast<const double*>(lse.const_data_ptr());
  args.grad_hidden = grad_hidden.mutable_data_ptr();
  args.grad_head = grad_head.mutable_data_ptr();
  args.grad_bias = in.bias ? data<float>(grad_bias) : nullptr;
  check_memory(kernels().cross_entropy_backward(in.problem, args, torch_parallel()));
  return {grad_hidden, grad_head, grad_bias};
}

Tensor code_histogram(Tensor indices, int64_t codebook_size) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, "indices: expected int64");
  STD_TORCH_CHECK(codebook_size >= 1, "codebook_size: expected at least 1, got ", codebook_size);
  Tensor counts = new_of(indices, {codebook_size}, ScalarType::Long);
  Tensor flat = torch::stable::contiguous(indices);
  const auto* at = static_cast<const int64_t*>(flat.const_data_ptr());
  const int64_t bad =
      cpu::histogram(at, flat.numel(), codebook_size, data<int64_t>(counts), torch_parallel());
  STD_TORCH_CHECK(bad < 0, "indices: expected values in [0, ", codebook_size, "), got ",
                  at[bad < 0 ? 0 : bad], " at position ", bad);
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ibq_fast, CPU, m) {
  m.impl("codebook_search", TORCH_BOX(&codebook_search));
  m.impl("straight_through_select", TORCH_BOX(&straight_through_select));
  m.impl("straight_through_select_backward", TORCH_BOX(&straight_through_select_backward));
  m.impl("softmax_statistics", TORCH_BOX(&softmax_statistics));
  m.impl("softmax_statistics_backward", TORCH_BOX(&softmax_statistics_backward));
  m.impl("index_backprop", TORCH_BOX(&index_backprop));
  m.impl("index_backprop_backward", TORCH_BOX(&index_backprop_backward));
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
  m.impl("code_histogram", TORCH_BOX(&code_histogram));
}

}  // namespace ibq
