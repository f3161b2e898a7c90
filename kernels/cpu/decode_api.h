// Arguments of the decoding kernels: linear layers for a few rows, and a whole step of the generator.
#pragma once

#include <cstdint>

namespace ibq::cpu {

enum class WeightType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3 };

// Weights [N, C] as they lie in memory: row-major, contiguous. `scale` [N] with int8, else null.
struct Matrix {
  const void* rows = nullptr;
  const float* scale = nullptr;
  int64_t n = 0, c = 0;
};

// out [M, N] = x [M, C] W^T * scale + bias.
struct SkinnyLinear {
  WeightType type = WeightType::kFloat32;
  Matrix weight;
  const float* x = nullptr;
  const float* bias = nullptr;  // [N] or null
  float* out = nullptr;
  int64_t m = 0;
};

// One token of up to `rows` sequences through all blocks; width = heads * head_dim.
//   weights     [4 * depth]: qkv [(heads + 2 kv_heads) * head_dim, width], out [width, width], gate_up
//               [2 * hidden, width], down [width, hidden]
//   modulation  [6 * depth + 2, capacity, width]: per block scale, shift, gate of attention, then of the MLP;
//               scale and shift of the last norm
//   cache       [depth, 2, capacity, kv_heads, places, head_dim], of the weights' type (float32 for int8)
//   rotary      [2, rotary_places, head_dim]: factors of a channel and of its pair's other channel
// A row with a negative position is left alone and its output zeroed.
struct GeneratorStep {
  WeightType type = WeightType::kFloat32;
  const Matrix* weights = nullptr;
  const float* x = nullptr;            // [rows, width]
  const int64_t* positions = nullptr;  // [rows], each below places
  const float* modulation = nullptr;
  void* cache = nullptr;
  const float* rotary = nullptr;
  float* out = nullptr;  // [rows, width]
  int64_t rows = 0, capacity = 0, depth = 0, heads = 0, kv_heads = 0, head_dim = 0, hidden = 0, places = 0,
          rotary_places = 0;
  float eps = 0;
};

}  // namespace ibq::cpu
