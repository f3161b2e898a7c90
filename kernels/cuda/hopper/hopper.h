// Host side of the Hopper kernels: whether they can be used, and their launches. Called by the launchers
// behind ibq_cuda.h; no CUDA header is needed to include this file.
#pragma once

#include "../ibq_cuda.h"
#include "../launch_list.h"
#include "tensor_map.h"

namespace ibq::cuda::hopper {

// Why the Hopper kernels do not take operands of these sizes on the current device, or null if they do.
// address_bits: all base addresses or-ed together. A string literal, valid for ever.
const char* refusal(int64_t N, int64_t K, int64_t D, ibq_dtype dtype, uint64_t address_bits);

// cuTensorMapEncodeTiled, found through the runtime so that nothing links libcuda. A cudaError_t.
int encode_tensor_map(const TensorMapRequest& request, TensorMap* map);

// Whether a launch of the training sequences goes to the Hopper kernels: `takes` (substitutes.h) on a device
// that has them. Their splits and workspace are the portable kernels', so each launch decides for itself.
bool takes_over(Kernel kernel, Element element, const SearchArguments& args);
bool takes_over(Kernel kernel, Element element, const SweepArguments& args);
bool takes_over(Kernel kernel, Element element, const ProductArguments& args);
int launch(Kernel kernel, Element element, const SearchArguments& args, void* stream);
int launch(Kernel kernel, const SweepArguments& args, void* stream);
int launch(Kernel kernel, const ProductArguments& args, void* stream);

// As in ibq_cuda.h, for what refusal() takes.
int codebook_search_workspace(int64_t N, int64_t K, int64_t D, int with_lse, int64_t* bytes);
int codebook_search(const void* z, const void* codebook, const float* bias, float scale, int64_t N, int64_t K,
                    int64_t D, ibq_dtype dtype, int64_t* indices, float* max, float* lse, void* workspace,
                    int64_t workspace_bytes, void* stream);

}  // namespace ibq::cuda::hopper
