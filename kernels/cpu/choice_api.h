// The surface of the token choice: raw pointers and sizes, no PyTorch. Implemented in choice.h, once per
// instruction set.
#pragma once

#include <cstdint>

namespace ibq::cpu {

// One token per row of logits: a draw from softmax(filter(logits / temperature)).
//
//   x_j = logits_j / temperature, rounded to float32
//   the filter keeps the top_k largest x (ties with the last one included; 0 or >= codes: all), then, going
//   down from the largest (ties: lowest code first), every code until the probability before it exceeds
//   top_p
//   token = argmax over the kept codes of x_j + noise_j, ties to the lowest code; noise_j = -log(-log(1 -
//   v)), v = (word + 1/2) / 2^32, word = philox word j % 4 of counter (j / 4, position, image), key seed
//
// top_k = 1 is the plain argmax of the logits. A row with a NaN, with a positive infinity or without any
// finite x gives -1. Probabilities, their sums and the scores x + noise are float64.
struct Choice {
  const float* logits = nullptr;       // [rows, codes]
  const float* temperature = nullptr;  // [rows], > 0
  const int64_t* top_k = nullptr;      // [rows], >= 0
  const float* top_p = nullptr;        // [rows], in (0, 1]
  const int64_t* seed = nullptr;       // [rows]
  const int64_t* image = nullptr;      // [rows]
  const int64_t* position = nullptr;   // [rows]
  int64_t rows = 0, codes = 0;
  int64_t* tokens = nullptr;  // [rows]
};

}  // namespace ibq::cpu
