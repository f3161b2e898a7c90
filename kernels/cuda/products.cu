// The products of product_kernel.cuh, or the Hopper ones in their place. UNRUN ON A GPU.
#include "hopper/hopper.h"
#include "launches.h"
#include "product_kernel.cuh"

namespace ibq::cuda {
namespace {

template <Element kElement>
cudaError_t launch_product(const Launch& launch, const ProductArguments& args) {
  return launch.kernel == Kernel::product ? launch_instance(product_kernel<kElement, false>, launch, args)
                                          : launch_instance(product_kernel<kElement, true>, launch, args);
}

}  // namespace

cudaError_t launch_kernel(const Launch& launch, const ProductArguments& args) {
  if (hopper::takes_over(launch.kernel, launch.element, args))
    return static_cast<cudaError_t>(hopper::launch(launch.kernel, args, launch.stream));
  switch (launch.element) {
    case Element::f32:
      return launch_product<Element::f32>(launch, args);
    case Element::bf16:
      return launch_product<Element::bf16>(launch, args);
    default:
      return launch_product<Element::f16>(launch, args);
  }
}

}  // namespace ibq::cuda
