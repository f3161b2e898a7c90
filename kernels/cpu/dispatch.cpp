// Chooses an instruction set at run time, never by the machine that built the binary.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/cpu/codebook.h"

namespace ibq::cpu {

#if defined(IBQ_HAVE_X86_ISAS)
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

// Best first.
const Candidate* candidates(int* count) {
#if defined(IBQ_HAVE_X86_ISAS)
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Candidate list[] = {
      {&kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
      {&kernels_avx512, avx512},
      {&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&kernels_portable, true},
  };
#else
  static const Candidate list[] = {{&kernels_portable, true}};
#endif
  *count = static_cast<int>(sizeof(list) / sizeof(list[0]));
  return list;
}

}  // namespace

const Kernels* kernels_named(const char* name) {
  int count;
  const Candidate* list = candidates(&count);
  for (int i = 0; i < count; ++i)
    if (list[i].supported && std::strcmp(list[i].kernels->name, name) == 0) return list[i].kernels;
  return nullptr;
}

const Kernels* kernels() {
  const char* forced = std::getenv("IBQ_FAST_CPU_ISA");
  if (forced && *forced) return kernels_named(forced);
  int count;
  const Candidate* list = candidates(&count);
  for (int i = 0; i < count; ++i)
    if (list[i].supported) return list[i].kernels;
  return nullptr;
}

const char* available_isas() {
  static const std::string names = [] {
    std::string all;
    int count;
    const Candidate* list = candidates(&count);
    for (int i = 0; i < count; ++i)
      if (list[i].supported) all += (all.empty() ? "" : ",") + std::string(list[i].kernels->name);
    return all;
  }();
  return names.c_str();
}

}  // namespace ibq::cpu
