//! Golden vectors: launches that show what a device does where the rules of PTX leave it open.
//! tests/cuda/device records the results, tests/ptxsim/tests/ptx/golden compares the simulator with them.
//! Inputs are made from a hash and stored nowhere.
#![allow(dead_code)] // the recorder and the comparison each use their part

pub mod file;
pub mod inputs;
pub mod tensor;

use tensor::{Element, Tensor};

/// A launch of one entry: every thread reads a row of words and writes one.
pub struct Probe {
    pub entry: &'static str,
    /// Text of the module.
    pub ptx: &'static str,
    /// Compute capability: this one, or also later ones.
    pub needs: Capability,
    pub blocks: u32,
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    pub inputs: Inputs,
    /// What the words of a result's row are.
    pub columns: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Capability {
    From80,
    Only90,
}

impl Capability {
    pub fn met_by(self, capability: (i32, i32)) -> bool {
        match self {
            Self::From80 => capability >= (8, 0),
            Self::Only90 => capability == (9, 0),
        }
    }
}

/// What a thread's row of inputs holds.
#[derive(Clone, Copy, Debug)]
pub enum Inputs {
    /// Nothing.
    None,
    /// One f32 of a sweep over all binades, and of more.
    Sweep,
    /// So many words: f32 that meet corners, or pairs of 16-bit floats.
    Operands(usize),
    /// A mask of lanes, one for a block.
    Mask,
    /// Its part of the operands of a matrix product.
    Tensor(Tensor),
}

const SM80: Probe = Probe {
    entry: "",
    ptx: include_str!("golden_sm80.ptx"),
    needs: Capability::From80,
    blocks: 16,
    threads: 128,
    shared_bytes: 0,
    inputs: Inputs::None,
    columns: &[],
};

const SM90: Probe =
    Probe { ptx: include_str!("golden_sm90.ptx"), needs: Capability::Only90, ..SM80 };

const ACCUMULATORS: &[&str] = &["d0", "d1", "d2", "d3"];

const fn tensor(entry: &'static str, tensor: Tensor) -> Probe {
    let probe = if tensor.warpgroup { SM90 } else { SM80 };
    // As many sums of each.
    let (blocks, threads) = if tensor.warpgroup { (8, 128) } else { (32, 32) };
    let columns = ACCUMULATORS.split_at(if tensor.half { 2 } else { 4 }).0;
    Probe { entry, blocks, threads, inputs: Inputs::Tensor(tensor), columns, ..probe }
}

const fn mma(element: Element) -> Tensor {
    Tensor { warpgroup: false, element, half: false }
}

const fn wgmma(element: Element) -> Tensor {
    Tensor { warpgroup: true, element, half: false }
}

/// All probes.
pub const PROBES: &[Probe] = &[
    Probe {
        entry: "unary",
        blocks: 24,
        inputs: Inputs::Sweep,
        columns: &[
            "ex2.approx.f32",
            "ex2.approx.ftz.f32",
            "lg2.approx.f32",
            "lg2.approx.ftz.f32",
            "rcp.approx.f32",
            "rcp.approx.ftz.f32",
            "sqrt.approx.f32",
            "sqrt.approx.ftz.f32",
            "rsqrt.approx.f32",
            "rsqrt.approx.ftz.f32",
            "tanh.approx.f32",
            "sin.approx.f32",
            "cos.approx.f32",
            "cvt.rna.tf32.f32",
        ],
        ..SM80
    },
    Probe {
        entry: "binary",
        inputs: Inputs::Operands(2),
        columns: &[
            "div.approx.f32",
            "div.full.f32",
            "min.f32",
            "max.f32",
            "min.NaN.f32",
            "max.NaN.f32",
            "cvt.rn.f16x2.f32",
            "cvt.rn.bf16x2.f32",
        ],
        ..SM80
    },
    Probe {
        entry: "ternary",
        inputs: Inputs::Operands(3),
        columns: &[
            "fma.rn.f32",
            "fma.rn.ftz.f32",
            "fma.rz.f32",
            "mul.f32 and add.f32",
            "fma.rn.f16x2",
            "fma.rn.bf16x2",
        ],
        ..SM80
    },
    Probe {
        entry: "halves",
        inputs: Inputs::Operands(1),
        columns: &["ex2.approx.f16x2", "tanh.approx.f16x2"],
        ..SM80
    },
    Probe {
        entry: "shared_base",
        blocks: 1,
        threads: 32,
        shared_bytes: 1024,
        columns: &["static variable", "second static variable", "dynamic array"],
        ..SM80
    },
    tensor("mma_bf16", mma(Element::Bf16)),
    tensor("mma_f16", mma(Element::F16)),
    tensor("mma_tf32", mma(Element::Tf32)),
    tensor("mma_f16_f16", Tensor { half: true, ..mma(Element::F16) }),
    Probe {
        entry: "bf16_halves",
        inputs: Inputs::Operands(1),
        columns: &["ex2.approx.ftz.bf16x2", "tanh.approx.bf16x2"],
        ..SM90
    },
    Probe { entry: "elect", threads: 32, inputs: Inputs::Mask, columns: &["elect.sync"], ..SM90 },
    tensor("wgmma_bf16", wgmma(Element::Bf16)),
    tensor("wgmma_f16", wgmma(Element::F16)),
    tensor("wgmma_tf32", wgmma(Element::Tf32)),
    tensor("wgmma_f16_f16", Tensor { half: true, ..wgmma(Element::F16) }),
];

impl Probe {
    /// Words of all results.
    pub fn results(&self) -> usize {
        (self.blocks * self.threads) as usize * self.columns.len()
    }

    /// Input words of a thread.
    pub fn row(&self) -> usize {
        match self.inputs {
            Inputs::None => 0,
            Inputs::Sweep | Inputs::Mask => 1,
            Inputs::Operands(n) => n,
            Inputs::Tensor(tensor) => tensor.row(),
        }
    }

    /// The rows of all threads.
    pub fn words(&self) -> Vec<u32> {
        let rows = u64::from(self.blocks * self.threads);
        match self.inputs {
            Inputs::None => vec![],
            Inputs::Sweep => (0..rows).map(inputs::sweep).collect(),
            Inputs::Operands(n) => (0..rows).flat_map(|i| inputs::operands(n, i)).collect(),
            Inputs::Mask => (0..rows).map(|i| inputs::mask(i / u64::from(self.threads))).collect(),
            Inputs::Tensor(tensor) => (0..self.blocks).flat_map(|b| tensor.words(b)).collect(),
        }
    }

    /// Stands for everything the results depend on: text, launch and inputs.
    pub fn key(&self) -> u64 {
        let head = format!(".entry {}(", self.entry);
        let text = self.ptx.split_once(&head).map_or("", |(_, rest)| rest);
        let text = text.split("\n}").next().unwrap_or_default();
        let launch = [self.blocks, self.threads, self.shared_bytes];
        let words = launch.into_iter().chain(self.words()).flat_map(u32::to_le_bytes);
        hash(text.bytes().chain(words))
    }
}

/// FNV-1a.
pub fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3);
    bytes.into_iter().fold(0xCBF2_9CE4_8422_2325, step)
}
