// What the CPU implementations of all ops share: the kernels, the thread pool that is lent to them, data
// pointers.
#pragma once

#include "csrc/arguments.h"
#include "kernels/cpu/codebook.h"

namespace ibq {

inline const cpu::Kernels& kernels() {
  const cpu::Kernels* k = cpu::kernels();
  STD_TORCH_CHECK(k != nullptr, "IBQ_FAST_CPU_ISA: expected one of ", cpu::available_isas());
  return *k;
}

// torch's own thread pool, lent to the kernels.
inline cpu::Parallel torch_parallel() {
  cpu::Parallel p;
  p.threads = static_cast<int>(torch::stable::get_num_threads());
  p.run = [](int tasks, void (*body)(void*, int), void* context) {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) body(context, static_cast<int>(t));
    });
  };
  return p;
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline void check_memory(bool ok) {
  STD_TORCH_CHECK(ok, "ibq_fast: not enough memory for the kernel's workspace");
}

}  // namespace ibq
