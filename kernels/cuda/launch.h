// How a launcher sees the device: as a queue that takes launches.
//
// A launcher (*_launch.h) is plain C++: it plans, fills in arguments and hands kernels, named by tags, to a
// queue. Two queues exist: cuda_queue.cuh launches what nvcc compiled; csrc/cupy_queue.h passes names and
// argument bytes to CuPy, which compiled the same sources at run time. So both launch the same things.
//
// A queue has
//   int limits(DeviceLimits*)                   what plans depend on
//   int fill(void* at, int byte, int64_t bytes)  sets device memory
//   int launch(Tag, Grid, arguments...)         starts the tag's kernel
// and each returns 0 or a cudaError_t as int. A tag is an empty struct with
//   Function        the kernel's pointer type; arguments are converted to its parameters
//   kSource         the file under kernels/cuda that defines the kernel
//   static KernelExpression name()
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "search_plan.h"

namespace ibq::cuda {

// The values of cudaError_t that launchers return themselves.
constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kInvalidConfiguration = 9;

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// The C++ name of a kernel, as NVRTC resolves it: KernelExpression("f").with(Element::bf16).with(true) is
// "ibq::cuda::f<ibq::cuda::Element(1),true>".
class KernelExpression {
 public:
  explicit KernelExpression(const char* function) {
    std::snprintf(text_, sizeof text_, "ibq::cuda::%s", function);
  }
  KernelExpression with(Element element) const {
    char argument[32];
    std::snprintf(argument, sizeof argument, "ibq::cuda::Element(%d)", static_cast<int>(element));
    return with(argument);
  }
  KernelExpression with(bool flag) const { return with(flag ? "true" : "false"); }
  KernelExpression with(const char* argument) const {
    KernelExpression longer(*this);
    size_t end = std::strlen(text_);
    const bool first = end == 0 || text_[end - 1] != '>';
    if (!first) --end;  // the closing bracket moves behind the new argument
    std::snprintf(longer.text_ + end, sizeof text_ - end, "%c%s>", first ? '<' : ',', argument);
    return longer;
  }
  const char* text() const { return text_; }

 private:
  char text_[192];
};

}  // namespace ibq::cuda
