// The tests' only tool: CHECK(condition, printf-like words) counts and prints failures, finish() is main's
// result.
#pragma once

#include <cstdio>

namespace ibq::test {

inline int failures = 0;
inline int checks = 0;

inline int finish(const char* name) {
  std::printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace ibq::test

#define CHECK(condition, ...)                                                \
  do {                                                                       \
    ++ibq::test::checks;                                                     \
    if (!(condition)) {                                                      \
      if (++ibq::test::failures <= 20) {                                     \
        std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::fprintf(stderr, __VA_ARGS__);                                   \
        std::fprintf(stderr, "\n");                                          \
      }                                                                      \
    }                                                                        \
  } while (false)
