// Token choice (choice_api.h) without a sort. Included inside an ISA's anonymous namespace.
//
// Cost for V codes. No filter: one pass over the logits, 3 instructions a code for Philox, a dozen for the
// bound below; logarithms for about log V codes. top-k: a pass that divides, a histogram of the keys' upper
// 11 bits, then only the codes of the bin that holds the k-th largest. top-p: the same with float64
// probabilities in the bins. Measured times: docs/sampling.md.
//
// Which noise is evaluated. With E = -log(1 - v) >= v a code beats the best score so far when
// E < exp(x - best), so v < exp(x - best) is necessary: one float32 exponential without logarithms decides
// nearly all codes; a vector of codes below best - 22.9 (the largest noise there is) does not even draw. What
// passes is scored in float64.
//
// Tried and left: scoring every code in float32 with vectorised logarithms (three times the arithmetic, and
// scores that differ from one library to the next in the last bit); sorting the kept codes of top-p (its
// histogram is one pass).
#pragma once

typedef double D __attribute__((vector_size(4 * IBQ_WIDTH)));
typedef double DUnaligned __attribute__((vector_size(4 * IBQ_WIDTH), aligned(8), may_alias));
typedef int64_t L __attribute__((vector_size(4 * IBQ_WIDTH)));
typedef float HalfF __attribute__((vector_size(2 * IBQ_WIDTH), aligned(4), may_alias));
typedef uint32_t U32 __attribute__((vector_size(4 * IBQ_WIDTH)));
typedef uint32_t U32Unaligned __attribute__((vector_size(4 * IBQ_WIDTH), aligned(4), may_alias));

constexpr float kLargestNoise = 22.9f;  // -log(-log(1 - 2^-33)) = 22.87
constexpr int kBins = 2048, kBinBits = 11;

// exp(x) for x <= 0, float64; 0 below -708. Relative error below 4e-16: x = n ln2 + r, |r| <= ln2 / 2, Taylor
// to degree 13, exponent added to the bits.
IBQ_INLINE D exp_of_double(D x) {
  const D lowest = D{} - 708.0;
  const L gone = x < lowest;
  x = gone ? lowest : x;
  const D magic = D{} + 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to the nearest integer
  const D t = x * 1.4426950408889634 + magic;
  const D n = t - magic;
  D r = n * -0.693147180369123816490 + x;
  r = n * -1.90821492927058770002e-10 + r;
  D p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  const D e = (p * r) * r + r + 1.0;
  const L bits = (L)e + ((L)t << 52);
  return gone ? D{} : (D)bits;
}

// A float's bits in an order that unsigned integers share. -0 does not occur: x is normalised to +0.
IBQ_INLINE uint32_t key_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

IBQ_INLINE float float_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// x = logits / temperature with -0 as +0; `live` of kWidth logits, the rest of the vector -inf.
IBQ_INLINE F scaled(const float* logits, int64_t live, F temperature) {
  if (live >= kWidth) return load(logits) / temperature + set1(0.0f);
  float part[kWidth];
  for (int i = 0; i < kWidth; ++i) part[i] = i < live ? logits[i] : -HUGE_VALF;
  return load(part) / temperature + set1(0.0f);
}

// The running best of one row.
struct BestDraw {
  double score = -HUGE_VAL;
  float bound = -HUGE_VALF;  // the score, rounded down
  int64_t token = -1;
};

inline void score_codes(const float* x, const uint32_t* words, uint32_t passed, int64_t first,
                        BestDraw& best) {
  for (; passed != 0; passed &= passed - 1) {
    const int i = __builtin_ctz(passed);
    const double v = (words[i] + 0.5) * 2.3283064365386963e-10;  // 2^-32
    const double score = static_cast<double>(x[i]) - log(-log1p(-v));
    if (score > best.score) {
      best.score = score;
      best.token = first + i;
      best.bound = static_cast<float>(score);
      if (static_cast<double>(best.bound) > score) best.bound = nextafterf(best.bound, -HUGE_VALF);
    }
  }
}

// Which lanes may beat `bound`: v <= exp(x - bound), with a margin for float32 (|x - bound| matters up to 23,
// so its rounding changes the exponential by less than 2e-6). Without a best yet, x - bound is +inf or NaN
// and every lane passes.
IBQ_INLINE uint32_t passing(F x, U32 words, float bound) {
  const F gap = x - set1(bound);
  const F chance = exp_of(gap < set1(1.0f) ? gap : set1(1.0f)) * 1.0001f;
  const I pass = __builtin_convertvector(words, F) * 2.3283064365386963e-10f <= chance;
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)pass);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)pass));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= (pass[i] & 1u) << i;
  return mask;
#endif
}

// Draws for the kDraws codes from `first` on, whose x are a and b.
IBQ_INLINE void draw_block(const DrawKey& key, int64_t first, F a, F b, BestDraw& best) {
  if (!any_greater(max_of(a, b), set1(best.bound - kLargestNoise))) return;
  uint32_t words[kDraws];
  draw_words(key, first, words);
  float x[kDraws];
  store(x, a);
  store(x + kWidth, b);
  for (int half = 0; half < kDraws; half += kWidth) {
    const U32 w = *reinterpret_cast<const U32Unaligned*>(words + half);
    const uint32_t passed = passing(half ? b : a, w, best.bound);
    if (passed) score_codes(x + half, words + half, passed, first + half, best);
  }
}

// One pass over unfiltered logits. -1 for a row that is no distribution.
inline int64_t draw_unfiltered(const float* logits, int64_t codes, float temperature, const DrawKey& key) {
  const F divisor = set1(temperature), infinity = set1(HUGE_VALF);
  BestDraw best;
  I bad = I{};
  for (int64_t j = 0; j < codes; j += kDraws) {
    const F a = scaled(logits + j, codes - j, divisor);
    const F b = codes - j > kWidth ? scaled(logits + j + kWidth, codes - j - kWidth, divisor) : -infinity;
    bad |= ~(a < infinity) | ~(b < infinity);
    draw_block(key, j, a, b, best);
  }
  for (int i = 0; i < kWidth; ++i)
    if (bad[i]) return -1;
  return best.token;
}

// Workspace of one task.
struct ChoiceSpace {
  float* x;         // [padded codes]
  double* weight;   // [padded codes]
  int32_t* member;  // [codes]: the codes of a bin
  double* mass;     // [kBins], zero between uses
};

// Scaled logits into space.x, padded with -inf to a multiple of kDraws. Returns the largest, NaN for a bad
// row.
inline float scale_row(const float* logits, int64_t codes, float temperature, const ChoiceSpace& space) {
  const F divisor = set1(temperature), infinity = set1(HUGE_VALF);
  F most = -infinity;
  I bad = I{};
  for (int64_t j = 0; j < codes; j += kWidth) {
    const F x = scaled(logits + j, codes - j, divisor);
    store(space.x + j, x);
    bad |= ~(x < infinity);
    most = max_of(x, most);
  }
  for (int64_t j = (codes + kWidth - 1) / kWidth * kWidth; j % kDraws; j += kWidth)
    store(space.x + j, -infinity);
  for (int i = 0; i < kWidth; ++i)
    if (bad[i]) return NAN;
  return horizontal_max(most);
}

// The codes whose key has `digit` at `shift` become the members; the first level looks at all codes.
inline int64_t narrow(const ChoiceSpace& space, int64_t members, bool all, int shift, uint32_t mask,
                      uint32_t digit) {
  int64_t kept = 0;
  for (int64_t i = 0; i < members; ++i) {
    const int32_t j = all ? static_cast<int32_t>(i) : space.member[i];
    space.member[kept] = j;
    kept += ((key_of(space.x[j]) >> shift) & mask) == digit;
  }
  return kept;
}

// The value at which the amounts of codes, added up from the largest x down, first exceed `limit`.
struct Crossing {
  float value;    // NaN when they never do
  double above;   // the amounts of all codes with a larger x
  int64_t equal;  // number of codes with this x: space.member[0 .. equal), lowest first
};

// Three digits of the keys, 11 + 11 + 10 bits, highest first: each level adds up the amounts of the members'
// digits and walks down to the digit that goes beyond the limit. Where another order of float64 summation
// makes a level stop short of it, the lowest digit there is stands for it.
template <typename Amount>
inline Crossing find_crossing(const ChoiceSpace& space, int64_t codes, double limit, const Amount& amount) {
  Crossing found = {NAN, 0.0, codes};
  uint32_t key = 0;
  for (int level = 0; level < 3; ++level) {
    const int bits = level < 2 ? kBinBits : 32 - 2 * kBinBits, shift = level < 2 ? 21 - 11 * level : 0;
    const uint32_t mask = (1u << bits) - 1;
    uint32_t lowest = mask, highest = 0;
    for (int64_t i = 0; i < found.equal; ++i) {
      const int64_t j = level == 0 ? i : space.member[i];
      const uint32_t bin = (key_of(space.x[j]) >> shift) & mask;
      space.mass[bin] += amount(j);
      lowest = bin < lowest ? bin : lowest;
      highest = bin > highest ? bin : highest;
    }
    double above = found.above;
    uint32_t digit = highest;
    bool beyond = false;
    for (uint32_t bin = highest + 1; bin-- > lowest && !beyond;) {
      if (space.mass[bin] == 0.0) continue;
      beyond = above + space.mass[bin] > limit;
      digit = bin;
      found.above = above;
      above += space.mass[bin];
    }
    memset(space.mass + lowest, 0, sizeof(double) * (highest - lowest + 1));
    if (!beyond && level == 0) return found;
    key |= digit << shift;
    found.equal = narrow(space, found.equal, level == 0, shift, mask, digit);
  }
  found.value = float_of(key);
  return found;
}

// Codes below `least` become -inf.
inline void drop_below(const ChoiceSpace& space, int64_t codes, float least) {
  const F bound = set1(least), gone = set1(-HUGE_VALF);
  for (int64_t j = 0; j < codes; j += kWidth) {
    const F x = load(space.x + j);
    store(space.x + j, x < bound ? gone : x);
  }
}

inline void keep_top_k(const ChoiceSpace& space, int64_t codes, int64_t top_k) {
  // The k-th largest is where the count first exceeds k - 1.
  const auto one = [](int64_t) { return 1.0; };
  drop_below(space, codes, find_crossing(space, codes, static_cast<double>(top_k - 1), one).value);
}

inline void keep_top_p(const ChoiceSpace& space, int64_t codes, float top_p, float largest) {
  D sum = D{};
  for (int64_t j = 0; j < codes; j += kWidth / 2) {
    const D x = __builtin_convertvector(*reinterpret_cast<const HalfF*>(space.x + j), D);
    const D w = exp_of_double(x - static_cast<double>(largest));
    *reinterpret_cast<DUnaligned*>(space.weight + j) = w;
    sum += w;  // padding is -inf: 0
  }
  double total = 0;
  for (int i = 0; i < kWidth / 2; ++i) total += sum[i];
  const double* weight = space.weight;
  const double limit = static_cast<double>(top_p) * total;
  const Crossing at = find_crossing(space, codes, limit, [weight](int64_t j) { return weight[j]; });
  if (isnan(at.value)) return;  // only rounding stands between top_p and the whole mass
  drop_below(space, codes, at.value);
  const double each = weight[space.member[0]];
  for (int64_t i = 1; i < at.equal; ++i)  // the i-th of equals has above + i * each before it
    if (at.above + static_cast<double>(i) * each > limit) space.x[space.member[i]] = -HUGE_VALF;
}

inline int64_t greedy(const float* logits, int64_t codes) {
  F most = set1(-HUGE_VALF);
  I bad = I{};
  const F infinity = set1(HUGE_VALF), one = set1(1.0f);
  for (int64_t j = 0; j < codes; j += kWidth) {
    const F x = scaled(logits + j, codes - j, one);
    bad |= ~(x < infinity);
    most = max_of(x, most);
  }
  for (int i = 0; i < kWidth; ++i)
    if (bad[i]) return -1;
  const float largest = horizontal_max(most);
  if (largest == -HUGE_VALF) return -1;
  int64_t j = 0;
  while (logits[j] != largest) ++j;
  return j;
}

inline int64_t choose_row(const Choice& in, int64_t row, const ChoiceSpace& space) {
  const float* logits = in.logits + row * in.codes;
  const int64_t top_k = in.top_k[row];
  if (top_k == 1) return greedy(logits, in.codes);
  const uint64_t seed = static_cast<uint64_t>(in.seed[row]), image = static_cast<uint64_t>(in.image[row]);
  const DrawKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                       static_cast<uint32_t>(in.position[row]), static_cast<uint32_t>(image),
                       static_cast<uint32_t>(image >> 32)};
  const bool by_rank = top_k > 0 && top_k < in.codes, by_mass = in.top_p[row] < 1.0f;
  if (!by_rank && !by_mass) return draw_unfiltered(logits, in.codes, in.temperature[row], key);
  const float largest = scale_row(logits, in.codes, in.temperature[row], space);
  if (!(largest > -HUGE_VALF)) return -1;
  if (by_rank) keep_top_k(space, in.codes, top_k);
  if (by_mass) keep_top_p(space, in.codes, in.top_p[row], largest);
  BestDraw best;
  for (int64_t j = 0; j < in.codes; j += kDraws)
    draw_block(key, j, load(space.x + j), load(space.x + j + kWidth), best);
  return best.token;
}

struct ChoiceTasks {
  const Choice* in;
  int tasks;
  bool failed;
};

inline void choose_task(void* context, int task) {
  auto& shared = *static_cast<ChoiceTasks*>(context);
  const Choice& in = *shared.in;
  const int64_t padded = (in.codes + kDraws - 1) / kDraws * kDraws;
  const size_t bytes = padded * (sizeof(double) + sizeof(float) + sizeof(int32_t)) + kBins * sizeof(double);
  char* memory = static_cast<char*>(malloc(bytes));
  if (memory == nullptr) {
    __atomic_store_n(&shared.failed, true, __ATOMIC_RELAXED);
    return;
  }
  ChoiceSpace space;
  space.weight = reinterpret_cast<double*>(memory);
  space.mass = space.weight + padded;
  memset(space.mass, 0, sizeof(double) * kBins);
  space.x = reinterpret_cast<float*>(space.mass + kBins);
  space.member = reinterpret_cast<int32_t*>(space.x + padded);
  for (int64_t row = in.rows * task / shared.tasks; row < in.rows * (task + 1) / shared.tasks; ++row)
    in.tokens[row] = choose_row(in, row, space);
  free(memory);
}

inline bool choose_tokens(const Choice& in, const Parallel& parallel) {
  if (in.rows == 0) return true;
  const int tasks = static_cast<int>(min_of(parallel.run ? parallel.threads : 1, in.rows));
  ChoiceTasks shared = {&in, tasks, false};
  if (tasks > 1)
    parallel.run(tasks, choose_task, &shared);
  else
    choose_task(&shared, 0);
  return !shared.failed;
}
