//! Barriers, atomics and tickets.

use ptxsim::{Arg, Launch, Residency};
use rand::prelude::*;

use crate::support::compare::{generator, steps};
use crate::support::run::{clean, compiled};

#[test]
fn ticket_sum() {
    let (module, mut device) = compiled("block", "sm_80");
    for (n, blocks) in [(5000, 7), (100, 1)] {
        let data: Vec<f32> = steps(&mut generator("ticket sum"), n);
        let input = device.buffer("in", &data);
        let partial = device.uninitialised::<f32>("partial", blocks as usize);
        let ticket = device.buffer("ticket", &[0u32]);
        let out = device.uninitialised::<f32>("out", 1);
        let n = Arg::I32(n as i32);
        let args = [input.into(), n, partial.into(), ticket.into(), out.into()];
        for residency in [Residency::Sequential, Residency::CoResident] {
            device.options.residency = residency;
            clean(&mut device, &module, "ticket_sum", Launch::linear(blocks, 256), &args);
            assert_eq!(device.read::<f32>(out), Ok(vec![data.iter().sum()]));
            assert_eq!(device.read::<u32>(ticket), Ok(vec![0]));
        }
    }
}

#[test]
fn named_barriers() {
    let (module, mut device) = compiled("block", "sm_80");
    for tiles in [1, 2, 7] {
        let data: Vec<f32> = steps(&mut generator("named barriers"), tiles * 64);
        let input = device.buffer("in", &data);
        let out = device.uninitialised::<f32>("out", tiles * 64);
        let args = [input.into(), out.into(), Arg::I32(tiles as i32)];
        clean(&mut device, &module, "named_barriers", Launch::linear(1, 128), &args);
        let want = |i: usize| 2.0 * data[i / 64 * 64 + 63 - i % 64] + (i / 64) as f32;
        assert_eq!(device.read::<f32>(out), Ok((0..tiles * 64).map(want).collect()));
    }
}

#[test]
fn transposes() {
    let (module, mut device) = compiled("block", "sm_80");
    let (rows, columns) = (50usize, 70usize);
    let data: Vec<f32> = steps(&mut generator("transposes"), rows * columns);
    let input = device.buffer("in", &data);
    let want: Vec<f32> = (0..rows * columns).map(|i| data[i % rows * columns + i / rows]).collect();
    for kernel in ["transpose_shared", "transpose_conflicts"] {
        let out = device.uninitialised::<f32>("out", rows * columns);
        let grid = [columns.div_ceil(32) as u32, rows.div_ceil(32) as u32, 1];
        let launch = Launch { grid, block: [32, 8, 1], ..Launch::linear(1, 1) };
        let args = [input.into(), out.into(), Arg::I32(rows as i32), Arg::I32(columns as i32)];
        clean(&mut device, &module, kernel, launch, &args);
        assert_eq!(device.read::<f32>(out), Ok(want.clone()), "{kernel}");
    }
}

#[test]
fn histogram() {
    let (module, mut device) = compiled("block", "sm_80");
    let mut rng = generator("histogram");
    let data: Vec<u8> = (0..3000).map(|_| rng.random::<u8>() / 3).collect();
    let mut want = vec![0u32; 256];
    data.iter().for_each(|x| want[usize::from(*x)] += 1);
    let input = device.buffer("in", &data);
    let bins = device.buffer("bins", &[0u32; 256]);
    let args = [input.into(), Arg::I32(3000), bins.into()];
    clean(&mut device, &module, "histogram", Launch::linear(4, 256), &args);
    assert_eq!(device.read::<u32>(bins), Ok(want));
}

#[test]
fn blocks_that_wait_for_each_other() {
    let (module, mut device) = compiled("block", "sm_80");
    let blocks = 9;
    let out = device.uninitialised::<i32>("out", blocks);
    let flags = device.buffer("flags", &vec![0u32; blocks]);
    device.options.residency = Residency::CoResident;
    let launch = Launch::linear(blocks as u32, 32);
    clean(&mut device, &module, "spin_chain", launch, &[out.into(), flags.into()]);
    let want: Vec<i32> = (0..blocks as i32).map(|b| b * (b + 1) / 2).collect();
    assert_eq!(device.read::<i32>(out), Ok(want));
}
