// The queue (kernels/cuda/launch.h) of kernels that CuPy compiled at run time: names and argument bytes go to
// the Python object that was given to ibq_fast._C.set_cupy_launcher, see ibq_fast/ops/cupy/launcher.py.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "kernels/cuda/launch.h"

namespace ibq::cupy {

// What launches return when the launcher raised: its message is error_text().
constexpr int kLauncherFailed = -1;

// The device of the op that this thread is in, as torch numbers it.
inline thread_local int32_t current_device = -1;

struct Argument {
  const void* bytes;
  size_t size;
};

int launcher_limits(cuda::DeviceLimits* limits);
int launcher_fill(void* at, int byte, int64_t bytes);
int launcher_launch(const char* source, const char* name, const cuda::Grid& grid, const Argument* arguments,
                    size_t count);
const char* error_text();

class CupyQueue {
 public:
  int limits(cuda::DeviceLimits* limits) const { return launcher_limits(limits); }
  int fill(void* at, int byte, int64_t bytes) const { return launcher_fill(at, byte, bytes); }

  template <typename Tag, typename... Given>
  int launch(Tag, const cuda::Grid& grid, const Given&... given) const {
    return launch_as(static_cast<typename Tag::Function>(nullptr), Tag::kSource, Tag::name(), grid, given...);
  }

 private:
  // Arguments become the kernel's parameters first, as the compiler would do it in a launch.
  template <typename... Parameters, typename... Given>
  static int launch_as(void (*)(Parameters...), const char* source, const cuda::KernelExpression& name,
                       const cuda::Grid& grid, const Given&... given) {
    static_assert(sizeof...(Parameters) == sizeof...(Given), "a launch gives every parameter of its kernel");
    const std::tuple<Parameters...> parameters(given...);
    return std::apply(
        [&](const auto&... parameter) {
          const Argument arguments[] = {{&parameter, sizeof parameter}...};
          return launcher_launch(source, name.text(), grid, arguments, sizeof...(Parameters));
        },
        parameters);
  }
};

}  // namespace ibq::cupy
