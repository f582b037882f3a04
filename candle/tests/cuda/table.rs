//! The shared table of cases, against the float64 reference.

use anyhow::{Result, ensure};
use candle_core::Device;
use infini_attn::cuda::{Arch, KERNELS};

use crate::common::candle::Candle;
use crate::common::driver::run_cases;
use crate::common::tensor_cases::every_nth;
use crate::data::is_simulated;

/// One case in so many, of so many multiply-adds. (All are planned by tests/cuda/operations.)
const FEW: (usize, u64) = (5, 2_000_000);
const MORE: (usize, u64) = (3, 50_000_000);

pub fn the_table_of_cases(device: &Device) -> Result<()> {
    let kernels =
        KERNELS.iter().filter(|k| k.operation == "segment_attention" && k.arch == Arch::Sm80);
    let shapes: Vec<_> = kernels.filter_map(|k| Some((k.dtype?, k.key_dim, k.value_dim))).collect();
    let (n, budget) = if is_simulated(device)? { FEW } else { MORE };
    let cases = every_nth(n, &shapes, budget);
    let summary = run_cases(&Candle::<true>(device.clone()), &cases);
    let failures = &summary.failures;
    ensure!(failures.is_empty(), "{} failures, the first: {}", failures.len(), failures[0]);
    ensure!(summary.ran >= cases.len() / 2, "{} of {} cases ran", summary.ran, cases.len());
    Ok(())
}
