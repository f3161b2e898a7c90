// The search sweep with the sums that training needs (search_kernel.cuh). UNRUN ON A GPU.
#include "hopper/hopper.h"
#include "launches.h"
#include "search_kernel.cuh"

namespace ibq::cuda {
namespace {

template <Element kElement>
cudaError_t launch_search(const Launch& launch, const SearchArguments& args) {
  switch (launch.kernel) {
    case Kernel::search:
      return launch_instance(codebook_search_kernel<kElement, true>, launch, args);
    case Kernel::search_entropy:
      return launch_instance(codebook_search_kernel<kElement, true, Extra::entropy>, launch, args);
    case Kernel::search_target:
      return launch_instance(codebook_search_kernel<kElement, true, Extra::target>, launch, args);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_kernel(const Launch& launch, const SearchArguments& args) {
  if (hopper::takes_over(launch.kernel, launch.element, args))
    return static_cast<cudaError_t>(hopper::launch(launch.kernel, launch.element, args, launch.stream));
  switch (launch.element) {
    case Element::f32:
      return launch_search<Element::f32>(launch, args);
    case Element::bf16:
      return launch_search<Element::bf16>(launch, args);
    default:
      return launch_search<Element::f16>(launch, args);
  }
}

}  // namespace ibq::cuda
