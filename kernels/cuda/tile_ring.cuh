// A ring of stages in shared memory through which tiles stream: the stage to be loaded next runs ahead of the
// one being read.
#pragma once

#include "intrinsics.cuh"

namespace ibq::cuda {

struct TileRing {
  SharedAddress begin, end, stage_bytes;
  SharedAddress to_load, to_read;
  int stages;

  IBQ_DEVICE TileRing(SharedAddress first, int stage_count, SharedAddress bytes)
      : begin(first),
        end(first + static_cast<SharedAddress>(stage_count) * bytes),
        stage_bytes(bytes),
        to_load(first),
        to_read(first),
        stages(stage_count) {}

  IBQ_DEVICE SharedAddress next_load() { return step(to_load); }
  IBQ_DEVICE SharedAddress next_read() { return step(to_read); }

  // Waits until this thread's copies into the stage to be read have landed; a group was committed for every
  // stage, also where there was nothing to load.
  IBQ_DEVICE void wait() const {
    if (stages == 4) {
      cp_async_wait<2>();
    } else if (stages == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
  }

 private:
  IBQ_DEVICE SharedAddress step(SharedAddress& at) const {
    const SharedAddress now = at;
    at += stage_bytes;
    if (at == end) at = begin;
    return now;
  }
};

}  // namespace ibq::cuda
