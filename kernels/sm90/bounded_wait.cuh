// Waits that give up, in builds with INFINI_ATTN_WAIT_POLLS: after so many failed polls of its
// barrier the first thread of all writes down where it stands, and traps.
//
// No printf: with a call in a kernel, ptxas serialises wgmma and ignores setmaxnreg, and what runs
// is no longer what hangs. And one piece of assembly, which has no way back into the kernel once it
// gives up: no register is to spare around the waits, and from C++ the compiler spills.
//
// Polls are `test_wait`, some tens of cycles each, so that their number is a limit in time: a
// `try_wait` may suspend the thread for as long as the hardware likes.
#pragma once

#include <stddef.h>

#include "common/ptx.cuh"
#include "params.h"

extern "C" {
// The module's record: in memory of the host, which outlives the context. The host says where;
// null: nothing is written down.
__device__ __attribute__((used)) InfiniWaitReport* infini_wait_report;
// Whether a thread has given up. Not in the record: not every bus does atomics.
__device__ __attribute__((used)) uint32_t infini_wait_given_up;
}

// The first thread traps once its record is complete; all others that give up sleep until then.
#define INFINI_BOUNDED_WAIT(test_wait, barrier, parity)                                  \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\n.reg .b32 x;\n.reg .b64 report;\n"                              \
      "mov.b32 x, 0;\n"                                                                  \
      "WAIT:\n" test_wait                                                                \
      " p, [%0], %1;\n"                                                                  \
      "@p bra DONE;\n"                                                                   \
      "add.u32 x, x, 1;\n"                                                               \
      "setp.ne.u32 p, x, %2;\n"                                                          \
      "@p bra WAIT;\n"                                                                   \
      "atom.global.exch.b32 x, [infini_wait_given_up], 1;\n"                             \
      "setp.ne.u32 p, x, 0;\n"                                                           \
      "@p bra SLEEP;\n"                                                                  \
      "ld.global.u64 report, [infini_wait_report];\n"                                    \
      "setp.eq.u64 p, report, 0;\n"                                                      \
      "@p bra TRAP;\n"                                                                   \
      "cvta.to.global.u64 report, report;\n"                                             \
      "mov.u32 x, %%ctaid.x;\nst.global.u32 [report + %3], x;\n"                         \
      "mov.u32 x, %%ctaid.y;\nst.global.u32 [report + %3 + 4], x;\n"                     \
      "mov.u32 x, %%ctaid.z;\nst.global.u32 [report + %3 + 8], x;\n"                     \
      "mov.u32 x, %%tid.x;\nst.global.u32 [report + %4], x;\n"                           \
      "st.global.u32 [report + %5], %0;\n"                                               \
      "st.global.u32 [report + %6], %1;\n"                                               \
      "st.global.u32 [report + %7], %2;\n"                                               \
      "membar.sys;\n"                                                                    \
      "st.volatile.global.u32 [report + %8], 1;\n"                                       \
      "membar.sys;\n"                                                                    \
      "TRAP:\ntrap;\n"                                                                   \
      "SLEEP:\nnanosleep.u32 1000;\nbra SLEEP;\n"                                        \
      "DONE:\n}" ::"r"(barrier),                                                         \
      "r"(parity), "n"(INFINI_WAIT_POLLS), "n"(offsetof(InfiniWaitReport, block)),       \
      "n"(offsetof(InfiniWaitReport, thread)), "n"(offsetof(InfiniWaitReport, barrier)), \
      "n"(offsetof(InfiniWaitReport, parity)), "n"(offsetof(InfiniWaitReport, polls)),   \
      "n"(offsetof(InfiniWaitReport, complete))                                          \
      : "memory")

namespace infini::ptx {

// The wait of sm90/ptx.cuh.
__device__ __forceinline__ void mbarrier_wait_parity(uint32_t barrier, int parity) {
  INFINI_BOUNDED_WAIT("mbarrier.test_wait.parity.shared::cta.b64", barrier, parity);
}

}  // namespace infini::ptx
