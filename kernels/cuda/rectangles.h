// S in rectangles: the sweep over one, what is added up after it, and the products with its weights. Plain
// C++; the parts that the forward (softmax_forward.h), the backward (softmax_backward.h) and the cross
// entropy (cross_entropy.h) share.
#pragma once

#include "ibq_cuda.h"
#include "launch_list.h"

namespace ibq::cuda {

inline Element element_of(ibq_dtype dtype) {
  return dtype == IBQ_F32 ? Element::f32 : dtype == IBQ_BF16 ? Element::bf16 : Element::f16;
}

inline bool is_valid(const ibq_problem& p) {
  constexpr int64_t kLargest = int64_t{1} << 31;
  if (p.dtype != IBQ_F32 && p.dtype != IBQ_BF16 && p.dtype != IBQ_F16) return false;
  return p.N >= 0 && p.K >= 1 && p.K < kLargest - kSweepTileCodes && p.D >= 1 && p.D < kLargest / 4 &&
         p.N < (int64_t{1} << 62) / (p.D * 4);
}

inline uint64_t alignment_bits(const void* p) {
  return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(p));
}

// A problem as the kernels see it.
struct Operands {
  const ibq_problem& problem;
  Element element;
  const unsigned char *z, *codebook;
  int64_t row_bytes;
  const float* bias;  // with the norms once prepare_bias has run

  explicit Operands(const ibq_problem& p)
      : problem(p),
        element(element_of(p.dtype)),
        z(static_cast<const unsigned char*>(p.z)),
        codebook(static_cast<const unsigned char*>(p.codebook)),
        row_bytes(p.D * bytes_of(element)),
        bias(p.bias) {}

  int access_of(const void* a, const void* b, const void* c = nullptr) const {
    return widest_access(alignment_bits(a) | alignment_bits(b) | alignment_bits(c) |
                         static_cast<uint64_t>(row_bytes));
  }
};

// Room for one rectangle and what is made of it.
struct RectangleWorkspace {
  Rectangle rectangle;
  unsigned char* weights = nullptr;
  uint8_t* live = nullptr;
  float *row_parts = nullptr, *column_parts = nullptr, *partial = nullptr;
};

struct RectangleNeeds {
  bool weights, row_parts, column_parts, partial;
};

// Splits of a rectangle's sweep times its rows never exceed this.
inline int64_t row_part_rows(int64_t rows, const LaunchLimits& limits) {
  return round_up(rows, kSweepTileRows) + (kMaxWaves * limits.device.multiprocessors + 1) * kSweepTileRows;
}

inline RectangleWorkspace take_rectangle(Arena& arena, const Operands& in, const RectangleNeeds& needs,
                                         const LaunchLimits& limits) {
  RectangleWorkspace w;
  w.rectangle = plan_rectangle(in.problem.N, in.problem.K, weight_bytes(in.element), limits.weights_bytes,
                               limits.rectangle_rows);
  const int64_t rows = w.rectangle.rows, codes = w.rectangle.codes;
  if (needs.weights) {
    w.weights = arena.take<unsigned char>(rows * codes * weight_bytes(in.element));
    w.live = arena.take<uint8_t>(rows / kSweepTileRows * (codes / kSweepTileCodes));
  }
  if (needs.row_parts) w.row_parts = arena.take<float>(2 * row_part_rows(rows, limits));
  if (needs.column_parts) w.column_parts = arena.take<float>(rows / kSweepTileRows * codes);
  if (needs.partial) w.partial = arena.take<float>(partial_floats(in.element, limits.device));
  return w;
}

// Calls body(first_row, rows, first_code, codes) for every rectangle, codes innermost.
template <typename Body>
void for_rectangles(const Rectangle& r, int64_t N, int64_t K, const Body& body) {
  for (int64_t row = 0; row < N; row += r.rows)
    for (int64_t code = 0; code < K; code += r.codes)
      body(row, smaller(r.rows, N - row), code, smaller(r.codes, K - code));
}

inline int64_t blocks_for(int64_t items, int64_t per_block) { return ceil_div(items, per_block); }

// bias - norm_weight |E|^2 in `out`, when there are norms.
template <typename Queue>
void prepare_bias(Queue& queue, Operands& in, float* out) {
  if (in.problem.norm_weight == 0.0f) return;
  const NormBiasArguments args{in.codebook,  in.problem.bias, in.problem.norm_weight,
                               in.problem.K, in.problem.D,    out};
  queue.launch(Kernel::norm_bias, in.element, blocks_for(in.problem.K, kRowThreads / 32), 0, args);
  in.bias = out;
}

// What all sweeps of a call share.
inline SweepArguments sweep_arguments(const Operands& in, const RowConstants* rows, const void* cotangents) {
  SweepArguments args{};
  args.z = in.z;
  args.cotangents = static_cast<const unsigned char*>(cotangents);
  args.codebook = in.codebook;
  args.bias = in.bias;
  args.rows = rows;
  args.scale = in.problem.scale;
  args.inverse_tau = 1.0f;
  args.gap = negligible_gap(in.problem.K, in.problem.dropped_mass);
  args.N = in.problem.N;
  args.K = in.problem.K;
  args.row_bytes = in.row_bytes;
  args.access = in.access_of(in.z, in.codebook, cotangents);
  return args;
}

inline bool has_products(Kernel kernel) {
  return kernel == Kernel::sweep_select || kernel == Kernel::sweep_both;
}

// Runs a sweep over one rectangle. args: from sweep_arguments, with the outputs that the call wants set.
template <typename Queue>
SweepPlan run_sweep(Queue& queue, Kernel kernel, const Operands& in, SweepArguments& args, int64_t row,
                    int64_t rows, int64_t code, int64_t codes, const LaunchLimits& limits) {
  args.first_row = row;
  args.first_code = code;
  args.plan = plan_sweep(rows, codes, in.problem.D, in.element, has_products(kernel) ? 2 : 1, limits.device);
  args.weights_pitch = args.plan.schedule.code_tiles * kSweepTileCodes;
  if (args.plan.stages == 0) {
    queue.refuse();
  } else {
    queue.launch(kernel, in.element, args.plan.schedule.blocks(), args.plan.shared_bytes, args);
  }
  return args.plan;
}

// Adds the column sums of a rectangle to `out` [K].
template <typename Queue>
void add_columns(Queue& queue, const SweepArguments& sweep, int64_t codes, double factor, float* out) {
  const TileSchedule& tiles = sweep.plan.schedule;
  const AddColumnsArguments args{
      sweep.column_parts,    tiles.row_tiles, tiles.code_tiles * kSweepTileCodes, codes, factor,
      out + sweep.first_code};
  queue.launch(Kernel::add_columns, Element::f32, blocks_for(codes, kRowThreads), 0, args);
}

// out += factor * W B (rows of the rectangle) or factor * W^T B (its codes).
template <typename Queue>
void run_product(Queue& queue, bool transposed, const Operands& in, const RectangleWorkspace& w,
                 const SweepArguments& sweep, int64_t rows, int64_t codes, float factor, bool deterministic,
                 float* out, const LaunchLimits& limits) {
  const TileSchedule& tiles = sweep.plan.schedule;
  ProductArguments args{};
  args.weights = w.weights;
  args.weights_pitch = sweep.weights_pitch;
  args.weight_rows = tiles.row_tiles * kSweepTileRows;
  args.live = w.live;
  args.code_tiles = tiles.code_tiles;
  args.operand = transposed ? in.z : in.codebook;
  args.operand_row = transposed ? sweep.first_row : sweep.first_code;
  args.operand_rows = transposed ? in.problem.N : in.problem.K;
  args.row_bytes = in.row_bytes;
  args.access = in.access_of(args.operand, nullptr);
  args.rows = transposed ? codes : rows;
  args.D = in.problem.D;
  args.factor = factor;
  args.plan = plan_product(args.rows, transposed ? rows : codes, args.D, in.element, limits.device);
  args.out = out + (transposed ? sweep.first_code : sweep.first_row) * args.D;
  const bool split = args.plan.splits > 1;
  args.atomic = split && !deterministic;
  args.partial = split && deterministic ? w.partial : nullptr;
  if (args.plan.stages == 0) {
    queue.refuse();
    return;
  }
  queue.launch(transposed ? Kernel::product_transposed : Kernel::product, in.element, args.plan.blocks(),
               args.plan.shared_bytes, args);
  if (args.partial == nullptr) return;
  const AddPartsArguments parts{args.partial, args.rows * args.D, args.plan.splits, factor, args.out};
  queue.launch(Kernel::add_parts, in.element, smaller(blocks_for(parts.count, kRowThreads), 2048), 0, parts);
}

}  // namespace ibq::cuda
