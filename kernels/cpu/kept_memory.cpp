#include "kernels/cpu/kept_memory.h"

#include <cstdlib>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ibq::cpu {
namespace {

constexpr int64_t kLargePage = 2 << 20;

struct Kept {
  void* buffer = nullptr;
  int64_t bytes = 0;
};

struct Shelf {
  std::mutex mutex;
  Kept kept[kKeptBuffers];  // oldest first; empty places at the end
};

// Never destroyed: tensors may outlive every static object.
Shelf& shelf() {
  static Shelf* const one = new Shelf;
  return *one;
}

// Takes place `at` out and closes the gap.
Kept take_out(Shelf& s, int at) {
  const Kept out = s.kept[at];
  for (int i = at; i + 1 < kKeptBuffers; ++i) s.kept[i] = s.kept[i + 1];
  s.kept[kKeptBuffers - 1] = Kept{};
  return out;
}

void* fresh(int64_t bytes) {
  const bool large = bytes >= kKeptFrom;
  void* buffer = nullptr;
  if (posix_memalign(&buffer, large ? kLargePage : 64, static_cast<size_t>(bytes < 64 ? 64 : bytes)) != 0)
    return nullptr;
#ifdef __linux__
  // a hint: whether it is followed changes nothing but time
  if (large) madvise(buffer, static_cast<size_t>(bytes / kLargePage * kLargePage), MADV_HUGEPAGE);
#endif
  return buffer;
}

}  // namespace

void* take_memory(int64_t bytes) {
  if (bytes >= kKeptFrom) {
    Shelf& s = shelf();
    const std::lock_guard<std::mutex> lock(s.mutex);
    for (int i = 0; i < kKeptBuffers; ++i)
      if (s.kept[i].buffer != nullptr && s.kept[i].bytes == bytes) return take_out(s, i).buffer;
  }
  void* buffer = fresh(bytes);
  if (buffer == nullptr && release_kept_memory() > 0) buffer = fresh(bytes);
  return buffer;
}

void return_memory(void* buffer, int64_t bytes) {
  if (buffer == nullptr) return;
  void* leaving = buffer;
  if (bytes >= kKeptFrom) {
    Shelf& s = shelf();
    const std::lock_guard<std::mutex> lock(s.mutex);
    int used = 0;
    while (used < kKeptBuffers && s.kept[used].buffer != nullptr) ++used;
    leaving = used == kKeptBuffers ? take_out(s, 0).buffer : nullptr;
    s.kept[used == kKeptBuffers ? used - 1 : used] = Kept{buffer, bytes};
  }
  free(leaving);
}

int64_t release_kept_memory() {
  Shelf& s = shelf();
  const std::lock_guard<std::mutex> lock(s.mutex);
  int64_t bytes = 0;
  for (Kept& k : s.kept) {
    free(k.buffer);
    bytes += k.bytes;
    k = Kept{};
  }
  return bytes;
}

}  // namespace ibq::cpu
