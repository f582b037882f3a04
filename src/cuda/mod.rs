//! The operator on CUDA devices of compute capability 8.0 and later (feature `cuda`).
//!
//! Every operation has portable kernels, and some have others for one architecture ([`Arch`]); a
//! plan chooses by the [`Target`] it is made for.
//!
//! The kernels are compiled when the crate is built and lie in it as fatbins; [`KERNELS`] is the
//! table they are looked up in. libcuda is never linked: it is opened when a [`Device`] is.
//!
//! Calls come in two layers. The raw one takes addresses: a *plan* is made on the host from shapes
//! alone ([`plan_prefill`], [`plan_segment`], [`plan_decode`], [`plan_flush`]), printed or tested
//! without a device, and run by a [`Launcher`]. The typed one ([`prefill()`], [`segment()`],
//! [`decode()`], [`flush`]) owns its [`State`] and borrows tensors in cudarc's buffers.

mod address;
mod attention;
mod buffers;
mod call;
mod calls;
mod commit;
mod decode;
mod device;
mod encoded_maps;
mod enqueue;
mod host_tables;
mod kernels;
mod launcher;
mod maps;
mod merge;
mod observer;
pub mod params;
mod phases;
mod plan;
mod prefill;
mod replaced;
mod residency;
mod runs;
mod segment;
mod sequences;
mod state;
mod target;
mod tensor;
mod tensor_map;
mod transfer;
mod typed;
mod wait_report;

pub use address::{Addresses, Operand, Requirement};
pub use buffers::{TensorView, TensorViewMut};
pub use call::{Call, DeviceRope};
pub use calls::{
    Inputs, Outputs, Rope, decode, flush, prefill, prepare_decode, record_decode, segment,
};
pub use commit::plan_flush;
pub use decode::{DecodeOptions, Runs, plan_decode};
pub use device::Device;
pub use enqueue::CudaLauncher;
pub use kernels::{KERNELS, Kernel, fatbin, find, ptx};
pub use launcher::{Launch, Launcher};
pub use maps::{
    KeySumsMirror, MapAddresses, SegmentMapMirror, plan_add_key_sums, plan_apply, plan_compose,
    plan_key_sums, plan_segment_map,
};
pub use merge::{plan_merge_memories, plan_merge_partials};
pub use observer::Event;
pub use plan::{Plan, PlannedLaunch};
pub use prefill::{PrefillOptions, plan_prefill};
pub use replaced::replace_kernels;
pub use runs::{
    KeySums, SegmentMap, apply, compose, key_sums, merge_memories, merge_partials, segment_map,
};
pub use segment::plan_segment;
pub use state::{Mirror, StateLayout};
pub use target::{Arch, Target};
pub use tensor::DeviceTensor;
pub use tensor_map::{MAP_BYTES, MAP_CHANNELS, TensorMap};
pub use typed::{Gate, State};
