// The decoding kernels of every instruction set this machine can run: linear layers for few rows against
// double sums at ragged sizes, and a step of the generator whose rows stand apart, against itself with other
// numbers of rows and threads, bit for bit; idle rows; a pool that runs its tasks one after the other.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/codebook.h"
#include "kernels/cpu/decode_api.h"
#include "kernels/tests/check.h"

namespace {

using namespace ibq::cpu;

Parallel threads(int count) {
  Parallel p;
  p.threads = count;
  p.run = [](int tasks, void (*body)(void*, int), void* context) {
    std::vector<std::thread> pool;
    for (int t = 0; t < tasks; ++t) pool.emplace_back(body, context, t);
    for (auto& t : pool) t.join();
  };
  return p;
}

// Says that it has many threads, and runs one task after the other.
Parallel one_after_the_other(int count) {
  Parallel p;
  p.threads = count;
  p.run = [](int tasks, void (*body)(void*, int), void* context) {
    for (int t = tasks - 1; t >= 0; --t) body(context, t);
  };
  return p;
}

// Weights of a type, and the numbers that they stand for.
struct Weight {
  std::vector<float> values, scale;
  std::vector<char> bytes;
  Matrix matrix;
};

Weight weight(WeightType type, int64_t n, int64_t c, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Weight w;
  const float spread = 1.0f / std::sqrt(static_cast<float>(c));
  if (type == WeightType::kInt8) w.scale.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    if (type == WeightType::kInt8) w.scale[i] = spread / static_cast<float>(40 + i % 7);
    for (int64_t j = 0; j < c; ++j) {
      // eight bits of mantissa: bfloat16 and float16 hold it alike
      float v = normal(random) * spread + (j % 2 ? 0.01f : -0.01f);
      uint32_t u;
      std::memcpy(&u, &v, 4);
      u &= std::fabs(v) < 6.2e-5f ? 0u : 0xffff0000u;
      std::memcpy(&v, &u, 4);
      if (type == WeightType::kInt8) {
        const int8_t q = static_cast<int8_t>(std::lround(normal(random) * 40.0f) % 128);
        v = q * w.scale[i];
        w.bytes.push_back(static_cast<char>(q));
      } else if (type == WeightType::kFloat32) {
        const char* p = reinterpret_cast<const char*>(&v);
        w.bytes.insert(w.bytes.end(), p, p + 4);
      } else {
        const uint32_t half = u == 0 ? 0 : (u >> 16 & 0x8000u) | ((u & 0x7fffffffu) - 0x38000000u) >> 13;
        const uint16_t h = static_cast<uint16_t>(type == WeightType::kBFloat16 ? u >> 16 : half);
        const char* p = reinterpret_cast<const char*>(&h);
        w.bytes.insert(w.bytes.end(), p, p + 2);
      }
      w.values.push_back(v);
    }
  }
  w.matrix.rows = w.bytes.data();
  w.matrix.n = n;
  w.matrix.c = c;
  return w;
}

// std::vectors move; their scales' addresses are taken where they stay.
Matrix matrix_of(const Weight& w) {
  Matrix m = w.matrix;
  m.rows = w.bytes.data();
  m.scale = w.scale.empty() ? nullptr : w.scale.data();
  return m;
}

void check_linear(const Kernels& k, WeightType type, int64_t m, int64_t n, int64_t c) {
  std::mt19937 random(static_cast<unsigned>(m * 31 + n * 7 + c));
  std::normal_distribution<float> normal;
  const Weight w = weight(type, n, c, random);
  std::vector<float> x(m * c), bias(n), out(m * n, NAN);
  for (float& v : x) v = normal(random);
  for (float& v : bias) v = normal(random);
  SkinnyLinear p;
  p.type = type;
  p.weight = matrix_of(w);
  p.x = x.data();
  p.bias = bias.data();
  p.out = out.data();
  p.m = m;
  CHECK(k.skinny_linear(p, threads(2)), "%s: no memory", k.name);
  // x may be rounded to bfloat16 beside bfloat16 weights: half a unit of 8 bits a term
  const double eps = type == WeightType::kBFloat16 ? std::ldexp(1.0, -8) : std::ldexp(1.0, -21);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double exact = bias[j], squares = 0;
      for (int64_t t = 0; t < c; ++t) {
        const double term = static_cast<double>(x[i * c + t]) * w.values[j * c + t];
        exact += term;
        squares += term * term;
      }
      const double allowed = 4 * eps * (std::sqrt(squares) + std::fabs(exact)) + 1e-6;
      CHECK(std::fabs(out[i * n + j] - exact) <= allowed, "%s type %d [%d x %d x %d] at %d, %d: %g, not %g",
            k.name, static_cast<int>(type), static_cast<int>(m), static_cast<int>(n), static_cast<int>(c),
            static_cast<int>(i), static_cast<int>(j), out[i * n + j], exact);
    }
}

struct Shape {
  int64_t depth, heads, kv_heads, head_dim, hidden, places, rows;
};

// A model and the steps of `rows` sequences, of which `batch` at a time share a step.
struct Model {
  Shape s;
  WeightType type;
  int64_t width, rows;
  std::vector<Weight> weights;
  std::vector<float> modulation, rotary, inputs;

  Model(Shape shape, WeightType t)
      : s(shape), type(t), width(shape.heads * shape.head_dim), rows(shape.rows) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t l = 0; l < s.depth; ++l) {
      weights.push_back(weight(type, width + 2 * s.kv_heads * s.head_dim, width, random));
      weights.push_back(weight(type, width, width, random));
      weights.push_back(weight(type, 2 * s.hidden, width, random));
      weights.push_back(weight(type, width, s.hidden, random));
    }
    modulation.resize((6 * s.depth + 2) * rows * width);
    rotary.resize(2 * s.places * s.head_dim);
    inputs.resize(s.places * rows * width);
    for (std::vector<float>* v : {&modulation, &rotary, &inputs})
      for (float& f : *v) f = 0.5f * normal(random);
  }

  // Hidden vectors [places][rows][width]; row r pauses at step r + 1. Every step must succeed.
  std::vector<float> run(const Kernels& k, int64_t batch, const Parallel& parallel) const {
    std::vector<float> all(s.places * rows * width);
    std::vector<Matrix> matrices;
    for (const Weight& w : weights) matrices.push_back(matrix_of(w));
    for (int64_t first = 0; first < rows; first += batch) {
      const int64_t count = std::min(batch, rows - first);
      std::vector<float> mod((6 * s.depth + 2) * count * width), x(count * width), out(count * width);
      for (int64_t part = 0; part < 6 * s.depth + 2; ++part)
        std::memcpy(&mod[part * count * width], &modulation[(part * rows + first) * width],
                    sizeof(float) * static_cast<size_t>(count * width));
      // NaN in every type: what was not written must not be read
      std::vector<char> cache(s.depth * 2 * count * s.kv_heads * s.places * s.head_dim * 4, '\xff');
      std::vector<int64_t> positions(count);
      for (int64_t step = 0; step <= s.places; ++step) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t pause = first + r + 1, place = step < pause ? step : step - 1;
          positions[r] = step == pause || place >= s.places ? -1 : place;
          const int64_t at = positions[r] < 0 ? 0 : positions[r];
          std::memcpy(&x[r * width], &inputs[(at * rows + first + r) * width],
                      sizeof(float) * static_cast<size_t>(width));
        }
        GeneratorStep p;
        p.type = type;
        p.weights = matrices.data();
        p.x = x.data();
        p.positions = positions.data();
        p.modulation = mod.data();
        p.cache = cache.data();
        p.rotary = rotary.data();
        p.out = out.data();
        p.rows = p.capacity = count;
        p.depth = s.depth;
        p.heads = s.heads;
        p.kv_heads = s.kv_heads;
        p.head_dim = s.head_dim;
        p.hidden = s.hidden;
        p.places = p.rotary_places = s.places;
        p.eps = 1e-5f;
        CHECK(k.generator_step(p, parallel), "%s: no memory", k.name);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t i = 0; i < width; ++i)
            if (positions[r] < 0)
              CHECK(out[r * width + i] == 0.0f, "%s: an idle row gave %g", k.name, out[r * width + i]);
            else
              all[(positions[r] * rows + first + r) * width + i] = out[r * width + i];
      }
    }
    return all;
  }
};

void check_step(const Kernels& k, WeightType type, const Shape& shape) {
  const Model model(shape, type);
  const std::vector<float> first = model.run(k, shape.rows, threads(1));
  for (float v : first) CHECK(std::isfinite(v), "%s type %d: %g", k.name, static_cast<int>(type), v);
  const auto same = [&](int64_t batch, const Parallel& parallel, const char* what) {
    const std::vector<float> other = model.run(k, batch, parallel);
    CHECK(std::memcmp(first.data(), other.data(), first.size() * sizeof(float)) == 0, "%s type %d: %s",
          k.name, static_cast<int>(type), what);
  };
  same(1, threads(1), "one row at a time gives other bits");
  same(shape.rows / 2, threads(3), "three threads give other bits");
  same(shape.rows, threads(2), "two threads give other bits");
  same(shape.rows, one_after_the_other(5), "tasks that run one after the other give other bits");
}

}  // namespace

int main() {
  std::istringstream names(available_isas());
  for (std::string name; std::getline(names, name, ',');) {
    const Kernels& k = *kernels_named(name.c_str());
    for (WeightType type :
         {WeightType::kFloat32, WeightType::kBFloat16, WeightType::kFloat16, WeightType::kInt8}) {
      for (int64_t m : {1, 2, 3, 4, 7, 16, 59}) check_linear(k, type, m, 21, 67);
      check_linear(k, type, 2, 1, 1);
      check_linear(k, type, 5, 300, 128);
      check_step(k, type, {2, 2, 1, 12, 21, 9, 5});
      check_step(k, type, {1, 2, 2, 20, 40, 18, 5});
      check_step(k, type, {1, 1, 1, 64, 12, 18, 135});  // several parts
    }
  }
  return ibq::test::finish("decode");
}
