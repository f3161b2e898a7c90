// The sweeps of sweep_kernel.cuh for bf16 operands. UNRUN ON A GPU.
#include "launches.h"
#include "sweep_kernel.cuh"

namespace ibq::cuda {

cudaError_t launch_sweep_bf16(const Launch& launch, const SweepArguments& args) {
  switch (launch.kernel) {
    case Kernel::sweep_probability:
      return launch_instance(sweep_kernel<Element::bf16, Sweep::probability>, launch, args);
    case Kernel::sweep_select:
      return launch_instance(sweep_kernel<Element::bf16, Sweep::select>, launch, args);
    case Kernel::sweep_entropy:
      return launch_instance(sweep_kernel<Element::bf16, Sweep::entropy>, launch, args);
    case Kernel::sweep_both:
      return launch_instance(sweep_kernel<Element::bf16, Sweep::both>, launch, args);
    case Kernel::sweep_cross:
      return launch_instance(sweep_kernel<Element::bf16, Sweep::cross>, launch, args);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace ibq::cuda
