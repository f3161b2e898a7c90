// Whether the current device runs the Hopper kernels, and tensor maps for them. Host code only.
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "hopper.h"
#include "stream_plan.h"

namespace {

using namespace ibq::cuda::hopper;

bool allowed_by_environment() {
  const char* said = std::getenv("IBQ_FAST_HOPPER");
  return said == nullptr || std::strcmp(said, "off") != 0;
}

std::atomic<bool> allowed{allowed_by_environment()};

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
static_assert(CU_TENSOR_MAP_DATA_TYPE_FLOAT16 == 6 && CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 == 9);
static_assert(CU_TENSOR_MAP_INTERLEAVE_NONE == 0 && CU_TENSOR_MAP_SWIZZLE_128B == 3);
static_assert(CU_TENSOR_MAP_L2_PROMOTION_L2_256B == 3 && CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE == 0);

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned kSince = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince,
                                                             cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function)
                                                                      : nullptr;
}

Encode encode_function() {
  static const Encode encode = find_encode();
  return encode;
}

}  // namespace

namespace ibq::cuda::hopper {

const char* refusal(int64_t N, int64_t K, int64_t D, ibq_dtype dtype, uint64_t address_bits) {
  if (!allowed) return "switched off by IBQ_FAST_HOPPER=off or ibq_cuda_allow_hopper";
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
    return "no CUDA device";
  if (major != 9) return "compute capability is not 9.x";
  const char* reason = stream_refusal(N, K, D, dtype == IBQ_BF16 || dtype == IBQ_F16, address_bits);
  if (reason != nullptr) return reason;
  return encode_function() == nullptr ? "the driver has no cuTensorMapEncodeTiled" : nullptr;
}

int encode_tensor_map(const TensorMapRequest& request, TensorMap* map) {
  if (encode_function() == nullptr) return cudaErrorNotSupported;
  CUtensorMap encoded;
  const CUresult result = encode_function()(&encoded, static_cast<CUtensorMapDataType>(request.data_type), 2,
                                            const_cast<void*>(request.address), request.dimensions,
                                            &request.row_bytes, request.box, request.element_strides,
                                            static_cast<CUtensorMapInterleave>(request.interleave),
                                            static_cast<CUtensorMapSwizzle>(request.swizzle),
                                            static_cast<CUtensorMapL2promotion>(request.l2_promotion),
                                            static_cast<CUtensorMapFloatOOBfill>(request.out_of_bounds));
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  std::memcpy(map, &encoded, sizeof(encoded));
  return cudaSuccess;
}

}  // namespace ibq::cuda::hopper

void ibq_cuda_allow_hopper(int allow) { allowed = allow != 0; }

const char* ibq_cuda_hopper_refusal(const void* z, const void* codebook, int64_t N, int64_t K, int64_t D,
                                    ibq_dtype dtype) {
  return refusal(N, K, D, dtype, reinterpret_cast<uintptr_t>(z) | reinterpret_cast<uintptr_t>(codebook));
}
