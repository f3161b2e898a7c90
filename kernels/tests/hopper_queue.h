// The launch sequences of kernels/cuda with the Hopper kernels where `takes` (substitutes.h) says so, on
// their emulator; the rest as EmulatedQueue does.
#pragma once

#include "simt_queue.h"

#include "../cuda/hopper/product_kernel.cuh"
#include "../cuda/hopper/search_kernel.cuh"
#include "../cuda/hopper/substitutes.h"
#include "../cuda/hopper/sweep_kernel.cuh"
#include "check.h"

namespace ibq::test {

class HopperQueue {
 public:
  HopperQueue(const char* name, int multiprocessors, int64_t shared,
              cuda::hopper::emulator::Delivery delivery)
      : portable_(emulator::kWarpByWarp),
        name_(name),
        multiprocessors_(multiprocessors),
        shared_(shared),
        delivery_(delivery) {}
  int taken = 0;
  bool searches = true;  // false: left to the portable kernel

  void refuse() { portable_.refuse(); }
  void fill(void* at, int byte, int64_t bytes) { portable_.fill(at, byte, bytes); }
  template <typename Arguments>
  void launch(Kernel kernel, Element element, int64_t blocks, int64_t shared_bytes, const Arguments& args) {
    portable_.launch(kernel, element, blocks, shared_bytes, args);
  }

  void launch(Kernel kernel, Element element, int64_t blocks, int64_t shared_bytes,
              const SearchArguments& args) {
    if (!searches) return portable_.launch(kernel, element, blocks, shared_bytes, args);
    CHECK(hopper::takes(kernel, element, args), "%s: search not taken", name_);
    hopper::SearchParameters p{};
    hopper::prepare(kernel, element, args, shared_, encode, &p);
    CHECK(p.plan.stages > 0, "%s: no plan of a search", name_);
    const int64_t taking = hopper::stream_blocks(p.schedule, multiprocessors_);
    const bool streamed = hopper::is_streamed(kernel, args.row_bytes);
    element == Element::bf16 ? search<true>(kernel, taking, p, streamed)
                             : search<false>(kernel, taking, p, streamed);
  }

  void launch(Kernel kernel, Element element, int64_t, int64_t, const SweepArguments& args) {
    CHECK(hopper::takes(kernel, element, args), "%s: sweep not taken", name_);
    hopper::SweepParameters p{};
    hopper::prepare(kernel, args, shared_, encode, &p);
    CHECK(p.plan.stages > 0, "%s: no plan", name_);
    run(hopper::stream_blocks(args.plan.schedule, multiprocessors_), p.plan.shared_bytes, [&] {
      if (kernel == Kernel::sweep_probability) hopper::hopper_sweep_kernel<Sweep::probability>(p);
      if (kernel == Kernel::sweep_select) hopper::hopper_sweep_kernel<Sweep::select>(p);
      if (kernel == Kernel::sweep_entropy) hopper::hopper_sweep_kernel<Sweep::entropy>(p);
      if (kernel == Kernel::sweep_both) hopper::hopper_sweep_kernel<Sweep::both>(p);
      if (kernel != Kernel::sweep_cross) return;
      hopper::is_streamed(kernel, args.row_bytes)
          ? hopper::hopper_sweep_kernel<Sweep::cross, hopper::StreamedCodes>(p)
          : hopper::hopper_sweep_kernel<Sweep::cross>(p);
    });
  }

  void launch(Kernel kernel, Element element, int64_t, int64_t, const ProductArguments& args) {
    CHECK(hopper::takes(kernel, element, args), "%s: product not taken", name_);
    hopper::ProductParameters p{};
    int64_t shared_bytes = 0;
    hopper::prepare(kernel, args, shared_, encode, &p, &shared_bytes);
    CHECK(p.stages > 0, "%s: no stages", name_);
    const bool transposed = kernel == Kernel::product_transposed;
    const auto either = [&](auto straight, auto turned) {
      run(args.plan.row_tiles * args.plan.splits * hopper::product_column_tiles(args.D), shared_bytes,
          [&] { transposed ? turned(p) : straight(p); });
    };
    using hopper::hopper_product_kernel;
    const int panels = hopper::product_panels(args.D);
    if (panels == 1) either(hopper_product_kernel<true, false, 1>, hopper_product_kernel<true, true, 1>);
    if (panels == 2) either(hopper_product_kernel<true, false, 2>, hopper_product_kernel<true, true, 2>);
    if (panels == 3) either(hopper_product_kernel<true, false, 3>, hopper_product_kernel<true, true, 3>);
    if (panels == 4) either(hopper_product_kernel<true, false, 4>, hopper_product_kernel<true, true, 4>);
  }

 private:
  EmulatedQueue portable_;
  const char* name_;
  int multiprocessors_;
  int64_t shared_;
  cuda::hopper::emulator::Delivery delivery_;

  static int encode(const hopper::TensorMapRequest& request, hopper::TensorMap* map) {
    *map = hopper::emulator::encode(request);
    return 0;
  }

  template <typename Body>
  void run(int64_t blocks, int64_t shared_bytes, const Body& body) {
    ++taken;
    hopper::emulator::launch(blocks, hopper::kStreamThreads, shared_bytes, emulator::kWarpByWarp, delivery_,
                             body);
  }

  template <bool kBf16>
  void search(Kernel kernel, int64_t blocks, const hopper::SearchParameters& p, bool streamed) {
    using namespace hopper;
    run(blocks, p.plan.shared_bytes, [&] {
      if (kernel == Kernel::search) hopper_search_kernel<kBf16, true>(p);
      if (kernel == Kernel::search_entropy) hopper_search_kernel<kBf16, true, Extra::entropy>(p);
      if (kernel != Kernel::search_target) return;
      streamed ? hopper_search_kernel<kBf16, true, Extra::target, StreamedRows>(p)
               : hopper_search_kernel<kBf16, true, Extra::target>(p);
    });
  }
};

}  // namespace ibq::test
