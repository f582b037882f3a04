//! One file per operation: which kernels are launched for it, in which order, with which parameters.
//! Host code alone; each file opens with its phases.

pub mod attention;
pub mod commit;
pub mod decode;
pub mod forward;
pub mod init;
pub mod maps;
pub mod merge;
pub mod phases;
pub mod prefill;
pub mod segment;
pub mod slots;
