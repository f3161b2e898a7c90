// Launches the sweeps and products of the training sequences. NEVER RUN ON A GPU. Compiled for sm_90a alone.
#include <cuda_runtime.h>

#include "hopper.h"
#include "product_kernel.cuh"
#include "substitutes.h"
#include "sweep_kernel.cuh"

namespace ibq::cuda::hopper {
namespace {

struct Device {
  int multiprocessors, shared_limit;
};

cudaError_t current_device(Device* found) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error;
}

template <typename Parameters>
int launch_kernel(void (*kernel)(Parameters), int64_t blocks, int64_t shared_bytes, const Parameters& p,
                  void* stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kStreamThreads, static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

template <bool kTransposed>
int launch_product(int64_t blocks, int64_t shared_bytes, const ProductParameters& p, void* stream) {
  switch (p.args.D) {
    case 64:
      return launch_kernel(hopper_product_kernel<true, kTransposed, 1>, blocks, shared_bytes, p, stream);
    case 128:
      return launch_kernel(hopper_product_kernel<true, kTransposed, 2>, blocks, shared_bytes, p, stream);
    case 192:
      return launch_kernel(hopper_product_kernel<true, kTransposed, 3>, blocks, shared_bytes, p, stream);
    default:
      return launch_kernel(hopper_product_kernel<true, kTransposed, 4>, blocks, shared_bytes, p, stream);
  }
}

}  // namespace

bool takes_over(Kernel kernel, Element element, const SweepArguments& args) {
  return takes(kernel, element, args) && refusal(1, 1, kPanelColumns, IBQ_BF16, 0) == nullptr;
}

bool takes_over(Kernel kernel, Element element, const ProductArguments& args) {
  return takes(kernel, element, args) && refusal(1, 1, kPanelColumns, IBQ_BF16, 0) == nullptr;
}

int launch(Kernel kernel, const SweepArguments& args, void* stream) {
  Device device{};
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  SweepParameters p{};
  const int failed = prepare(kernel, args, device.shared_limit, encode_tensor_map, &p);
  if (failed != 0) return failed;
  if (p.plan.stages == 0) return cudaErrorInvalidConfiguration;
  const int64_t blocks = stream_blocks(args.plan.schedule, device.multiprocessors);
  switch (kernel) {
    case Kernel::sweep_probability:
      return launch_kernel(hopper_sweep_kernel<Sweep::probability>, blocks, p.plan.shared_bytes, p, stream);
    case Kernel::sweep_select:
      return launch_kernel(hopper_sweep_kernel<Sweep::select>, blocks, p.plan.shared_bytes, p, stream);
    case Kernel::sweep_entropy:
      return launch_kernel(hopper_sweep_kernel<Sweep::entropy>, blocks, p.plan.shared_bytes, p, stream);
    default:
      return launch_kernel(hopper_sweep_kernel<Sweep::both>, blocks, p.plan.shared_bytes, p, stream);
  }
}

int launch(Kernel kernel, const ProductArguments& args, void* stream) {
  Device device{};
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  ProductParameters p{};
  int64_t shared_bytes = 0;
  const int failed = prepare(kernel, args, device.shared_limit, encode_tensor_map, &p, &shared_bytes);
  if (failed != 0) return failed;
  if (p.stages == 0) return cudaErrorInvalidConfiguration;
  const int64_t blocks = args.plan.row_tiles * args.plan.splits;
  return kernel == Kernel::product_transposed ? launch_product<true>(blocks, shared_bytes, p, stream)
                                              : launch_product<false>(blocks, shared_bytes, p, stream);
}

}  // namespace ibq::cuda::hopper
