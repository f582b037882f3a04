// A few new tokens per sequence: appended to the open segment, which they attend; retrieval, gate.
//
// Tile: DecodeTile<Dk, Dv>: 32 rows of (token, query head) pairs of one KV head, row = token *
// group + head, so that a tile of keys serves the whole group. Grid ((splits + 1) * row tiles, Hkv,
// sequences): a block attends `split_len` keys of the open segment, the last of a row tile
// retrieves. Its four warps share each tile of 64 keys (a warp 16 of them, or two 32 with more than
// 16 rows in use), and add up in their order what they have. All blocks with work leave partial
// outputs, of rows in use; the last of a (sequence, KV head, row tile), known by a ticket, merges
// those in index order by their log-sum-exp, gates and writes. A segment that is full now is left
// to `commit`.
//
// Where the sequences stand is read from device memory, so the same launch serves every step of a
// captured graph. All blocks of a sequence take a second ticket once they have read its counters;
// the last moves them. Blocks beyond the open segment's end have nothing else to do.
//
// Shared memory: two tiles of keys and values in flight (one at d = 256), or the snapshot (there in
// halves), then what the warps have to add up; query tile; z; row maxima, sums, weights. Barriers: __syncthreads; tickets in global memory, 0 between
// launches.
//
// Per token of the open segment and KV head 2 * 16 (Dk + Dv) flops for every 16 rows in use, and
// (Dk + Dv) elements read once; M (snapshot) and z are read once. Per split and row in use 8 (Dv +
// 2) bytes are exchanged.
#include "common/decode_tile.h"
#include "common/gate.cuh"
#include "common/instantiate.h"
#include "common/key_share.cuh"
#include "common/open_rows.cuh"
#include "common/sequence.cuh"

namespace infini {

// What a block is to do.
template <class T>
struct DecodeTask {
  Keys<T> source;
  InfiniPiece piece;
  int split, row_tile;
  int first, rows;  // rows of the tile among [len * group]; rows <= 0: none
  int begin, end;   // keys of this block
  int used;         // splits with keys
  int taken;        // tokens of the call that earlier steps have appended
};

template <class T, int Dk, int Dv>
struct Decode {
  using Shape = DecodeTile<Dk, Dv>;
  using Share = KeyShare<T, Dk, Dv>;
  using QueryTile = Tile<T, Shape::rows, Dk>;
  using KeyTile = Tile<T, Shape::keys, Dk>;
  using ValueTile = Tile<T, Shape::keys, Dv>;
  static constexpr int kThreads = Shape::threads, kRows = Shape::rows, kKeys = Shape::keys;
  static constexpr int kStages = Shape::stages, kStage = KeyTile::bytes + ValueTile::bytes;
  static constexpr int kPartial = kRows * (Dv + 2);
  // Channels of M that the ring holds at a time.
  static constexpr int kChannels = 2 * Dk * Dv > Shape::ring_bytes ? Dk / 2 : Dk;
  static_assert(2 * kChannels * Dv <= Shape::ring_bytes && kChannels % 16 == 0);
  static_assert(4 * Shape::warps * 16 * Dv <= Shape::ring_bytes, "what the warps add up");
  // The thread that moves the counters.
  static constexpr int kCounting = 32;

  const InfiniDecode& p;
  DecodeTask<T>& task;
  unsigned char* shared;

  // ---- shared memory

  __device__ __forceinline__ KeyTile keys(int stage) const {
    return {ptx::shared_address(shared) + stage * kStage};
  }
  __device__ __forceinline__ ValueTile values(int stage) const {
    return {keys(stage).base + KeyTile::bytes};
  }
  __device__ __forceinline__ QueryTile queries() const {
    return {ptx::shared_address(shared) + Shape::ring_bytes};
  }
  __device__ __forceinline__ float* z() const {  // [Dk]
    return reinterpret_cast<float*>(shared + Shape::ring_bytes + QueryTile::bytes);
  }
  // Maximum and sum of a warp's rows.
  __device__ __forceinline__ float2* heads() const {  // [warps][16]
    return reinterpret_cast<float2*>(z() + Dk);
  }
  // One over the retrieval's denominator; 0: nothing is retrieved.
  __device__ __forceinline__ float* weights() const {  // [rows]
    return reinterpret_cast<float*>(heads() + Shape::warps * 16);
  }
  // Four columns of a warp's sums. Stores of eight rows and loads of one meet different banks.
  __device__ __forceinline__ float4* sums(int warp, int row, int column) const {
    const int at = (column / 8 ^ (row & 3)) * 8 + column % 8;
    return reinterpret_cast<float4*>(shared) + (((warp * 16 + row) * Dv + at) >> 2);
  }

  // ---- where this block and warp stand

  __device__ __forceinline__ int kv_head() const { return blockIdx.y; }
  __device__ __forceinline__ int64_t head_index() const {
    return (int64_t{blockIdx.z} * p.problem.kv_heads + kv_head()) * p.row_tiles + task.row_tile;
  }
  __device__ __forceinline__ int token_of(int row) const {
    return (task.first + row) / p.problem.group;
  }
  __device__ __forceinline__ int head_of(int row) const {
    return kv_head() * p.problem.group + (task.first + row) % p.problem.group;
  }
  // Warps that have different rows of the same keys.
  __device__ __forceinline__ int row_warps() const { return task.rows > 16 ? 2 : 1; }
  __device__ __forceinline__ int shares() const { return Shape::warps / row_warps(); }
  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ int share() const { return warp() / row_warps(); }
  __device__ __forceinline__ int first_row() const { return warp() % row_warps() * 16; }
  // The warp that has a share of a row.
  __device__ __forceinline__ int warp_of(int row, int share) const {
    return share * row_warps() + row / 16;
  }

  __device__ __forceinline__ bool retrieves() const { return !task.piece.empty; }

  // By one thread.
  __device__ __forceinline__ void prepare() const {
    const InfiniSequence s = sequence_of(p.sequences, blockIdx.z);
    const InfiniCounters* counters = counters_of(p.state, s.slot);
    task.taken = p.step > 0 && counters ? counters->taken : 0;
    task.piece = piece_of(p.problem, p.state, p.call.rope, p.sequences, s, task.taken);
    const InfiniPiece& piece = task.piece;
    const int end = piece.cached + piece.len;
    task.split = blockIdx.x % (p.splits + 1);
    task.row_tile = blockIdx.x / (p.splits + 1);
    task.first = task.row_tile * kRows;
    task.rows = min(kRows, piece.len * p.problem.group - task.first);
    task.begin = task.split * p.split_len;
    task.end = min(task.begin + p.split_len, end);
    task.used = (end + p.split_len - 1) / p.split_len;
    if (task.used > p.splits) {
      // More is open than the host knew of when it cut the work: blocks, and tickets, would lack.
      report(p.state.status, INFINI_STATUS_LENGTH);
      task.piece.len = task.rows = 0;
    }
    if (task.rows <= 0) return;
    task.source = {keys_of<T>(p.problem, p.call.k, p.state, piece, kv_head()),
                   values_of<T>(p.problem, p.call.v, p.state, piece, kv_head())};
    if (p.call.rope.rows > 0) {
      const uint64_t open = p.state.open_k_rotated;
      task.source.k.open.data = segment_rows<T>(open, p.problem, piece.slot, kv_head(), Dk);
    }
  }

  // ---- local branch

  __device__ __forceinline__ void load_queries() const {
    const InfiniPiece& piece = task.piece;
    const int group = p.problem.group;
    const T* q = row_of<T>(p.call.q, piece.batch, piece.first, kv_head() * group);
    constexpr int chunks = Dk / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * chunks; i += kThreads) {
      const int row = i / chunks, chunk = i % chunks;
      const bool inside = row < task.rows;
      const int at = task.first + (inside ? row : 0);
      const T* from = q + at / group * p.call.q.token + at % group * p.call.q.head + chunk * 8;
      ptx::cp_async_16(queries().at(row, chunk), from, inside);
    }
  }

  __device__ __forceinline__ void load_keys(int tile) const {
    const int stage = tile % kStages, start = task.begin + tile * kKeys;
    if (start < task.end) {
      load_tile<kThreads>(keys(stage), task.source.k, start, task.end);
      load_tile<kThreads>(values(stage), task.source.v, start, task.end);
    }
    ptx::cp_async_commit_group();
  }

  // Rotates what has just arrived.
  __device__ __forceinline__ void rotate(int tile) const {
    const InfiniRope& rope = p.call.rope;
    if (rope.rows == 0) return;
    const InfiniPiece& piece = task.piece;
    const auto position = [&](int token) {
      return position_of(rope, piece.batch, piece.first + token, piece.position + token);
    };
    if (tile == 0) {
      rotate_tile<kThreads>(queries(), 0, task.rows, rope, p.state.status,
                            [&](int r) { return position(token_of(r)); });
    }
    const int start = task.begin + tile * kKeys, cached = piece.cached;
    if (start + kKeys > cached) {
      rotate_tile<kThreads>(keys(tile % kStages), max(cached - start, 0),
                            min(kKeys, task.end - start), rope, p.state.status,
                            [&](int r) { return position(start + r - cached); });
    }
    __syncthreads();
  }

  __device__ __forceinline__ void attend_tile(Share& sum, int tile) const {
    const typename Share::Queries rows{queries().base + first_row() * (2 * Dk)};
#pragma unroll 1
    for (int at = share() * 16; at < kKeys; at += shares() * 16) {
      const int start = task.begin + tile * kKeys + at;
      if (start >= task.end) break;
      // The first token sees `cached` + 1 rows.
      const int whole = min(task.piece.cached + 1, task.end);
      sum.attend(
          p.problem, rows, typename Share::Keys{keys(tile % kStages).base + at * (2 * Dk)},
          typename Share::Values{values(tile % kStages).base + at * (2 * Dv)}, start + 16 > whole,
          [&](int h) {
            const int token = token_of(first_row() + Share::row(h));
            return min(task.piece.cached + token + 1, task.end) - start;
          });
    }
  }

  __device__ __forceinline__ void attend() const {
    load_queries();
#pragma unroll 1
    for (int tile = 0; tile < kStages; ++tile) load_keys(tile);
    if (task.row_tile == 0 && task.split == 0) {
      append_tokens<kThreads, T>(p.problem, p.call, p.state, task.piece, kv_head(), 0,
                                 task.piece.len);
    }
    Share sum;
    const int tiles = (task.end - task.begin + kKeys - 1) / kKeys;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      ptx::cp_async_wait_group<kStages - 1>();
      __syncthreads();  // this tile has arrived
      rotate(tile);
      attend_tile(sum, tile);
      __syncthreads();  // all have read it
      load_keys(tile + kStages);
    }
    sum.reduce();
    park(sum);
    leave();
  }

  // A warp's sums to shared memory, of rows in use.
  __device__ __forceinline__ void park(const Share& sum) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = Share::row(h);
      if (first_row() + row >= task.rows) continue;
#pragma unroll
      for (int j = 0; j < Dv / 8; ++j) {
        auto* to = reinterpret_cast<float2*>(sums(warp(), row, j * 8)) + lane % 4;
        *to = {sum.o[j][2 * h], sum.o[j][2 * h + 1]};
      }
      if (lane % 4 == 0) heads()[warp() * 16 + row] = {sum.top[h], sum.total[h]};
    }
  }

  // `each(row, column)` of rows in use, four columns at a time, by the threads of the block.
  template <class Each>
  __device__ __forceinline__ void each_four(Each each) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < task.rows * (Dv / 4); i += kThreads) {
      each(i / (Dv / 4), i % (Dv / 4) * 4);
    }
  }

  static __device__ __forceinline__ void add(float4& x, const float4& y, float weight) {
    x.x += weighed(y.x, weight);
    x.y += weighed(y.y, weight);
    x.z += weighed(y.z, weight);
    x.w += weighed(y.w, weight);
  }

  // The partial output of a split, or what was retrieved: [rows][Dv]; maximum and sum per row.
  __device__ __forceinline__ float* partial(int index) const {
    return pointer<float>(p.exchange.partials) +
           (head_index() * (p.splits + 1) + index) * kPartial;
  }
  static __device__ __forceinline__ float2* partial_heads(float* partial) {
    return reinterpret_cast<float2*>(partial + kRows * Dv);
  }

  // The local branch of this split: the sums of the warps, in their order.
  __device__ __forceinline__ void leave() const {
    __syncthreads();
    float* to = partial(task.split);
    each_four([&](int row, int column) {
      float2 head = {-INFINITY, 0.0f};
      for (int s = 0; s < shares(); ++s) {
        head.x = fmaxf(head.x, heads()[warp_of(row, s) * 16 + row % 16].x);
      }
      float4 x = {};
      for (int s = 0; s < shares(); ++s) {
        const float2 own = heads()[warp_of(row, s) * 16 + row % 16];
        const float weight = share_weight(own.x, head.x);
        head.y += weighed(own.y, weight);
        add(x, *sums(warp_of(row, s), row % 16, column), weight);
      }
      *reinterpret_cast<float4*>(to + row * Dv + column) = x;
      if (column == 0) partial_heads(to)[row] = head;
    });
  }

  // ---- retrieval

  __device__ __forceinline__ void retrieve() const {
    const int64_t matrix = int64_t{task.piece.slot} * p.problem.kv_heads + kv_head();
    const Rows<T> memory{pointer<const T>(p.state.snapshot) + matrix * (Dk * Dv), Dv};
    const float* normaliser = pointer<const float>(p.state.normalizer) + matrix * Dk;
    const Tile<T, kChannels, Dv> tile{ptx::shared_address(shared)};
    load_queries();
    for (int i = threadIdx.x * 4; i < Dk; i += kThreads * 4) {
      ptx::cp_async_16(ptx::shared_address(z() + i), normaliser + z_channel<Dk>(i), true);
    }
    load_tile<kThreads>(tile, memory, 0, Dk);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    map_queries<kThreads>(p.problem, queries(), z(), task.rows, [&](int row, float d, bool first) {
      if (first) weights()[row] = d == 0.0f ? 0.0f : __fdividef(1.0f, d);
      return d != 0.0f;
    });
    __syncthreads();
    const typename Share::Queries rows{queries().base + first_row() * (2 * Dk)};
    Share sum;
#pragma unroll 1
    for (int channel = share() * 16;; channel += shares() * 16) {
      if (channel >= kChannels) break;
      sum.retrieve(rows, channel, typename Share::Values{tile.base + channel * (2 * Dv)});
    }
    if constexpr (kChannels < Dk) {
      __syncthreads();  // all have read the first half
      load_tile<kThreads>(tile, memory, kChannels, Dk);
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_group<0>();
      __syncthreads();
#pragma unroll 1
      for (int channel = share() * 16; channel < kChannels; channel += shares() * 16) {
        sum.retrieve(rows, kChannels + channel,
                     typename Share::Values{tile.base + channel * (2 * Dv)});
      }
    }
    __syncthreads();  // all have read M
    park(sum);
    __syncthreads();
    const float* scale = pointer<const float>(p.state.snapshot_scale) + matrix * (Dv / 32);
    float* to = partial(p.splits);
    each_four([&](int row, int column) {
      const float weight = weights()[row] * inverse_scale(scale[column / 32]);
      float4 x = {};
      for (int s = 0; s < shares(); ++s) {
        // A row that retrieves nothing must not meet the memory at all: it may hold NaN.
        add(x, *sums(warp_of(row, s), row % 16, column), weight);
      }
      *reinterpret_cast<float4*>(to + row * Dv + column) = x;
    });
  }

  // ---- outputs

  __device__ __forceinline__ void write(const InfiniTensor& to, int row, int column,
                                        const float4& x) const {
    T* at = row_of<T>(to, task.piece.batch, task.piece.first + token_of(row), head_of(row));
    *reinterpret_cast<uint2*>(at + column) = {pack<T>(x.x, x.y), pack<T>(x.z, x.w)};
  }

  // The partial outputs of all splits, in index order; gate and outputs.
  __device__ __forceinline__ void finish() const {
    each_four([&](int row, int column) {
      float top = -INFINITY, total = 0.0f;
#pragma unroll 4
      for (int s = 0; s < task.used; ++s) top = fmaxf(top, partial_heads(partial(s))[row].x);
      float4 local = {}, retrieved = {};
#pragma unroll 4
      for (int s = 0; s < task.used; ++s) {
        float* from = partial(s);
        const float2 head = partial_heads(from)[row];
        const float weight = share_weight(head.x, top);
        total += weighed(head.y, weight);
        add(local, *reinterpret_cast<const float4*>(from + row * Dv + column), weight);
      }
      if (retrieves()) {
        retrieved = *reinterpret_cast<const float4*>(partial(p.splits) + row * Dv + column);
      }
      const float logit = pointer<const float>(p.call.gate)[head_of(row)];
      const Gate gate = gate_of(p.problem, logit, task.piece.empty);
      const auto over = [&](float weight) { return over_total(weight, total); };
      float4 x = {};
      add(x, local, over(gate.local));
      add(x, retrieved, gate.memory);
      write(p.call.o, row, column, x);
      if (p.call.a_mem.data) write(p.call.a_mem, row, column, retrieved);
      if (p.call.a_dot.data) {
        x = {};
        add(x, local, over(1.0f));
        write(p.call.a_dot, row, column, x);
      }
      if (p.call.lse.data && column == 0) {
        const int64_t token = task.piece.first + token_of(row);
        *row_of<float>(p.call.lse, task.piece.batch, token, head_of(row)) = log_sum_exp(top, total);
      }
    });
  }

  __device__ __forceinline__ void advance() const {
    if (task.piece.len <= 0) return;
    InfiniCounters& c = pointer<InfiniCounters>(p.state.counters)[task.piece.slot];
    c.tokens += task.piece.len;
    c.open_len = task.piece.cached + task.piece.len;
    c.rotated = p.call.rope.rows > 0;
    c.taken = task.taken + task.piece.len;
  }

  __device__ __forceinline__ void run() const {
    // After the block has read the counters; the answer is not waited for before the end.
    const uint32_t blocks = gridDim.x * gridDim.y;
    uint32_t before = 0;
    const auto count = [&] {
      if (threadIdx.x != kCounting) return;
      uint32_t* ticket = pointer<uint32_t>(p.exchange.sequence_tickets) + blockIdx.z;
      before = ptx::atom_inc_release(ticket, blocks - 1);
    };
    const bool alone = task.split == p.splits;
    if (task.rows > 0 && (alone ? retrieves() : task.begin < task.end)) {
      if (alone) {
        retrieve();
      } else {
        attend();
      }
      uint32_t* ticket = pointer<uint32_t>(p.exchange.head_tickets) + head_index();
      if (last_block(ticket, task.used + (retrieves() ? 1 : 0), count)) finish();
    } else {
      count();
    }
    if (threadIdx.x == kCounting && before == blocks - 1) {
      ptx::fence_acq_rel();
      advance();
    }
  }
};

template <class T, int Dk, int Dv>
__device__ __forceinline__ void decode(const InfiniDecode& p, unsigned char* shared) {
  __shared__ DecodeTask<T> task;
  const Decode<T, Dk, Dv> block{p, task, shared};
  if (threadIdx.x == 0) block.prepare();
  __syncthreads();
  block.run();
}

}  // namespace infini

#define INFINI_INSTANCE(dk, dv) INFINI_HEAD(decode, InfiniDecode, DecodeTile, dk, dv)
INFINI_HEAD_DIMS(INFINI_INSTANCE)
