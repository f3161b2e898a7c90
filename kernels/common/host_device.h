// What lets one header serve a C++ compiler, nvcc and the run-time compiler NVRTC.
//
// IBQ_HD marks a function that runs on host and device alike. NVRTC has no system headers, so the
// fixed-width integers come from here as well.
#pragma once

#if defined(__CUDACC_RTC__)
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
#else
#include <cmath>
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define IBQ_HD __host__ __device__ __forceinline__
#else
#define IBQ_HD inline
#endif

namespace ibq {

// Bit patterns rather than INFINITY and NAN: neither needs a header, and -ffast-math keeps its hands off.
union FloatBits {
  uint32_t bits;
  float value;
};

IBQ_HD float positive_infinity() {
  FloatBits b;
  b.bits = 0x7f800000u;
  return b.value;
}

IBQ_HD float negative_infinity() {
  FloatBits b;
  b.bits = 0xff800000u;
  return b.value;
}

IBQ_HD float quiet_nan() {
  FloatBits b;
  b.bits = 0x7fc00000u;
  return b.value;
}

IBQ_HD bool is_nan(float x) { return x != x; }

template <typename T>
IBQ_HD T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace ibq
