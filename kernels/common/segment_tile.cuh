// One query tile of one piece and query head: what segment_attention and segment do in their
// attention blocks.
#pragma once

#include "common/attention.cuh"
#include "common/piece.cuh"

namespace infini {

// Which outputs an attention block writes.
enum class Branch { kBoth, kMemory };

// What a tile is. It lies in shared memory, so that it takes no registers through the main loop.
template <class T>
struct SegmentTask {
  Keys<T> source;  // the segment as the local branch sees it
  Memory<T> memory;
  InfiniPiece piece;
  InfiniRope rope;
  int64_t token;    // the tile's first token
  int first, rows;  // the same within the piece; rows in use
  int head;
  int kv_head;
  Branch branch;
  bool rotate_keys;  // new keys are rotated on arrival
};

template <class T>
__device__ __forceinline__ Gate gate_of(const InfiniProblem& p, const InfiniCall& call,
                                        const SegmentTask<T>& task) {
  if (task.branch == Branch::kMemory) return {1.0f, 0.0f};
  return gate_of(p, pointer<const float>(call.gate)[task.head], task.piece.empty);
}

template <class T, int Dk, int Dv>
__device__ __forceinline__ void segment_tile(const InfiniProblem& p, const InfiniCall& call,
                                             const SegmentTask<T>& task, uint64_t status,
                                             unsigned char* shared) {
  using Tile = Attention<T, Dk, Dv, AttentionTile<Dk, Dv>>;
  constexpr int kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  const auto load_queries = [&](const Tile& t) {
    const InfiniPiece& piece = task.piece;
    const Rows<T> rows{row_of<T>(call.q, piece.batch, task.token, task.head), call.q.token};
    load_tile<kThreads>(t.queries, rows, 0, task.rows);
  };
  Tile t(shared);
  load_queries(t);

  const bool asked = task.branch == Branch::kBoth && (call.lse.data || call.a_dot.data);
  const bool attends = asked || gate_of(p, call, task).local != 0.0f;
  if (attends) {
    const int whole = task.piece.cached + task.first + 1;
    const auto position = [&](int64_t token) {
      const InfiniPiece& piece = task.piece;
      return position_of(task.rope, piece.batch, piece.first + token, piece.position + token);
    };
    const auto rotate = [&](int start) {
      if (task.rope.rows == 0) return;
      if (start == 0) {
        rotate_tile<kThreads>(t.queries, 0, task.rows, task.rope, status,
                              [&](int r) { return position(task.first + r); });
      }
      const int cached = task.piece.cached, end = cached + task.first + task.rows;
      if (task.rotate_keys && start + kKeys > cached) {
        rotate_tile<kThreads>(t.keys, max(cached - start, 0), min(kKeys, end - start), task.rope,
                              status, [&](int r) { return position(start + r - cached); });
      }
      __syncthreads();
    };
    t.attend(
        p, task.source, 0, whole - 1 + task.rows, whole,
        [&](int i, int h) { return whole + Tile::row(i, h); }, Tile::first_row() >= task.rows,
        rotate);
    t.reduce();
  } else {
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
  }

  const auto out = [&](const InfiniTensor& to, int r) -> T* {
    if (r >= task.rows) return nullptr;
    return row_of<T>(to, task.piece.batch, task.token + r, task.head);
  };
  if (asked && call.lse.data) {
    t.each_row([&](int i, int h, int r) {
      if (threadIdx.x % 4 == 0 && r < task.rows) {
        *row_of<float>(call.lse, task.piece.batch, task.token + r, task.head) = t.log_sum_exp(i, h);
      }
    });
  }
  if (asked && call.a_dot.data) {
    t.store([&](int i, int h,
                int) { return t.total[i][h] == 0.0f ? 0.0f : __fdividef(1.0f, t.total[i][h]); },
            [&](int r) { return out(call.a_dot, r); });
  }
  const Gate gate = gate_of(p, call, task);
  const bool retrieves = !task.piece.empty && gate.memory != 0.0f;
  t.finish(
      p, task.memory, task.rows, retrieves, [&](int) { return gate; },
      [&](int r) { return out(task.branch == Branch::kMemory ? call.a_mem : call.o, r); },
      [&] {
        if (!attends || task.rope.rows == 0) return;
        __syncthreads();  // all have read the rotated queries
        load_queries(t);
        ptx::cp_async_commit_group();
        ptx::cp_async_wait_group<0>();
      });
}

}  // namespace infini
