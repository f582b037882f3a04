// The main loop of a consumer warpgroup of the attention kernels: local attention of 64 query rows
// (attention_group.cuh), their output in registers; attention_outputs.cuh ends a tile.
//
// Per block of keys, with the products of one block under the softmax of another:
//   1. S' = Q K't of the next block is issued, then O += P V of this one
//   2. S' has arrived: its keys are released; running softmax of S' (attention_softmax.cuh)
//   3. O has arrived: the values are released; O is rescaled, P <- S'
// The groups take turns at step 1, so that one multiplies while the other weighs; a group's
// operands have arrived when its turn comes.
#pragma once

#include "sm90/attention_outputs.cuh"

namespace infini {

template <class T, int Dk, int Dv, int QueryStages>
struct AttentionConsumer {
  using Group = AttentionGroup<T, Dk, Dv, QueryStages>;
  using Shared = typename Group::Shared;
  static constexpr int kKeys = Shared::kKeys;
  using Softmax = typename Group::Softmax;
  using Outputs = GroupOutputs<Group>;
  using Scores = typename Softmax::Scores;
  using Weights = typename Softmax::Weights;

  Group group;

  // One tile; false when there are no more.
  __device__ __forceinline__ bool run(const InfiniProblem& p, const InfiniCall& call,
                                      uint64_t status) {
    const Ring<Shared::kJobs> ring = group.shared.job_ring();
    const Ring<QueryStages> query_ring = group.shared.query_ring(group.index());
    const AttentionJob& job = group.shared.job(group.jobs.stage());
    ring.wait(group.jobs);
    if (job.rows == 0) return false;
    group.start();
    group.wait_queries();
    if (job.rotates) group.rotate_queries(call, job, status);
    if (job.attends) attend(p, job.blocks);
    if (job.attends && !job.memory) Outputs::write_local(call, group, job);
    if (job.reloads) {
      query_ring.release(group.query);
      group.query.advance();
      group.wait_queries();
    }
    Outputs::gate_and_stage(p, group, job);
    Outputs::write(group, job, job.memory ? call.a_mem : call.o, job.memory ? kMapAMem : kMapO);
    query_ring.release(group.query);
    group.query.advance();
    ring.release(group.jobs);
    group.jobs.advance();
    return true;
  }

  // All blocks of a tile.
  __device__ __forceinline__ void attend(const InfiniProblem& problem, const KeyBlocks& blocks) {
    Weights p;
    {
      Scores s;
      float shrink[2];
      group.shared.key_ring().wait(group.key);
      group.take_turn();
      issue_scores(s);
      group.pass_turn();
      ptx::wgmma_wait_group<0>(s);
      group.release_keys();
      weigh<true>(problem, s, blocks.at<kKeys>(0), shrink);
      group.softmax.round(s, p);
    }
    attend_blocks<true>(problem, blocks, 1, blocks.masked, p);
    attend_blocks<false>(problem, blocks, max(1, blocks.masked), blocks.count, p);
    group.shared.value_ring().wait(group.value);
    issue_values<false>(p);
    ptx::wgmma_wait_group<0>(group.o);
    group.release_values();
    group.softmax.reduce();
  }

  // Blocks `from` to `to`: see the top of this file. `p` holds the weights of the block before.
  template <bool kMasked>
  __device__ __forceinline__ void attend_blocks(const InfiniProblem& problem,
                                                const KeyBlocks& blocks, int from, int to,
                                                Weights& p) {
    from = group.uniform(from);
    to = group.uniform(to);
    group.key.count = group.uniform(group.key.count);
    group.value.count = group.uniform(group.value.count);
#pragma unroll 1
    for (int i = from; i < to; ++i) {
      Scores s;
      float shrink[2];
      group.shared.key_ring().wait(group.key);
      group.shared.value_ring().wait(group.value);
      group.take_turn();
      issue_scores(s);
      issue_values<true>(p);
      ptx::wgmma_wait_group<1>(s);
      group.release_keys();
      weigh<kMasked>(problem, s, blocks.at<kKeys>(i), shrink);
      group.softmax.stay_before_wait();
      ptx::wgmma_wait_group<0>(group.o);
      if (group.softmax.shrinks(shrink)) group.rescale(shrink);
      group.release_values();
      group.softmax.round(s, p);
    }
  }

  // Issues S = Q Kt of the key ring's next block.
  __device__ __forceinline__ void issue_scores(Scores& s) {
    const auto q = group.queries();
    const auto k = group.shared.keys(group.key.stage());
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < Dk; kk += 16) {
      ptx::Wgmma<T, kKeys>::template ss<0, 0>(s, q.along_columns(kk), k.along_columns(kk), kk > 0);
    }
    ptx::wgmma_commit_group();
  }

  // Issues O += P V of the value ring's next block. `kPasses`: passes the turn before the last
  // products, so that those of the other group are there when the pipe runs empty.
  template <bool kPasses>
  __device__ __forceinline__ void issue_values(const Weights& p) {
    const auto v = group.shared.values(group.value.stage());
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      ptx::Wgmma<T, Dv>::template rs<1>(group.o, p[kk], v.along_rows(kk * 16), 1);
      if (kPasses && kk == kKeys / 16 - 3) group.pass_turn();
    }
    ptx::wgmma_commit_group();
  }

  template <bool kMasked>
  __device__ __forceinline__ void weigh(const InfiniProblem& p, Scores& s, const KeyBlock& block,
                                        float (&shrink)[2]) {
    const auto visible = [&](int h) { return block.visible + block.step * group.tile_row(h); };
    group.softmax.template weigh<kMasked>(p, s, visible, shrink);
  }
};

}  // namespace infini
