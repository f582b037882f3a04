//! What the instruction set leaves open is varied: results move, and stay within their tolerance.

use ptxsim::numeric::tensor::Accumulation;
use ptxsim::{Arg, Launch, Options, Report, Residency, Timing};

use crate::products::{attention, product_of};
use crate::support::compare::assert_close;
use crate::support::run::compiled;

/// Rows that `math_f32` writes, and the one that holds exp(x).
const ROWS: usize = 18;
const EXP: usize = 6;
const TOLERANCE: f64 = 2.0 / 256.0;

/// exp of 600 numbers, in f32.
fn exponentials(perturb: Option<u64>) -> (Vec<f32>, Vec<f64>) {
    let (module, mut device) = compiled("math", "sm_80");
    device.options.perturb = perturb;
    let xs: Vec<f32> = (0..600).map(|i| (i as f32 + 0.5) / 40.0 - 8.0).collect();
    let n = xs.len();
    let [x, y] = ["x", "y"].map(|name| device.buffer(name, &xs));
    let out = device.uninitialised::<f32>("out", ROWS * n);
    let args = [x.into(), y.into(), out.into(), Arg::I32(n as i32)];
    let launch = Launch::linear(n.div_ceil(128) as u32, 128);
    let report = device.launch(&module, "math_f32", &launch, &args).expect("it runs");
    assert!(report.is_clean(), "{report}");
    let bytes = device.contents(out);
    let at = |i: usize| f32::from_le_bytes(std::array::from_fn(|b| bytes[4 * i + b]));
    ((0..n).map(|i| at(EXP * n + i)).collect(), xs.iter().map(|x| f64::from(*x).exp()).collect())
}

#[test]
fn approximations_are_perturbed() {
    let (plain, want) = exponentials(None);
    for seed in [1, 2] {
        let (got, _) = exponentials(Some(seed));
        let wide: Vec<f64> = got.iter().map(|x| f64::from(*x)).collect();
        assert_close("perturbed exp", &wide, &want, 1e-6);
        let moved = got.iter().zip(&plain).filter(|(a, b)| a != b).count();
        assert!(moved > 100, "{moved} of {} results moved", got.len());
        let options = Options { perturb: Some(seed), ..Options::default() };
        let (o, want) = attention(&options, [1, 128], true);
        assert_close("attention", &o, &want, TOLERANCE);
    }
}

#[test]
fn tensor_cores_sum_in_another_order() {
    let of = |accumulation| product_of(&Options { accumulation, ..Options::default() });
    let ((exact, want), (chain, _)) = (of(Accumulation::Exact), of(Accumulation::Chain));
    assert_close("a chain of additions", &chain, &want, 1e-6);
    assert_ne!(exact, chain);
}

#[test]
fn schedules_change_nothing() {
    let plain = Options::default();
    let (want, _) = attention(&plain, [1, 128], true);
    let others = [
        ("lazy", Options { seed: 1, timing: Timing::Lazy, ..plain.clone() }),
        ("eager, another seed", Options { seed: 2, ..plain.clone() }),
        ("co-resident", Options { residency: Residency::CoResident, ..plain.clone() }),
        ("weakest alignment", Options { weak_alignment: true, ..plain.clone() }),
        ("no checks", Options { checks: false, ..plain }),
    ];
    for (case, options) in others {
        assert!(attention(&options, [1, 128], true).0 == want, "{case}");
    }
}

/// The same counts, whatever the order of blocks and warps.
#[test]
fn counts_do_not_depend_on_the_schedule() {
    let run = |seed, residency| -> Report {
        let (module, mut device) = compiled("warp", "sm_80");
        device.options = Options { seed, residency, ..Options::default() };
        let launch = Launch::linear(3, 64);
        let name = module.kernels().next().expect("a kernel").to_string();
        let kernel = module.kernel(&name).expect("it decodes");
        let data = device.buffer("data", &[1u32; 4096]);
        let args: Vec<_> = (kernel.params.iter())
            .map(|p| if p.bytes == 8 { data.into() } else { Arg::I32(16) })
            .collect();
        device.launch(&module, &name, &launch, &args).expect("it runs")
    };
    let first = run(0, Residency::Sequential);
    for (seed, residency) in [(1, Residency::Sequential), (2, Residency::CoResident)] {
        let next = run(seed, residency);
        assert_eq!(first.lines, next.lines);
        assert_eq!(first.buffers, next.buffers);
    }
}
