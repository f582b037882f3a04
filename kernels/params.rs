// Made by bindgen of params.h; `INFINI_ATTN_BLESS=1 cargo test -p bindings` makes it anew.
pub type InfiniAddress = u64;
pub const INFINI_MAX_DECODE_TOKENS: _bindgen_ty_1 = 16;
pub type _bindgen_ty_1 = u32;
pub const INFINI_INLINE_SEQUENCES: _bindgen_ty_2 = 64;
pub type _bindgen_ty_2 = u32;
pub const INFINI_SCALE_COLUMNS: _bindgen_ty_3 = 32;
pub type _bindgen_ty_3 = u32;
pub const INFINI_MERGE_ROWS: _bindgen_ty_4 = 32;
pub type _bindgen_ty_4 = u32;
pub const INFINI_TABLE_BYTES: _bindgen_ty_5 = 3840;
pub type _bindgen_ty_5 = u32;
pub const INFINI_PAD_SLOT: _bindgen_ty_6 = -1;
pub type _bindgen_ty_6 = i32;
pub const INFINI_STATUS_SLOT: _bindgen_ty_7 = 1;
pub const INFINI_STATUS_LENGTH: _bindgen_ty_7 = 2;
pub const INFINI_STATUS_POSITION: _bindgen_ty_7 = 4;
pub const INFINI_STATUS_ROTATION: _bindgen_ty_7 = 8;
pub type _bindgen_ty_7 = u32;
pub const INFINI_DENOMINATOR_EXACT: _bindgen_ty_8 = 0;
pub const INFINI_DENOMINATOR_CLAMP: _bindgen_ty_8 = 1;
pub const INFINI_DENOMINATOR_ADD: _bindgen_ty_8 = 2;
pub type _bindgen_ty_8 = u32;
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniProblem {
    pub key_dim: i32,
    pub value_dim: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub group: i32,
    pub segment_len: i32,
    pub delta: i32,
    pub bypass: i32,
    pub denominator: i32,
    pub epsilon: f32,
    pub scale_log2: f32,
    pub negative: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniProblem"][::std::mem::size_of::<InfiniProblem>() - 48usize];
    ["Alignment of InfiniProblem"][::std::mem::align_of::<InfiniProblem>() - 4usize];
    ["Offset of field: InfiniProblem::key_dim"]
        [::std::mem::offset_of!(InfiniProblem, key_dim) - 0usize];
    ["Offset of field: InfiniProblem::value_dim"]
        [::std::mem::offset_of!(InfiniProblem, value_dim) - 4usize];
    ["Offset of field: InfiniProblem::heads"]
        [::std::mem::offset_of!(InfiniProblem, heads) - 8usize];
    ["Offset of field: InfiniProblem::kv_heads"]
        [::std::mem::offset_of!(InfiniProblem, kv_heads) - 12usize];
    ["Offset of field: InfiniProblem::group"]
        [::std::mem::offset_of!(InfiniProblem, group) - 16usize];
    ["Offset of field: InfiniProblem::segment_len"]
        [::std::mem::offset_of!(InfiniProblem, segment_len) - 20usize];
    ["Offset of field: InfiniProblem::delta"]
        [::std::mem::offset_of!(InfiniProblem, delta) - 24usize];
    ["Offset of field: InfiniProblem::bypass"]
        [::std::mem::offset_of!(InfiniProblem, bypass) - 28usize];
    ["Offset of field: InfiniProblem::denominator"]
        [::std::mem::offset_of!(InfiniProblem, denominator) - 32usize];
    ["Offset of field: InfiniProblem::epsilon"]
        [::std::mem::offset_of!(InfiniProblem, epsilon) - 36usize];
    ["Offset of field: InfiniProblem::scale_log2"]
        [::std::mem::offset_of!(InfiniProblem, scale_log2) - 40usize];
    ["Offset of field: InfiniProblem::negative"]
        [::std::mem::offset_of!(InfiniProblem, negative) - 44usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniTensor {
    pub data: InfiniAddress,
    pub batch: i64,
    pub token: i64,
    pub head: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniTensor"][::std::mem::size_of::<InfiniTensor>() - 32usize];
    ["Alignment of InfiniTensor"][::std::mem::align_of::<InfiniTensor>() - 8usize];
    ["Offset of field: InfiniTensor::data"][::std::mem::offset_of!(InfiniTensor, data) - 0usize];
    ["Offset of field: InfiniTensor::batch"][::std::mem::offset_of!(InfiniTensor, batch) - 8usize];
    ["Offset of field: InfiniTensor::token"][::std::mem::offset_of!(InfiniTensor, token) - 16usize];
    ["Offset of field: InfiniTensor::head"][::std::mem::offset_of!(InfiniTensor, head) - 24usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniRope {
    pub cos: InfiniAddress,
    pub sin: InfiniAddress,
    pub cos_stride: i64,
    pub sin_stride: i64,
    pub positions: InfiniAddress,
    pub positions_batch: i64,
    pub rows: i64,
    pub half: i32,
    pub interleaved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniRope"][::std::mem::size_of::<InfiniRope>() - 64usize];
    ["Alignment of InfiniRope"][::std::mem::align_of::<InfiniRope>() - 8usize];
    ["Offset of field: InfiniRope::cos"][::std::mem::offset_of!(InfiniRope, cos) - 0usize];
    ["Offset of field: InfiniRope::sin"][::std::mem::offset_of!(InfiniRope, sin) - 8usize];
    ["Offset of field: InfiniRope::cos_stride"]
        [::std::mem::offset_of!(InfiniRope, cos_stride) - 16usize];
    ["Offset of field: InfiniRope::sin_stride"]
        [::std::mem::offset_of!(InfiniRope, sin_stride) - 24usize];
    ["Offset of field: InfiniRope::positions"]
        [::std::mem::offset_of!(InfiniRope, positions) - 32usize];
    ["Offset of field: InfiniRope::positions_batch"]
        [::std::mem::offset_of!(InfiniRope, positions_batch) - 40usize];
    ["Offset of field: InfiniRope::rows"][::std::mem::offset_of!(InfiniRope, rows) - 48usize];
    ["Offset of field: InfiniRope::half"][::std::mem::offset_of!(InfiniRope, half) - 56usize];
    ["Offset of field: InfiniRope::interleaved"]
        [::std::mem::offset_of!(InfiniRope, interleaved) - 60usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniCounters {
    pub tokens: u64,
    pub committed: u64,
    pub open_len: u32,
    pub rotated: u32,
    pub taken: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniCounters"][::std::mem::size_of::<InfiniCounters>() - 32usize];
    ["Alignment of InfiniCounters"][::std::mem::align_of::<InfiniCounters>() - 8usize];
    ["Offset of field: InfiniCounters::tokens"]
        [::std::mem::offset_of!(InfiniCounters, tokens) - 0usize];
    ["Offset of field: InfiniCounters::committed"]
        [::std::mem::offset_of!(InfiniCounters, committed) - 8usize];
    ["Offset of field: InfiniCounters::open_len"]
        [::std::mem::offset_of!(InfiniCounters, open_len) - 16usize];
    ["Offset of field: InfiniCounters::rotated"]
        [::std::mem::offset_of!(InfiniCounters, rotated) - 20usize];
    ["Offset of field: InfiniCounters::taken"]
        [::std::mem::offset_of!(InfiniCounters, taken) - 24usize];
    ["Offset of field: InfiniCounters::reserved"]
        [::std::mem::offset_of!(InfiniCounters, reserved) - 28usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniState {
    pub memory: InfiniAddress,
    pub normalizer: InfiniAddress,
    pub snapshot: InfiniAddress,
    pub snapshot_scale: InfiniAddress,
    pub open_k: InfiniAddress,
    pub open_k_rotated: InfiniAddress,
    pub open_v: InfiniAddress,
    pub counters: InfiniAddress,
    pub status: InfiniAddress,
    pub slots: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniState"][::std::mem::size_of::<InfiniState>() - 80usize];
    ["Alignment of InfiniState"][::std::mem::align_of::<InfiniState>() - 8usize];
    ["Offset of field: InfiniState::memory"][::std::mem::offset_of!(InfiniState, memory) - 0usize];
    ["Offset of field: InfiniState::normalizer"]
        [::std::mem::offset_of!(InfiniState, normalizer) - 8usize];
    ["Offset of field: InfiniState::snapshot"]
        [::std::mem::offset_of!(InfiniState, snapshot) - 16usize];
    ["Offset of field: InfiniState::snapshot_scale"]
        [::std::mem::offset_of!(InfiniState, snapshot_scale) - 24usize];
    ["Offset of field: InfiniState::open_k"][::std::mem::offset_of!(InfiniState, open_k) - 32usize];
    ["Offset of field: InfiniState::open_k_rotated"]
        [::std::mem::offset_of!(InfiniState, open_k_rotated) - 40usize];
    ["Offset of field: InfiniState::open_v"][::std::mem::offset_of!(InfiniState, open_v) - 48usize];
    ["Offset of field: InfiniState::counters"]
        [::std::mem::offset_of!(InfiniState, counters) - 56usize];
    ["Offset of field: InfiniState::status"][::std::mem::offset_of!(InfiniState, status) - 64usize];
    ["Offset of field: InfiniState::slots"][::std::mem::offset_of!(InfiniState, slots) - 72usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniPiece {
    pub first: i64,
    pub position: i64,
    pub slot: i32,
    pub batch: i32,
    pub len: i32,
    pub cached: i32,
    pub full: i32,
    pub empty: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniPiece"][::std::mem::size_of::<InfiniPiece>() - 40usize];
    ["Alignment of InfiniPiece"][::std::mem::align_of::<InfiniPiece>() - 8usize];
    ["Offset of field: InfiniPiece::first"][::std::mem::offset_of!(InfiniPiece, first) - 0usize];
    ["Offset of field: InfiniPiece::position"]
        [::std::mem::offset_of!(InfiniPiece, position) - 8usize];
    ["Offset of field: InfiniPiece::slot"][::std::mem::offset_of!(InfiniPiece, slot) - 16usize];
    ["Offset of field: InfiniPiece::batch"][::std::mem::offset_of!(InfiniPiece, batch) - 20usize];
    ["Offset of field: InfiniPiece::len"][::std::mem::offset_of!(InfiniPiece, len) - 24usize];
    ["Offset of field: InfiniPiece::cached"][::std::mem::offset_of!(InfiniPiece, cached) - 28usize];
    ["Offset of field: InfiniPiece::full"][::std::mem::offset_of!(InfiniPiece, full) - 32usize];
    ["Offset of field: InfiniPiece::empty"][::std::mem::offset_of!(InfiniPiece, empty) - 36usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniChain {
    pub tokens: i64,
    pub committed: i64,
    pub slot: i32,
    pub first_piece: i32,
    pub pieces: i32,
    pub empty: i32,
    pub ends: i32,
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniChain"][::std::mem::size_of::<InfiniChain>() - 40usize];
    ["Alignment of InfiniChain"][::std::mem::align_of::<InfiniChain>() - 8usize];
    ["Offset of field: InfiniChain::tokens"][::std::mem::offset_of!(InfiniChain, tokens) - 0usize];
    ["Offset of field: InfiniChain::committed"]
        [::std::mem::offset_of!(InfiniChain, committed) - 8usize];
    ["Offset of field: InfiniChain::slot"][::std::mem::offset_of!(InfiniChain, slot) - 16usize];
    ["Offset of field: InfiniChain::first_piece"]
        [::std::mem::offset_of!(InfiniChain, first_piece) - 20usize];
    ["Offset of field: InfiniChain::pieces"][::std::mem::offset_of!(InfiniChain, pieces) - 24usize];
    ["Offset of field: InfiniChain::empty"][::std::mem::offset_of!(InfiniChain, empty) - 28usize];
    ["Offset of field: InfiniChain::ends"][::std::mem::offset_of!(InfiniChain, ends) - 32usize];
    ["Offset of field: InfiniChain::reserved"]
        [::std::mem::offset_of!(InfiniChain, reserved) - 36usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniRun {
    pub pieces: InfiniAddress,
    pub chains: InfiniAddress,
    pub piece_count: i32,
    pub chain_count: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniRun"][::std::mem::size_of::<InfiniRun>() - 24usize];
    ["Alignment of InfiniRun"][::std::mem::align_of::<InfiniRun>() - 8usize];
    ["Offset of field: InfiniRun::pieces"][::std::mem::offset_of!(InfiniRun, pieces) - 0usize];
    ["Offset of field: InfiniRun::chains"][::std::mem::offset_of!(InfiniRun, chains) - 8usize];
    ["Offset of field: InfiniRun::piece_count"]
        [::std::mem::offset_of!(InfiniRun, piece_count) - 16usize];
    ["Offset of field: InfiniRun::chain_count"]
        [::std::mem::offset_of!(InfiniRun, chain_count) - 20usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSequence {
    pub first: i64,
    pub slot: i32,
    pub batch: i32,
    pub len: i32,
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSequence"][::std::mem::size_of::<InfiniSequence>() - 24usize];
    ["Alignment of InfiniSequence"][::std::mem::align_of::<InfiniSequence>() - 8usize];
    ["Offset of field: InfiniSequence::first"]
        [::std::mem::offset_of!(InfiniSequence, first) - 0usize];
    ["Offset of field: InfiniSequence::slot"]
        [::std::mem::offset_of!(InfiniSequence, slot) - 8usize];
    ["Offset of field: InfiniSequence::batch"]
        [::std::mem::offset_of!(InfiniSequence, batch) - 12usize];
    ["Offset of field: InfiniSequence::len"][::std::mem::offset_of!(InfiniSequence, len) - 16usize];
    ["Offset of field: InfiniSequence::reserved"]
        [::std::mem::offset_of!(InfiniSequence, reserved) - 20usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSequences {
    pub table: InfiniAddress,
    pub count: i32,
    pub in_line: i32,
    pub tokens: i32,
    pub max_len: i32,
    pub inline_sequences: [InfiniSequence; 64usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSequences"][::std::mem::size_of::<InfiniSequences>() - 1560usize];
    ["Alignment of InfiniSequences"][::std::mem::align_of::<InfiniSequences>() - 8usize];
    ["Offset of field: InfiniSequences::table"]
        [::std::mem::offset_of!(InfiniSequences, table) - 0usize];
    ["Offset of field: InfiniSequences::count"]
        [::std::mem::offset_of!(InfiniSequences, count) - 8usize];
    ["Offset of field: InfiniSequences::in_line"]
        [::std::mem::offset_of!(InfiniSequences, in_line) - 12usize];
    ["Offset of field: InfiniSequences::tokens"]
        [::std::mem::offset_of!(InfiniSequences, tokens) - 16usize];
    ["Offset of field: InfiniSequences::max_len"]
        [::std::mem::offset_of!(InfiniSequences, max_len) - 20usize];
    ["Offset of field: InfiniSequences::inline_sequences"]
        [::std::mem::offset_of!(InfiniSequences, inline_sequences) - 24usize];
};
impl Default for InfiniSequences {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniCall {
    pub q: InfiniTensor,
    pub k: InfiniTensor,
    pub v: InfiniTensor,
    pub o: InfiniTensor,
    pub a_dot: InfiniTensor,
    pub a_mem: InfiniTensor,
    pub lse: InfiniTensor,
    pub gate: InfiniAddress,
    pub rope: InfiniRope,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniCall"][::std::mem::size_of::<InfiniCall>() - 296usize];
    ["Alignment of InfiniCall"][::std::mem::align_of::<InfiniCall>() - 8usize];
    ["Offset of field: InfiniCall::q"][::std::mem::offset_of!(InfiniCall, q) - 0usize];
    ["Offset of field: InfiniCall::k"][::std::mem::offset_of!(InfiniCall, k) - 32usize];
    ["Offset of field: InfiniCall::v"][::std::mem::offset_of!(InfiniCall, v) - 64usize];
    ["Offset of field: InfiniCall::o"][::std::mem::offset_of!(InfiniCall, o) - 96usize];
    ["Offset of field: InfiniCall::a_dot"][::std::mem::offset_of!(InfiniCall, a_dot) - 128usize];
    ["Offset of field: InfiniCall::a_mem"][::std::mem::offset_of!(InfiniCall, a_mem) - 160usize];
    ["Offset of field: InfiniCall::lse"][::std::mem::offset_of!(InfiniCall, lse) - 192usize];
    ["Offset of field: InfiniCall::gate"][::std::mem::offset_of!(InfiniCall, gate) - 224usize];
    ["Offset of field: InfiniCall::rope"][::std::mem::offset_of!(InfiniCall, rope) - 232usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniRotateKeys {
    pub problem: InfiniProblem,
    pub k: InfiniTensor,
    pub rope: InfiniRope,
    pub run: InfiniRun,
    pub status: InfiniAddress,
    pub rotated: InfiniAddress,
    pub block: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniRotateKeys"][::std::mem::size_of::<InfiniRotateKeys>() - 192usize];
    ["Alignment of InfiniRotateKeys"][::std::mem::align_of::<InfiniRotateKeys>() - 8usize];
    ["Offset of field: InfiniRotateKeys::problem"]
        [::std::mem::offset_of!(InfiniRotateKeys, problem) - 0usize];
    ["Offset of field: InfiniRotateKeys::k"][::std::mem::offset_of!(InfiniRotateKeys, k) - 48usize];
    ["Offset of field: InfiniRotateKeys::rope"]
        [::std::mem::offset_of!(InfiniRotateKeys, rope) - 80usize];
    ["Offset of field: InfiniRotateKeys::run"]
        [::std::mem::offset_of!(InfiniRotateKeys, run) - 144usize];
    ["Offset of field: InfiniRotateKeys::status"]
        [::std::mem::offset_of!(InfiniRotateKeys, status) - 168usize];
    ["Offset of field: InfiniRotateKeys::rotated"]
        [::std::mem::offset_of!(InfiniRotateKeys, rotated) - 176usize];
    ["Offset of field: InfiniRotateKeys::block"]
        [::std::mem::offset_of!(InfiniRotateKeys, block) - 184usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSegmentState {
    pub problem: InfiniProblem,
    pub k: InfiniTensor,
    pub v: InfiniTensor,
    pub state: InfiniState,
    pub run: InfiniRun,
    pub splits: i32,
    pub split_len: i32,
    pub b: InfiniAddress,
    pub sums: InfiniAddress,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSegmentState"][::std::mem::size_of::<InfiniSegmentState>() - 240usize];
    ["Alignment of InfiniSegmentState"][::std::mem::align_of::<InfiniSegmentState>() - 8usize];
    ["Offset of field: InfiniSegmentState::problem"]
        [::std::mem::offset_of!(InfiniSegmentState, problem) - 0usize];
    ["Offset of field: InfiniSegmentState::k"]
        [::std::mem::offset_of!(InfiniSegmentState, k) - 48usize];
    ["Offset of field: InfiniSegmentState::v"]
        [::std::mem::offset_of!(InfiniSegmentState, v) - 80usize];
    ["Offset of field: InfiniSegmentState::state"]
        [::std::mem::offset_of!(InfiniSegmentState, state) - 112usize];
    ["Offset of field: InfiniSegmentState::run"]
        [::std::mem::offset_of!(InfiniSegmentState, run) - 192usize];
    ["Offset of field: InfiniSegmentState::splits"]
        [::std::mem::offset_of!(InfiniSegmentState, splits) - 216usize];
    ["Offset of field: InfiniSegmentState::split_len"]
        [::std::mem::offset_of!(InfiniSegmentState, split_len) - 220usize];
    ["Offset of field: InfiniSegmentState::b"]
        [::std::mem::offset_of!(InfiniSegmentState, b) - 224usize];
    ["Offset of field: InfiniSegmentState::sums"]
        [::std::mem::offset_of!(InfiniSegmentState, sums) - 232usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniNormaliserScan {
    pub problem: InfiniProblem,
    pub run: InfiniRun,
    pub splits: i32,
    pub reserved: i32,
    pub sums: InfiniAddress,
    pub z: InfiniAddress,
    pub start: InfiniAddress,
    pub end: InfiniAddress,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniNormaliserScan"][::std::mem::size_of::<InfiniNormaliserScan>() - 112usize];
    ["Alignment of InfiniNormaliserScan"][::std::mem::align_of::<InfiniNormaliserScan>() - 8usize];
    ["Offset of field: InfiniNormaliserScan::problem"]
        [::std::mem::offset_of!(InfiniNormaliserScan, problem) - 0usize];
    ["Offset of field: InfiniNormaliserScan::run"]
        [::std::mem::offset_of!(InfiniNormaliserScan, run) - 48usize];
    ["Offset of field: InfiniNormaliserScan::splits"]
        [::std::mem::offset_of!(InfiniNormaliserScan, splits) - 72usize];
    ["Offset of field: InfiniNormaliserScan::reserved"]
        [::std::mem::offset_of!(InfiniNormaliserScan, reserved) - 76usize];
    ["Offset of field: InfiniNormaliserScan::sums"]
        [::std::mem::offset_of!(InfiniNormaliserScan, sums) - 80usize];
    ["Offset of field: InfiniNormaliserScan::z"]
        [::std::mem::offset_of!(InfiniNormaliserScan, z) - 88usize];
    ["Offset of field: InfiniNormaliserScan::start"]
        [::std::mem::offset_of!(InfiniNormaliserScan, start) - 96usize];
    ["Offset of field: InfiniNormaliserScan::end"]
        [::std::mem::offset_of!(InfiniNormaliserScan, end) - 104usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSegmentTransition {
    pub problem: InfiniProblem,
    pub k: InfiniTensor,
    pub state: InfiniState,
    pub run: InfiniRun,
    pub z: InfiniAddress,
    pub g: InfiniAddress,
    pub g_scale: InfiniAddress,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSegmentTransition"]
        [::std::mem::size_of::<InfiniSegmentTransition>() - 208usize];
    ["Alignment of InfiniSegmentTransition"]
        [::std::mem::align_of::<InfiniSegmentTransition>() - 8usize];
    ["Offset of field: InfiniSegmentTransition::problem"]
        [::std::mem::offset_of!(InfiniSegmentTransition, problem) - 0usize];
    ["Offset of field: InfiniSegmentTransition::k"]
        [::std::mem::offset_of!(InfiniSegmentTransition, k) - 48usize];
    ["Offset of field: InfiniSegmentTransition::state"]
        [::std::mem::offset_of!(InfiniSegmentTransition, state) - 80usize];
    ["Offset of field: InfiniSegmentTransition::run"]
        [::std::mem::offset_of!(InfiniSegmentTransition, run) - 160usize];
    ["Offset of field: InfiniSegmentTransition::z"]
        [::std::mem::offset_of!(InfiniSegmentTransition, z) - 184usize];
    ["Offset of field: InfiniSegmentTransition::g"]
        [::std::mem::offset_of!(InfiniSegmentTransition, g) - 192usize];
    ["Offset of field: InfiniSegmentTransition::g_scale"]
        [::std::mem::offset_of!(InfiniSegmentTransition, g_scale) - 200usize];
};
pub const INFINI_START_MEMORY: _bindgen_ty_9 = 0;
pub const INFINI_START_ZERO: _bindgen_ty_9 = 1;
pub const INFINI_START_IDENTITY: _bindgen_ty_9 = 2;
pub type _bindgen_ty_9 = u32;
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniMemoryScan {
    pub problem: InfiniProblem,
    pub run: InfiniRun,
    pub splits: i32,
    pub start_kind: i32,
    pub b: InfiniAddress,
    pub g: InfiniAddress,
    pub g_scale: InfiniAddress,
    pub start: InfiniAddress,
    pub end: InfiniAddress,
    pub snapshot: InfiniAddress,
    pub snapshot_scale: InfiniAddress,
    pub end_snapshot: InfiniAddress,
    pub end_snapshot_scale: InfiniAddress,
    pub columns: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniMemoryScan"][::std::mem::size_of::<InfiniMemoryScan>() - 160usize];
    ["Alignment of InfiniMemoryScan"][::std::mem::align_of::<InfiniMemoryScan>() - 8usize];
    ["Offset of field: InfiniMemoryScan::problem"]
        [::std::mem::offset_of!(InfiniMemoryScan, problem) - 0usize];
    ["Offset of field: InfiniMemoryScan::run"]
        [::std::mem::offset_of!(InfiniMemoryScan, run) - 48usize];
    ["Offset of field: InfiniMemoryScan::splits"]
        [::std::mem::offset_of!(InfiniMemoryScan, splits) - 72usize];
    ["Offset of field: InfiniMemoryScan::start_kind"]
        [::std::mem::offset_of!(InfiniMemoryScan, start_kind) - 76usize];
    ["Offset of field: InfiniMemoryScan::b"][::std::mem::offset_of!(InfiniMemoryScan, b) - 80usize];
    ["Offset of field: InfiniMemoryScan::g"][::std::mem::offset_of!(InfiniMemoryScan, g) - 88usize];
    ["Offset of field: InfiniMemoryScan::g_scale"]
        [::std::mem::offset_of!(InfiniMemoryScan, g_scale) - 96usize];
    ["Offset of field: InfiniMemoryScan::start"]
        [::std::mem::offset_of!(InfiniMemoryScan, start) - 104usize];
    ["Offset of field: InfiniMemoryScan::end"]
        [::std::mem::offset_of!(InfiniMemoryScan, end) - 112usize];
    ["Offset of field: InfiniMemoryScan::snapshot"]
        [::std::mem::offset_of!(InfiniMemoryScan, snapshot) - 120usize];
    ["Offset of field: InfiniMemoryScan::snapshot_scale"]
        [::std::mem::offset_of!(InfiniMemoryScan, snapshot_scale) - 128usize];
    ["Offset of field: InfiniMemoryScan::end_snapshot"]
        [::std::mem::offset_of!(InfiniMemoryScan, end_snapshot) - 136usize];
    ["Offset of field: InfiniMemoryScan::end_snapshot_scale"]
        [::std::mem::offset_of!(InfiniMemoryScan, end_snapshot_scale) - 144usize];
    ["Offset of field: InfiniMemoryScan::columns"]
        [::std::mem::offset_of!(InfiniMemoryScan, columns) - 152usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSegmentAttention {
    pub problem: InfiniProblem,
    pub call: InfiniCall,
    pub state: InfiniState,
    pub run: InfiniRun,
    pub rotated: InfiniAddress,
    pub snapshot: InfiniAddress,
    pub snapshot_scale: InfiniAddress,
    pub z: InfiniAddress,
    pub tiles: i32,
    pub piece_group: i32,
    pub shared_by: i32,
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSegmentAttention"][::std::mem::size_of::<InfiniSegmentAttention>() - 496usize];
    ["Alignment of InfiniSegmentAttention"]
        [::std::mem::align_of::<InfiniSegmentAttention>() - 8usize];
    ["Offset of field: InfiniSegmentAttention::problem"]
        [::std::mem::offset_of!(InfiniSegmentAttention, problem) - 0usize];
    ["Offset of field: InfiniSegmentAttention::call"]
        [::std::mem::offset_of!(InfiniSegmentAttention, call) - 48usize];
    ["Offset of field: InfiniSegmentAttention::state"]
        [::std::mem::offset_of!(InfiniSegmentAttention, state) - 344usize];
    ["Offset of field: InfiniSegmentAttention::run"]
        [::std::mem::offset_of!(InfiniSegmentAttention, run) - 424usize];
    ["Offset of field: InfiniSegmentAttention::rotated"]
        [::std::mem::offset_of!(InfiniSegmentAttention, rotated) - 448usize];
    ["Offset of field: InfiniSegmentAttention::snapshot"]
        [::std::mem::offset_of!(InfiniSegmentAttention, snapshot) - 456usize];
    ["Offset of field: InfiniSegmentAttention::snapshot_scale"]
        [::std::mem::offset_of!(InfiniSegmentAttention, snapshot_scale) - 464usize];
    ["Offset of field: InfiniSegmentAttention::z"]
        [::std::mem::offset_of!(InfiniSegmentAttention, z) - 472usize];
    ["Offset of field: InfiniSegmentAttention::tiles"]
        [::std::mem::offset_of!(InfiniSegmentAttention, tiles) - 480usize];
    ["Offset of field: InfiniSegmentAttention::piece_group"]
        [::std::mem::offset_of!(InfiniSegmentAttention, piece_group) - 484usize];
    ["Offset of field: InfiniSegmentAttention::shared_by"]
        [::std::mem::offset_of!(InfiniSegmentAttention, shared_by) - 488usize];
    ["Offset of field: InfiniSegmentAttention::reserved"]
        [::std::mem::offset_of!(InfiniSegmentAttention, reserved) - 492usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniAppend {
    pub problem: InfiniProblem,
    pub call: InfiniCall,
    pub state: InfiniState,
    pub run: InfiniRun,
    pub rotated: InfiniAddress,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniAppend"][::std::mem::size_of::<InfiniAppend>() - 456usize];
    ["Alignment of InfiniAppend"][::std::mem::align_of::<InfiniAppend>() - 8usize];
    ["Offset of field: InfiniAppend::problem"]
        [::std::mem::offset_of!(InfiniAppend, problem) - 0usize];
    ["Offset of field: InfiniAppend::call"][::std::mem::offset_of!(InfiniAppend, call) - 48usize];
    ["Offset of field: InfiniAppend::state"]
        [::std::mem::offset_of!(InfiniAppend, state) - 344usize];
    ["Offset of field: InfiniAppend::run"][::std::mem::offset_of!(InfiniAppend, run) - 424usize];
    ["Offset of field: InfiniAppend::rotated"]
        [::std::mem::offset_of!(InfiniAppend, rotated) - 448usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniClearPadding {
    pub problem: InfiniProblem,
    pub call: InfiniCall,
    pub sequences: InfiniSequences,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniClearPadding"][::std::mem::size_of::<InfiniClearPadding>() - 1904usize];
    ["Alignment of InfiniClearPadding"][::std::mem::align_of::<InfiniClearPadding>() - 8usize];
    ["Offset of field: InfiniClearPadding::problem"]
        [::std::mem::offset_of!(InfiniClearPadding, problem) - 0usize];
    ["Offset of field: InfiniClearPadding::call"]
        [::std::mem::offset_of!(InfiniClearPadding, call) - 48usize];
    ["Offset of field: InfiniClearPadding::sequences"]
        [::std::mem::offset_of!(InfiniClearPadding, sequences) - 344usize];
};
impl Default for InfiniClearPadding {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniExchange {
    pub partials: InfiniAddress,
    pub head_tickets: InfiniAddress,
    pub sequence_tickets: InfiniAddress,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniExchange"][::std::mem::size_of::<InfiniExchange>() - 24usize];
    ["Alignment of InfiniExchange"][::std::mem::align_of::<InfiniExchange>() - 8usize];
    ["Offset of field: InfiniExchange::partials"]
        [::std::mem::offset_of!(InfiniExchange, partials) - 0usize];
    ["Offset of field: InfiniExchange::head_tickets"]
        [::std::mem::offset_of!(InfiniExchange, head_tickets) - 8usize];
    ["Offset of field: InfiniExchange::sequence_tickets"]
        [::std::mem::offset_of!(InfiniExchange, sequence_tickets) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSegment {
    pub problem: InfiniProblem,
    pub call: InfiniCall,
    pub state: InfiniState,
    pub exchange: InfiniExchange,
    pub rotated: InfiniAddress,
    pub tiles: i32,
    pub chunks: i32,
    pub chunk_len: i32,
    pub reserved: i32,
    pub sequences: InfiniSequences,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSegment"][::std::mem::size_of::<InfiniSegment>() - 2032usize];
    ["Alignment of InfiniSegment"][::std::mem::align_of::<InfiniSegment>() - 8usize];
    ["Offset of field: InfiniSegment::problem"]
        [::std::mem::offset_of!(InfiniSegment, problem) - 0usize];
    ["Offset of field: InfiniSegment::call"][::std::mem::offset_of!(InfiniSegment, call) - 48usize];
    ["Offset of field: InfiniSegment::state"]
        [::std::mem::offset_of!(InfiniSegment, state) - 344usize];
    ["Offset of field: InfiniSegment::exchange"]
        [::std::mem::offset_of!(InfiniSegment, exchange) - 424usize];
    ["Offset of field: InfiniSegment::rotated"]
        [::std::mem::offset_of!(InfiniSegment, rotated) - 448usize];
    ["Offset of field: InfiniSegment::tiles"]
        [::std::mem::offset_of!(InfiniSegment, tiles) - 456usize];
    ["Offset of field: InfiniSegment::chunks"]
        [::std::mem::offset_of!(InfiniSegment, chunks) - 460usize];
    ["Offset of field: InfiniSegment::chunk_len"]
        [::std::mem::offset_of!(InfiniSegment, chunk_len) - 464usize];
    ["Offset of field: InfiniSegment::reserved"]
        [::std::mem::offset_of!(InfiniSegment, reserved) - 468usize];
    ["Offset of field: InfiniSegment::sequences"]
        [::std::mem::offset_of!(InfiniSegment, sequences) - 472usize];
};
impl Default for InfiniSegment {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniDecode {
    pub problem: InfiniProblem,
    pub call: InfiniCall,
    pub state: InfiniState,
    pub exchange: InfiniExchange,
    pub splits: i32,
    pub split_len: i32,
    pub row_tiles: i32,
    pub step: i32,
    pub sequences: InfiniSequences,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniDecode"][::std::mem::size_of::<InfiniDecode>() - 2024usize];
    ["Alignment of InfiniDecode"][::std::mem::align_of::<InfiniDecode>() - 8usize];
    ["Offset of field: InfiniDecode::problem"]
        [::std::mem::offset_of!(InfiniDecode, problem) - 0usize];
    ["Offset of field: InfiniDecode::call"][::std::mem::offset_of!(InfiniDecode, call) - 48usize];
    ["Offset of field: InfiniDecode::state"]
        [::std::mem::offset_of!(InfiniDecode, state) - 344usize];
    ["Offset of field: InfiniDecode::exchange"]
        [::std::mem::offset_of!(InfiniDecode, exchange) - 424usize];
    ["Offset of field: InfiniDecode::splits"]
        [::std::mem::offset_of!(InfiniDecode, splits) - 448usize];
    ["Offset of field: InfiniDecode::split_len"]
        [::std::mem::offset_of!(InfiniDecode, split_len) - 452usize];
    ["Offset of field: InfiniDecode::row_tiles"]
        [::std::mem::offset_of!(InfiniDecode, row_tiles) - 456usize];
    ["Offset of field: InfiniDecode::step"][::std::mem::offset_of!(InfiniDecode, step) - 460usize];
    ["Offset of field: InfiniDecode::sequences"]
        [::std::mem::offset_of!(InfiniDecode, sequences) - 464usize];
};
impl Default for InfiniDecode {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniCommit {
    pub problem: InfiniProblem,
    pub state: InfiniState,
    pub exchange: InfiniExchange,
    pub chunks: i32,
    pub chunk_len: i32,
    pub flush: i32,
    pub reserved: i32,
    pub sequences: InfiniSequences,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniCommit"][::std::mem::size_of::<InfiniCommit>() - 1728usize];
    ["Alignment of InfiniCommit"][::std::mem::align_of::<InfiniCommit>() - 8usize];
    ["Offset of field: InfiniCommit::problem"]
        [::std::mem::offset_of!(InfiniCommit, problem) - 0usize];
    ["Offset of field: InfiniCommit::state"][::std::mem::offset_of!(InfiniCommit, state) - 48usize];
    ["Offset of field: InfiniCommit::exchange"]
        [::std::mem::offset_of!(InfiniCommit, exchange) - 128usize];
    ["Offset of field: InfiniCommit::chunks"]
        [::std::mem::offset_of!(InfiniCommit, chunks) - 152usize];
    ["Offset of field: InfiniCommit::chunk_len"]
        [::std::mem::offset_of!(InfiniCommit, chunk_len) - 156usize];
    ["Offset of field: InfiniCommit::flush"]
        [::std::mem::offset_of!(InfiniCommit, flush) - 160usize];
    ["Offset of field: InfiniCommit::reserved"]
        [::std::mem::offset_of!(InfiniCommit, reserved) - 164usize];
    ["Offset of field: InfiniCommit::sequences"]
        [::std::mem::offset_of!(InfiniCommit, sequences) - 168usize];
};
impl Default for InfiniCommit {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniMergePartials {
    pub a_dot: InfiniAddress,
    pub lse: InfiniAddress,
    pub out: InfiniTensor,
    pub out_lse: InfiniTensor,
    pub batches: i64,
    pub tokens: i64,
    pub heads: i32,
    pub value_dim: i32,
    pub parts: i32,
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniMergePartials"][::std::mem::size_of::<InfiniMergePartials>() - 112usize];
    ["Alignment of InfiniMergePartials"][::std::mem::align_of::<InfiniMergePartials>() - 8usize];
    ["Offset of field: InfiniMergePartials::a_dot"]
        [::std::mem::offset_of!(InfiniMergePartials, a_dot) - 0usize];
    ["Offset of field: InfiniMergePartials::lse"]
        [::std::mem::offset_of!(InfiniMergePartials, lse) - 8usize];
    ["Offset of field: InfiniMergePartials::out"]
        [::std::mem::offset_of!(InfiniMergePartials, out) - 16usize];
    ["Offset of field: InfiniMergePartials::out_lse"]
        [::std::mem::offset_of!(InfiniMergePartials, out_lse) - 48usize];
    ["Offset of field: InfiniMergePartials::batches"]
        [::std::mem::offset_of!(InfiniMergePartials, batches) - 80usize];
    ["Offset of field: InfiniMergePartials::tokens"]
        [::std::mem::offset_of!(InfiniMergePartials, tokens) - 88usize];
    ["Offset of field: InfiniMergePartials::heads"]
        [::std::mem::offset_of!(InfiniMergePartials, heads) - 96usize];
    ["Offset of field: InfiniMergePartials::value_dim"]
        [::std::mem::offset_of!(InfiniMergePartials, value_dim) - 100usize];
    ["Offset of field: InfiniMergePartials::parts"]
        [::std::mem::offset_of!(InfiniMergePartials, parts) - 104usize];
    ["Offset of field: InfiniMergePartials::reserved"]
        [::std::mem::offset_of!(InfiniMergePartials, reserved) - 108usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSum {
    pub inputs: InfiniAddress,
    pub out: InfiniAddress,
    pub count: i64,
    pub parts: i32,
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSum"][::std::mem::size_of::<InfiniSum>() - 32usize];
    ["Alignment of InfiniSum"][::std::mem::align_of::<InfiniSum>() - 8usize];
    ["Offset of field: InfiniSum::inputs"][::std::mem::offset_of!(InfiniSum, inputs) - 0usize];
    ["Offset of field: InfiniSum::out"][::std::mem::offset_of!(InfiniSum, out) - 8usize];
    ["Offset of field: InfiniSum::count"][::std::mem::offset_of!(InfiniSum, count) - 16usize];
    ["Offset of field: InfiniSum::parts"][::std::mem::offset_of!(InfiniSum, parts) - 24usize];
    ["Offset of field: InfiniSum::reserved"][::std::mem::offset_of!(InfiniSum, reserved) - 28usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniCompose {
    pub a: InfiniAddress,
    pub b: InfiniAddress,
    pub d: InfiniAddress,
    pub c: InfiniAddress,
    pub matrices: i64,
    pub key_dim: i32,
    pub columns: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniCompose"][::std::mem::size_of::<InfiniCompose>() - 48usize];
    ["Alignment of InfiniCompose"][::std::mem::align_of::<InfiniCompose>() - 8usize];
    ["Offset of field: InfiniCompose::a"][::std::mem::offset_of!(InfiniCompose, a) - 0usize];
    ["Offset of field: InfiniCompose::b"][::std::mem::offset_of!(InfiniCompose, b) - 8usize];
    ["Offset of field: InfiniCompose::d"][::std::mem::offset_of!(InfiniCompose, d) - 16usize];
    ["Offset of field: InfiniCompose::c"][::std::mem::offset_of!(InfiniCompose, c) - 24usize];
    ["Offset of field: InfiniCompose::matrices"]
        [::std::mem::offset_of!(InfiniCompose, matrices) - 32usize];
    ["Offset of field: InfiniCompose::key_dim"]
        [::std::mem::offset_of!(InfiniCompose, key_dim) - 40usize];
    ["Offset of field: InfiniCompose::columns"]
        [::std::mem::offset_of!(InfiniCompose, columns) - 44usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSnapshot {
    pub memory: InfiniAddress,
    pub snapshot: InfiniAddress,
    pub snapshot_scale: InfiniAddress,
    pub matrices: i64,
    pub key_dim: i32,
    pub value_dim: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSnapshot"][::std::mem::size_of::<InfiniSnapshot>() - 40usize];
    ["Alignment of InfiniSnapshot"][::std::mem::align_of::<InfiniSnapshot>() - 8usize];
    ["Offset of field: InfiniSnapshot::memory"]
        [::std::mem::offset_of!(InfiniSnapshot, memory) - 0usize];
    ["Offset of field: InfiniSnapshot::snapshot"]
        [::std::mem::offset_of!(InfiniSnapshot, snapshot) - 8usize];
    ["Offset of field: InfiniSnapshot::snapshot_scale"]
        [::std::mem::offset_of!(InfiniSnapshot, snapshot_scale) - 16usize];
    ["Offset of field: InfiniSnapshot::matrices"]
        [::std::mem::offset_of!(InfiniSnapshot, matrices) - 24usize];
    ["Offset of field: InfiniSnapshot::key_dim"]
        [::std::mem::offset_of!(InfiniSnapshot, key_dim) - 32usize];
    ["Offset of field: InfiniSnapshot::value_dim"]
        [::std::mem::offset_of!(InfiniSnapshot, value_dim) - 36usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniSlotPair {
    pub from: i32,
    pub to: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniSlotPair"][::std::mem::size_of::<InfiniSlotPair>() - 8usize];
    ["Alignment of InfiniSlotPair"][::std::mem::align_of::<InfiniSlotPair>() - 4usize];
    ["Offset of field: InfiniSlotPair::from"]
        [::std::mem::offset_of!(InfiniSlotPair, from) - 0usize];
    ["Offset of field: InfiniSlotPair::to"][::std::mem::offset_of!(InfiniSlotPair, to) - 4usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniCopySlots {
    pub problem: InfiniProblem,
    pub from: InfiniState,
    pub to: InfiniState,
    pub pairs: InfiniAddress,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniCopySlots"][::std::mem::size_of::<InfiniCopySlots>() - 216usize];
    ["Alignment of InfiniCopySlots"][::std::mem::align_of::<InfiniCopySlots>() - 8usize];
    ["Offset of field: InfiniCopySlots::problem"]
        [::std::mem::offset_of!(InfiniCopySlots, problem) - 0usize];
    ["Offset of field: InfiniCopySlots::from"]
        [::std::mem::offset_of!(InfiniCopySlots, from) - 48usize];
    ["Offset of field: InfiniCopySlots::to"]
        [::std::mem::offset_of!(InfiniCopySlots, to) - 128usize];
    ["Offset of field: InfiniCopySlots::pairs"]
        [::std::mem::offset_of!(InfiniCopySlots, pairs) - 208usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniTable {
    pub to: InfiniAddress,
    pub bytes: i64,
    pub data: [u32; 960usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniTable"][::std::mem::size_of::<InfiniTable>() - 3856usize];
    ["Alignment of InfiniTable"][::std::mem::align_of::<InfiniTable>() - 8usize];
    ["Offset of field: InfiniTable::to"][::std::mem::offset_of!(InfiniTable, to) - 0usize];
    ["Offset of field: InfiniTable::bytes"][::std::mem::offset_of!(InfiniTable, bytes) - 8usize];
    ["Offset of field: InfiniTable::data"][::std::mem::offset_of!(InfiniTable, data) - 16usize];
};
impl Default for InfiniTable {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, :: bytemuck :: Pod, :: bytemuck :: Zeroable)]
pub struct InfiniWaitReport {
    pub complete: u32,
    pub block: [u32; 3usize],
    pub thread: u32,
    pub barrier: u32,
    pub parity: u32,
    pub polls: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of InfiniWaitReport"][::std::mem::size_of::<InfiniWaitReport>() - 32usize];
    ["Alignment of InfiniWaitReport"][::std::mem::align_of::<InfiniWaitReport>() - 4usize];
    ["Offset of field: InfiniWaitReport::complete"]
        [::std::mem::offset_of!(InfiniWaitReport, complete) - 0usize];
    ["Offset of field: InfiniWaitReport::block"]
        [::std::mem::offset_of!(InfiniWaitReport, block) - 4usize];
    ["Offset of field: InfiniWaitReport::thread"]
        [::std::mem::offset_of!(InfiniWaitReport, thread) - 16usize];
    ["Offset of field: InfiniWaitReport::barrier"]
        [::std::mem::offset_of!(InfiniWaitReport, barrier) - 20usize];
    ["Offset of field: InfiniWaitReport::parity"]
        [::std::mem::offset_of!(InfiniWaitReport, parity) - 24usize];
    ["Offset of field: InfiniWaitReport::polls"]
        [::std::mem::offset_of!(InfiniWaitReport, polls) - 28usize];
};
