// CUDA implementations of the training ops, as cuda_ops.cpp does it for the search. UNRUN ON A GPU.
//
// Results are bitwise repeatable: the atomic variant of the kernels is measured nowhere yet and not used.
#include "csrc/cuda_device.h"

namespace ibq {
namespace {

constexpr int kDeterministic = 1;

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Operands made contiguous on one device, and the problem that points at them.
struct Operands {
  OnDeviceOf device;
  Tensor z, codebook;
  std::optional<Tensor> bias;
  ibq_problem problem;

  Operands(const Tensor& z_in, const Tensor& codebook_in, const std::optional<Tensor>& bias_in, double scale,
           double norm_weight)
      : device(z_in) {
    check_operands(z_in, codebook_in, bias_in);
    check_device(codebook_in, "codebook", z_in);
    if (bias_in) check_device(*bias_in, "bias", z_in);
    z = torch::stable::contiguous(z_in);
    codebook = torch::stable::contiguous(codebook_in);
    bias = contiguous(bias_in);
    problem = {z.const_data_ptr(),
               codebook.const_data_ptr(),
               bias ? const_data<float>(*bias) : nullptr,
               z.size(0),
               codebook.size(0),
               codebook.size(1),
               cuda_dtype_of(z, "z"),
               static_cast<float>(scale),
               static_cast<float>(norm_weight),
               IBQ_NEGLIGIBLE_MASS};
  }

  // A saved tensor or a gradient: of this shape and type, on the device, dense.
  Tensor take(const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
              ScalarType dtype) const {
    check_shape(t, name, shape, dtype);
    check_device(t, name, z);
    return torch::stable::contiguous(t);
  }
};

float checked_temperature(double temperature) {
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);
  return static_cast<float>(temperature);
}

// Asks a sequence for its workspace, then runs it. The workspace is freed on return while the kernels still
// run: torch's allocator reuses it on the same stream only.
template <typename Arguments, typename Run>
void with_workspace(const Operands& in, const Arguments& args, const char* what,
                    int (*bytes_of)(const ibq_problem*, const Arguments*, int64_t*), const Run& run) {
  int64_t bytes = 0;
  check_cuda(bytes_of(&in.problem, &args, &bytes), what);
  const Tensor workspace = new_of(in.z, {bytes}, ScalarType::Byte);
  check_cuda(run(workspace.mutable_data_ptr(), bytes), what);
}

void run_forward(const Operands& in, const ibq_softmax_forward& out, const char* what) {
  with_workspace(in, out, what, ibq_cuda_softmax_forward_workspace, [&](void* workspace, int64_t bytes) {
    return ibq_cuda_softmax_forward(&in.problem, &out, kDeterministic, workspace, bytes, in.device.stream());
  });
}

// z_q and codes: the selected rows twice, as two tensors with gradients of their own.
void gather_twice(const Operands& in, const Tensor& indices, const Tensor& z_q, const Tensor& codes) {
  const ibq_problem& p = in.problem;
  check_cuda(ibq_cuda_gather_codes(p.codebook, const_data<int64_t>(indices), p.N, p.K, p.D, p.dtype,
                                   z_q.mutable_data_ptr(), codes.mutable_data_ptr(), in.device.stream()),
             "gather_codes");
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Operands& in, ibq_softmax_backward& args,
                                             const char* what) {
  const ibq_problem& p = in.problem;
  const ScalarType dtype = in.z.scalar_type();
  Tensor grad_z = new_of(in.z, {p.N, p.D}, ScalarType::Float);
  Tensor grad_codebook = new_of(in.z, {p.K, p.D}, ScalarType::Float);
  Tensor grad_bias = new_of(in.z, {in.bias ? p.K : 0}, ScalarType::Float);
  args.grad_z = data<float>(grad_z);
  args.grad_codebook = data<float>(grad_codebook);
  args.grad_bias = in.bias ? data<float>(grad_bias) : nullptr;
  if (p.N > 0) {
    with_workspace(in, args, what, ibq_cuda_softmax_backward_workspace, [&](void* workspace, int64_t bytes) {
      return ibq_cuda_softmax_backward(&in.problem, &args, kDeterministic, workspace, bytes,
                                       in.device.stream());
    });
  } else {
    torch::stable::zero_(grad_codebook);
    torch::stable::zero_(grad_bias);
  }
  return {torch::stable::to(grad_z, dtype), torch::stable::to(grad_codebook, dtype), grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> straight_through_select(Tensor z, Tensor codebook,
                                                                           std::optional<Tensor> bias,
                                                                           double scale) {
  const Operands in(z, codebook, bias, scale, 0.0);
  const int64_t n = in.problem.N, d = in.problem.D;
  Tensor z_q = new_of(z, {n, d}, z.scalar_type());
  Tensor codes = new_of(z, {n, d}, z.scalar_type());
  Tensor indices = new_of(z, {n}, ScalarType::Long);
  Tensor lse = new_of(z, {n}, ScalarType::Double);
  Tensor readout = new_of(z, {n, d}, ScalarType::Float);
  if (n > 0) {
    ibq_softmax_forward out{};
    out.indices = data<int64_t>(indices);
    out.lse = data<double>(lse);
    out.readout = data<float>(readout);
    run_forward(in, out, "straight_through_select");
    gather_twice(in, indices, z_q, codes);
  }
  return {z_q, codes, indices, lse, readout};
}

std::tuple<Tensor, Tensor, Tensor> straight_through_select_backward(Tensor grad_z_q, Tensor grad_codes,
                                                                    Tensor z, Tensor codebook,
                                                                    std::optional<Tensor> bias, double scale,
                                                                    Tensor indices, Tensor lse,
                                                                    Tensor readout) {
  const Operands in(z, codebook, bias, scale, 0.0);
  const int64_t n = in.problem.N, d = in.problem.D;
  grad_z_q = in.take(grad_z_q, "grad_z_q", {n, d}, z.scalar_type());
  grad_codes = in.take(grad_codes, "grad_codes", {n, d}, z.scalar_type());
  indices = in.take(indices, "indices", {n}, ScalarType::Long);
  lse = in.take(lse, "lse", {n}, ScalarType::Double);
  readout = in.take(readout, "readout", {n, d}, ScalarType::Float);
  ibq_softmax_backward args{};
  args.grad_z_q = grad_z_q.const_data_ptr();
  args.grad_codes = grad_codes.const_data_ptr();
  args.indices = const_data<int64_t>(indices);
  args.lse = const_data<double>(lse);
  args.readout = const_data<float>(readout);
  return gradients(in, args, "straight_through_select_backward");
}

std::tuple<Tensor, Tensor, Tensor> softmax_statistics(Tensor z, Tensor codebook, std::optional<Tensor> bias,
                                                      double scale, double temperature) {
  const Operands in(z, codebook, bias, scale, 0.0);
  const int64_t n = in.problem.N;
  Tensor row_entropy = new_of(z, {n}, ScalarType::Float);
  Tensor mean_prob = new_of(z, {in.problem.K}, ScalarType::Float);
  Tensor lse = new_of(z, {n}, ScalarType::Double);
  ibq_softmax_forward out{};
  out.temperature = checked_temperature(temperature);
  out.row_entropy = data<float>(row_entropy);
  out.mean_prob = data<float>(mean_prob);
  out.lse_tau = data<double>(lse);
  if (n > 0) {
    run_forward(in, out, "softmax_statistics");
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
  const Operands in(z, codebook, bias, scale, 0.0);
  const int64_t n = in.problem.N, k = in.problem.K;
  grad_row_entropy = in.take(grad_row_entropy, "grad_row_entropy", {n}, ScalarType::Float);
  grad_mean_prob = in.take(grad_mean_prob, "grad_mean_prob", {k}, ScalarType::Float);
  lse = in.take(lse, "lse", {n}, ScalarType::Double);
  row_entropy = in.take(row_entropy, "row_entropy", {n}, ScalarType::Float);
  ibq_softmax_backward args{};
  args.temperature = checked_temperature(temperature);
  args.lse_tau = const_data<double>(lse);
  args.row_entropy = const_data<float>(row_entropy);
  args.grad_row_entropy = const_data<float>(grad_row_entropy);
  args.grad_mean_prob = const_data<float>(grad_mean_prob);
  return gradients(in, args, "softmax_statistics_backward");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> index_backprop(
    Tensor z, Tensor codebook, std::optional<Tensor> bias, double scale, double norm_weight,
    double temperature) {
  const Operands in(z, codebook, bias, scale, norm_weight);
  const int64_t n = in.problem.N, k = in.problem.K, d = in.problem.D;
  int64_t tiles, blocks;
  ibq_cuda_bound_grid(n, k, &tiles, &blocks);
  Tensor z_q = new_of(z, {n, d}, z.scalar_type());
  Tensor codes = new_of(z, {n, d}, z.scalar_type());
  Tensor indices = new_of(z, {n}, ScalarType::Long);
  Tensor lse = new_of(z, {n}, ScalarType::Double);
  Tensor readout = new_of(z, {n, d}, ScalarType::Float);
  Tensor row_entropy = new_of(z, {n}, ScalarType::Float);
  Tensor mean_prob = new_of(z, {k}, ScalarType::Float);
  Tensor lse_tau = new_of(z, {n}, ScalarType::Double);
  Tensor tile_bound = new_of(z, {2, tiles, blocks}, ScalarType::Float);
  Tensor candidates = new_of(z, {0}, ScalarType::Byte);  // only the CPU kernels list any
  ibq_softmax_forward out{};
  out.indices = data<int64_t>(indices);
  out.lse = data<double>(lse);
  out.readout = data<float>(readout);
  out.temperature = checked_temperature(temperature);
  out.row_entropy = data<float>(row_entropy);
  out.mean_prob = data<float>(mean_prob);
  out.lse_tau = data<double>(lse_tau);
  out.tile_bound = tiles > 0 ? data<float>(tile_bound) : nullptr;
  if (n > 0) {
    run_forward(in, out, "index_backprop");
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
  const Operands in(z, codebook, bias, scale, norm_weight);
  const int64_t n = in.problem.N, k = in.problem.K, d = in.problem.D;
  int64_t tiles, blocks;
  ibq_cuda_bound_grid(n, k, &tiles, &blocks);
  grad_z_q = in.take(grad_z_q, "grad_z_q", {n, d}, z.scalar_type());
  grad_codes = in.take(grad_codes, "grad_codes", {n, d}, z.scalar_type());
  grad_row_entropy = in.take(grad_row_entropy, "grad_row_entropy", {n}, ScalarType::Float);
  grad_mean_prob = in.take(grad_mean_prob, "grad_mean_prob", {k}, ScalarType::Float);
  indices = in.take(indices, "indices", {n}, ScalarType::Long);
  lse = in.take(lse, "lse", {n}, ScalarType::Double);
  readout = in.take(readout, "readout", {n, d}, ScalarType::Float);
  row_entropy = in.take(row_entropy, "row_entropy", {n}, ScalarType::Float);
  lse_tau = in.take(lse_tau, "lse_tau", {n}, ScalarType::Double);
  tile_bound = in.take(tile_bound, "tile_bound", {2, tiles, blocks}, ScalarType::Float);
  in.take(candidates, "candidates", {0}, ScalarType::Byte);
  ibq_softmax_backward args{};
  args.grad_z_q = grad_z_q.const_data_ptr();
  args.grad_codes = grad_codes.const_data_ptr();
  args.indices = const_data<int64_t>(indices);
  args.lse = const_data<double>(lse);
  args.readout = const_data<float>(readout);
  args.temperature = checked_temperature(temperature);
  args.lse_tau = const_data<double>(lse_tau);
  args.row_entropy = const_data<float>(row_entropy);
  args.grad_row_entropy = const_data<float>(grad_row_entropy);
  args.grad_mean_prob = const_data<float>(grad_mean_prob);
  args.tile_bound = tiles > 0 ? const_data<float>(tile_bound) : nullptr;
  return gradients(in, args, "index_backprop_backward");
}

// Unlike on the CPU, a target that is no class cannot be reported without waiting for the device: its row
// gives NaN.
ibq_cross_entropy cross_entropy_of(const Operands& in, Tensor& targets, int64_t ignore_index,
                                   double label_smoothing) {
  targets = in.take(targets, "targets", {in.problem.N}, ScalarType::Long);
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
                  "label_smoothing: expected a number from 0 to 1, got ", label_smoothing);
  ibq_cross_entropy args{};
  args.targets = const_data<int64_t>(targets);
  args.ignore_index = ignore_index;
  args.label_smoothing = label_smoothing;
  return args;
}

std::tuple<Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor head, std::optional<Tensor> bias,
                                                Tensor targets, int64_t ignore_index,
                                                double label_smoothing) {
  const Operands in(hidden, head, bias, 1.0, 0.0);
  ibq_cross_entropy args = cross_entropy_of(in, targets, ignore_index, label_smoothing);
  Tensor loss = new_of(hidden, {in.problem.N}, ScalarType::Float);
  Tensor lse = new_of(hidden, {in.problem.N}, ScalarType::Double);
  args.loss = data<float>(loss);
  args.lse = data<double>(lse);
  if (in.problem.N > 0)
    with_workspace(in, args, "linear_cross_entropy", ibq_cuda_cross_entropy_forward_workspace,
                   [&](void* workspace, int64_t bytes) {
                     return ibq_cuda_cross_entropy_forward(&in.problem, &args, workspace, bytes,
                                                           in.device.stream());
                   });
  return {loss, lse};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor head,
                                                                 std::optional<Tensor> bias, Tensor targets,
                                                                 int64_t ignore_index, double label_smoothing,
                                                                 Tensor lse) {
  const Operands in(hidden, head, bias, 1.0, 0.0);
  const int64_t n = in.problem.N, k = in.problem.K, d = in.problem.D;
  ibq_cross_entropy args = cross_entropy_of(in, targets, ignore_index, label_smoothing);
  grad_loss = in.take(grad_loss, "grad_loss", {n}, ScalarType::Float);
  lse = in.take(lse, "lse", {n}, ScalarType::Double);
  Tensor grad_hidden = new_of(hidden, {n, d}, ScalarType::Float);
  Tensor grad_head = new_of(hidden, {k, d}, ScalarType::Float);
  Tensor grad_bias = new_of(hidden, {in.bias ? k : 0}, ScalarType::Float);
  args.grad_loss = const_data<float>(grad_loss);
  args.lse = data<double>(lse);  // only read here
  args.grad_hidden = data<float>(grad_hidden);
  args.grad_head = data<float>(grad_head);
  args.grad_bias = in.bias ? data<float>(grad_bias) : nullptr;
  if (n > 0) {
    with_workspace(in, args, "linear_cross_entropy_backward", ibq_cuda_cross_entropy_backward_workspace,
                   [&](void* workspace, int64_t bytes) {
                     return ibq_cuda_cross_entropy_backward(&in.problem, &args, kDeterministic, workspace,
                                                            bytes, in.device.stream());
                   });
  } else {
    torch::stable::zero_(grad_head);
    torch::stable::zero_(grad_bias);
  }
  return {torch::stable::to(grad_hidden, hidden.scalar_type()),
          torch::stable::to(grad_head, hidden.scalar_type()), grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(IBQ_OPS_NAMESPACE, IBQ_OPS_KEY, m) {
  m.impl("straight_through_select", TORCH_BOX(&straight_through_select));
  m.impl("straight_through_select_backward", TORCH_BOX(&straight_through_select_backward));
  m.impl("softmax_statistics", TORCH_BOX(&softmax_statistics));
  m.impl("softmax_statistics_backward", TORCH_BOX(&softmax_statistics_backward));
  m.impl("index_backprop", TORCH_BOX(&index_backprop));
  m.impl("index_backprop_backward", TORCH_BOX(&index_backprop_backward));
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}

}  // namespace ibq
