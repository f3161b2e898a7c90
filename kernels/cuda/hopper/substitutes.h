// Which launches of the portable sequences (launch_list.h) the Hopper kernels take over, and their parameters
// made from the portable kernels' own. Plain C++: the launcher and the tests use the same.
#pragma once

#include "../launch_list.h"
#include "product_plan.h"
#include "stream_plan.h"
#include "sweep_parameters.h"

namespace ibq::cuda::hopper {

inline bool takes_operands(Element element, int64_t N, int64_t K, int64_t row_bytes, int access) {
  return element == Element::bf16 && access == 16 && stream_refusal(N, K, row_bytes / 2, true, 0) == nullptr;
}

inline bool takes(Kernel kernel, Element element, const SweepArguments& args) {
  return kernel != Kernel::sweep_cross &&
         takes_operands(element, args.N, args.K, args.row_bytes, args.access);
}

inline bool takes(Kernel, Element element, const ProductArguments& args) {
  return takes_operands(element, args.weight_rows, args.operand_rows, args.row_bytes, args.access);
}

inline bool has_cotangents(Kernel kernel) {
  return kernel == Kernel::sweep_select || kernel == Kernel::sweep_both;
}

// encode(TensorMapRequest, TensorMap*) returns 0 or an error. A plan without stages does not fit the device.
template <typename Encode>
int prepare(Kernel kernel, const SweepArguments& args, int64_t shared_limit, const Encode& encode,
            SweepParameters* p) {
  const int64_t D = args.row_bytes / 2;
  p->args = args;
  p->plan = has_cotangents(kernel) ? plan_stream<WideRows>(D, exchange_bytes<WideRows>(), shared_limit)
                                   : plan_stream<WideCodes>(D, exchange_bytes<WideCodes>(), shared_limit);
  int error = encode(request_tensor_map(args.z, args.N, D, true, kBoxRows), &p->z);
  if (error == 0) error = encode(request_tensor_map(args.codebook, args.K, D, true, kBoxRows), &p->codebook);
  if (error == 0 && has_cotangents(kernel))
    error = encode(request_tensor_map(args.cotangents, args.N, D, true, kBoxRows), &p->cotangents);
  return error;
}

// Sets *shared_bytes; 0 stages do not fit the device.
template <typename Encode>
int prepare(Kernel kernel, const ProductArguments& args, int64_t shared_limit, const Encode& encode,
            ProductParameters* p, int64_t* shared_bytes) {
  const ProductStages stages = plan_product_stages(args.D, shared_limit);
  p->args = args;
  p->stages = stages.count;
  *shared_bytes = stages.shared_bytes;
  const int box_rows = kernel == Kernel::product_transposed ? kStageDepth : kProductTileRows;
  const int error = encode(
      request_tensor_map(args.weights, args.weight_rows, args.weights_pitch, true, box_rows), &p->weights);
  if (error != 0) return error;
  return encode(request_tensor_map(args.operand, args.operand_rows, args.D, true, kStageDepth), &p->operand);
}

}  // namespace ibq::cuda::hopper
