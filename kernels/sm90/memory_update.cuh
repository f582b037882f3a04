// The update of one KV head's memory by the blocks of a cluster, each with a chunk of the segment:
// transposed and in registers as in common/update.cuh, then summed through distributed shared
// memory.
//
// `columns` of M at a time (a pass), 64 of them per consumer warpgroup; at Dv = 64 the groups share
// them and take every other 64 tokens. Per tile of keys and values, mapped in place, one factor
// 1 / (sigma(k) z) per token; a step is 64 tokens, 32 at Dk = 256:
//   1. per step dMt += Vt sigma(K); under the delta rule Rt = Mt sigma(K)t is issued before,
//      weighed while these products run, and dMt += -Rt sigma(K) issued behind
//   2. all consumers map the next tile's keys while the last products run
// Then dM goes to shared memory as f32 [Dk][columns], and after a barrier of the cluster block r
// adds 32 columns of all blocks to M, in the order of the blocks.
//
// Shared memory: M's snapshot [Dk][columns] where the queries lay; keys and values in their rings;
// then dM over all of it.
#pragma once

#include "common/snapshot.cuh"
#include "sm90/attention_shared.cuh"
#include "sm90/token_tiles.cuh"

namespace infini {

// What a block is to do. It lies in shared memory, where it takes no registers.
struct UpdateChunk {
  int kv_head, first, end;  // tokens of the segment
  bool delta;               // there is a memory to correct
  int64_t matrix;           // slot and head of M
  float unit;               // by which z in shared memory was multiplied
};

template <class T, int Dk, int Dv>
struct UpdateShared : AttentionShared<T, Dk, Dv, 1> {
  using Shape = GroupSegmentTile<Dk, Dv>;
  using Base = AttentionShared<T, Dk, Dv, 1>;
  static constexpr int kColumns = Shape::columns, kPasses = Dv / kColumns;
  static constexpr int kThreads = 128 * Shape::groups;
  // Partial sums of a block: one, or one per group.
  static constexpr int kPartials = kColumns < 64 * Shape::groups ? 2 : 1;
  // Rows of dM in shared memory lie so far apart that fragments are stored without bank conflicts.
  static constexpr int kStride = kColumns + 4;
  static constexpr int kPartialBytes = Dk * kStride * 4;
  static_assert(kPartials * kPartialBytes <= Shape::Attention::tile_bytes);

  using SnapshotTile = SwizzledTile<T, Dk, kColumns>;
  static_assert(SnapshotTile::bytes <= Base::kKeysAt);

  __device__ __forceinline__ SnapshotTile snapshot() const { return {Base::queries(0).base}; }

  static __device__ __forceinline__ float* floats(int offset) {
    return reinterpret_cast<float*>(dynamic_shared() + Shape::Attention::shared_bytes) + offset;
  }
  static __device__ __forceinline__ float* z() { return floats(0); }
  static __device__ __forceinline__ float* sums() { return floats(Dk); }
  static __device__ __forceinline__ float2* sum_parts() {
    return reinterpret_cast<float2*>(floats(2 * Dk));
  }
  static __device__ __forceinline__ float* factors(int stage) {
    return floats(2 * Dk + 512 + stage * Shape::keys);
  }
  static __device__ __forceinline__ float* warp_values() {
    return floats(2 * Dk + 512 + 2 * Shape::keys);
  }
  static __device__ __forceinline__ InfiniPiece& piece() {
    return *reinterpret_cast<InfiniPiece*>(warp_values() + 16);
  }
  static __device__ __forceinline__ UpdateChunk& chunk() {
    return *reinterpret_cast<UpdateChunk*>(warp_values() + 32);
  }
  // dM of a partial, [Dk][kStride].
  static __device__ __forceinline__ float* partial(int index) {
    return reinterpret_cast<float*>(dynamic_shared() + index * kPartialBytes);
  }
};

template <class T, int Dk, int Dv>
struct MemoryUpdate {
  using Shared = UpdateShared<T, Dk, Dv>;
  static constexpr int kKeys = Shared::Shape::keys, kThreads = Shared::kThreads;
  static constexpr int kColumns = Shared::kColumns, kPartials = Shared::kPartials;
  // Tokens of a step: as many as the registers allow beside dM.
  static constexpr int kStep = Dk > 128 ? 32 : 64;
  static constexpr int kPairs = Dk / 2, kPairGroups = kThreads / kPairs;  // of the column sums

  const InfiniSegment& p;
  Shared shared;
  Cursor<1> query;
  Cursor<Shared::kStages> key, value;
  float2 sums = {};  // of one pair of channels, every kPairGroups rows

  static __device__ __forceinline__ int group() { return ptx::tid_x() / 128; }
  static __device__ __forceinline__ int warp_row() { return ptx::tid_x() / 32 % 4 * 16; }
  // The group's strip of 64 columns.
  static __device__ __forceinline__ int strip() { return kPartials == 1 ? group() : 0; }

  static __device__ __forceinline__ void meet() { ptx::bar_sync(kConsumerBarrier, kThreads); }

  // sigma of the tile of keys at `at`, in place.
  __device__ __forceinline__ void map_keys(Cursor<Shared::kStages> at, int valid) const {
    const auto keys = shared.keys(at.stage());
    float* factor = shared.factors(at.stage());
    shared.key_ring().wait(at);
    infini::map_keys<kThreads>(p.problem, keys, shared.z(), shared.chunk().unit, valid,
                               [&](int row, float den, bool first) {
                                 const bool absent = den == 0.0f || row >= valid;
                                 if (first) factor[row] = absent ? 0.0f : __fdividef(1.0f, den);
                               });
    ptx::fence_proxy_async_shared();
  }

  __device__ __forceinline__ void add_sums() {
    const int pair = threadIdx.x % kPairs;
    const auto keys = shared.keys(key.stage());
#pragma unroll(Dk > 128 ? 4 : 8)  // registers are few
    for (int row = threadIdx.x / kPairs; row < kKeys; row += kPairGroups) {
      const float2 x = unpack<T>(ptx::ld_shared(keys.at(row, pair / 4) + pair % 4 * 4));
      sums.x += x.x;
      sums.y += x.y;
    }
  }

  // Starts Rt of a step.
  __device__ __forceinline__ void retrieve(float (&r)[kStep / 2], int token) const {
    const auto keys = shared.keys(key.stage());
    const auto m = shared.snapshot().strip(strip());
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < Dk; kk += 16) {
      ptx::Wgmma<T, kStep>::template ss<1, 0>(r, m.along_rows(kk), keys.along_columns(kk, token),
                                              kk > 0);
    }
    ptx::wgmma_commit_group();
  }

  // -Rt as A fragments.
  __device__ __forceinline__ void weigh(uint32_t (&a)[kStep / 16][4], const float (&r)[kStep / 2],
                                        int token, float memory_scale) const {
    const float* factor = shared.factors(key.stage()) + token + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < kStep / 8; ++j) {
      const float x = factor[j * 8] * memory_scale, y = factor[j * 8 + 1] * memory_scale;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        a[j / 2][j % 2 * 2 + h] =
            pack<T>(weighed(r[4 * j + 2 * h], x), weighed(r[4 * j + 2 * h + 1], y));
      }
    }
    ptx::settle(a);
  }

  // Starts dMt += Vt sigma(K) of a step; V's strips from `first_strip` on.
  __device__ __forceinline__ void add(float (&d)[Dk / 2], int token, int first_strip) const {
    const auto keys = shared.keys(key.stage());
    const auto v = shared.values(value.stage()).strip(first_strip + strip());
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kStep / 16; ++kk) {
      const int row = token + kk * 16;
      ptx::Wgmma<T, Dk>::template ss<1, 1>(d, v.along_rows(row), keys.along_rows(row), 1);
    }
    ptx::wgmma_commit_group();
  }

  // The same of (V - R)t sigma(K). Rt is weighed under the products of V.
  __device__ __forceinline__ void correct(float (&d)[Dk / 2], int token, int first_strip,
                                          float memory_scale) const {
    float r[kStep / 2];
    retrieve(r, token);
    add(d, token, first_strip);
    ptx::wgmma_wait_group<1>(r);
    uint32_t a[kStep / 16][4];
    weigh(a, r, token, memory_scale);
    const auto keys = shared.keys(key.stage());
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kStep / 16; ++kk) {
      ptx::Wgmma<T, Dk>::template rs<1>(d, a[kk], keys.along_rows(token + kk * 16), 1);
    }
    ptx::wgmma_commit_group();
  }

  // The chunk's share of one pass: dM in shared memory, and in the first pass the column sums.
  __device__ __forceinline__ void run(int pass) {
    // The snapshot comes by the ring of group 0.
    shared.query_ring(0).wait(query);
    if (group() > 0) shared.query_ring(group()).wait(query);
    float d[Dk / 2];
#pragma unroll
    for (float& x : d) x = 0.0f;
    add_tiles(d, pass);
    meet();  // all are done with keys, values and snapshot
    put(d);
    if (pass == 0) put_sums();
  }

  // How many tokens of tile `i` count; 0: there is none. Found anew from shared memory, for
  // registers are few.
  __device__ __forceinline__ int valid(int i) const {
    const UpdateChunk& chunk = shared.chunk();
    const TokenTiles<kKeys> tiles(shared.piece(), chunk.first, chunk.end);
    return i < tiles.count() ? tiles.at(i).valid : 0;
  }

  // All tiles; the next is mapped under the last products of one.
  __device__ __forceinline__ void add_tiles(float (&d)[Dk / 2], int pass) {
    // Columns of this warp share one scale.
    const int64_t scale = shared.chunk().matrix * (Dv / 32) +
                          (pass * kColumns + strip() * 64 + warp_row()) / INFINI_SCALE_COLUMNS;
    const float memory_scale =
        -inverse_scale(pointer<const float>(p.state.snapshot_scale)[scale]) * shared.chunk().unit;
    int rows = valid(0);
    map_keys(key, rows);
#pragma unroll 1
    for (int i = 1; rows > 0; ++i) {
      meet();  // the tile is mapped
      shared.value_ring().wait(value);
#pragma unroll 1
      for (int token = kPartials == 2 ? group() * 64 : 0; token < kKeys;
           token += kPartials * kStep) {
        if (shared.chunk().delta) {
          correct(d, token, pass * (kColumns / 64), memory_scale);
        } else {
          add(d, token, pass * (kColumns / 64));
        }
      }
      if (pass == 0) add_sums();
      rows = valid(i);
      if (rows > 0) map_keys({key.count + 1}, rows);
      ptx::wgmma_wait_group<0>(d);
      shared.key_ring().release(key);
      key.advance();
      shared.value_ring().release(value);
      value.advance();
    }
  }

  // dMt of the group, transposed.
  __device__ __forceinline__ void put(const float (&d)[Dk / 2]) const {
    const int lane = threadIdx.x % 32;
    float* to = shared.partial(kPartials == 2 ? group() : 0) + strip() * 64 + warp_row() + lane / 4;
#pragma unroll
    for (int i = 0; i < Dk / 2; ++i) {
      to[(i / 4 * 8 + lane % 4 * 2 + i % 2) * Shared::kStride + i / 2 % 2 * 8] = d[i];
    }
  }

  __device__ __forceinline__ void put_sums() const {
    float2* parts = shared.sum_parts();
    parts[threadIdx.x] = sums;
    meet();
    if (threadIdx.x < kPairs) {
      float2 sum = parts[threadIdx.x];
      for (int i = 1; i < kPairGroups; ++i) {
        sum.x += parts[i * kPairs + threadIdx.x].x;
        sum.y += parts[i * kPairs + threadIdx.x].y;
      }
      reinterpret_cast<float2*>(shared.sums())[threadIdx.x] = sum;
    }
  }

  // ---- the end, after a barrier of the cluster

  // Largest of the consumers' values.
  __device__ __forceinline__ float largest(float x) const {
    float* values = shared.warp_values();
    x = lanes_max<32>(x);
    meet();
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = x;
    meet();
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) x = fmaxf(x, values[i]);
    return x;
  }

  // M += dM of all blocks in the pass's columns, 32 columns per block and turn; z in the last pass,
  // for until then it is read.
  __device__ __forceinline__ void finish(int pass) const {
    const int blocks = ptx::cluster_nctarank(), rank = ptx::cluster_ctarank();
#pragma unroll 1
    for (int column = rank * 32; column < kColumns; column += blocks * 32) {
      finish_columns(pass * kColumns, column, blocks);
    }
    if (pass < Shared::kPasses - 1 || rank != 0) return;
    float* z = pointer<float>(p.state.normalizer) + shared.chunk().matrix * Dk;
    for (int i = threadIdx.x; i < Dk; i += kThreads) {
      float sum = shared.piece().empty ? 0.0f : z[i];
      for (int block = 0; block < blocks; ++block) {
        sum += ptx::ld_shared_cluster(ptx::mapa(ptx::shared_address(shared.sums() + i), block));
      }
      z[i] = sum;
    }
  }

  __device__ __forceinline__ void finish_columns(int pass_column, int column, int blocks) const {
    const UpdateChunk& chunk = shared.chunk();
    constexpr int kEach = Dk * 8 / kThreads;  // groups of 4 columns per thread
    const int64_t base = chunk.matrix * (Dk * Dv) + pass_column + column;
    float* m = pointer<float>(p.state.memory) + base;
    T* snapshot = pointer<T>(p.state.snapshot) + base;
    float4 x[kEach];
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = threadIdx.x + i * kThreads, row = at / 8, c = at % 8 * 4;
      x[i] = shared.piece().empty ? float4{} : *reinterpret_cast<const float4*>(m + row * Dv + c);
      for (int block = 0; block < blocks; ++block) {
#pragma unroll
        for (int part = 0; part < kPartials; ++part) {
          const float* from = shared.partial(part) + row * Shared::kStride + column + c;
          const float4 d = ptx::ld_shared_cluster_v4(ptx::mapa(ptx::shared_address(from), block));
          x[i] = {x[i].x + d.x, x[i].y + d.y, x[i].z + d.z, x[i].w + d.w};
        }
      }
      *reinterpret_cast<float4*>(m + row * Dv + c) = x[i];
      top = fmaxf(top,
                  fmaxf(fmaxf(fabsf(x[i].x), fabsf(x[i].y)), fmaxf(fabsf(x[i].z), fabsf(x[i].w))));
    }
    const float scale = snapshot_scale(largest(top));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = threadIdx.x + i * kThreads, row = at / 8, c = at % 8 * 4;
      *reinterpret_cast<uint2*>(snapshot + row * Dv + c) = {
          pack<T>(x[i].x * scale, x[i].y * scale), pack<T>(x[i].z * scale, x[i].w * scale)};
    }
    if (threadIdx.x == 0) {
      pointer<float>(
          p.state.snapshot_scale)[chunk.matrix * (Dv / 32) + (pass_column + column) / 32] = scale;
    }
  }
};

}  // namespace infini
