// The codebook kernels compiled for avx512 (flags in CMakeLists.txt).
#define IBQ_ISA_NAME "avx512"
#define IBQ_KERNELS kernels_avx512
#include "kernels/cpu/isa.inl"
