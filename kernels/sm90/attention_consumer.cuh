// A consumer warpgroup of the attention kernels: 64 query rows, their output in registers.
//
// Per block of keys, with the products of one block under the softmax of another:
//   1. S' = Q K't of the next block is issued, then O += P V of this one
//   2. S' has arrived: its keys are released; running softmax of S'
//   3. O has arrived: the values are released; O is rescaled, P <- S'
// The groups take turns at step 1, so that one multiplies while the other weighs; a group's operands
// have arrived when its turn comes.
//
// Then O <- f O, O += sigma(Q) M, O <- e O as in common/attention.cuh: sigma(Q) is made in
// registers, and M's snapshot comes through the value ring.
#pragma once

#include "common/rotate.cuh"
#include "common/snapshot.cuh"
#include "sm90/attention_shared.cuh"

namespace infini {

template <class T, int Dk, int Dv, int QueryStages>
struct AttentionConsumer {
  using Shared = AttentionShared<T, Dk, Dv, QueryStages>;
  static constexpr int kGroups = Shared::kGroups, kKeys = Shared::kKeys;
  static constexpr int kStages = Shared::kStages;
  static constexpr int kMemoryRows = Shared::kMemoryRows;

  const ptx::TensorMap* maps;
  Shared shared;
  Cursor<QueryStages> query;
  Cursor<kStages> key, value;
  Cursor<Shared::kJobs> jobs;

  // Row h of a thread is row `row(h)` of the group's 64.
  float o[Dv / 2];
  float top[2];    // running maximum of scores, times scale_log2
  float total[2];  // running sum of exponentials; of this thread's columns until reduce()

  using Scores = float[kKeys / 2];
  using Weights = uint32_t[kKeys / 16][4];  // A fragments

  // What all lanes agree on and a shuffle says so stays in uniform registers, where the operands of
  // wgmma are built. (Above Dv = 128 no register is to spare for it.)
  const int uniform_group = uniform(threadIdx.x / 128);

  static __device__ __forceinline__ uint32_t uniform(uint32_t x) {
    return __shfl_sync(0xffffffff, x, 0);
  }
  __device__ __forceinline__ int group() const {
    return Dv > 128 ? ptx::tid_x() / 128 : uniform_group;
  }
  static __device__ __forceinline__ int warp_row() { return ptx::tid_x() / 32 % 4 * 16; }
  static __device__ __forceinline__ int row(int h) {
    return warp_row() + ptx::tid_x() % 32 / 4 + h * 8;
  }

  // The group's queries.
  uint32_t query_base;
  __device__ __forceinline__ typename Shared::QueryTile queries() const {
    if (QueryStages == 1) return shared.queries(group());
    return {query_base};
  }
  __device__ __forceinline__ void wait_queries() {
    if (QueryStages > 1) query_base = uniform(shared.queries(group(), query.stage()).base);
    shared.query_ring(group()).wait(query);
  }

  // ---- turns

  __device__ __forceinline__ void take_turn() const { ptx::bar_sync(kTurnBarrier + group(), 256); }
  __device__ __forceinline__ void pass_turn() const {
    ptx::bar_arrive(kTurnBarrier + (group() + 1) % kGroups, 256);
  }
  // Before the first turn: as if the last group had passed it.
  __device__ __forceinline__ void start_turns() const {
    if (group() == kGroups - 1) pass_turn();
  }
  // After the last: what the last group has passed.
  __device__ __forceinline__ void end_turns() const {
    if (group() == 0) take_turn();
  }

  // ---- local branch

  // Issues S = Q Kt of the key ring's next block.
  __device__ __forceinline__ void issue_scores(Scores& s) {
    const auto q = queries();
    const auto k = shared.keys(key.stage());
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < Dk; kk += 16) {
      ptx::Wgmma<T, kKeys>::template ss<0, 0>(s, q.along_columns(kk), k.along_columns(kk), kk > 0);
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ void release_keys() {
    shared.key_ring().release(key);
    key.advance();
  }

  // Issues O += P V of the value ring's next block. `kPasses`: passes the turn before the last
  // products, so that those of the other group are there when the pipe runs empty.
  template <bool kPasses>
  __device__ __forceinline__ void issue_values(const Weights& p) {
    const auto v = shared.values(value.stage());
    ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      ptx::Wgmma<T, Dv>::template rs<1>(o, p[kk], v.along_rows(kk * 16), 1);
      if (kPasses && kk == kKeys / 16 - 3) pass_turn();
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ void release_values() {
    shared.value_ring().release(value);
    value.advance();
  }

  // Scores become weights relative to the new maximum; `shrink`: what was summed before is to be
  // multiplied by.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(const InfiniProblem& p, Scores& s, const KeyBlock& block,
                                        float (&shrink)[2]) {
    const int column = static_cast<int>(threadIdx.x) % 4 * 2;
    if (p.negative) {
#pragma unroll
      for (float& x : s) x = -x;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int visible = block.visible + block.step * (group() * 64 + row(h)) - column;
      float best = -INFINITY;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[4 * j + 2 * h + c];
          if (kMasked && j * 8 + c >= visible) x = -INFINITY;
          best = fmaxf(best, x);
        }
      }
      best = fmaxf(top[h], lanes_max<4>(best) * p.scale_log2);
      // A maximum that grew by little stays, and O needs no rescaling: weights up to 2^8 are as
      // exact.
      if (best - top[h] <= 8.0f) best = top[h];
      // Nothing visible yet: any finite shift gives weights 0 instead of NaN.
      const float shift = best == -INFINITY ? 0.0f : best;
      shrink[h] = ptx::ex2_approx_ftz(top[h] - shift);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[4 * j + 2 * h + c];
          x = ptx::ex2_approx_ftz(fmaf(x, p.scale_log2, -shift));
          sum += x;
        }
      }
      total[h] = total[h] * shrink[h] + sum;
      top[h] = best;
    }
  }

  static __device__ __forceinline__ void round(const Scores& s, Weights& p) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < Dv / 2; ++i) o[i] *= factor[i / 2 % 2];
  }

  // The assembler would move the wait for the products up, before the softmax that is to overlap
  // with them; it does not move it over a branch that depends on the softmax. (This one is never
  // taken: sums of exponentials are not negative.)
  static __device__ __forceinline__ void keep_before(const float (&total)[2]) {
    if (total[0] + total[1] < 0.0f) __trap();
  }

  // Blocks `from` to `to`: see the top of this file. `p` holds the weights of the block before.
  template <bool kMasked>
  __device__ __forceinline__ void attend_blocks(const InfiniProblem& problem,
                                                const KeyBlocks& blocks, int from, int to,
                                                Weights& p) {
    from = uniform(from);
    to = uniform(to);
    key.count = uniform(key.count);
    value.count = uniform(value.count);
#pragma unroll 1
    for (int i = from; i < to; ++i) {
      Scores s;
      float shrink[2];
      shared.key_ring().wait(key);
      shared.value_ring().wait(value);
      take_turn();
      issue_scores(s);
      issue_values<true>(p);
      ptx::wgmma_wait_group<1>(s);
      release_keys();
      weigh<kMasked>(problem, s, blocks.at<kKeys>(i), shrink);
      keep_before(total);
      ptx::wgmma_wait_group<0>(o);
      // Most blocks raise no row's maximum.
      if (__any_sync(0xffffffff, shrink[0] != 1.0f || shrink[1] != 1.0f)) rescale(shrink);
      release_values();
      round(s, p);
    }
  }

  __device__ __forceinline__ void attend(const InfiniProblem& problem, const AttentionJob& job) {
    const KeyBlocks& blocks = job.blocks;
    Weights p;
    {
      Scores s;
      float shrink[2];
      shared.key_ring().wait(key);
      take_turn();
      issue_scores(s);
      pass_turn();
      ptx::wgmma_wait_group<0>(s);
      release_keys();
      weigh<true>(problem, s, blocks.at<kKeys>(0), shrink);
      round(s, p);
    }
    attend_blocks<true>(problem, blocks, 1, blocks.masked, p);
    attend_blocks<false>(problem, blocks, max(1, blocks.masked), blocks.count, p);
    shared.value_ring().wait(value);
    issue_values<false>(p);
    ptx::wgmma_wait_group<0>(o);
    release_values();
#pragma unroll
    for (float& x : total) x = lanes_sum<4>(x);
  }

  // Natural log-sum-exp of a row; -inf where it attended nothing.
  __device__ __forceinline__ float log_sum_exp(int h) const {
    return total[h] == 0.0f ? -INFINITY : (top[h] + log2f(total[h])) * kLn2;
  }

  // ---- retrieval

  // A fragment of sigma(Q), of rows scaled by e^-shift.
  __device__ __forceinline__ void map_queries(uint32_t (&a)[4], int column,
                                              const float (&shift)[2]) const {
    queries().a(a, warp_row(), column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(a[i]);
      a[i] = pack<T>(sigma(x.x - shift[i % 2]), sigma(x.y - shift[i % 2]));
    }
  }

  // min(largest channel, 0) of each row: what a retrieval may divide its row by.
  __device__ __forceinline__ void shift_of(float (&shift)[2]) const {
    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll 4
    for (int column = 0; column < Dk; column += 16) {
      uint32_t a[4];
      queries().a(a, warp_row(), column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(a[i]);
        most[i % 2] = fmaxf(most[i % 2], fmaxf(x.x, x.y));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[h] = lanes_max<4>(most[h]);
      // A row of -inf alone is weightless, as in the limit of ever smaller channels.
      shift[h] = most[h] == -INFINITY ? 0.0f : fminf(most[h], 0.0f);
    }
  }

  // sigma(Q) is mapped once where it fits the registers.
  static constexpr bool kKeeps = Dk <= 128;
  using Mapped = uint32_t[kKeeps ? Dk / 16 : 1][4];

  // sigma(Q) z of each row; 0 for rows that retrieve nothing.
  __device__ __forceinline__ void denominators(const InfiniProblem& p, const float* z,
                                               const float (&shift)[2], float (&den)[2],
                                               Mapped& mapped) const {
    const float2* pairs = reinterpret_cast<const float2*>(z) + ptx::tid_x() % 4;
    den[0] = den[1] = 0.0f;
#pragma unroll (kKeeps ? Dk / 16 : 4)
    for (int column = 0; column < Dk; column += 16) {
      uint32_t(&a)[4] = mapped[kKeeps ? column / 16 : 0];
      map_queries(a, column, shift);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<T>(a[i]), weight = ptx::ld_global(pairs + column / 2 + i / 2 * 4);
        den[i % 2] += x.x * weight.x + x.y * weight.y;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) den[h] = denominator(p, lanes_sum<4>(den[h]), shift[h]);
  }

  // O += sigma(Q) snapshot.
  __device__ __forceinline__ void retrieve(const float (&shift)[2], Mapped& mapped) {
    static_assert(!kKeeps || kMemoryRows == Dk);
#pragma unroll 1
    for (int first = 0; first < Dk; first += kMemoryRows) {
      uint32_t a[kMemoryRows / 16][4];
#pragma unroll
      for (int kk = 0; kk < kMemoryRows / 16; ++kk) {
        if constexpr (kKeeps) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[kk][i] = mapped[kk][i];
        } else {
          map_queries(a[kk], first + kk * 16, shift);
        }
      }
      const auto m = shared.memory(value.stage());
      shared.value_ring().wait(value);
      ptx::settle(a);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kMemoryRows / 16; ++kk) {
        ptx::Wgmma<T, Dv>::template rs<1>(o, a[kk], m.along_rows(kk * 16), 1);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>(o);
      release_values();
    }
  }

  // ---- outputs

  __device__ __forceinline__ typename Shared::OutputStage stage() const {
    return {{queries().base}, warp_row()};
  }

  // What was staged of the warp's rows, to its place: whole 16 rows by the copy engine.
  __device__ __forceinline__ void write(const InfiniTensor& to, AttentionMap map,
                                        const AttentionJob& job) const {
    const int first = group() * 64 + warp_row(), count = min(16, job.rows - first);
    if (count == 16) {
      stage().send(&maps[map], job.row_box(to, first));
    } else {
      stage().copy(count, [&](int r) {
        return row_of<T>(to, job.piece.batch, job.piece.first + job.first + first + r, job.head);
      });
      ptx::fence_proxy_async_shared();  // the next queries come here by the copy engine
    }
  }

  __device__ __forceinline__ void write_log_sum_exp(const InfiniTensor& lse,
                                                    const AttentionJob& job) const {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = group() * 64 + row(h);
      if (r >= job.rows) continue;
      const int64_t token = job.piece.first + job.first + r;
      *row_of<float>(lse, job.piece.batch, token, job.head) = log_sum_exp(h);
    }
  }

  // What is asked of the local branch alone.
  __device__ __forceinline__ void write_local(const InfiniCall& call,
                                              const AttentionJob& job) const {
    if (call.lse.data) write_log_sum_exp(call.lse, job);
    if (!call.a_dot.data) return;
    float over[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) over[h] = total[h] == 0.0f ? 0.0f : __fdividef(1.0f, total[h]);
    stage().put([&](int i) { return weighed(o[i], over[i / 2 % 2]); }, {false, false});
    write(call.a_dot, kMapADot, job);
  }

  // O <- share O, or where the memory takes part weight (share / weight O + sigma(Q) M), staged.
  // Requires reduced totals and the raw queries.
  __device__ __forceinline__ void gate_and_stage(const InfiniProblem& p, const AttentionJob& job) {
    float share[2], weight[2] = {0.0f, 0.0f}, shift[2];
    Mapped mapped;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float w = job.gate.local;
      share[h] = w == 0.0f || total[h] == 0.0f ? 0.0f : __fdividef(w, total[h]);
    }
    if (job.retrieves) {
      shift_of(shift);
      denominators(p, job.z, shift, weight, mapped);
#pragma unroll
      for (float& w : weight) w = w == 0.0f ? 0.0f : __fdividef(job.gate.memory, w);
      __syncwarp();  // all lanes have read the queries of rows that are staged now
    }
    // Rows that retrieve nothing are staged before they meet the memory: it may hold NaN.
    const bool local[2] = {weight[0] == 0.0f, weight[1] == 0.0f};
    if (__any_sync(0xffffffff, local[0] || local[1])) {
      stage().put([&](int i) { return weighed(o[i], share[i / 2 % 2]); }, {!local[0], !local[1]});
    }
    if (!job.retrieves) return;
    // Bounded away from 0 so that share / retrieved stays finite; what that adds is below rounding.
    const auto retrieved = [&](int h, int slice) {
      const float e = weight[h] * inverse_scale(ptx::ld_global(job.scale + slice));
      const float least = share[h] * 1e-30f;
      return fabsf(e) < least ? least : e;
    };
#pragma unroll
    for (int i = 0; i < Dv / 2; i += 16) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float f = share[h] == 0.0f ? 0.0f : __fdividef(share[h], retrieved(h, i / 16));
#pragma unroll
        for (int j = i + 2 * h; j < i + 16; j += 4) {
          o[j] = weighed(o[j], f);
          o[j + 1] = weighed(o[j + 1], f);
        }
      }
    }
    retrieve(shift, mapped);
#pragma unroll
    for (int i = 0; i < Dv / 2; i += 16) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float e = retrieved(h, i / 16);
#pragma unroll
        for (int j = i + 2 * h; j < i + 16; j += 4) {
          o[j] *= e;
          o[j + 1] *= e;
        }
      }
    }
    stage().put([&](int i) { return o[i]; }, local);
  }

  // One tile; false when there are no more.
  __device__ __forceinline__ bool run(const InfiniProblem& p, const InfiniCall& call,
                                      uint64_t status) {
    const Ring<Shared::kJobs> ring = shared.job_ring();
    const Ring<QueryStages> query_ring = shared.query_ring(group());
    const AttentionJob& job = shared.job(jobs.stage());
    ring.wait(jobs);
    if (job.rows == 0) return false;
#pragma unroll
    for (float& x : o) x = 0.0f;
    top[0] = top[1] = -INFINITY;
    total[0] = total[1] = 0.0f;
    wait_queries();
    if (job.rotates) rotate(call, job, status);
    if (job.attends) attend(p, job);
    if (job.attends && !job.memory) write_local(call, job);
    if (job.reloads) {
      query_ring.release(query);
      query.advance();
      wait_queries();
    }
    gate_and_stage(p, job);
    write(job.memory ? call.a_mem : call.o, job.memory ? kMapAMem : kMapO, job);
    query_ring.release(query);
    query.advance();
    ring.release(jobs);
    jobs.advance();
    return true;
  }

  // The group's queries in place.
  __device__ __forceinline__ void rotate(const InfiniCall& call, const AttentionJob& job,
                                         uint64_t status) const {
    const InfiniPiece& piece = job.piece;
    const int skip = job.first + group() * 64;
    rotate_tile<128>(
        queries(), 0, max(0, min(64, job.rows - group() * 64)), call.rope, status,
        [&](int r) {
          return position_of(call.rope, piece.batch, piece.first + skip + r,
                             piece.position + skip + r);
        },
        threadIdx.x % 128);
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(kGroupBarrier + group(), 128);
  }
};

}  // namespace infini
