// The launchers (kernels/cuda/*_launch.h) on a queue that runs the kernels in the emulator: what they plan,
// lay out in the workspace and pass to the kernels must give right results, whoever launches.
#define IBQ_SIMT_EMULATION

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../cuda/gather_kernel.cuh"
#include "../cuda/gather_launch.h"
#include "../cuda/histogram_kernel.cuh"
#include "../cuda/histogram_launch.h"
#include "../cuda/search_kernel.cuh"
#include "../cuda/search_launch.h"
#include "check.h"

namespace ibq::cuda {

template <Element kElement, bool kWithLse>
auto kernel_of(SearchKernel<kElement, kWithLse>) {
  return codebook_search_kernel<kElement, kWithLse>;
}
template <bool kWithLse>
auto kernel_of(SearchFinishKernel<kWithLse>) {
  return codebook_search_finish_kernel<kWithLse>;
}
auto kernel_of(HistogramKernel<true>) { return histogram_shared_kernel; }
auto kernel_of(HistogramKernel<false>) { return histogram_global_kernel; }
template <typename Word>
auto kernel_of(GatherKernel<Word>) {
  return gather_codes_kernel<Word>;
}

}  // namespace ibq::cuda

namespace {

using namespace ibq;
using namespace ibq::cuda;

struct EmulatorQueue {
  DeviceLimits device{3, 102400, 101376};
  std::vector<std::string> launched;

  int limits(DeviceLimits* limits) const {
    *limits = device;
    return kSuccess;
  }
  int fill(void* at, int byte, int64_t bytes) const {
    std::memset(at, byte, static_cast<size_t>(bytes));
    return kSuccess;
  }
  template <typename Tag, typename... Arguments>
  int launch(Tag tag, const Grid& grid, const Arguments&... arguments) {
    const typename Tag::Function kernel = kernel_of(tag);
    emulator::launch(grid.blocks, grid.threads, grid.shared_bytes, 1, [&] { kernel(arguments...); });
    launched.push_back(Tag::name().text());
    return kSuccess;
  }
};

void test_names() {
  CHECK(std::string(KernelExpression("f").text()) == "ibq::cuda::f", "no arguments");
  const KernelExpression longest = KernelExpression("f").with(Element::bf16).with(true).with("int");
  CHECK(std::string(longest.text()) == "ibq::cuda::f<ibq::cuda::Element(1),true,int>", "%s", longest.text());
}

void test_search() {
  const int64_t N = 130, K = 300, D = 20;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> z(N * D), codebook(K * D), bias(K), max(N), lse(N);
  for (auto* values : {&z, &codebook, &bias})
    for (float& value : *values) value = uniform(random);
  std::vector<int64_t> indices(N);
  EmulatorQueue queue;
  int64_t bytes = 0;
  CHECK(search_workspace(queue, N, K, D, IBQ_F32, 1, &bytes) == kSuccess, "workspace");
  std::vector<float> workspace(static_cast<size_t>(bytes) / 4);
  const auto search = [&](int64_t workspace_bytes) {
    return launch_search(queue, z.data(), codebook.data(), bias.data(), 1.5f, N, K, D, IBQ_F32,
                         indices.data(), max.data(), lse.data(), workspace.data(), workspace_bytes);
  };
  CHECK(search(bytes - 1) == kInvalidValue, "a workspace that is too small is refused");
  CHECK(search(bytes) == kSuccess, "search");
  CHECK(queue.launched.size() == 2 &&
            queue.launched[0] == "ibq::cuda::codebook_search_kernel<ibq::cuda::Element(0),true>",
        "names");
  for (int64_t i = 0; i < N; ++i) {
    double best = -INFINITY, sum = 0;
    int64_t index = 0;
    std::vector<double> s(K);
    for (int64_t j = 0; j < K; ++j) {
      for (int64_t d = 0; d < D; ++d) s[j] += double(z[i * D + d]) * codebook[j * D + d];
      s[j] = 1.5 * s[j] + bias[j];
      if (s[j] > best) {
        best = s[j];
        index = j;
      }
    }
    for (double value : s) sum += std::exp(value - best);
    CHECK(std::abs(s[indices[i]] - best) < 1e-5 && (indices[i] == index || s[indices[i]] == best), "index");
    CHECK(std::abs(max[i] - best) < 1e-5, "max");
    CHECK(std::abs(lse[i] - (best + std::log(sum))) < 1e-4, "lse");
  }
  CHECK(search_workspace(queue, N, 0, D, IBQ_F32, 1, &bytes) == kInvalidValue, "no codes");
}

void test_histogram() {
  for (const int64_t K : {int64_t{7}, kSharedHistogramCodes + 1}) {
    const int64_t N = 1000;
    std::vector<int64_t> indices(N), counts(K, 77), expected(K, 0);
    for (int64_t i = 0; i < N; ++i) {
      indices[i] = i * i % K;
      ++expected[indices[i]];
    }
    EmulatorQueue queue;
    CHECK(launch_histogram(queue, indices.data(), N, K, counts.data()) == kSuccess, "histogram");
    CHECK(counts == expected, "counts");
    CHECK(launch_histogram(queue, indices.data(), 0, K, counts.data()) == kSuccess && counts[0] == 0,
          "empty");
    CHECK(queue.launched.size() == 1, "nothing is launched for no indices");
  }
}

void test_gather() {
  for (const int64_t D : {4, 6, 7}) {  // rows of 16, 12 and 14 bytes: each width of words
    const ibq_dtype dtype = D == 4 ? IBQ_F32 : IBQ_BF16;
    const int64_t N = 9, K = 5, bytes = D * element_bytes(dtype);
    std::vector<unsigned char> codebook(K * bytes + 32), out(N * bytes + 32), second(N * bytes + 32);
    const auto aligned = [](std::vector<unsigned char>& v) {
      return v.data() + (16 - reinterpret_cast<uintptr_t>(v.data()) % 16) % 16;
    };
    for (size_t i = 0; i < codebook.size(); ++i) codebook[i] = static_cast<unsigned char>(i * 7);
    std::vector<int64_t> indices(N);
    for (int64_t i = 0; i < N; ++i) indices[i] = i * 3 % K;
    EmulatorQueue queue;
    CHECK(launch_gather(queue, aligned(codebook), indices.data(), N, K, D, dtype, aligned(out),
                        aligned(second)) == kSuccess,
          "gather");
    for (int64_t i = 0; i < N; ++i)
      for (const auto* rows : {aligned(out), aligned(second)})
        CHECK(std::memcmp(rows + i * bytes, aligned(codebook) + indices[i] * bytes, bytes) == 0, "row");
  }
}

}  // namespace

int main() {
  test_names();
  test_search();
  test_histogram();
  test_gather();
  return ibq::test::finish("test_launch_simt");
}
