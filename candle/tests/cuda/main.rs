//! The operator, the state and the model on candle's CUDA device, in groups that can each have a process
//! of its own (`--exact NAME`). On the simulator: `scripts/candle-device`. Without a device all are
//! skipped, and it is said so.
//!
//! `INFINI_KERNELS` names a folder of kernels in place of those compiled in (docs/gpu.md).

#[path = "../candle/common/mod.rs"]
mod common;
mod data;
mod driver;
mod layouts;
mod model;
mod operator;
mod refusals;
mod slots;
mod table;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use candle_core::Device;
use infini_attn::cuda::replace_kernels;
use libtest_mimic::{Arguments, Trial};

type Check = fn(&Device) -> Result<()>;

const CHECKS: [(&str, Check); 20] = [
    ("table", table::the_table_of_cases),
    ("layouts", layouts::every_layout_is_read),
    ("copies", layouts::rows_off_16_bytes_are_copied_and_told_of),
    ("prompts_and_tokens", operator::a_prompt_and_tokens_after_it),
    ("batches", operator::packed_is_padded_is_one_by_one),
    ("parts", operator::parts),
    ("nothing", operator::nothing_new),
    ("tracked", operator::tracked),
    ("rotation", operator::rotated_as_on_the_cpu),
    ("threads", operator::threads_take_turns),
    ("waits", driver::nothing_is_waited_for),
    ("refused_memory", driver::what_the_driver_refuses_leaves_the_state),
    ("slots", slots::other_slots_keep_their_bits),
    ("files", slots::to_a_file_and_back),
    ("f32", refusals::f32_is_refused),
    ("per_thread_stream", refusals::the_per_thread_stream_is_refused),
    ("devices", refusals::tensors_of_other_devices_are_refused),
    ("shapes", refusals::what_is_refused_leaves_the_state),
    ("model", model::as_on_the_cpu),
    ("conversations", model::conversations_go_on),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if let Some(folder) = std::env::var_os("INFINI_KERNELS").filter(|folder| !folder.is_empty()) {
        // SAFETY: whoever names the folder wants to run what it holds.
        if let Err(error) = unsafe { replace_kernels(Path::new(&folder)) } {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    }
    let missing = match arguments.list {
        true => None,
        false => Device::new_cuda_with_stream(0).err(),
    };
    if let Some(error) = &missing {
        eprintln!("skipped {} groups: {}", CHECKS.len(), first_line(error));
    }
    let tell = arguments.nocapture;
    let trials = CHECKS.into_iter().map(|(name, check)| {
        let name = format!("candle::{name}");
        let own = name.clone();
        let run = move || {
            if tell {
                eprintln!("case {own}");
            }
            let done = Device::new_cuda_with_stream(0).map_err(Into::into);
            done.and_then(|device| check(&device)).map_err(|error| {
                eprintln!("failed {own}: {}", first_line(&error));
                error.into()
            })
        };
        Trial::test(name, run).with_ignored_flag(missing.is_some())
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// candle's errors may end in a backtrace.
fn first_line(error: &impl std::fmt::Display) -> String {
    format!("{error:#}").lines().next().unwrap_or_default().to_owned()
}
