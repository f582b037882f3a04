// What the queries of a consumer warpgroup find in the memory, added to its outputs: sigma(Q) is
// made in registers, and M's snapshot comes through the value ring.
#pragma once

#include "sm90/attention_group.cuh"

namespace infini {

template <class Group>
struct GroupRetrieval {
  using T = typename Group::Element;
  static constexpr int Dk = Group::kKeyDim, Dv = Group::kValueDim;
  static constexpr int kMemoryRows = Group::Shared::kMemoryRows;
  // sigma(Q) is mapped once where it fits the registers.
  static constexpr bool kKeeps = Dk <= 128;
  static_assert(!kKeeps || kMemoryRows == Dk);
  using Mapped = uint32_t[kKeeps ? Dk / 16 : 1][4];

  // What each row is scaled by.
  static __device__ __forceinline__ void scale_of(const Group& group, RowScale (&scale)[2]) {
    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll 4
    for (int column = 0; column < Dk; column += 16) {
      uint32_t a[4];
      group.queries().a(a, group.warp_row(), column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(a[i]);
        most[i % 2] = fmaxf(most[i % 2], fmaxf(x.x, x.y));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) scale[h] = row_scale(lanes_max<4>(most[h]));
  }

  // A fragment of sigma(Q), of scaled rows.
  static __device__ __forceinline__ void map_queries(const Group& group, uint32_t (&a)[4],
                                                     int column, const RowScale (&scale)[2]) {
    group.queries().a(a, group.warp_row(), column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(a[i]);
      const RowScale& s = scale[i % 2];
      a[i] = pack<T>(sigma(x.x - s.shift) * s.factor, sigma(x.y - s.shift) * s.factor);
    }
  }

  // sigma(Q) z of each row; 0 for rows that retrieve nothing.
  static __device__ __forceinline__ void denominators(const InfiniProblem& p, const Group& group,
                                                      const float* z, RowScale (&scale)[2],
                                                      float (&den)[2], Mapped& mapped) {
    const float2* pairs = reinterpret_cast<const float2*>(z) + ptx::tid_x() % 4;
#pragma unroll 1
    for (int run = 0;; ++run) {
      den[0] = den[1] = 0.0f;
#pragma unroll (kKeeps ? Dk / 16 : 4)
      for (int column = 0; column < Dk; column += 16) {
        uint32_t(&a)[4] = mapped[kKeeps ? column / 16 : 0];
        map_queries(group, a, column, scale);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(a[i]), weight = ptx::ld_global(pairs + column / 2 + i / 2 * 4);
          den[i % 2] += x.x * weight.x + x.y * weight.y;
        }
      }
      bool huge = false;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        den[h] = lanes_sum<4>(den[h]);
        huge |= run == 0 && rescale(scale[h], den[h]);
      }
      if (!__any_sync(0xffffffff, huge)) break;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) den[h] = denominator(p, den[h], scale[h]);
  }

  // O += sigma(Q) snapshot.
  static __device__ __forceinline__ void add(Group& group, const RowScale (&scale)[2],
                                             const Mapped& mapped) {
#pragma unroll 1
    for (int first = 0; first < Dk; first += kMemoryRows) {
      uint32_t a[kMemoryRows / 16][4];
#pragma unroll
      for (int kk = 0; kk < kMemoryRows / 16; ++kk) {
        if constexpr (kKeeps) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[kk][i] = mapped[kk][i];
        } else {
          map_queries(group, a[kk], first + kk * 16, scale);
        }
      }
      const auto m = group.shared.memory(group.value.stage());
      group.shared.value_ring().wait(group.value);
      ptx::settle(a);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kMemoryRows / 16; ++kk) {
        ptx::Wgmma<T, Dv>::template rs<1>(group.o, a[kk], m.along_rows(kk * 16), 1);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(group.o);
      group.release_values();
    }
  }
};

}  // namespace infini
