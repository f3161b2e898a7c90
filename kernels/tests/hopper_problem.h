// What the tests of the Hopper kernels share: matrices of 16-bit floats as the kernels want them, their
// tensor maps, and random numbers.
#pragma once

#include <random>
#include <vector>

#include "../cuda/hopper/ptx.cuh"

namespace ibq::test {

using cuda::hopper::TensorMap;

// Rows of bf16 or fp16, 16-byte aligned, poisoned behind the last row.
struct Matrix16 {
  bool bf16;
  int64_t rows, columns;
  std::vector<uint16_t> storage;
  uint16_t* data;

  Matrix16(bool bf16, int64_t rows, int64_t columns)
      : bf16(bf16), rows(rows), columns(columns), storage(static_cast<size_t>(rows * columns) + 8, 0xffffu) {
    const auto start = reinterpret_cast<uintptr_t>(storage.data());
    data = storage.data() + (16 - start % 16) % 16 / 2;
  }
  Matrix16(const Matrix16&) = delete;

  void set(int64_t row, int64_t column, float value) {
    data[row * columns + column] = static_cast<uint16_t>(bf16 ? cuda::hopper::pack_two<true>(value, 0.0f)
                                                              : cuda::hopper::pack_two<false>(value, 0.0f));
  }
  float get(int64_t row, int64_t column) const {
    return cuda::hopper::emulator::to_float(data[row * columns + column], bf16);
  }
  template <typename Draw>
  void fill(Draw draw) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) set(i, j, draw());
  }
  TensorMap map(int box_rows) const {
    return cuda::hopper::emulator::encode(
        cuda::hopper::request_tensor_map(data, rows, columns, bf16, box_rows));
  }
};

inline double dot(const Matrix16& a, int64_t i, const Matrix16& b, int64_t j) {
  double sum = 0.0;
  for (int64_t d = 0; d < a.columns; ++d) sum += static_cast<double>(a.get(i, d)) * b.get(j, d);
  return sum;
}

}  // namespace ibq::test
