// The op schemas: the one place where the native ops are declared. What each computes is documented in
// ibq_fast/ops; here is only their shape for the dispatcher.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ibq_fast, m) {
  m.def(
      "codebook_search(Tensor z, Tensor codebook, Tensor? bias, float scale, bool with_lse, bool exact)"
      " -> (Tensor indices, Tensor max, Tensor lse)");
  m.def(
      "straight_through_select(Tensor z, Tensor codebook, Tensor? bias, float scale)"
      " -> (Tensor z_q, Tensor codes, Tensor indices, Tensor lse, Tensor readout)");
  m.def(
      "straight_through_select_backward(Tensor grad_z_q, Tensor grad_codes, Tensor z, Tensor codebook,"
      " Tensor? bias, float scale, Tensor indices, Tensor lse, Tensor readout)"
      " -> (Tensor grad_z, Tensor grad_codebook, Tensor grad_bias)");
  m.def(
      "softmax_statistics(Tensor z, Tensor codebook, Tensor? bias, float scale, float temperature)"
      " -> (Tensor row_entropy, Tensor mean_prob, Tensor lse)");
  m.def(
      "softmax_statistics_backward(Tensor grad_row_entropy, Tensor grad_mean_prob, Tensor z, Tensor codebook,"
      " Tensor? bias, float scale, float temperature, Tensor lse, Tensor row_entropy)"
      " -> (Tensor grad_z, Tensor grad_codebook, Tensor grad_bias)");
  m.def(
      "index_backprop(Tensor z, Tensor codebook, Tensor? bias, float scale, float norm_weight, float "
      "temperature)"
      " -> (Tensor z_q, Tensor codes, Tensor indices, Tensor lse, Tensor readout, Tensor row_entropy,"
      " Tensor mean_prob, Tensor lse_tau, Tensor tile_bound, Tensor candidates)");
  m.def(
      "index_backprop_backward(Tensor grad_z_q, Tensor grad_codes, Tensor grad_row_entropy,"
      " Tensor grad_mean_prob, Tensor z, Tensor codebook, Tensor? bias, float scale, float norm_weight,"
      " float temperature, Tensor indices, Tensor lse, Tensor readout, Tensor row_entropy, Tensor lse_tau,"
      " Tensor tile_bound, Tensor candidates) -> (Tensor grad_z, Tensor grad_codebook, Tensor grad_bias)");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor head, Tensor? bias, Tensor targets, int ignore_index,"
      " float label_smoothing) -> (Tensor loss, Tensor lse)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor head, Tensor? bias,"
      " Tensor targets, int ignore_index, float label_smoothing, Tensor lse)"
      " -> (Tensor grad_hidden, Tensor grad_head, Tensor grad_bias)");
  m.def("code_histogram(Tensor indices, int codebook_size) -> Tensor");
}
