//! The launches that `triton_kernels.py` describes.

use std::collections::BTreeMap;
use std::fs;

use half::{bf16, f16};
use ptxsim::tensor_map::TensorMap;
use ptxsim::{Arg, Buffer, Device, Launch, Module};
use rand::prelude::*;
use serde::Deserialize;

use crate::support::compare::{Element, generator, random, steps, values};
use crate::support::{run, tools};

/// One launch of the manifest.
#[derive(Deserialize)]
pub struct Case {
    pub label: String,
    pub kernel: String,
    pub arch: String,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    buffers: BTreeMap<String, Described>,
    args: Vec<Argument>,
    pub reference: serde_json::Value,
    file: String,
}

#[derive(Deserialize)]
struct Described {
    dtype: String,
    shape: Vec<usize>,
    role: Role,
}

#[derive(Clone, Copy, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Role {
    Input,
    /// Multiples of 1/1024: their sum is exact in any order.
    Steps,
    Output,
    Zero,
}

/// A kernel argument, as `{"kind": value}`; `tensor_map` also names its buffer.
#[derive(Deserialize)]
#[serde(untagged)]
enum Argument {
    Buffer { buffer: String },
    I32 { i32: i32 },
    I64 { i64: i64 },
    F32 { f32: f64 },
    Map { tensor_map: serde_json::Value },
    Scratch { scratch: u64, align: u64 },
}

/// A buffer's number on the device and what it started with.
struct Placed {
    buffer: Buffer,
    dtype: String,
    initial: Vec<f64>,
}

/// A finished launch.
pub struct Ran {
    device: Device,
    placed: BTreeMap<String, Placed>,
}

/// All cases; compiles on the first call.
pub fn cases() -> Vec<Case> {
    let path = tools::triton().join("manifest.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

impl Case {
    /// A number of the reference's description.
    pub fn size(&self, name: &str) -> usize {
        let value = self.reference[name].as_u64();
        value.unwrap_or_else(|| panic!("{}: reference has no {name}", self.label)) as usize
    }

    /// Fills the buffers and runs the kernel, which must be clean.
    pub fn run(&self) -> Ran {
        let path = tools::triton().join(&self.file);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let module: Module = run::parse(&self.label, &text);
        let mut device = Device::new(run::arch(&self.arch));
        let mut rng = generator(&self.label);
        let place = |(name, described): (&String, &Described)| {
            (name.clone(), described.place(name, &mut device, &mut rng))
        };
        let placed: BTreeMap<_, _> = self.buffers.iter().map(place).collect();
        let args: Vec<_> =
            self.args.iter().map(|a| self.argument(a, &mut device, &placed)).collect();
        let launch = Launch {
            grid: self.grid,
            block: [self.block, 1, 1],
            ..Launch::linear(1, 1).shared(self.shared)
        };
        run::clean(&mut device, &module, &self.kernel, launch, &args);
        Ran { device, placed }
    }

    fn argument(
        &self,
        argument: &Argument,
        device: &mut Device,
        placed: &BTreeMap<String, Placed>,
    ) -> Arg {
        match argument {
            Argument::Buffer { buffer } => Arg::Buffer(placed[buffer].buffer),
            Argument::I32 { i32 } => Arg::I32(*i32),
            Argument::I64 { i64 } => Arg::I64(*i64),
            Argument::F32 { f32 } => Arg::F32(*f32 as f32),
            Argument::Map { tensor_map } => {
                // The map as the library reads it, and the buffer it stands on.
                let mut described = tensor_map.clone();
                let buffer = described.as_object_mut().and_then(|m| m.remove("buffer"));
                let buffer = buffer.as_ref().and_then(|b| b.as_str()).unwrap_or_default();
                let mut map: TensorMap = serde_json::from_value(described)
                    .unwrap_or_else(|e| panic!("{}: {e}", self.label));
                map.address = device.address(placed[buffer].buffer);
                Arg::TensorMap(map)
            }
            Argument::Scratch { scratch: 0, .. } => Arg::U64(0),
            Argument::Scratch { scratch, align } => {
                let bytes = scratch.next_multiple_of(*align) * self.blocks();
                Arg::Buffer(device.uninitialised_bytes("scratch", bytes))
            }
        }
    }

    fn blocks(&self) -> u64 {
        self.grid.iter().map(|n| u64::from(*n)).product()
    }
}

impl Described {
    fn place(&self, name: &str, device: &mut Device, rng: &mut impl Rng) -> Placed {
        match self.dtype.as_str() {
            "f32" => self.place_floats::<f32>(name, device, rng),
            "f16" => self.place_floats::<f16>(name, device, rng),
            "bf16" => self.place_floats::<bf16>(name, device, rng),
            "i32" => {
                let draw = |_| match self.role {
                    Role::Input => rng.random_range(0..1000),
                    _ => 0i32,
                };
                let data: Vec<i32> = (0..self.elements()).map(draw).collect();
                let initial = data.iter().map(|x| f64::from(*x)).collect();
                Placed { buffer: device.buffer(name, &data), dtype: self.dtype.clone(), initial }
            }
            other => panic!("buffer {name}: no element type {other}"),
        }
    }

    fn place_floats<T: Element>(
        &self,
        name: &str,
        device: &mut Device,
        rng: &mut impl Rng,
    ) -> Placed {
        let n = self.elements();
        let data: Vec<T> = match self.role {
            Role::Input => random(rng, n, 1.0),
            Role::Steps => steps(rng, n),
            _ => vec![T::zeroed(); n],
        };
        let buffer = match self.role {
            Role::Output => device.uninitialised::<T>(name, n),
            _ => device.buffer(name, &data),
        };
        Placed { buffer, dtype: self.dtype.clone(), initial: values(&data) }
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Ran {
    /// What an input held.
    pub fn input(&self, name: &str) -> &[f64] {
        &self.placed[name].initial
    }

    /// What a buffer holds now; every byte must have been written.
    pub fn output(&self, name: &str) -> Vec<f64> {
        let Placed { buffer, dtype, .. } = &self.placed[name];
        match dtype.as_str() {
            "f32" => self.read::<f32>(*buffer),
            "f16" => self.read::<f16>(*buffer),
            "bf16" => self.read::<bf16>(*buffer),
            _ => {
                let data: Vec<i32> = run::read(&self.device, *buffer);
                data.into_iter().map(f64::from).collect()
            }
        }
    }

    fn read<T: Element>(&self, buffer: Buffer) -> Vec<f64> {
        values(&run::read::<T>(&self.device, buffer))
    }

    /// Unit round-off of a buffer's element type.
    pub fn roundoff(&self, name: &str) -> f64 {
        match self.placed[name].dtype.as_str() {
            "f16" => 2f64.powi(-11),
            "bf16" => 2f64.powi(-8),
            _ => 2f64.powi(-24),
        }
    }
}
