// The codebook kernels compiled for avx2 (flags in CMakeLists.txt).
#define IBQ_ISA_NAME "avx2"
#define IBQ_KERNELS kernels_avx2
#include "kernels/cpu/isa.inl"
