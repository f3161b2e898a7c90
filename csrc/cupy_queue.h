// The queue (kernels/cuda/launch.h) of kernels that CuPy compiled at run time: names and argument bytes go to
// the Python object that was given to ibq_fast._C.set_cupy_launcher, see ibq_fast/ops/cupy/launcher.py.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/launch_list.h"

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

// Serves both kinds of launchers: those of launch.h, which look at every result, and the sequences of
// launch_list.h, which ask for the status at their end. After a failure nothing more is launched.
class CupyQueue {
 public:
  int status() const { return status_; }
  void refuse() { keep(cuda::kInvalidConfiguration); }
  int limits(cuda::DeviceLimits* limits) { return keep(launcher_limits(limits)); }
  int fill(void* at, int byte, int64_t bytes) {
    return status_ == cuda::kSuccess ? keep(launcher_fill(at, byte, bytes)) : status_;
  }

  template <typename Tag, typename... Given>
  int launch(Tag, const cuda::Grid& grid, const Given&... given) {
    return launch_as(static_cast<typename Tag::Function>(nullptr), Tag::kSource, Tag::name().text(), grid,
                     given...);
  }

  template <typename Arguments>
  void launch(cuda::Kernel kernel, cuda::Element element, int64_t blocks, int64_t shared_bytes,
              const Arguments& arguments) {
    const cuda::KernelName name = cuda::kernel_name(kernel);
    char text[192];
    if (name.arguments == nullptr) {
      std::snprintf(text, sizeof text, "ibq::cuda::%s", name.name);
    } else {
      std::snprintf(text, sizeof text, "ibq::cuda::%s<ibq::cuda::Element(%d)%s>", name.name,
                    static_cast<int>(element), name.arguments);
    }
    launch_as(static_cast<void (*)(Arguments)>(nullptr), cuda::kernel_source(kernel), text,
              {blocks, name.threads, shared_bytes}, arguments);
  }

 private:
  // Arguments become the kernel's parameters first, as the compiler would do it in a launch.
  template <typename... Parameters, typename... Given>
  int launch_as(void (*)(Parameters...), const char* source, const char* name, const cuda::Grid& grid,
                const Given&... given) {
    static_assert(sizeof...(Parameters) == sizeof...(Given), "a launch gives every parameter of its kernel");
    if (status_ != cuda::kSuccess) return status_;
    const std::tuple<Parameters...> parameters(given...);
    return keep(std::apply(
        [&](const auto&... parameter) {
          const Argument arguments[] = {{&parameter, sizeof parameter}...};
          return launcher_launch(source, name, grid, arguments, sizeof...(Parameters));
        },
        parameters));
  }

  int keep(int status) {
    if (status_ == cuda::kSuccess) status_ = status;
    return status_;
  }

  int status_ = cuda::kSuccess;
};

}  // namespace ibq::cupy
