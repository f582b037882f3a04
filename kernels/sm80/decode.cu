// A few new tokens per sequence: appended to the open segment, which they attend; retrieval, gate.
//
// Tile: DecodeTile<Dk, Dv>: 64 rows of (token, query head) pairs of one KV head, row = token *
// group + head, so that a tile of keys serves the whole group. Grid ((splits + 1) * row tiles, Hkv,
// sequences): a block attends `split_len` keys of the open segment; the one more retrieves alone,
// where a_mem is asked for. With more than one split the
// blocks leave partial outputs, and the last block of a (sequence, KV head, row tile), known by a
// ticket that all of them take, merges them in index order by their log-sum-exp; it retrieves,
// gates and writes. The last head of a sequence moves the counters; a segment that is full now is
// left to `commit`.
//
// Where the sequences stand is read from device memory, so the same launch serves every step of a
// captured graph; blocks beyond the open segment's end have nothing to do but their ticket.
//
// Shared memory: query, key, value tile; z; row weights. Barriers: __syncthreads; tickets in global
// memory, 0 between launches.
//
// Per token of the open segment and KV head 2 * 16 (Dk + Dv) flops for every 16 rows in use, and
// (Dk + Dv) elements read once; M (snapshot) and z are read once.
#include "common/attention.cuh"
#include "common/instantiate.h"
#include "common/open_rows.cuh"
#include "common/sequence.cuh"

namespace infini {

// The query rows of a tile: rows `first` on of [len * group], as one strided run per token.
template <class T>
struct PackedRows {
  const T* data;  // token 0, first head of the group
  int64_t token, head;
  int group;

  __device__ __forceinline__ const T* row(int i) const {
    return data + i / group * token + i % group * head;
  }
};

template <class T>
struct DecodeTask {
  Keys<T> source;
  Memory<T> memory;
  InfiniPiece piece;
  InfiniRope rope;
  int first, rows;  // rows of the tile among [len * group]
  int begin, end;   // keys of this block
  int used;         // splits with keys
  int taken;        // tokens of the call that earlier steps have appended
  bool last;        // this block is the last of its row tile, or alone
  bool alone;       // the block retrieves alone, for a_mem
};

template <class T, int Dk, int Dv>
struct Decode {
  using Tile = Attention<T, Dk, Dv, DecodeTile<Dk, Dv>>;
  static constexpr int kThreads = Tile::kThreads, kRows = Tile::QueryTile::rows;
  static constexpr int kPartial = kRows * (Dv + 2);

  const InfiniDecode& p;
  DecodeTask<T>& task;

  __device__ __forceinline__ int kv_head() const { return blockIdx.y; }
  // Blocks per row tile: the splits, and one more for a_mem.
  __device__ __forceinline__ int blocks() const { return p.splits + 1; }
  __device__ __forceinline__ int split() const { return blockIdx.x % blocks(); }
  __device__ __forceinline__ int row_tile() const { return blockIdx.x / blocks(); }
  __device__ __forceinline__ int64_t head_index() const {
    return int64_t{blockIdx.z} * p.problem.kv_heads + kv_head();
  }
  __device__ __forceinline__ int token_of(int row) const {
    return (task.first + row) / p.problem.group;
  }
  __device__ __forceinline__ int head_of(int row) const {
    return kv_head() * p.problem.group + (task.first + row) % p.problem.group;
  }

  // By one thread: what this block is to do.
  __device__ __forceinline__ void prepare() const {
    const InfiniSequence s = sequence_of(p.sequences, blockIdx.z);
    const InfiniCounters* counters = counters_of(p.state, s.slot);
    task.taken = p.step > 0 && counters ? counters->taken : 0;
    task.piece = piece_of(p.problem, p.state, p.call.rope, p.sequences, s, task.taken);
    const InfiniPiece& piece = task.piece;
    task.rope = p.call.rope;
    task.alone = split() == p.splits;
    task.first = row_tile() * kRows;
    task.rows = min(kRows, piece.len * p.problem.group - task.first);
    const int end = piece.cached + piece.len;
    task.begin = split() * p.split_len;
    task.end = piece.len > 0 ? min(task.begin + p.split_len, end) : 0;
    task.used = (end + p.split_len - 1) / p.split_len;
    if (piece.len <= 0) return;
    task.source = {keys_of<T>(p.problem, p.call.k, p.state, piece, kv_head()),
                   values_of<T>(p.problem, p.call.v, p.state, piece, kv_head())};
    if (task.rope.rows > 0) {
      const uint64_t open = p.state.open_k_rotated;
      task.source.k.open.data = segment_rows<T>(open, p.problem, piece.slot, kv_head(), Dk);
    }
    const int64_t matrix = int64_t{piece.slot} * p.problem.kv_heads + kv_head();
    task.memory = {pointer<const T>(p.state.snapshot) + matrix * (Dk * Dv),
                   pointer<const float>(p.state.snapshot_scale) + matrix * (Dv / 32),
                   pointer<const float>(p.state.normalizer) + matrix * Dk};
  }

  __device__ __forceinline__ void load_queries(const Tile& t) const {
    const InfiniPiece& piece = task.piece;
    const int group = p.problem.group;
    const PackedRows<T> rows{row_of<T>(p.call.q, piece.batch, piece.first, kv_head() * group),
                             p.call.q.token, p.call.q.head, group};
    constexpr int chunks = Dk / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * chunks; i += kThreads) {
      const int row = i / chunks, chunk = i % chunks;
      const bool inside = row < task.rows;
      const T* from = rows.row(task.first + (inside ? row : 0)) + chunk * 8;
      ptx::cp_async_16(t.queries.at(row, chunk), from, inside);
    }
  }

  __device__ __forceinline__ void attend(Tile& t) const {
    load_queries(t);
    const auto position = [&](int token) {
      const InfiniPiece& piece = task.piece;
      return position_of(task.rope, piece.batch, piece.first + token, piece.position + token);
    };
    const auto rotate = [&](int start) {
      if (task.rope.rows == 0) return;
      if (start == task.begin) {
        rotate_tile<kThreads>(t.queries, 0, task.rows, task.rope, p.state.status,
                              [&](int r) { return position(token_of(r)); });
      }
      const int cached = task.piece.cached;
      if (start + Tile::kKeys > cached) {
        rotate_tile<kThreads>(t.keys, max(cached - start, 0), min(Tile::kKeys, task.end - start),
                              task.rope, p.state.status,
                              [&](int r) { return position(start + r - cached); });
      }
      __syncthreads();
    };
    // The first token sees `cached` + 1 rows.
    t.attend(
        p.problem, task.source, task.begin, task.end, task.piece.cached + 1,
        [&](int i, int h) {
          const int visible = task.piece.cached + token_of(Tile::row(i, h)) + 1;
          return min(visible, task.end);
        },
        Tile::first_row() >= task.rows, rotate);
    t.reduce();
  }

  __device__ __forceinline__ float* partial(int index) const {
    const int64_t tile = head_index() * p.row_tiles + row_tile();
    return pointer<float>(p.exchange.partials) + (tile * p.splits + index) * kPartial;
  }

  __device__ __forceinline__ void leave(const Tile& t) const {
    float* to = partial(split());
#pragma unroll
    for (int j = 0; j < Dv / 8; ++j) {
      reinterpret_cast<float4*>(to)[j * kThreads + threadIdx.x] = {t.o[0][j][0], t.o[0][j][1],
                                                                   t.o[0][j][2], t.o[0][j][3]};
    }
    Tile::each_row([&](int i, int h, int row) {
      if (threadIdx.x % 4 != 0) return;
      to[kRows * Dv + row] = t.top[i][h];
      to[kRows * (Dv + 1) + row] = t.total[i][h];
    });
  }

  // The partial outputs of all splits, in index order.
  __device__ __forceinline__ void merge(Tile& t) const {
    clear(t);
    Tile::each_row([&](int i, int h, int row) {
      for (int s = 0; s < task.used; ++s) {
        t.top[i][h] = fmaxf(t.top[i][h], partial(s)[kRows * Dv + row]);
      }
    });
    for (int s = 0; s < task.used; ++s) {
      const float* from = partial(s);
      float weight[2];
      Tile::each_row([&](int i, int h, int row) {
        const float top = t.top[i][h] == -INFINITY ? 0.0f : t.top[i][h];
        weight[h] = ptx::ex2_approx_ftz(from[kRows * Dv + row] - top);
        t.total[i][h] += weighed(from[kRows * (Dv + 1) + row], weight[h]);
      });
#pragma unroll
      for (int j = 0; j < Dv / 8; ++j) {
        const float4 x = reinterpret_cast<const float4*>(from)[j * kThreads + threadIdx.x];
        t.o[0][j][0] += weighed(x.x, weight[0]);
        t.o[0][j][1] += weighed(x.y, weight[0]);
        t.o[0][j][2] += weighed(x.z, weight[1]);
        t.o[0][j][3] += weighed(x.w, weight[1]);
      }
    }
  }

  // Retrieval, gate and outputs of a row tile whose local branch is complete, or absent.
  __device__ __forceinline__ void finish(Tile& t) const {
    const auto out = [&](const InfiniTensor& to, int r) -> T* {
      if (r >= task.rows) return nullptr;
      return row_of<T>(to, task.piece.batch, task.piece.first + token_of(r), head_of(r));
    };
    if (p.call.lse.data && !task.alone) {
      Tile::each_row([&](int i, int h, int r) {
        if (threadIdx.x % 4 != 0 || r >= task.rows) return;
        *row_of<float>(p.call.lse, task.piece.batch, task.piece.first + token_of(r), head_of(r)) =
            t.log_sum_exp(i, h);
      });
    }
    if (p.call.a_dot.data && !task.alone) {
      t.store([&](int i, int h,
                  int) { return t.total[i][h] == 0.0f ? 0.0f : __fdividef(1.0f, t.total[i][h]); },
              [&](int r) { return out(p.call.a_dot, r); });
    }
    t.finish(
        p.problem, task.memory, task.rows, !task.piece.empty,
        [&](int r) {
          if (task.alone) return Gate{1.0f, 0.0f};
          const float logit = pointer<const float>(p.call.gate)[head_of(r)];
          return gate_of(p.problem, logit, task.piece.empty);
        },
        [&](int r) { return out(task.alone ? p.call.a_mem : p.call.o, r); },
        [&] {
          // The queries were rotated, or never here.
          __syncthreads();
          load_queries(t);
          ptx::cp_async_commit_group();
          ptx::cp_async_wait_group<0>();
        });
  }

  static __device__ __forceinline__ void clear(Tile& t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      t.top[0][h] = -INFINITY;
      t.total[0][h] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < Dv / 8; ++j) {
#pragma unroll
      for (float& x : t.o[0][j]) x = 0.0f;
    }
  }

  __device__ __forceinline__ void advance() const {
    const int open = task.piece.cached + task.piece.len;
    if (threadIdx.x != 0 || task.piece.len <= 0) return;
    InfiniCounters& c = pointer<InfiniCounters>(p.state.counters)[task.piece.slot];
    c.tokens += task.piece.len;
    c.open_len = open;
    c.rotated = task.rope.rows > 0;
    c.taken = task.taken + task.piece.len;
  }

  // Whether this block has rows and keys. Asked again wherever it matters: `task` lies in shared
  // memory, and the accumulators leave no register to remember it in.
  __device__ __forceinline__ bool works() const { return task.rows > 0 && task.begin < task.end; }

  __device__ __forceinline__ void run(unsigned char* shared) const {
    Tile t(shared);
    if (works()) {
      if (row_tile() == 0 && split() == 0) {
        append_tokens<kThreads, T>(p.problem, p.call, p.state, task.piece, kv_head(), 0,
                                   task.piece.len);
      }
      attend(t);
      if (task.used > 1) leave(t);
    }
    bool last = true;
    if (!task.alone) {
      uint32_t* tickets = pointer<uint32_t>(p.exchange.head_tickets);
      last = last_block(tickets + head_index() * p.row_tiles + row_tile(), p.splits);
      if (last && task.used > 1 && task.rows > 0) merge(t);
    }
    if (threadIdx.x == 0) task.last = last;
    if (task.alone || task.used > 1 ? last && task.rows > 0 : works()) finish(t);
    __syncthreads();
    if (task.last && last_block(pointer<uint32_t>(p.exchange.sequence_tickets) + blockIdx.z,
                                p.problem.kv_heads * p.row_tiles * (p.call.a_mem.data ? 2 : 1))) {
      advance();
    }
  }
};

template <class T, int Dk, int Dv>
__device__ __forceinline__ void decode(const InfiniDecode& p, unsigned char* shared) {
  __shared__ DecodeTask<T> task;
  const Decode<T, Dk, Dv> block{p, task};
  if (block.split() == p.splits && !p.call.a_mem.data) return;
  if (threadIdx.x == 0) block.prepare();
  __syncthreads();
  block.run(shared);
}

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) INFINI_HEAD(decode, InfiniDecode, DecodeTile, dk, dv)
INFINI_HEAD_DIMS(INFINI_INSTANCE)
