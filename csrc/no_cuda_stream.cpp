// Stands in for the one function that a torch built for CUDA exports and others lack, so that the CUDA glue
// can be linked and loaded beside them: part of the link check alone, of no module that is installed.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return AOTI_TORCH_FAILURE; }
