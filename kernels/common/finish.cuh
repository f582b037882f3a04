// The end of an update that several blocks share: each leaves its partial sums in global memory and
// takes a ticket; the last block of a KV head folds them into M and z, the last head of a sequence
// advances its counters. Sums are in index order, so that every run gives the same bits.
#pragma once

#include "common/feature_map.cuh"
#include "common/sequence.cuh"
#include "common/snapshot.cuh"

namespace infini {

// One chunk's part of a head's update: dM [Dk][Dv], then the column sums of sigma(K) [Dk].
template <int Dk, int Dv>
__device__ __forceinline__ float* partial_of(const InfiniExchange& x, const InfiniProblem& p,
                                             int chunks, int sequence, int kv_head, int chunk) {
  const int64_t head = int64_t{sequence} * p.kv_heads + kv_head;
  return pointer<float>(x.partials) + (head * chunks + chunk) * (Dk * Dv + Dk);
}

// Whether this block is the last of the `blocks` of its (sequence, KV head). All of them take part,
// those without work too.
__device__ __forceinline__ bool last_of_head(const InfiniExchange& x, const InfiniProblem& p,
                                             int sequence, int kv_head, uint32_t blocks) {
  const int64_t head = int64_t{sequence} * p.kv_heads + kv_head;
  return last_block(pointer<uint32_t>(x.head_tickets) + head, blocks);
}

// Whether this head, whose last block calls, is the last of its sequence.
__device__ __forceinline__ bool last_of_sequence(const InfiniExchange& x, const InfiniProblem& p,
                                                 int sequence) {
  return last_block(pointer<uint32_t>(x.sequence_tickets) + sequence, p.kv_heads);
}

__device__ __forceinline__ void add(float4& a, const float4& b) {
  a.x += b.x;
  a.y += b.y;
  a.z += b.z;
  a.w += b.w;
}

// M += dM and z += dz of one head, from `used` partials that follow one another, and M's snapshot
// with its scales. An empty memory is not read. 32 columns at a time, which stay in registers until
// their scale is known: M, z and every partial are read once.
template <class T, int Dk, int Dv, int Threads>
__device__ __forceinline__ void fold_partials(const InfiniProblem& p, const InfiniState& state,
                                              const float* partials, int used, int slot,
                                              int kv_head, bool empty) {
  constexpr int kColumns = INFINI_SCALE_COLUMNS, kLanes = kColumns / 4;
  constexpr int kStep = Threads / kLanes, kRows = Dk / kStep;
  static_assert(Dk % kStep == 0, "every thread holds the same number of rows");
  const int64_t head = int64_t{slot} * p.kv_heads + kv_head, stride = Dk * Dv + Dk;
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes * 4;
#pragma unroll 1
  for (int column = 0; column < Dv; column += kColumns) {
    const int64_t first = int64_t{row} * Dv + column + lane;
    float4 sum[kRows] = {};
#pragma unroll 1
    for (int i = 0; i < used; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        add(sum[r], *reinterpret_cast<const float4*>(partials + i * stride + first +
                                                     r * (kStep * Dv)));
      }
    }
    float* memory = pointer<float>(state.memory) + head * (Dk * Dv) + first;
    float top = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float4& to = *reinterpret_cast<float4*>(memory + r * (kStep * Dv));
      if (!empty) add(sum[r], to);
      to = sum[r];
      top = fmaxf(top, fmaxf(fmaxf(fabsf(sum[r].x), fabsf(sum[r].y)),
                             fmaxf(fabsf(sum[r].z), fabsf(sum[r].w))));
    }
    const float scale = snapshot_scale(block_max<Threads>(top));
    T* snapshot = pointer<T>(state.snapshot) + head * (Dk * Dv) + first;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      *reinterpret_cast<uint2*>(snapshot + r * (kStep * Dv)) = {
          pack<T>(sum[r].x * scale, sum[r].y * scale), pack<T>(sum[r].z * scale, sum[r].w * scale)};
    }
    if (threadIdx.x == 0) {
      pointer<float>(state.snapshot_scale)[head * (Dv / kColumns) + column / kColumns] = scale;
    }
  }
  for (int i = threadIdx.x; i < Dk; i += Threads) {
    float sum = 0.0f;
    for (int c = 0; c < used; ++c) sum += partials[c * stride + Dk * Dv + i];
    float& z = pointer<float>(state.normalizer)[head * Dk + i];
    z = empty ? sum : z + sum;
  }
}

}  // namespace infini
