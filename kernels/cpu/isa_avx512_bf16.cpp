// The codebook kernels compiled for avx512_bf16 (flags in CMakeLists.txt).
#define IBQ_ISA_NAME "avx512_bf16"
#define IBQ_KERNELS kernels_avx512_bf16
#include "kernels/cpu/isa.inl"
