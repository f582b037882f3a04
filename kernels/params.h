// Launch parameters: one POD structure per kernel, shared with Rust by params.rs, which
// is made of this file (CONTRIBUTING.md).
//
// Addresses are 64-bit device addresses; 0 means absent. Strides are in elements and may be
// negative. T is the problem's 16-bit element type. Fixed-width types, no bool, no implicit
// padding: sizes are multiples of 8 and both sides assert them.
#pragma once

#include <stdint.h>

typedef uint64_t InfiniAddress;

// New tokens a sequence may bring to one decode call.
enum { INFINI_MAX_DECODE_TOKENS = 16 };
// Sequences that a launch carries in its own parameters.
enum { INFINI_INLINE_SEQUENCES = 64 };
// Columns of M that share one snapshot scale.
enum { INFINI_SCALE_COLUMNS = 32 };
// Rows of the result that a block of merge_partials makes.
enum { INFINI_MERGE_ROWS = 32 };
// Bytes that one launch of `table` writes.
enum { INFINI_TABLE_BYTES = 3840 };

// Slot of a sequence that is padding of the batch: skipped, its output rows cleared.
enum { INFINI_PAD_SLOT = -1 };

// Bits of the status word.
enum {
  INFINI_STATUS_SLOT = 1,      // a slot outside the state
  INFINI_STATUS_LENGTH = 2,    // a length below 0 or above what the call allows
  INFINI_STATUS_POSITION = 4,  // a position outside the rotation tables
  INFINI_STATUS_ROTATION = 8   // rotation changed inside an open segment
};

enum { INFINI_DENOMINATOR_EXACT = 0, INFINI_DENOMINATOR_CLAMP = 1, INFINI_DENOMINATOR_ADD = 2 };

// What is computed; the host's Problem. Most kernels have Dk and Dv as template arguments as well.
struct InfiniProblem {
  int32_t key_dim;      // Dk
  int32_t value_dim;    // Dv
  int32_t heads;        // Hq
  int32_t kv_heads;     // Hkv
  int32_t group;        // Hq / Hkv
  int32_t segment_len;  // N
  int32_t delta;        // 1: eq. (9), 0: eq. (8)
  int32_t bypass;       // 1: an empty memory bypasses the gate
  int32_t denominator;  // INFINI_DENOMINATOR_*
  float epsilon;
  float scale_log2;  // |scale| · log2 e, at least 1e-30: masked scores stay -inf
  int32_t negative;  // 1: scale < 0, scores change sign
};

// A [batch, token, head, channel] tensor with contiguous channels; log-sum-exp: channel dimension
// absent, token stride 1.
struct InfiniTensor {
  InfiniAddress data;
  int64_t batch;  // 0 when packed
  int64_t token;
  int64_t head;
};

// Rotation of the local branch. rows = 0: none.
struct InfiniRope {
  InfiniAddress cos;  // f32 [rows, half]
  InfiniAddress sin;  // f32 [rows, half]
  int64_t cos_stride;
  int64_t sin_stride;
  InfiniAddress positions;  // i64, token t of batch b at b * positions_batch + t; 0: continued
  int64_t positions_batch;
  int64_t rows;         // rows of the tables
  int32_t half;         // R / 2; may be 0 with rotation on
  int32_t interleaved;  // 1: channel 2i pairs with 2i + 1; 0: i with i + R/2
};

// Counters of one slot.
struct InfiniCounters {
  uint64_t tokens;     // seen
  uint64_t committed;  // in (M, z)
  uint32_t open_len;   // in the open segment: 0 to N - 1; N between decode and its commit
  uint32_t rotated;    // whether they came with rotation; meaningful while open_len > 0
  uint32_t taken;      // tokens of the running decode call already appended
  uint32_t reserved;
};

// A pool of states.
struct InfiniState {
  InfiniAddress memory;          // f32 [slots][Hkv][Dk][Dv]
  InfiniAddress normalizer;      // f32 [slots][Hkv][Dk]
  InfiniAddress snapshot;        // T [slots][Hkv][Dk][Dv]: memory * snapshot_scale, rounded
  InfiniAddress snapshot_scale;  // f32 [slots][Hkv][Dv / 32], powers of two
  InfiniAddress open_k;          // T [slots][Hkv][N][Dk], unrotated
  InfiniAddress open_k_rotated;  // the same, rotated; 0 until a call rotates
  InfiniAddress open_v;          // T [slots][Hkv][N][Dv]
  InfiniAddress counters;        // InfiniCounters [slots]
  InfiniAddress status;          // u32
  int64_t slots;
};

// The share that a call has in one segment of one sequence.
struct InfiniPiece {
  int64_t first;     // its first new token: index into the token dimension
  int64_t position;  // default position of that token
  int32_t slot;
  int32_t batch;
  int32_t len;     // new tokens
  int32_t cached;  // tokens of the segment that lie in the open segment already
  int32_t full;    // cached + len = N: the segment is committed
  int32_t empty;   // nothing was committed before it
};

// Consecutive pieces of one sequence.
struct InfiniChain {
  int64_t tokens;  // the slot's counters after the call
  int64_t committed;
  int32_t slot;
  int32_t first_piece;
  int32_t pieces;
  int32_t empty;  // nothing was committed before its first piece
  int32_t ends;   // its last piece is the sequence's last of the call
  int32_t reserved;
};

// Pieces and chains of one run of a prefill.
struct InfiniRun {
  InfiniAddress pieces;  // InfiniPiece [piece_count]
  InfiniAddress chains;  // InfiniChain [chain_count]
  int32_t piece_count;
  int32_t chain_count;
};

// One sequence of a segment or decode call.
struct InfiniSequence {
  int64_t first;  // index of its first token in the token dimension
  int32_t slot;   // INFINI_PAD_SLOT: padding
  int32_t batch;
  int32_t len;
  int32_t reserved;
};

// Sequences of a segment, decode or commit call.
struct InfiniSequences {
  InfiniAddress table;  // InfiniSequence [count] in device memory; 0: `inline_sequences` if
                        // `in_line`, else sequence b is tokens 0..tokens of batch b, slot b
  int32_t count;
  int32_t in_line;
  int32_t tokens;   // extent of the token dimension per batch (total when packed)
  int32_t max_len;  // most new tokens of a sequence
  struct InfiniSequence inline_sequences[INFINI_INLINE_SEQUENCES];
};

// Inputs, outputs and gate of the attention kernels.
struct InfiniCall {
  struct InfiniTensor q;      // T [B, T, Hq, Dk], unrotated
  struct InfiniTensor k;      // T [B, T, Hkv, Dk], unrotated
  struct InfiniTensor v;      // T [B, T, Hkv, Dv]
  struct InfiniTensor o;      // T [B, T, Hq, Dv]
  struct InfiniTensor a_dot;  // as o, or absent
  struct InfiniTensor a_mem;  // as o, or absent
  struct InfiniTensor lse;    // f32 [B, Hq, T], or absent
  InfiniAddress gate;         // f32 [Hq]
  struct InfiniRope rope;
};

// ---- prefill, in launch order
// --------------------------------------------------------------------

// rotated[p][h][j] = rotated key of token j of piece p's new tokens, head h.
struct InfiniRotateKeys {
  struct InfiniProblem problem;
  struct InfiniTensor k;
  struct InfiniRope rope;
  struct InfiniRun run;
  InfiniAddress status;
  InfiniAddress rotated;  // T [piece_count][Hkv][N][Dk]
  int64_t block;          // rows behind the last key become 0 up to a multiple of this
};

// B and column sums of sigma(K) of every full piece, in `splits` parts of `split_len` tokens.
struct InfiniSegmentState {
  struct InfiniProblem problem;
  struct InfiniTensor k;
  struct InfiniTensor v;  // absent: column sums only
  struct InfiniState state;
  struct InfiniRun run;
  int32_t splits;
  int32_t split_len;   // multiple of 64
  InfiniAddress b;     // f32 [piece_count][Hkv][splits][Dk][Dv]
  InfiniAddress sums;  // f32 [piece_count][Hkv][splits][Dk]
};

// z before every piece, and z after the run.
struct InfiniNormaliserScan {
  struct InfiniProblem problem;
  struct InfiniRun run;
  int32_t splits;
  int32_t reserved;
  InfiniAddress sums;   // f32 [piece_count][Hkv][splits][Dk]
  InfiniAddress z;      // out, f32 [piece_count][Hkv][Dk]
  InfiniAddress start;  // f32 [slots][Hkv][Dk]
  InfiniAddress end;    // out, f32 [slots][Hkv][Dk]; may be `start`
};

// G of every full piece that finds a memory.
struct InfiniSegmentTransition {
  struct InfiniProblem problem;
  struct InfiniTensor k;
  struct InfiniState state;
  struct InfiniRun run;
  InfiniAddress z;        // f32 [piece_count][Hkv][Dk]
  InfiniAddress g;        // out, T [piece_count][Hkv][Dk][Dk], true G = g * g_scale
  InfiniAddress g_scale;  // out, f32 [piece_count][Hkv][Dk / 16]: a power of two per 16 rows
};

enum { INFINI_START_MEMORY = 0, INFINI_START_ZERO = 1, INFINI_START_IDENTITY = 2 };

// M before every piece, as snapshot, and M after the run: M <- M - G M + B. `columns` columns of M
// (Dv, or Dk for the A of a map).
struct InfiniMemoryScan {
  struct InfiniProblem problem;
  struct InfiniRun run;
  int32_t splits;
  int32_t start_kind;  // INFINI_START_*
  InfiniAddress b;     // f32 [piece_count][Hkv][splits][Dk][columns]; absent: 0
  InfiniAddress g;     // as above; absent: linear rule
  InfiniAddress g_scale;
  InfiniAddress start;           // f32 [slots][Hkv][Dk][columns], read under INFINI_START_MEMORY
  InfiniAddress end;             // out, f32 [slots][Hkv][Dk][columns]; may be `start`
  InfiniAddress snapshot;        // out, T [piece_count][Hkv][Dk][columns], M before the piece;
                                 // absent: none
  InfiniAddress snapshot_scale;  // out, f32 [piece_count][Hkv][columns / 32]
  InfiniAddress end_snapshot;    // out, T [slots][Hkv][Dk][columns]; absent: none
  InfiniAddress end_snapshot_scale;  // out, f32 [slots][Hkv][columns / 32]
  int64_t columns;
};

// Local attention, retrieval and gate of every piece.
struct InfiniSegmentAttention {
  struct InfiniProblem problem;
  struct InfiniCall call;
  struct InfiniState state;
  struct InfiniRun run;
  InfiniAddress rotated;         // T [piece_count][Hkv][N][Dk], of rotate_keys; 0 without rotation
  InfiniAddress snapshot;        // T [piece_count][Hkv][Dk][Dv]
  InfiniAddress snapshot_scale;  // f32 [piece_count][Hkv][Dv / 32]
  InfiniAddress z;               // f32 [piece_count][Hkv][Dk]
  int32_t tiles;                 // query tiles of the longest piece
  int32_t piece_group;           // pieces whose tiles run together
  int32_t shared_by;  // sm90: blocks (of a cluster, neighbouring heads) that load K and V together
  int32_t reserved;
};

// Of every chain that ends: tokens after the last full segment go into the open segment, counters
// to their final values.
struct InfiniAppend {
  struct InfiniProblem problem;
  struct InfiniCall call;
  struct InfiniState state;
  struct InfiniRun run;
  InfiniAddress rotated;  // as above
};

// Output rows of padding: 0, log-sum-exp -inf.
struct InfiniClearPadding {
  struct InfiniProblem problem;
  struct InfiniCall call;
  struct InfiniSequences sequences;
};

// ---- segment, decode, commit
// ---------------------------------------------------------------------

// What the blocks of one (sequence, KV head) exchange.
struct InfiniExchange {
  InfiniAddress partials;          // f32, see the kernel
  InfiniAddress head_tickets;      // u32 [sequences][Hkv] (decode: [row_tiles]), 0 between launches
  InfiniAddress sequence_tickets;  // u32 [sequences], 0 between launches
};

// Up to one segment per sequence: attention of the new tokens, and the update where they complete
// the segment.
struct InfiniSegment {
  struct InfiniProblem problem;
  struct InfiniCall call;
  struct InfiniState state;
  struct InfiniExchange exchange;
  InfiniAddress rotated;  // sm90 with rotation: T [sequences][Hkv][N][Dk], rotated new keys
  int32_t tiles;          // query tiles of the longest sequence
  int32_t chunks;         // update chunks of a segment, 0 when no sequence completes one
  int32_t chunk_len;      // tokens per update chunk, a multiple of 64
  int32_t reserved;
  struct InfiniSequences sequences;
};

// A few new tokens per sequence: append, attend the open segment in `splits` ranges of `split_len`
// keys, retrieve (in a part of its own), gate. A segment that fills is left to `commit`.
struct InfiniDecode {
  struct InfiniProblem problem;
  struct InfiniCall call;
  struct InfiniState state;
  struct InfiniExchange exchange;
  int32_t splits;
  int32_t split_len;  // keys, a multiple of 64
  int32_t row_tiles;  // tiles of 32 (query head, token) rows per KV head
  int32_t step;       // 0: the first tokens of the call; later steps go on behind `taken`
  struct InfiniSequences sequences;
};

// Folds open segments into (M, z): those of N tokens, or any under `flush`.
struct InfiniCommit {
  struct InfiniProblem problem;
  struct InfiniState state;
  struct InfiniExchange exchange;
  int32_t chunks;
  int32_t chunk_len;  // tokens per chunk, a multiple of 64
  int32_t flush;
  int32_t reserved;
  struct InfiniSequences sequences;  // only slots are read
};

// ---- merges and maps
// -----------------------------------------------------------------------------

// out = sum of a_dot[i] weighted by exp(lse[i]); the arrays of descriptors lie in device memory.
struct InfiniMergePartials {
  InfiniAddress a_dot;  // InfiniTensor [parts], T
  InfiniAddress lse;    // InfiniTensor [parts], f32
  struct InfiniTensor out;
  struct InfiniTensor out_lse;  // or absent
  int64_t batches;
  int64_t tokens;
  int32_t heads;
  int32_t value_dim;
  int32_t parts;
  int32_t reserved;
};

// out[i] = sum over parts of in[p][i], in order and rounded once. Arrays begin at multiples of 16
// bytes.
struct InfiniSum {
  InfiniAddress inputs;  // InfiniAddress [parts] of f32 [count]
  InfiniAddress out;     // f32 [count]; may be an input
  int64_t count;
  int32_t parts;
  int32_t reserved;
};

// c = a b + d per matrix, all f32 row-major: a [Dk][Dk], b and c and d [Dk][columns].
struct InfiniCompose {
  InfiniAddress a;  // [matrices][Dk][Dk]
  InfiniAddress b;  // [matrices][Dk][columns]
  InfiniAddress d;  // [matrices][Dk][columns]; absent: 0
  InfiniAddress c;  // out, [matrices][Dk][columns]; not an input
  int64_t matrices;
  int32_t key_dim;
  int32_t columns;
};

// Snapshots of memories: f32 [matrices][Dk][Dv] to T with scales. Dk is at most 256.
struct InfiniSnapshot {
  InfiniAddress memory;
  InfiniAddress snapshot;
  InfiniAddress snapshot_scale;  // f32 [matrices][Dv / 32]
  int64_t matrices;
  int32_t key_dim;
  int32_t value_dim;
};

// A slot and the slot that becomes its copy.
struct InfiniSlotPair {
  int32_t from;
  int32_t to;
};

// Slots of `to` become copies of slots of `from`, another pool of the same problem or the same one.
struct InfiniCopySlots {
  struct InfiniProblem problem;
  struct InfiniState from;
  struct InfiniState to;
  InfiniAddress pairs;  // InfiniSlotPair [grid's z]; no slot of `to` twice, or read as well
};

// Writes `bytes` (a multiple of 4) of the launch's own parameters to device memory: a table that a
// captured graph owns.
struct InfiniTable {
  InfiniAddress to;
  int64_t bytes;
  uint32_t data[INFINI_TABLE_BYTES / 4];
};

// ---- builds with INFINI_ATTN_WAIT_POLLS
// -----------------------------------------------------------------------------

// Where the first thread stood that gave up a wait.
struct InfiniWaitReport {
  uint32_t complete;  // 0: nobody has given up, or what follows is being written
  uint32_t block[3];
  uint32_t thread;   // of the block
  uint32_t barrier;  // shared address
  uint32_t parity;   // of the phase it waited for
  uint32_t polls;    // that failed
};
