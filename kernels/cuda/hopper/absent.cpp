// Stands in for hopper.h's functions in a library that holds no code for compute capability 9.0.
#include "hopper.h"

namespace ibq::cuda::hopper {

namespace {
constexpr int kNotSupported = 801;  // cudaErrorNotSupported
}

const char* refusal(int64_t, int64_t, int64_t, ibq_dtype, uint64_t) {
  return "built without code for sm_90a";
}

int encode_tensor_map(const TensorMapRequest&, TensorMap*) { return kNotSupported; }

bool takes_over(Kernel, Element, const SearchArguments&) { return false; }
bool takes_over(Kernel, Element, const SweepArguments&) { return false; }
bool takes_over(Kernel, Element, const ProductArguments&) { return false; }
int launch(Kernel, Element, const SearchArguments&, void*) { return kNotSupported; }
int launch(Kernel, const SweepArguments&, void*) { return kNotSupported; }
int launch(Kernel, const ProductArguments&, void*) { return kNotSupported; }

int codebook_search_workspace(int64_t, int64_t, int64_t, int, int64_t*) { return kNotSupported; }

int codebook_search(const void*, const void*, const float*, float, int64_t, int64_t, int64_t, ibq_dtype,
                    int64_t*, float*, float*, void*, int64_t, void*) {
  return kNotSupported;
}

}  // namespace ibq::cuda::hopper

void ibq_cuda_allow_hopper(int) {}

const char* ibq_cuda_hopper_refusal(const void*, const void*, int64_t, int64_t, int64_t, ibq_dtype) {
  return ibq::cuda::hopper::refusal(0, 0, 0, IBQ_F32, 0);
}
