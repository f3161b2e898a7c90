// The codebook kernels compiled for portable (flags in CMakeLists.txt).
#define IBQ_ISA_NAME "portable"
#define IBQ_KERNELS kernels_portable
#include "kernels/cpu/isa.inl"
