// The CPU kernels' surface: raw pointers and sizes, no PyTorch. Everything here is declared once and
// implemented once per instruction set (isa_*.cpp); dispatch.cpp chooses at run time.
//
// Notation (docs/architecture.md, section "Mathematics"):
//   z [N, D] features, E [K, D] codebook, S = scale * z E^T + bias - norm_weight * |E|^2 [N, K] logits, never
//   stored whole but where they fit a bounded buffer. Euclidean logits -s |z - E|^2 are scale = 2 s,
//   norm_weight = s, up to a constant of each row.
#pragma once

#include <cstdint>

namespace ibq::cpu {

struct Choice;               // choice_api.h
struct CrossEntropyForward;  // cross_entropy_api.h
struct CrossEntropyBackward;
struct SkinnyLinear;  // decode_api.h
struct GeneratorStep;

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How kernels run in parallel: the caller lends its thread pool. `run` calls body(context, task) for
// every task in [0, tasks), in any order, and returns when all are done.
struct Parallel {
  int threads = 1;
  void (*run)(int tasks, void (*body)(void* context, int task), void* context) = nullptr;
};

constexpr float kNegligibleMass = 2.3283064365386963e-10f;  // 2^-32

// What a forward leaves for its backward (Forward::candidates) takes no more than this or, where that is
// more, than the codebook's gradient in float32, which the backward allocates anyway.
constexpr int64_t kCandidateBytes = 256 << 20;

// The operands every codebook kernel shares. z and codebook are row-major and contiguous.
struct Problem {
  DType dtype = DType::kFloat32;
  const void* z = nullptr;         // [N, D]
  const void* codebook = nullptr;  // [K, D]
  const float* bias = nullptr;     // [K] or null
  int64_t n = 0, k = 0, d = 0;
  float scale = 1.0f;
  float norm_weight = 0.0f;
  // Share of a row's softmax mass that may be left out to skip work: entries below dropped_mass / K are
  // negligible, and a tile of nothing else is skipped. The default is far below float32 rounding whatever
  // K and however flat or peaked the row; 0 skips nothing.
  float dropped_mass = kNegligibleMass;
};

// Forward. Null outputs are not computed; the entropy group is computed when row_entropy is given.
//   indices  argmax_j S_ij, ties to the lowest j; a row with no finite logit gives 0
//   max      max_j S_ij (NaN for such a row)
//   lse      log sum_j exp S_ij, float64 so that exp(S - lse) keeps float32 accuracy for large |S|
//   readout  softmax(S) E, [N, D] float32
//   lse_tau, row_entropy, mean_prob: log-sum-exp of S/tau, entropy of its softmax's rows, mean of its rows
// Cost: one sweep of 2NKD (+2NKD with readout, +2NKD with mean_prob but for candidates and kept logits).
struct Forward {
  int64_t* indices = nullptr;
  float* max = nullptr;
  // Search alone (no output below): score in bfloat16 first where the CPU multiplies it, and settle what that
  // leaves open in float32. Same result as without, bit for bit; see exact_search.h.
  bool rounded_first = false;
  double* lse = nullptr;
  float* readout = nullptr;
  float temperature = 1.0f;
  double* lse_tau = nullptr;
  float* row_entropy = nullptr;
  float* mean_prob = nullptr;
  // [2][row tiles][code blocks], sizes from Kernels::tile_grid: for each tile the greatest log P (first) and
  // log p (second, when entropies are computed) in it. The backward uses it to skip tiles before computing
  // them.
  float* tile_bound = nullptr;
  // 64-byte aligned, best of Kernels::candidate_bytes, or null: what of S is left for this call's mean_prob
  // and for the backward, used when readout and mean_prob are computed: lists of the entries that count in
  // softmax(S/tau) (candidates.h), tiles of S (kept_logits.h).
  void* candidates = nullptr;
  int64_t candidate_bytes = 0;  // size of that buffer
};

// Backward of either group or both at once (the sum of their gradients, one pass over S).
//   select group (grad_z_q given): dS = P (g_i . E_j - g_i . o_i), P = softmax(S)
//   entropy group (row_entropy given): dS = p/tau [ -a_i (log p + H_i) + (c_j - sum_k p_ik c_k) / N ], p =
//   softmax(S/tau)
// grad_z [N, D] and grad_codebook [K, D], of the problem's dtype, and grad_bias [K] float32 (or null) are
// overwritten; sums are float32. The hard path's scatter-add into grad_codebook is scatter_add_rows. Cost per
// group: select S, G, dz, dE = 8NKD; entropy S, S, dz, dE = 8NKD; both: 10NKD.
struct Backward {
  const void* grad_z_q = nullptr;  // [N, D], dtype of the problem
  const double* lse = nullptr;
  const float* readout = nullptr;
  float temperature = 1.0f;
  const double* lse_tau = nullptr;
  const float* row_entropy = nullptr;
  const float* grad_row_entropy = nullptr;  // [N]
  const float* grad_mean_prob = nullptr;    // [K]
  const float* tile_bound = nullptr;        // as the forward left it, or null
  const void* candidates = nullptr;         // as a forward left them (with any threads), or null
  int64_t candidate_bytes = 0;              // as that forward was told
  void* grad_z = nullptr;
  void* grad_codebook = nullptr;
  float* grad_bias = nullptr;
};

// One instruction set's kernels. Functions return false when workspace cannot be allocated.
struct Kernels {
  const char* name;
  bool (*forward)(const Problem&, const Forward&, const Parallel&);
  bool (*backward)(const Problem&, const Backward&, const Parallel&);
  // Row tiles and code blocks of tile_bound for [n, k]; both 0 where k is too small for it to pay. They are
  // ceil(n / tile_rows) and ceil(k / block_codes) from bounded_from codes on.
  void (*tile_grid)(int64_t n, int64_t k, int64_t* tiles, int64_t* blocks);
  // Bytes worth giving to candidates: of the call's logits in whole tiles and a header, up to
  // kCandidateBytes or the codebook's gradient; 0 below bounded_from codes.
  int64_t (*candidate_bytes)(int64_t n, int64_t k, int64_t d);
  int tile_rows, block_codes, bounded_from;
  bool (*cross_entropy_forward)(const Problem&, const CrossEntropyForward&, const Parallel&);
  bool (*cross_entropy_backward)(const Problem&, const CrossEntropyBackward&, const Parallel&);
  bool (*choose_tokens)(const Choice&, const Parallel&);
  bool (*skinny_linear)(const SkinnyLinear&, const Parallel&);
  bool (*generator_step)(const GeneratorStep&, const Parallel&);
};

// The kernels of the best instruction set this CPU has, or of the one that the environment variable
// IBQ_FAST_CPU_ISA names (avx512_bf16, avx512, avx2, portable). Null if the named one is unknown or absent
// here.
const Kernels* kernels();
// Comma-separated names of the sets that this build has and this CPU can run, best first.
const char* available_isas();
// Same choice, by name instead of by environment; null when unavailable.
const Kernels* kernels_named(const char* name);

// dst[i] = table[indices[i]], rows of row_bytes bytes.
void gather_rows(const void* table, const int64_t* indices, int64_t n, int64_t row_bytes, void* dst,
                 const Parallel&);

// grad_codebook[indices[i]] += a[i] + b[i]; all of `dtype`, a, b [N, D], either may be null. A code's rows
// are added up in float32, in order, and rounded once; each code is owned by one task: deterministic for any
// thread count.
void scatter_add_rows(DType dtype, const void* a, const void* b, const int64_t* indices, int64_t n, int64_t k,
                      int64_t d, void* grad_codebook, const Parallel&);

// counts[j] = number of i with indices[i] == j. Returns the position of the first index outside [0, k), or
// -1.
int64_t histogram(const int64_t* indices, int64_t n, int64_t k, int64_t* counts, const Parallel&);

}  // namespace ibq::cpu
