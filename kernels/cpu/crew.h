// Many short phases in one parallel region. The pool of the caller is entered once; between phases the
// threads meet at counters in memory that they watch, where another region would have to be entered and left:
// a step of the generator has 80 phases, of some 30 us each in int8.
//
// Items of a phase are dealt out as one range per thread, so that each thread reads its weights in order; who
// has finished takes from others. A thread waits only for items that some running thread has taken. So
// nothing is assumed about how many tasks the pool runs at once: if it runs them one after the other, the
// first does it all.
#pragma once

class Crew {
 public:
  // On counters that are zero at the start; who comes later, or from elsewhere, takes what is left.
  Crew(int threads, int64_t* counters) : threads_(threads), counters_(counters) {}

  int threads() const { return threads_; }

  static int64_t counters_for(int threads, int phases) { return (int64_t)phases * (threads + 1) * kLine; }

  // Items of the phase, each by one thread; returns when all are done. `before` runs before a thread's first
  // item, `idle` before it has to wait.
  template <typename Before, typename Item, typename Idle>
  void run(int phase, int me, int64_t items, const Before& before, const Item& item, const Idle& idle) {
    int64_t* const done = counters_ + (int64_t)phase * (threads_ + 1) * kLine;
    int64_t mine = 0;
    for (int v = 0; v < threads_; ++v) {
      const int owner = (me + v) % threads_;
      int64_t* const next = done + (owner + 1) * kLine;
      const int64_t first = begin(items, owner), end = begin(items, owner + 1);
      if (v > 0 && first + __atomic_load_n(next, __ATOMIC_RELAXED) >= end) continue;
      for (;;) {
        const int64_t i = first + __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (i >= end) break;
        if (mine++ == 0) before();
        item(i);
      }
    }
    if (mine > 0) __atomic_fetch_add(done, mine, __ATOMIC_RELEASE);
    if (__atomic_load_n(done, __ATOMIC_ACQUIRE) >= items) return;
    idle();
    for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < items; ++spins)
      if (spins < kSpins)
        relax();
      else
        sched_yield();
  }

  // First item of a thread's range.
  int64_t begin(int64_t items, int owner) const { return items * owner / threads_; }

 private:
  static constexpr int kLine = 8;      // counters apart by a cache line
  static constexpr int kSpins = 4000;  // some 50 us; then another process may have the core

  static IBQ_INLINE void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  int threads_;
  int64_t* counters_;
};
