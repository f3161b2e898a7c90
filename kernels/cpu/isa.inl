// The body of one instruction set's translation unit; the including file defines IBQ_ISA_NAME and the
// name of its Kernels object. Everything lives in an anonymous namespace: see simd.h.
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "kernels/cpu/choice_api.h"
#include "kernels/cpu/codebook.h"
#include "kernels/cpu/cross_entropy_api.h"
#include "kernels/cpu/decode_api.h"

namespace ibq::cpu {
namespace {
#include "kernels/cpu/simd.h"
// clang-format off: order matters
#include "kernels/cpu/pack.h"
#include "kernels/cpu/narrow.h"
#include "kernels/cpu/tile.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/kept_logits.h"
#include "kernels/cpu/candidates.h"
#include "kernels/cpu/forward.h"
#include "kernels/cpu/forward_sweeps.h"
#include "kernels/cpu/run_forward.h"
#include "kernels/cpu/search.h"
#include "kernels/cpu/exact_search.h"
#include "kernels/cpu/backward.h"
#include "kernels/cpu/run_backward.h"
#include "kernels/cpu/entry.h"
#include "kernels/cpu/group_tile.h"
#include "kernels/cpu/cross_entropy.h"
#include "kernels/cpu/random.h"
#include "kernels/cpu/choice.h"
#include "kernels/cpu/crew.h"
#include "kernels/cpu/skinny.h"
#include "kernels/cpu/attend.h"
#include "kernels/cpu/decode.h"
// clang-format on
}  // namespace

extern const Kernels IBQ_KERNELS;
const Kernels IBQ_KERNELS = {IBQ_ISA_NAME,
                             &forward,
                             &backward,
                             &tile_grid,
                             &candidate_bytes,
                             kMR,
                             kBlock,
                             kBoundedFrom,
                             &cross_entropy_forward,
                             &cross_entropy_backward,
                             &choose_tokens,
                             &skinny_linear,
                             &generator_step};
}  // namespace ibq::cpu
