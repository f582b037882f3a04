// Prints one line per kernel: what the host must know to launch it. build.rs turns the lines into
// the table that kernels are looked up in. Compiles with any C++17 compiler.
//
//   arch operation dtype Dk Dv threads shared_bytes blocks_per_sm rows columns keys registers
//
// 0 where a kernel does not depend on a column; rows: query rows per tile; columns: columns per
// block; keys: rows of a box of keys or values that tensor copies bring; registers: of a thread at
// launch, where warps pass them to each other.
#include <cstdio>
#include <string>

#include "common/decode_tile.h"
#include "sm90/tiles.h"

using namespace infini;

namespace {

struct Launch {
  int threads, shared_bytes, blocks_per_sm, rows, columns, keys, registers;
};

void print(const char* arch, const char* operation, const char* dtype, int dk, int dv, Launch l) {
  std::printf("%s %s %s %d %d %d %d %d %d %d %d %d\n", arch, operation, dtype, dk, dv, l.threads,
              l.shared_bytes, l.blocks_per_sm, l.rows, l.columns, l.keys, l.registers);
}

void line(const char* operation, const char* dtype, int dk, int dv, Launch l) {
  print("sm80", operation, dtype, dk, dv, l);
}

template <int Dk, int Dv>
void head(const char* dtype) {
  using A = AttentionTile<Dk, Dv>;
  using D = DecodeTile<Dk, Dv>;
  using S = SegmentTile<Dk, Dv>;
  constexpr int columns = kUpdateColumns<Dv>;
  using U = UpdateTile<Dk, columns>;
  line("segment_attention", dtype, Dk, Dv,
       {A::threads, A::shared_bytes, A::blocks_per_sm, A::rows, 0, 0, 0});
  line("segment", dtype, Dk, Dv,
       {S::threads, S::shared_bytes, S::blocks_per_sm, A::rows, Dv / S::slices, 0, 0});
  line("decode", dtype, Dk, Dv, {D::threads, D::shared_bytes, D::blocks_per_sm, D::rows, 0, 0, 0});
  line("segment_state", dtype, Dk, Dv, {U::threads, U::shared_bytes, 1, 0, columns, 0, 0});
  line("commit", dtype, Dk, Dv, {U::threads, U::shared_bytes, 1, 0, columns, 0, 0});
}

template <int Dk>
void key(const char* dtype) {
  constexpr int columns = kUpdateColumns<Dk>;
  using U = UpdateTile<Dk, columns>;
  using S = ScanTile<Dk>;
  line("segment_transition", dtype, Dk, 0, {U::threads, U::shared_bytes, 1, 0, columns, 0, 0});
  line("memory_scan", dtype, Dk, 0, {S::threads, S::shared_bytes, 1, 0, S::columns, 0, 0});
}

// Kernels of compute capability 9.0.
template <int Dk, int Dv>
void hopper(const char* dtype) {
  using A = GroupAttentionTile<Dk, Dv>;
  print("sm90", "segment_attention", dtype, Dk, Dv,
        {A::threads, A::shared_bytes, A::blocks_per_sm, A::rows, 0, A::keys,
         A::launch_registers});
  using O = GroupSegmentTile<Dk, Dv>;
  print("sm90", "segment", dtype, Dk, Dv,
        {O::threads, O::shared_bytes, O::blocks_per_sm, O::rows, O::columns, O::keys,
         O::launch_registers});
  using S = GroupStateTile<Dk, Dv>;
  print("sm90", "segment_state", dtype, Dk, Dv,
        {S::threads, S::shared_bytes, S::blocks_per_sm, 0, kUpdateColumns<Dv>, S::tokens, 0});
}

template <int Dk>
void hopper_key(const char* dtype) {
  using G = GroupTransitionTile<Dk>;
  print("sm90", "segment_transition", dtype, Dk, 0,
        {G::threads, G::shared_bytes, G::blocks_per_sm, 0, kUpdateColumns<Dk>, G::tokens, 0});
  using S = ScanTile<Dk>;
  print("sm90", "memory_scan", dtype, Dk, 0,
        {S::threads, S::shared_bytes, S::blocks_per_sm, 0, S::columns, 0, 0});
}

}  // namespace

int main() {
  for (const char* dtype : {"bf16", "f16"}) {
#define INFINI_LINE(dk, dv) head<dk, dv>(dtype);
    INFINI_HEAD_DIMS(INFINI_LINE)
#undef INFINI_LINE
#define INFINI_LINE(dk) key<dk>(dtype);
    INFINI_KEY_DIMS(INFINI_LINE)
#undef INFINI_LINE
#define INFINI_LINE(dk, dv) hopper<dk, dv>(dtype);
    INFINI_SM90_HEAD_DIMS(INFINI_LINE)
#undef INFINI_LINE
#define INFINI_LINE(dk) hopper_key<dk>(dtype);
    INFINI_SM90_KEY_DIMS(INFINI_LINE)
#undef INFINI_LINE
    for (const char* operation :
         {"rotate_keys", "append", "clear_padding", "merge_partials", "snapshot"}) {
      line(operation, dtype, 0, 0, {kElementThreads, 0, 1, 0, 0, 0, 0});
    }
  }
  for (const char* operation : {"normaliser_scan", "sum", "compose", "table", "copy_slots"}) {
    line(operation, "any", 0, 0, {kElementThreads, 0, 1, 0, 0, 0, 0});
  }
  print("sm90", "normaliser_scan", "any", 0, 0, {kElementThreads, 0, 1, 0, 0, 0, 0});
}
