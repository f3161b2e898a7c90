// The launch sequences of kernels/cuda on the emulator, and matrices of any element type to run them on.
#pragma once

#define IBQ_SIMT_EMULATION

#include <cstring>
#include <vector>

#include "../cuda/columns_kernels.cuh"
#include "../cuda/launch_list.h"
#include "../cuda/product_kernel.cuh"
#include "../cuda/rows_kernels.cuh"
#include "../cuda/scatter_kernel.cuh"
#include "../cuda/search_kernel.cuh"
#include "../cuda/sweep_kernel.cuh"

namespace ibq::test {

using namespace ibq::cuda;

// A matrix of one element type, placed `offset` elements after a 16-byte boundary, ending with its buffer.
struct Matrix {
  Element element;
  int64_t rows, columns;
  std::vector<unsigned char> storage;
  unsigned char* data;

  Matrix(Element element, int64_t rows, int64_t columns, int offset = 0)
      : element(element), rows(rows), columns(columns) {
    const auto bytes = static_cast<size_t>((rows * columns + offset) * size());
    storage.resize(bytes + 16);
    const auto start = reinterpret_cast<uintptr_t>(storage.data());
    data = storage.data() + (16 - start % 16) % 16 + offset * size();
  }
  Matrix(const Matrix&) = delete;

  int size() const { return bytes_of(element); }

  void set(int64_t row, int64_t column, float value) {
    unsigned char* place = data + (row * columns + column) * size();
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (element == Element::bf16) bits = round_to_bf16(value);
    if (element == Element::f16) bits = half_bits(value);
    std::memcpy(place, &bits, static_cast<size_t>(size()));  // little endian
  }

  float get(int64_t row, int64_t column) const {
    uint32_t bits = 0;
    std::memcpy(&bits, data + (row * columns + column) * size(), static_cast<size_t>(size()));
    if (element == Element::bf16) return emulator::bf16_to_float(static_cast<uint16_t>(bits));
    if (element == Element::f16) return emulator::f16_to_float(static_cast<uint16_t>(bits));
    return emulator::bits_to_float(bits);
  }

  // Nearest half by truncation of the float: exact for the small integers and fine for random values, since
  // the reference reads back what was stored.
  static uint32_t half_bits(float value) {
    if (is_nan(value)) return 0x7e00u;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const int exponent = static_cast<int>((bits >> 23) & 255u) - 112;
    if (exponent <= 0) return (bits >> 16) & 0x8000u;
    return ((bits >> 16) & 0x8000u) | (static_cast<uint32_t>(exponent) << 10) | ((bits >> 13) & 1023u);
  }
};

// Launches kernels on the emulator at once. Each arguments struct belongs to one family of kernels.
class EmulatedQueue {
 public:
  explicit EmulatedQueue(uint32_t turns) : turns_(turns) {}

  int launches = 0;
  bool refused = false;

  void refuse() { refused = true; }
  void fill(void* at, int byte, int64_t bytes) { std::memset(at, byte, static_cast<size_t>(bytes)); }

  template <typename Arguments>
  void launch(Kernel kernel, Element element, int64_t blocks, int64_t shared_bytes, const Arguments& args) {
    ++launches;
    emulator::launch(blocks, kernel_name(kernel).threads, shared_bytes, turns_, [&] {
      if (element == Element::f32) run<Element::f32>(kernel, args);
      if (element == Element::bf16) run<Element::bf16>(kernel, args);
      if (element == Element::f16) run<Element::f16>(kernel, args);
    });
  }

 private:
  uint32_t turns_;

  template <Element e>
  static void run(Kernel kernel, const SearchArguments& args) {
    if (kernel == Kernel::search) codebook_search_kernel<e, true>(args);
    if (kernel == Kernel::search_entropy) codebook_search_kernel<e, true, Extra::entropy>(args);
    if (kernel == Kernel::search_target) codebook_search_kernel<e, true, Extra::target>(args);
  }
  template <Element e>
  static void run(Kernel kernel, const SweepArguments& args) {
    if (kernel == Kernel::sweep_probability) sweep_kernel<e, Sweep::probability>(args);
    if (kernel == Kernel::sweep_select) sweep_kernel<e, Sweep::select>(args);
    if (kernel == Kernel::sweep_entropy) sweep_kernel<e, Sweep::entropy>(args);
    if (kernel == Kernel::sweep_both) sweep_kernel<e, Sweep::both>(args);
    if (kernel == Kernel::sweep_cross) sweep_kernel<e, Sweep::cross>(args);
  }
  template <Element e>
  static void run(Kernel kernel, const ProductArguments& args) {
    kernel == Kernel::product ? product_kernel<e, false>(args) : product_kernel<e, true>(args);
  }
  template <Element e>
  static void run(Kernel, const RowConstantsArguments& args) {
    row_constants_kernel<e>(args);
  }
  template <Element e>
  static void run(Kernel, const WinnersArguments& args) {
    winners_kernel<e>(args);
  }
  template <Element e>
  static void run(Kernel, const ScatterArguments& args) {
    scatter_kernel<e>(args);
  }
  template <Element e>
  static void run(Kernel, const NormBiasArguments& args) {
    norm_bias_kernel<e>(args);
  }
  template <Element e>
  static void run(Kernel, const NormGradientArguments& args) {
    norm_gradient_kernel<e>(args);
  }
  template <Element>
  static void run(Kernel, const StatisticsArguments& args) {
    statistics_kernel(args);
  }
  template <Element>
  static void run(Kernel, const AddRowsArguments& args) {
    add_rows_kernel(args);
  }
  template <Element>
  static void run(Kernel, const AddPartsArguments& args) {
    add_parts_kernel(args);
  }
  template <Element>
  static void run(Kernel, const AddColumnsArguments& args) {
    add_columns_kernel(args);
  }
  template <Element>
  static void run(Kernel, const CenterArguments& args) {
    center_kernel(args);
  }
};

// A workspace of exactly the bytes asked for, full of NaN.
class PoisonedWorkspace {
 public:
  explicit PoisonedWorkspace(int64_t bytes) : bytes_(static_cast<size_t>(bytes) + 256, 0xff) {}
  void* at() {
    const auto start = reinterpret_cast<uintptr_t>(bytes_.data());
    return bytes_.data() + (256 - start % 256) % 256;
  }

 private:
  std::vector<unsigned char> bytes_;
};

}  // namespace ibq::test
