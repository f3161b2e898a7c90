// Which launches of the portable sequences (launch_list.h) the Hopper kernels take over, and their parameters
// made from the portable kernels' own. Plain C++: the launcher and the tests use the same.
#pragma once

#include "../launch_list.h"
#include "parameters.h"
#include "product_plan.h"
#include "stream_plan.h"

namespace ibq::cuda::hopper {

inline bool takes_operands(int64_t N, int64_t K, int64_t row_bytes, int access, bool streamed) {
  return access == 16 && stream_refusal(N, K, row_bytes / 2, true, 0, streamed) == nullptr;
}

// The kernels of the generator's loss, whose rows are wider than those of a codebook.
inline bool may_stream(Kernel kernel) {
  return kernel == Kernel::search_target || kernel == Kernel::sweep_cross;
}

inline bool is_streamed(Kernel kernel, int64_t row_bytes) {
  return may_stream(kernel) && row_bytes / 2 > kMaxColumns;
}

inline bool takes(Kernel kernel, Element element, const SearchArguments& args) {
  return element != Element::f32 &&
         takes_operands(args.N, args.K, args.row_bytes, args.access, may_stream(kernel));
}

inline bool takes(Kernel kernel, Element element, const SweepArguments& args) {
  return element == Element::bf16 &&
         takes_operands(args.N, args.K, args.row_bytes, args.access, may_stream(kernel));
}

inline bool takes(Kernel, Element element, const ProductArguments& args) {
  return element == Element::bf16 &&
         takes_operands(args.weight_rows, args.operand_rows, args.row_bytes, args.access, true);
}

inline bool has_cotangents(Kernel kernel) {
  return kernel == Kernel::sweep_select || kernel == Kernel::sweep_both;
}

// encode(TensorMapRequest, TensorMap*) returns 0 or an error. A plan without stages does not fit the device.
// Splits are the portable kernel's, whose row tiles are half as high and run two to a multiprocessor.
template <typename Encode>
int prepare(Kernel kernel, Element element, const SearchArguments& args, int64_t shared_limit,
            const Encode& encode, SearchParameters* p) {
  const int64_t D = args.row_bytes / 2;
  const bool bf16 = element == Element::bf16;
  p->plan = is_streamed(kernel, args.row_bytes) ? plan_stream<StreamedRows>(D, 0, shared_limit)
                                                : plan_stream<WideRows>(D, 0, shared_limit);
  p->schedule = args.plan.schedule;
  p->schedule.row_tiles = ceil_div(args.N, int64_t{kSearchRows});
  p->bias = args.bias;
  p->scale = args.scale;
  p->N = args.N;
  p->K = args.K;
  p->split_max = args.split_max;
  p->split_index = args.split_index;
  p->split_sum = args.split_sum;
  p->inverse_tau = args.inverse_tau;
  p->split_tempered_sum = args.split_tempered_sum;
  p->split_tempered_moment = args.split_tempered_moment;
  p->targets = args.targets;
  p->target_logit = args.target_logit;
  p->split_logits = args.split_logits;
  const int error = encode(request_tensor_map(args.z, args.N, D, bf16, kBoxRows), &p->z);
  if (error != 0) return error;
  return encode(request_tensor_map(args.codebook, args.K, D, bf16, kBoxRows), &p->codebook);
}

template <typename Encode>
int prepare(Kernel kernel, const SweepArguments& args, int64_t shared_limit, const Encode& encode,
            SweepParameters* p) {
  const int64_t D = args.row_bytes / 2;
  p->args = args;
  p->plan = has_cotangents(kernel) ? plan_stream<WideRows>(D, exchange_bytes<WideRows>(), shared_limit)
            : is_streamed(kernel, args.row_bytes)
                ? plan_stream<StreamedCodes>(D, exchange_bytes<StreamedCodes>(), shared_limit)
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
  const ProductStages stages = plan_product_stages(product_panels(args.D), shared_limit);
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
