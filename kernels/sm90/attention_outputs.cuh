// The end of a tile of a consumer warpgroup: the gate, with the retrieval between its two factors
// (attention_retrieval.cuh), and the way of the outputs to global memory through where the queries
// lay. Functions of an AttentionGroup, as those of the retrieval.
#pragma once

#include "sm90/attention_retrieval.cuh"

namespace infini {

template <class Group>
struct GroupOutputs {
  using T = typename Group::Element;
  using OutputStage = typename Group::Shared::OutputStage;
  using Retrieval = GroupRetrieval<Group>;
  static constexpr int Dv = Group::kValueDim;

  // What is asked of the local branch alone.
  static __device__ __forceinline__ void write_local(const InfiniCall& call, const Group& group,
                                                     const AttentionJob& job) {
    if (call.lse.data) write_log_sum_exp(group, job, call.lse);
    if (!call.a_dot.data) return;
    float over[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) over[h] = over_total(1.0f, group.softmax.total[h]);
    stage(group).put([&](int i) { return weighed(group.o[i], over[i / 2 % 2]); }, {false, false});
    write(group, job, call.a_dot, kMapADot);
  }

  static __device__ __forceinline__ void write_log_sum_exp(const Group& group,
                                                           const AttentionJob& job,
                                                           const InfiniTensor& lse) {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = group.tile_row(h);
      if (r >= job.rows) continue;
      const int64_t token = job.piece.first + job.first + r;
      *row_of<float>(lse, job.piece.batch, token, job.head) =
          log_sum_exp(group.softmax.top[h], group.softmax.total[h]);
    }
  }

  // O <- share O, or where the memory takes part e (share / e O + sigma(Q) M), staged.
  // Requires reduced totals and the raw queries.
  static __device__ __forceinline__ void gate_and_stage(const InfiniProblem& p, Group& group,
                                                        const AttentionJob& job) {
    float share[2], weight[2] = {0.0f, 0.0f}, least[2];
    RowScale scale[2];
    typename Retrieval::Mapped mapped;
#pragma unroll
    for (int h = 0; h < 2; ++h) share[h] = over_total(job.gate.local, group.softmax.total[h]);
    if (job.retrieves) {
      Retrieval::scale_of(group, scale);
      Retrieval::denominators(p, group, job.z, scale, weight, mapped);
#pragma unroll
      for (float& w : weight) w = w == 0.0f ? 0.0f : __fdividef(job.gate.memory, w);
      __syncwarp();  // all lanes have read the queries of rows that are staged now
    }
    // Rows that retrieve nothing are staged before they meet the memory: it may hold NaN.
    const bool local[2] = {weight[0] == 0.0f, weight[1] == 0.0f};
    if (__any_sync(0xffffffff, local[0] || local[1])) {
      stage(group).put([&](int i) { return weighed(group.o[i], share[i / 2 % 2]); },
                       {!local[0], !local[1]});
    }
    if (!job.retrieves) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = 0.0f;
#pragma unroll
      for (int i = 2 * h; i < Dv / 2; i += 4) {
        top = fmaxf(top, fmaxf(fabsf(group.o[i]), fabsf(group.o[i + 1])));
      }
      least[h] = least_share(share[h], top);
    }
    const auto retrieved = [&](int h, int slice) {
      return retrieved_share(weight[h], ptx::ld_global(job.scale + slice), least[h]);
    };
#pragma unroll
    for (int i = 0; i < Dv / 2; i += 16) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float f = share[h] == 0.0f ? 0.0f : __fdividef(share[h], retrieved(h, i / 16));
#pragma unroll
        for (int j = i + 2 * h; j < i + 16; j += 4) {
          group.o[j] = weighed(group.o[j], f);
          group.o[j + 1] = weighed(group.o[j + 1], f);
        }
      }
    }
    Retrieval::add(group, scale, mapped);
#pragma unroll
    for (int i = 0; i < Dv / 2; i += 16) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float e = retrieved(h, i / 16);
#pragma unroll
        for (int j = i + 2 * h; j < i + 16; j += 4) {
          group.o[j] *= e;
          group.o[j + 1] *= e;
        }
      }
    }
    stage(group).put([&](int i) { return group.o[i]; }, local);
  }

  static __device__ __forceinline__ OutputStage stage(const Group& group) {
    return {{group.queries().base}, group.warp_row()};
  }

  // What was staged of the warp's rows, to its place: whole 16 rows by the copy engine.
  static __device__ __forceinline__ void write(const Group& group, const AttentionJob& job,
                                               const InfiniTensor& to, AttentionMap map) {
    const int first = group.index() * 64 + group.warp_row(), count = min(16, job.rows - first);
    if (count == 16) {
      stage(group).send(&group.maps[map], job.row_box(to, first));
    } else {
      stage(group).copy(count, [&](int r) {
        return row_of<T>(to, job.piece.batch, job.piece.first + job.first + first + r, job.head);
      });
      ptx::fence_proxy_async_shared();  // the next queries come here by the copy engine
    }
  }
};

}  // namespace infini
