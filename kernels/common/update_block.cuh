// One chunk of one segment's update, as the blocks of commit and the update blocks of segment
// compute it: f32 partials of dM and of the column sums.
#pragma once

#include "common/finish.cuh"
#include "common/piece.cuh"
#include "common/update.cuh"

namespace infini {

// What the block is to do. It lies in shared memory, so that it takes no registers through the main
// loop.
template <class T>
struct UpdateTask {
  Keys<T> source;
  int64_t matrix;  // slot and head of M
  float* partial;  // where the result goes
  int first, end;  // tokens of the segment
  int column;      // first column of V
  int key;         // first column of K that is accumulated
  bool empty;
  float unit;  // by which z is multiplied
};

template <int Threads, class T, int Dk, int Dv, int Columns, int Accumulated = Dk>
__device__ __forceinline__ void update_block(const InfiniProblem& p, const InfiniState& state,
                                             UpdateTask<T>& task, unsigned char* shared) {
  Update<T, Dk, Columns, Threads, Accumulated> update(shared, task.key);
  const bool delta = p.delta && !task.empty;
  const float* z = pointer<const float>(state.normalizer) + task.matrix * Dk;
  const float unit = delta ? normaliser_scale<Dk>(z) : 1.0f;
  if (threadIdx.x == 0) task.unit = unit;
  for (int i = threadIdx.x; i < Dk; i += Threads) {
    update.z[i] = delta ? z[z_channel<Dk>(i)] * unit : 0.0f;
  }
  if (delta) {
    update.load_memory(pointer<const T>(state.snapshot) + task.matrix * (Dk * Dv),
                       pointer<const float>(state.snapshot_scale) + task.matrix * (Dv / 32), Dv,
                       task.column);
    update.memory_scale *= unit;
  }
  update.template run<true>(
      p, task.source.k, task.first, task.end, task.unit, delta, task.column == 0 && task.key == 0,
      [&](int stage, int token) {
        load_tile<Threads>(update.value_tile(stage), task.source.v, token, task.end, task.column);
      },
      [](float den) { return den == 0.0f ? 0.0f : 1.0f / den; }, [](int) {});
  update.store(task.partial, Dv, task.column);
  if (task.column == 0 && task.key == 0) update.store_sums(task.partial + Dk * Dv, shared);
}

}  // namespace infini
