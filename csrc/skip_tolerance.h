// The process's skip tolerance: the share of a row's softmax mass that kernels may leave out of gradients and
// readouts to skip work. Read at every call, set from Python (ibq_fast.ops.set_skip_tolerance).
#pragma once

#include <atomic>

#include "kernels/cpu/codebook.h"

namespace ibq {

inline std::atomic<float> skip_tolerance{cpu::kNegligibleMass};

}  // namespace ibq
