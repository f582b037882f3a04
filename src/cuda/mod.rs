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
//!
//! Three floors, each of which knows only those below it: `device` (cudarc), `operations` (what
//! is launched for each of them), `plan` (the vocabulary that plans are written in).

mod device;
mod operations;
mod plan;

pub use device::Device;
pub use device::borrowed::CurrentContext;
pub use device::buffers::{TensorView, TensorViewMut};
pub use device::gate::Gate;
pub use device::launcher::CudaLauncher;
pub use device::maps::{KeySums, SegmentMap, apply, compose, key_sums, segment_map};
pub use device::merge::{merge_memories, merge_partials};
pub use device::observer::Event;
pub use device::operator::{Inputs, Outputs, Rope};
pub use device::operator::{
    decode, flush, forward, prefill, prepare_decode, record_decode, segment,
};
pub use device::state::State;
pub use device::table::SequenceTable;
pub use operations::commit::plan_flush;
pub use operations::decode::{DecodeOptions, Runs, plan_decode};
pub use operations::forward::plan_forward;
pub use operations::maps::{KeySumsMirror, MapAddresses, SegmentMapMirror};
pub use operations::maps::{
    plan_add_key_sums, plan_apply, plan_compose, plan_key_sums, plan_segment_map,
};
pub use operations::merge::{plan_merge_memories, plan_merge_partials};
pub use operations::prefill::{PrefillOptions, plan_prefill};
pub use operations::segment::plan_segment;
pub use operations::slots::{plan_copy_slots, plan_copy_within, plan_truncate};
pub use plan::address::{Addresses, Operand, Requirement};
pub use plan::call::{Call, DeviceRope};
pub use plan::effect::PAD_SLOT;
pub use plan::kernel::{Arch, Kernel};
pub use plan::kernels::{KERNELS, fatbin, find, ptx};
pub use plan::launcher::{Launch, Launcher};
pub use plan::layout::StateLayout;
pub use plan::mirror::Mirror;
pub use plan::params;
pub use plan::replaced::replace_kernels;
pub use plan::target::Target;
pub use plan::tensor::DeviceTensor;
pub use plan::tensor_map::{MAP_BYTES, MAP_CHANNELS, TensorMap};
pub use plan::{Plan, PlannedLaunch};
