// One chunk of one segment's update, as the blocks of commit and the update blocks of segment
// compute it: f32 partials of dM and of the column sums.
#pragma once

#include "common/finish.cuh"
#include "common/piece.cuh"
#include "common/update.cuh"

namespace infini {

// Tokens `first` to `end` of the segment, columns `slice * Columns` on of V. `source` lies in shared
// memory.
template <int Threads, class T, int Dk, int Dv, int Columns>
__device__ __forceinline__ void update_block(const InfiniProblem& p, const InfiniState& state,
                                             const Keys<T>& source, int64_t matrix,
                                             bool empty, int first, int end, int slice,
                                             float* partial, unsigned char* shared) {
  Update<T, Dk, Columns, Threads> update(shared);
  const bool delta = p.delta && !empty;
  const float* z = pointer<const float>(state.normalizer) + matrix * Dk;
  for (int i = threadIdx.x; i < Dk; i += Threads) update.z[i] = delta ? z[i] : 0.0f;
  if (delta) {
    update.load_memory(pointer<const T>(state.snapshot) + matrix * (Dk * Dv),
                       pointer<const float>(state.snapshot_scale) + matrix * (Dv / 32), Dv,
                       slice * Columns);
  }
  update.template run<true>(
      p, source.k, first, end, delta, slice == 0,
      [&](int stage, int token) {
        load_tile<Threads>(update.value_tile(stage), source.v, token, end, slice * Columns);
      },
      [](float den) { return den == 0.0f ? 0.0f : 1.0f / den; }, [](int) {});
  update.store(partial, Dv, slice * Columns);
  if (slice == 0) update.store_sums(partial + Dk * Dv, shared);
}

}  // namespace infini
