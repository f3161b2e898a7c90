// The kernels by name, and what every sequence of launches is built from. Plain C++ without any CUDA include:
// the same sequence is launched by the CUDA runtime (launches.h), run by the emulator in kernels/tests, or
// handed to a host that compiles the kernels at run time.
//
// A Queue launches kernels in order on one stream:
//   void fill(void* at, int byte, int64_t bytes)
//   void launch(Kernel, Element, int64_t blocks, int64_t shared_bytes, const Arguments&)
// Every kernel takes one argument, its struct from search_plan.h or sweep_arguments.h, by value.
#pragma once

#include "sweep_arguments.h"

namespace ibq::cuda {

enum class Kernel : int {
  search,          // codebook_search_kernel<Element, true>
  search_entropy,  // codebook_search_kernel<Element, true, Extra::entropy>
  search_target,   // codebook_search_kernel<Element, true, Extra::target>
  sweep_probability,
  sweep_select,
  sweep_entropy,
  sweep_both,
  sweep_cross,
  product,             // product_kernel<Element, false>
  product_transposed,  // product_kernel<Element, true>
  row_constants,
  winners,
  scatter,
  norm_bias,
  norm_gradient,
  statistics,  // from here on without an Element
  add_rows,
  add_parts,
  add_columns,
  center,
};

constexpr int kKernels = static_cast<int>(Kernel::center) + 1;

struct KernelName {
  const char* name;       // in namespace ibq::cuda
  const char* arguments;  // after the Element; null where the kernel is no template
  int threads;
};

// The expression `ibq::cuda::NAME<ibq::cuda::Element(ELEMENT)ARGUMENTS>` names an instance to a run-time
// compiler.
inline KernelName kernel_name(Kernel kernel) {
  static constexpr KernelName kNames[kKernels] = {
      {"codebook_search_kernel", ", true", kSearchThreads},
      {"codebook_search_kernel", ", true, ibq::cuda::Extra::entropy", kSearchThreads},
      {"codebook_search_kernel", ", true, ibq::cuda::Extra::target", kSearchThreads},
      {"sweep_kernel", ", ibq::cuda::Sweep::probability", kSweepThreads},
      {"sweep_kernel", ", ibq::cuda::Sweep::select", kSweepThreads},
      {"sweep_kernel", ", ibq::cuda::Sweep::entropy", kSweepThreads},
      {"sweep_kernel", ", ibq::cuda::Sweep::both", kSweepThreads},
      {"sweep_kernel", ", ibq::cuda::Sweep::cross", kSweepThreads},
      {"product_kernel", ", false", kProductThreads},
      {"product_kernel", ", true", kProductThreads},
      {"row_constants_kernel", "", kRowThreads},
      {"winners_kernel", "", kRowThreads},
      {"scatter_kernel", "", kScatterThreads},
      {"norm_bias_kernel", "", kRowThreads},
      {"norm_gradient_kernel", "", kRowThreads},
      {"statistics_kernel", nullptr, kRowThreads},
      {"add_rows_kernel", nullptr, kRowThreads},
      {"add_parts_kernel", nullptr, kRowThreads},
      {"add_columns_kernel", nullptr, kRowThreads},
      {"center_kernel", nullptr, kCenterThreads},
  };
  return kNames[static_cast<int>(kernel)];
}

// What a sequence is planned for.
struct LaunchLimits {
  DeviceLimits device;
  int64_t weights_bytes = kWeightsBytes;
  int64_t rectangle_rows = kRectangleRows;
  int64_t bounded_from = kBoundedFrom;
};

// Hands out aligned pieces of a workspace; from a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

}  // namespace ibq::cuda
