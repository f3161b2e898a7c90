// CPU implementations of the generator's decoding ops. No arithmetic here.
#include <vector>

#include "csrc/arguments.h"
#include "csrc/cpu_kernels.h"
#include "kernels/cpu/decode_api.h"

namespace ibq {
namespace {

cpu::WeightType weight_type(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return cpu::WeightType::kFloat32;
    case ScalarType::BFloat16:
      return cpu::WeightType::kBFloat16;
    case ScalarType::Half:
      return cpu::WeightType::kFloat16;
    case ScalarType::Char:
      return cpu::WeightType::kInt8;
    default:
      STD_TORCH_CHECK(false, "weight: expected float32, bfloat16, float16 or int8");
  }
}

ScalarType cache_type(cpu::WeightType type) {
  return type == cpu::WeightType::kBFloat16  ? ScalarType::BFloat16
         : type == cpu::WeightType::kFloat16 ? ScalarType::Half
                                             : ScalarType::Float;
}

// A weight [n, c] (0: any size) as it lies in memory, with its scale.
cpu::Matrix matrix_of(const Tensor& weight, const Tensor* scale, cpu::WeightType type, int64_t n, int64_t c) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0 && weight.is_contiguous(),
                  "weight: expected a contiguous [N, C]");
  STD_TORCH_CHECK(weight_type(weight) == type, "weights: expected one dtype");
  STD_TORCH_CHECK((n == 0 || weight.size(0) == n) && (c == 0 || weight.size(1) == c), "weight: expected [", n,
                  ", ", c, "], got [", weight.size(0), ", ", weight.size(1), "]");
  STD_TORCH_CHECK((scale != nullptr) == (type == cpu::WeightType::kInt8),
                  "scale: expected one beside int8 weights, and none beside others");
  cpu::Matrix m;
  m.rows = weight.const_data_ptr();
  m.n = weight.size(0);
  m.c = weight.size(1);
  if (scale) {
    check_shape(*scale, "scale", {m.n}, ScalarType::Float);
    STD_TORCH_CHECK(scale->is_contiguous(), "scale: expected a contiguous vector");
    m.scale = static_cast<const float*>(scale->const_data_ptr());
  }
  return m;
}

Tensor skinny_linear(Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> bias) {
  cpu::SkinnyLinear p;
  p.type = weight_type(weight);
  weight = torch::stable::contiguous(weight);
  scale = contiguous(scale);
  bias = contiguous(bias);
  p.weight = matrix_of(weight, scale ? &*scale : nullptr, p.type, 0, 0);
  STD_TORCH_CHECK(x.dim() == 2, "x: expected [M, C], got ", x.dim(), " dimensions");
  check_shape(x, "x", {x.size(0), p.weight.c}, ScalarType::Float);
  x = torch::stable::contiguous(x);
  if (bias) check_shape(*bias, "bias", {p.weight.n}, ScalarType::Float);
  Tensor out = new_of(x, {x.size(0), p.weight.n}, ScalarType::Float);
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.out = data<float>(out);
  p.m = x.size(0);
  if (p.m > 0) check_memory(kernels().skinny_linear(p, torch_parallel()));
  return out;
}

Tensor generator_step(Tensor x, Tensor positions, std::vector<Tensor> weights, std::vector<Tensor> scales,
                      Tensor modulation, Tensor cache, Tensor rotary, int64_t num_heads, double eps) {
  STD_TORCH_CHECK(cache.dim() == 6 && cache.is_contiguous(),
                  "cache: expected a contiguous [depth, 2, R, KV, T, D]");
  STD_TORCH_CHECK(rotary.dim() == 4 && rotary.is_contiguous() && num_heads >= 1,
                  "rotary: expected a contiguous [2, P, 1, D]");
  STD_TORCH_CHECK(modulation.is_contiguous(), "modulation: expected a contiguous tensor");
  cpu::GeneratorStep p;
  p.depth = cache.size(0);
  p.capacity = cache.size(2);
  p.kv_heads = cache.size(3);
  p.places = cache.size(4);
  p.head_dim = cache.size(5);
  p.heads = num_heads;
  p.rows = x.size(0);
  p.rotary_places = rotary.size(1);
  p.eps = static_cast<float>(eps);
  const int64_t width = p.heads * p.head_dim, layers = 4 * p.depth;
  STD_TORCH_CHECK(p.depth >= 1 && static_cast<int64_t>(weights.size()) == layers, "weights: expected ",
                  layers, ", got ", weights.size());
  STD_TORCH_CHECK(scales.empty() || scales.size() == weights.size(), "scales: expected none or ", layers,
                  ", got ", scales.size());
  STD_TORCH_CHECK(p.head_dim % 2 == 0 && p.kv_heads >= 1 && p.heads % p.kv_heads == 0,
                  "num_heads: expected a multiple of the cache's ", p.kv_heads, " heads, got ", num_heads);
  p.type = weight_type(weights[0]);
  p.hidden = weights[3].dim() == 2 ? weights[3].size(1) : 0;
  check_shape(x, "x", {p.rows, width}, ScalarType::Float);
  STD_TORCH_CHECK(p.rows <= p.capacity, "x: expected at most ", p.capacity, " rows, got ", p.rows);
  check_shape(positions, "positions", {p.rows}, ScalarType::Long);
  check_shape(modulation, "modulation", {6 * p.depth + 2, p.capacity, width}, ScalarType::Float);
  check_shape(cache, "cache", {p.depth, 2, p.capacity, p.kv_heads, p.places, p.head_dim}, cache_type(p.type));
  check_shape(rotary, "rotary", {2, p.rotary_places, 1, p.head_dim}, ScalarType::Float);
  STD_TORCH_CHECK(p.rotary_places >= p.places, "rotary: expected at least ", p.places, " positions, got ",
                  p.rotary_places);
  const int64_t sizes[4][2] = {
      {width + 2 * p.kv_heads * p.head_dim, width}, {width, width}, {2 * p.hidden, width}, {width, p.hidden}};
  std::vector<cpu::Matrix> matrices;
  for (size_t i = 0; i < weights.size(); ++i)
    matrices.push_back(matrix_of(weights[i], scales.empty() ? nullptr : &scales[i], p.type, sizes[i % 4][0],
                                 sizes[i % 4][1]));
  x = torch::stable::contiguous(x);
  positions = torch::stable::contiguous(positions);
  p.positions = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t r = 0; r < p.rows; ++r)
    STD_TORCH_CHECK(p.positions[r] < p.places, "positions: expected values below ", p.places, ", got ",
                    p.positions[r]);
  Tensor out = new_of(x, {p.rows, width}, ScalarType::Float);
  p.weights = matrices.data();
  p.x = static_cast<const float*>(x.const_data_ptr());
  p.modulation = static_cast<const float*>(modulation.const_data_ptr());
  p.cache = cache.mutable_data_ptr();
  p.rotary = static_cast<const float*>(rotary.const_data_ptr());
  p.out = data<float>(out);
  if (p.rows > 0) check_memory(kernels().generator_step(p, torch_parallel()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ibq_fast, CPU, m) {
  m.impl("skinny_linear", TORCH_BOX(&skinny_linear));
  m.impl("generator_step", TORCH_BOX(&generator_step));
}

}  // namespace ibq
