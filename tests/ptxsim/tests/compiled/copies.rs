//! Tensor copies of every rank and swizzle, bulk copies, cp.async with an mbarrier.

use ptxsim::layout::Swizzle;
use ptxsim::tensor_map::{Dtype, OobFill, TensorMap};
use ptxsim::{Arg, Buffer, Device, Launch, Module};
use rand::prelude::*;

use crate::support::compare::{generator, steps};
use crate::support::run::{clean, compiled, read};

/// A tensor of 4-byte elements and one tile of it.
struct Tile {
    dims: Vec<u64>,
    tile: Vec<u32>,
    element_strides: Vec<u32>,
    swizzle: Swizzle,
    at: Vec<i32>,
}

impl Tile {
    fn new(dims: &[u64], tile: &[u32], at: &[i32]) -> Self {
        let element_strides = vec![1; dims.len()];
        let (dims, tile, at) = (dims.to_vec(), tile.to_vec(), at.to_vec());
        Self { dims, tile, element_strides, swizzle: Swizzle::None, at }
    }

    fn elements(&self) -> usize {
        self.dims.iter().product::<u64>() as usize
    }

    /// Elements that are copied along a dimension: those of the box that the steps meet. Dimension
    /// 0 has no steps.
    fn count(&self, d: usize) -> usize {
        let step = if d == 0 { 1 } else { self.element_strides[d] };
        self.tile[d].div_ceil(step) as usize
    }

    fn words(&self) -> usize {
        (0..self.tile.len()).map(|d| self.count(d)).product()
    }

    fn map(&self, dtype: Dtype, device: &Device, tensor: Buffer) -> TensorMap {
        TensorMap {
            swizzle: self.swizzle,
            element_strides: self.element_strides.clone(),
            address: device.address(tensor),
            ..TensorMap::dense(dtype, self.dims.clone(), self.tile.clone())
        }
    }

    /// Where the tile's dense word `word` lies in shared memory, and which element it is, if any.
    fn place(&self, word: usize) -> (usize, Option<usize>) {
        let bits = match self.swizzle {
            Swizzle::None => 0,
            Swizzle::B32 => 1,
            Swizzle::B64 => 3,
            Swizzle::B128 => 7,
        };
        let byte = word * 4;
        let shared = (byte ^ ((byte >> 7 & bits) << 4)) / 4;
        let (mut rest, mut pitch, mut element) = (word, 1, Some(0));
        for (d, extent) in self.dims.iter().enumerate() {
            let inside = rest % self.count(d);
            rest /= self.count(d);
            let x = i64::from(self.at[d]) + inside as i64 * i64::from(self.element_strides[d]);
            let x = usize::try_from(x).ok().filter(|x| *x < *extent as usize);
            element = element.zip(x).map(|(e, x)| e + x * pitch);
            pitch *= *extent as usize;
        }
        (shared, element)
    }

    fn arguments(&self, map: TensorMap, other: Buffer) -> Vec<Arg> {
        let mut args = vec![Arg::TensorMap(map), other.into(), Arg::I32(self.words() as i32)];
        args.extend(self.at.iter().map(|c| Arg::I32(*c)));
        args
    }

    fn run(&self, device: &mut Device, module: &Module, kernel: &str, args: &[Arg]) {
        let launch = Launch::linear(1, 128).shared(self.words() as u32 * 4);
        clean(device, module, kernel, launch, args);
    }

    fn check_load(&self) {
        let (module, mut device) = compiled("tensor_copies", "sm_90a");
        let mut rng = generator("tensor loads");
        let data: Vec<u32> = (0..self.elements()).map(|_| rng.random()).collect();
        let tensor = device.buffer("tensor", &data);
        let out = device.uninitialised::<u32>("out", self.words());
        let args = self.arguments(self.map(Dtype::U32, &device, tensor), out);
        let kernel = format!("tensor_load_{}d", self.dims.len());
        self.run(&mut device, &module, &kernel, &args);
        let mut want = vec![0; self.words()];
        for word in 0..self.words() {
            let (shared, element) = self.place(word);
            want[shared] = element.map_or(0, |e| data[e]);
        }
        let (dims, at) = (&self.dims, &self.at);
        assert_eq!(device.read::<u32>(out), Ok(want), "dims {dims:?} at {at:?}");
    }

    fn check_store(&self, kernel: &str, combine: impl Fn(f32, f32) -> f32) {
        let (module, mut device) = compiled("tensor_copies", "sm_90a");
        let mut rng = generator("tensor stores");
        let (before, tile): (Vec<f32>, Vec<f32>) =
            (steps(&mut rng, self.elements()), steps(&mut rng, self.words()));
        let tensor = device.buffer("tensor", &before);
        let input = device.buffer("in", &tile);
        let args = self.arguments(self.map(Dtype::F32, &device, tensor), input);
        self.run(&mut device, &module, kernel, &args);
        let mut want = before;
        for word in 0..self.words() {
            let (shared, element) = self.place(word);
            if let Some(e) = element {
                want[e] = combine(want[e], tile[shared]);
            }
        }
        let (dims, at) = (&self.dims, &self.at);
        assert_eq!(device.read::<f32>(tensor), Ok(want), "{kernel}: dims {dims:?} at {at:?}");
    }
}

#[test]
fn loads_of_every_rank() {
    Tile::new(&[100], &[32], &[40]).check_load();
    Tile::new(&[100], &[32], &[80]).check_load();
    Tile::new(&[100], &[32], &[-5]).check_load();
    Tile::new(&[40, 9], &[8, 4], &[16, 3]).check_load();
    Tile::new(&[40, 9], &[8, 4], &[36, -2]).check_load();
    Tile::new(&[12, 5, 4], &[8, 3, 2], &[4, 1, 3]).check_load();
    Tile::new(&[12, 5, 4, 3], &[4, 2, 3, 2], &[8, 4, 0, 1]).check_load();
    Tile::new(&[8, 3, 4, 2, 3], &[4, 2, 3, 2, 2], &[4, 1, 2, -1, 1]).check_load();
}

#[test]
fn loads_with_swizzle() {
    for (swizzle, row) in [(Swizzle::B32, 8), (Swizzle::B64, 16), (Swizzle::B128, 32)] {
        let tile = Tile { swizzle, ..Tile::new(&[64, 50], &[row, 24], &[16, 30]) };
        tile.check_load();
    }
}

#[test]
fn loads_with_element_strides() {
    let tile = Tile::new(&[40, 30], &[8, 14], &[4, 23]); // 5 rows, two of them outside
    Tile { element_strides: vec![1, 3], ..tile }.check_load();
}

#[test]
fn loads_fill_with_nan() {
    let (module, mut device) = compiled("tensor_copies", "sm_90a");
    let tensor = device.buffer("tensor", &[1.0f32; 64]);
    let out = device.uninitialised::<f32>("out", 32);
    let tile = Tile::new(&[8, 8], &[8, 4], &[4, 6]);
    let map = TensorMap { oob: OobFill::Nan, ..tile.map(Dtype::F32, &device, tensor) };
    tile.run(&mut device, &module, "tensor_load_2d", &tile.arguments(map, out));
    let got: Vec<f32> = read(&device, out);
    for (word, x) in got.iter().enumerate() {
        assert_eq!(x.is_nan(), tile.place(word).1.is_none(), "word {word} is {x}");
    }
}

#[test]
fn stores_and_reductions() {
    let inside = || Tile::new(&[40, 9], &[8, 4], &[16, 3]);
    let over = || Tile::new(&[40, 9], &[32, 8], &[12, 5]);
    for kernel in ["tensor_store_2d", "tensor_add_2d"] {
        let combine = |old: f32, new: f32| if kernel == "tensor_add_2d" { old + new } else { new };
        inside().check_store(kernel, combine);
        over().check_store(kernel, combine);
        Tile { swizzle: Swizzle::B128, ..over() }.check_store(kernel, combine);
    }
    Tile::new(&[12, 5, 4], &[8, 3, 2], &[8, 3, 1]).check_store("tensor_store_3d", |_, new| new);
}

#[test]
fn bulk_copies() {
    let (module, mut device) = compiled("tensor_copies", "sm_90a");
    let data: Vec<f32> = steps(&mut generator("bulk"), 1024);
    let before: Vec<f32> = steps(&mut generator("bulk output"), 1024);
    let input = device.buffer("in", &data);
    for add in [false, true] {
        let out = device.buffer("out", &before);
        let args = [input.into(), out.into(), Arg::F32(0.5), Arg::I32(add.into())];
        clean(&mut device, &module, "bulk_scale", Launch::linear(4, 256), &args);
        let base = |b: f32| if add { b } else { 0.0 };
        let want = data.iter().zip(&before).map(|(x, b)| 0.5 * x + base(*b)).collect();
        assert_eq!(device.read::<f32>(out), Ok(want), "add {add}");
    }
}

#[test]
fn asynchronous_copies_that_arrive_at_an_mbarrier() {
    let (module, mut device) = compiled("tensor_copies", "sm_90a");
    let data: Vec<f32> = steps(&mut generator("async ring"), 128);
    let input = device.buffer("in", &data);
    let out = device.uninitialised::<f32>("out", 128);
    let args = [input.into(), out.into()];
    clean(&mut device, &module, "async_ring", Launch::linear(1, 128), &args);
    let want = data.iter().rev().map(|x| x + 1.0).collect();
    assert_eq!(device.read::<f32>(out), Ok(want));
}
