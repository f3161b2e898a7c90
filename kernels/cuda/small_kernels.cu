// The kernels between the sweeps: rows_kernels.cuh, columns_kernels.cuh, scatter_kernel.cuh. UNRUN ON A GPU.
#include "columns_kernels.cuh"
#include "launches.h"
#include "rows_kernels.cuh"
#include "scatter_kernel.cuh"

namespace ibq::cuda {

#define IBQ_LAUNCH_BY_ELEMENT(Arguments, kernel)                           \
  cudaError_t launch_kernel(const Launch& launch, const Arguments& args) { \
    switch (launch.element) {                                              \
      case Element::f32:                                                   \
        return launch_instance(kernel<Element::f32>, launch, args);        \
      case Element::bf16:                                                  \
        return launch_instance(kernel<Element::bf16>, launch, args);       \
      default:                                                             \
        return launch_instance(kernel<Element::f16>, launch, args);        \
    }                                                                      \
  }
#define IBQ_LAUNCH(Arguments, kernel)                                      \
  cudaError_t launch_kernel(const Launch& launch, const Arguments& args) { \
    return launch_instance(kernel, launch, args);                          \
  }

IBQ_LAUNCH_BY_ELEMENT(RowConstantsArguments, row_constants_kernel)
IBQ_LAUNCH_BY_ELEMENT(WinnersArguments, winners_kernel)
IBQ_LAUNCH_BY_ELEMENT(ScatterArguments, scatter_kernel)
IBQ_LAUNCH_BY_ELEMENT(NormBiasArguments, norm_bias_kernel)
IBQ_LAUNCH_BY_ELEMENT(NormGradientArguments, norm_gradient_kernel)
IBQ_LAUNCH(StatisticsArguments, statistics_kernel)
IBQ_LAUNCH(AddRowsArguments, add_rows_kernel)
IBQ_LAUNCH(AddPartsArguments, add_parts_kernel)
IBQ_LAUNCH(AddColumnsArguments, add_columns_kernel)
IBQ_LAUNCH(CenterArguments, center_kernel)

}  // namespace ibq::cuda
