// Launches the searches, sweeps and products of the training sequences. NEVER RUN ON A GPU. Compiled for
// sm_90a alone.
#include <cuda_runtime.h>

#include "hopper.h"
#include "product_kernel.cuh"
#include "search_kernel.cuh"
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
  switch (product_panels(p.args.D)) {
    case 1:
      return launch_kernel(hopper_product_kernel<true, kTransposed, 1>, blocks, shared_bytes, p, stream);
    case 2:
      return launch_kernel(hopper_product_kernel<true, kTransposed, 2>, blocks, shared_bytes, p, stream);
    case 3:
      return launch_kernel(hopper_product_kernel<true, kTransposed, 3>, blocks, shared_bytes, p, stream);
    default:
      return launch_kernel(hopper_product_kernel<true, kTransposed, 4>, blocks, shared_bytes, p, stream);
  }
}

template <bool kBf16>
int launch_search(Kernel kernel, int64_t blocks, const SearchParameters& p, bool streamed, void* stream) {
  const int64_t bytes = p.plan.shared_bytes;
  if (kernel == Kernel::search)
    return launch_kernel(hopper_search_kernel<kBf16, true>, blocks, bytes, p, stream);
  if (kernel == Kernel::search_entropy)
    return launch_kernel(hopper_search_kernel<kBf16, true, Extra::entropy>, blocks, bytes, p, stream);
  if (streamed)
    return launch_kernel(hopper_search_kernel<kBf16, true, Extra::target, StreamedRows>, blocks, bytes, p,
                         stream);
  return launch_kernel(hopper_search_kernel<kBf16, true, Extra::target>, blocks, bytes, p, stream);
}

}  // namespace

bool takes_over(Kernel kernel, Element element, const SearchArguments& args) {
  return takes(kernel, element, args) && refusal(1, 1, kPanelColumns, IBQ_BF16, 0) == nullptr;
}

bool takes_over(Kernel kernel, Element element, const SweepArguments& args) {
  return takes(kernel, element, args) && refusal(1, 1, kPanelColumns, IBQ_BF16, 0) == nullptr;
}

bool takes_over(Kernel kernel, Element element, const ProductArguments& args) {
  return takes(kernel, element, args) && refusal(1, 1, kPanelColumns, IBQ_BF16, 0) == nullptr;
}

int launch(Kernel kernel, Element element, const SearchArguments& args, void* stream) {
  Device device{};
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  SearchParameters p{};
  const int failed = prepare(kernel, element, args, device.shared_limit, encode_tensor_map, &p);
  if (failed != 0) return failed;
  if (p.plan.stages == 0) return cudaErrorInvalidConfiguration;
  const int64_t blocks = stream_blocks(p.schedule, device.multiprocessors);
  const bool streamed = is_streamed(kernel, args.row_bytes);
  return element == Element::bf16 ? launch_search<true>(kernel, blocks, p, streamed, stream)
                                  : launch_search<false>(kernel, blocks, p, streamed, stream);
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
    case Kernel::sweep_cross:
      if (is_streamed(kernel, args.row_bytes))
        return launch_kernel(hopper_sweep_kernel<Sweep::cross, StreamedCodes>, blocks, p.plan.shared_bytes, p,
                             stream);
      return launch_kernel(hopper_sweep_kernel<Sweep::cross>, blocks, p.plan.shared_bytes, p, stream);
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
  const int64_t blocks = args.plan.row_tiles * args.plan.splits * product_column_tiles(args.D);
  return kernel == Kernel::product_transposed ? launch_product<true>(blocks, shared_bytes, p, stream)
                                              : launch_product<false>(blocks, shared_bytes, p, stream);
}

}  // namespace ibq::cuda::hopper
