// Attention of one position over its sequence: rotary, the new key and value into the cache, and
// softmax(q K^T / sqrt(D)) V over the row's prefix of it, all in float32 whatever the cache holds.
//
// Cost: 4 head_dim (position + 1) operations a head and the prefix of keys and values, which several hundred
// rows no longer have in a cache: at 200 rows, width 192, 4 blocks and 64 positions they are 79 MB of
// float32. So while a head is read the next one's is asked for, line by line, which takes some 5 % off such a
// step. Tried and left: asking for all of it at once, and large pages under the cache (no gain).
#pragma once

template <int... kLane>
IBQ_INLINE F pairs_swapped(F v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ 1)...);
}

template <WeightType W>
class Attention {
  typedef typename Activations<W>::Element Element;
  // The cache's type, and its dtype for the functions of narrow.h.
  static constexpr WeightType kCached = W == WeightType::kInt8 ? WeightType::kFloat32 : W;
  static constexpr DType kCache = kCached == WeightType::kBFloat16  ? DType::kBFloat16
                                  : kCached == WeightType::kFloat16 ? DType::kFloat16
                                                                    : DType::kFloat32;

  static constexpr int kUsual = 64 / kWidth;  // vectors of a head that has 64 channels, as most have

 public:
  explicit Attention(const GeneratorStep& p)
      : p_(p),
        padded_dim_((p.head_dim + kWidth - 1) / kWidth * kWidth),
        scores_width_((p.places + 4 + kWidth - 1) / kWidth * kWidth),
        usual_(p.head_dim == kUsual * kWidth),
        ahead_(p.places * p.head_dim * Weights<kCached>::kBytes) {}

  // Floats that a thread needs.
  int64_t scratch() const { return scores_width_ + padded_dim_; }

  // Key head h of sequence `row` in block `layer`, and the queries that share it. heads: the row's queries,
  // keys and values [heads + 2 kv_heads][head_dim]; out: what is attended [heads][head_dim].
  void key_head(const float* heads, int64_t layer, int64_t row, int64_t h, float* scratch,
                Element* out) const {
    const int64_t dim = p_.head_dim, group = p_.heads / p_.kv_heads, position = p_.positions[row];
    float *const scores = scratch, *const query = scratch + scores_width_;
    const int64_t plane = p_.capacity * p_.kv_heads * p_.places * dim;
    const int64_t keys = 2 * layer * plane + (row * p_.kv_heads + h) * p_.places * dim, values = keys + plane;

    rotate(heads + (p_.heads + h) * dim, position, 1.0f, query);
    const float* const value = heads + (p_.heads + p_.kv_heads + h) * dim;
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t at = position * dim + d, live = dim - d;
      store_narrow<kCache>(p_.cache, keys + at, load(query + d), live);
      store_narrow<kCache>(p_.cache, values + at, load_live<DType::kFloat32>(value, d, live), live);
    }
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = h * group + g;
      rotate(heads + head * dim, position, (float)(1.0 / sqrt((double)dim)), query);
      const float total = usual_ ? probabilities<kUsual>(keys, position + 1, query, scores)
                                 : probabilities<0>(keys, position + 1, query, scores);
      const F factor = set1(1.0f / total);
      usual_ ? read_out<kUsual>(values, position + 1, scores, factor, out + head * dim)
             : read_out<0>(values, position + 1, scores, factor, out + head * dim);
    }
  }

 private:
  // out[d] = x[d] turned by its pair's angle, times factor; zero from head_dim up to padded_dim.
  void rotate(const float* x, int64_t position, float factor, float* out) const {
    const float* straight = p_.rotary + position * p_.head_dim;
    const float* crossed = straight + p_.rotary_places * p_.head_dim;
    for (int64_t d = 0; d < p_.head_dim; d += kWidth) {
      const int64_t live = p_.head_dim - d;
      const F v = load_live<DType::kFloat32>(x, d, live);
      const F other = pairs_swapped(v, std::make_integer_sequence<int, kWidth>());
      const F turned = multiply_add<false>(v, load_live<DType::kFloat32>(straight, d, live),
                                           other * load_live<DType::kFloat32>(crossed, d, live));
      store(out + d, turned * set1(factor));
    }
  }

  // scores[t] = exp(query . key_t - their maximum) for t < count; returns the sum. kVectors: those of a head
  // where that is known, else 0.
  template <int kVectors>
  float probabilities(int64_t keys, int64_t count, const float* query, float* scores) const {
    const auto products = [&](int64_t t, F(&sums)[4]) {
      for (int v = 0; v < 4; ++v) sums[v] = F{};
      for_vectors<kVectors>([&](int64_t d) {
        const F q = load(query + d);
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t at = keys + min_of(t + i, count - 1) * p_.head_dim + d;
          sums[i] = multiply_add<false>(q, cached<kVectors != 0>(at, d), sums[i]);
        }
      });
    };
    int64_t t = 0;
#if defined(__AVX512F__)
    for (; t + 16 <= count; t += 16) {
      F sums[4][4];
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) products(t + 4 * i, sums[i]);
      store(scores + t, sums_of_sixteen(sums));
    }
#endif
    for (; t < count; t += 4) {
      F sums[4];
      products(t, sums);
      const Sums s = sums_of(sums[0], sums[1], sums[2], sums[3]);
      __builtin_memcpy(scores + t, &s, sizeof(s));
    }
    for (t = count; t < (count + kWidth - 1) / kWidth * kWidth; ++t) scores[t] = -__builtin_inff();
    F high = load(scores);
    for (t = kWidth; t < count; t += kWidth) high = max_of(high, load(scores + t));
    const F top = set1(horizontal_max(high));
    F sum = F{};
    for (t = 0; t < count; t += kWidth) {
      const F e = exp_of(load(scores + t) - top);
      sum = sum + e;
      store(scores + t, e);
    }
    return (float)horizontal_sum(sum);
  }

  // out[d] = factor * sum_t weights[t] value_t[d], even and odd positions apart
  template <int kVectors>
  void read_out(int64_t values, int64_t count, const float* weights, F factor, Element* out) const {
    constexpr int kColumns = kVectors > 0 && kVectors < 4 ? kVectors : 4;
    for (int64_t d = 0; d < p_.head_dim; d += kColumns * kWidth)
      read_columns<kVectors, kColumns>(values, count, weights, factor, out, d);
  }

  // Up to kColumns vectors of it from channel d on.
  template <int kVectors, int kColumns>
  void read_columns(int64_t values, int64_t count, const float* weights, F factor, Element* out,
                    int64_t d) const {
    const int64_t dim = p_.head_dim;
    if constexpr (kVectors == 0 && kColumns > 1)
      if (dim - d <= (kColumns - 1) * kWidth)
        return read_columns<kVectors, kColumns - 1>(values, count, weights, factor, out, d);
    F even[kColumns] = {}, odd[kColumns] = {};
    const auto add = [&](F(&sums)[kColumns], int64_t t) {
      const F weight = set1(weights[t]);
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) {
        const int64_t channel = d + v * kWidth;
        sums[v] =
            multiply_add<false>(weight, cached<kVectors != 0>(values + t * dim + channel, channel), sums[v]);
      }
    };
    int64_t t = 0;
    for (; t + 1 < count; t += 2) {
      add(even, t);
      add(odd, t + 1);
    }
    if (t < count) add(even, t);
    for (int v = 0; v < kColumns; ++v) {
      const int64_t channel = d + v * kWidth;
      Activations<W>::put(out, channel, (even[v] + odd[v]) * factor, dim - channel);
    }
  }

  // body(d) for every vector of a head.
  template <int kVectors, typename Body>
  IBQ_INLINE void for_vectors(const Body& body) const {
    if constexpr (kVectors > 0) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) body(v * kWidth);
    } else {
      for (int64_t d = 0; d < p_.head_dim; d += kWidth) body(d);
    }
  }

  // kWidth numbers of the cache from element `at` on, channel d of a head: from its end on zeros.
  template <bool kWhole>
  IBQ_INLINE F cached(int64_t at, int64_t d) const {
    const int64_t live = p_.head_dim - d;
    if (kWhole || live >= kWidth) {
      const char* const from = static_cast<const char*>(p_.cache) + at * Weights<kCached>::kBytes;
      if (kWhole) __builtin_prefetch(from + ahead_);
      return widened<kCached>(from);
    }
    return load_live<kCache>(p_.cache, at, live);
  }

  const GeneratorStep& p_;
  const int64_t padded_dim_, scores_width_;
  const bool usual_;
  const int64_t ahead_;
};
