// One query tile of one piece and query head: what segment_attention and segment do in their
// attention blocks.
#pragma once

#include "common/attention_outputs.cuh"
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
};

template <class T>
__device__ __forceinline__ Gate gate_of(const InfiniProblem& p, const InfiniCall& call,
                                        const SegmentTask<T>& task) {
  if (task.branch == Branch::kMemory) return {1.0f, 0.0f};
  return gate_of(p, pointer<const float>(call.gate)[task.head], task.piece.empty);
}

// Changes the sign of a tile, which every thread has written; the caller synchronises afterwards.
template <int Threads, class T, int R, int C>
__device__ __forceinline__ void negate_tile(const Tile<T, R, C>& tile) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < R * (C / 8); i += Threads) {
    const uint32_t at = tile.at(i / (C / 8), i % (C / 8));
    Chunk chunk = load_chunk(at);
#pragma unroll
    for (uint32_t& pair : chunk.x) pair ^= 0x80008000u;
    store_chunk(at, chunk);
  }
}

// `kRotatesKeys`: new keys are rotated on arrival, if there is a rotation; otherwise they come
// rotated.
template <bool kRotatesKeys, class T, int Dk, int Dv>
__device__ __forceinline__ void segment_tile(const InfiniProblem& p, const InfiniCall& call,
                                             const SegmentTask<T>& task, uint64_t status,
                                             unsigned char* shared) {
  using Tile = Attention<T, Dk, Dv>;
  constexpr int kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  const auto load_queries = [&](const Tile& t) {
    const InfiniPiece& piece = task.piece;
    const Rows<T> rows{row_of<T>(call.q, piece.batch, task.token, task.head), call.q.token};
    load_tile<kThreads>(t.queries, rows, 0, task.rows);
    ptx::cp_async_commit_group();
  };
  Tile t(shared);
  load_queries(t);

  const bool asked = task.branch == Branch::kBoth && (call.lse.data || call.a_dot.data);
  const bool attends = asked || gate_of(p, call, task).local != 0.0f;
  const auto changes_queries = [&] { return attends && (task.rope.rows > 0 || p.negative); };
  if (attends) {
    const int whole = task.piece.cached + task.first + 1, end = whole - 1 + task.rows;
    const auto position = [&](int64_t token) {
      const InfiniPiece& piece = task.piece;
      return position_of(task.rope, piece.batch, piece.first + token, piece.position + token);
    };
    const auto rotate = [&](int start) {
      const int cached = task.piece.cached;
      if (!kRotatesKeys || task.rope.rows == 0 || start + kKeys <= cached) return;
      rotate_tile<kThreads>(t.keys, max(cached - start, 0), min(kKeys, end - start), task.rope,
                            status, [&](int r) { return position(start + r - cached); });
      __syncthreads();
    };
    t.load_keys(task.source, 0, end);
    if (changes_queries()) {
      ptx::cp_async_wait_group<1>();
      __syncthreads();  // the queries have arrived
      if (task.rope.rows > 0) {
        rotate_tile<kThreads>(t.queries, 0, task.rows, task.rope, status,
                              [&](int r) { return position(task.first + r); });
      }
      if (p.negative) negate_tile<kThreads>(t.queries);
    }
    t.attend(
        p, task.source, end, whole, [&](int i, int h) { return whole + Tile::row(i, h); }, rotate);
  } else {
    ptx::cp_async_wait_group<0>();
    __syncthreads();
  }

  const AttentionOutputs<T, Dk, Dv> outputs{t};
  const auto out = [&](const InfiniTensor& to, int r) -> T* {
    if (r >= task.rows) return nullptr;
    return row_of<T>(to, task.piece.batch, task.token + r, task.head);
  };
  if (asked && call.lse.data) {
    t.each_row([&](int i, int h, int r) {
      if (threadIdx.x % 4 == 0 && r < task.rows) {
        *row_of<float>(call.lse, task.piece.batch, task.token + r, task.head) =
            log_sum_exp(t.softmax.top[i][h], t.softmax.total[i][h]);
      }
    });
  }
  if (asked && call.a_dot.data) {
    outputs.store([&](int i, int h, int) { return over_total(1.0f, t.softmax.total[i][h]); },
                  [&](int r) { return out(call.a_dot, r); });
  }
  const Gate gate = gate_of(p, call, task);
  const bool retrieves = !task.piece.empty && gate.memory != 0.0f;
  outputs.finish(
      p, task.memory, task.rows, retrieves, gate,
      [&](int r) { return out(task.branch == Branch::kMemory ? call.a_mem : call.o, r); },
      [&] {
        if (!changes_queries()) return;
        __syncthreads();  // all have read the changed queries
        load_queries(t);
        ptx::cp_async_wait_group<0>();
      });
}

}  // namespace infini
