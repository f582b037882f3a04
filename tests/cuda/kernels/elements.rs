//! The kernels that move rows and add up memories, against float64, in the simulator: odd sizes,
//! strides, NaN between the rows, and every byte read and written once.
mod merges;
mod tokens;

use crate::common::buffers::Strided;
use crate::common::simulator::Simulator;
use bytemuck::Zeroable;
use infini_attn::Element;
use infini_attn::cuda::params::{InfiniProblem, InfiniTensor};
use ptxsim::Report;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Elements before, after and between the rows of buffers: 16 bytes of a 16-bit type.
const MARGIN: usize = 8;

/// Schedules of every launch: two orders, asynchronous copies early and late.
const SCHEDULES: u32 = 4;

/// Threads of the kernels.
const THREADS: u32 = 256;

fn simulator() -> Simulator {
    Simulator::new().schedules(SCHEDULES)
}

/// Launches an element-wise kernel.
#[track_caller]
fn launch<P: bytemuck::Pod>(sim: &mut Simulator, symbol: &str, grid: [usize; 3], p: &P) -> Report {
    sim.launch(symbol, grid.map(|x| x as u32), THREADS, 0, bytemuck::bytes_of(p))
}

/// The symbol of an operation for an element type.
fn symbol<T: Element>(operation: &str) -> String {
    format!("infini_{operation}_sm80_{}", T::DTYPE)
}

/// The buffers named, together, were read and written once.
#[track_caller]
fn assert_moved_once(report: &Report, names: &[&str]) {
    let buffers = report.buffers.iter().filter(|b| names.contains(&b.name.as_str()));
    let (moved, distinct) = buffers.fold((0, 0), |(moved, distinct), b| {
        let (t, d) = (b.traffic, b.distinct_read + b.distinct_written);
        (moved + t.read + t.written, distinct + d)
    });
    assert!(distinct > 0, "{names:?} untouched");
    let ratio = moved as f64 / distinct as f64;
    assert!(ratio <= 1.05, "{names:?}: {ratio:.3} times the distinct bytes");
}

/// Values in (-3, 3).
fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-3.0..3.0)).collect()
}

/// A strided tensor on the simulated device.
struct OnDevice<T> {
    host: Strided<T>,
    address: u64,
    /// Dimensions [.., token, head, channel], or [.., head, token] without channels.
    tensor: InfiniTensor,
}

impl<T: Element> OnDevice<T> {
    /// [batch, token, head, channel] or [token, head, channel].
    fn rows(sim: &mut Simulator, name: &str, host: Strided<T>) -> Self {
        let strides = host.strides().to_vec();
        let n = strides.len();
        let batch = if n == 4 { strides[0] } else { 0 };
        Self::new(sim, name, host, [batch, strides[n - 3], strides[n - 2]])
    }

    /// [batch, head, token].
    fn logs(sim: &mut Simulator, name: &str, host: Strided<T>) -> Self {
        let strides = host.strides().to_vec();
        Self::new(sim, name, host, [strides[0], strides[2], strides[1]])
    }

    fn new(
        sim: &mut Simulator,
        name: &str,
        host: Strided<T>,
        [batch, token, head]: [i64; 3],
    ) -> Self {
        let address = sim.upload(name, host.data());
        let data = address + (host.offset() * size_of::<T>()) as u64;
        Self { host, address, tensor: InfiniTensor { data, batch, token, head } }
    }

    /// What the device holds now; nothing outside of the view has changed.
    #[track_caller]
    fn read(&self, sim: &Simulator) -> Strided<T> {
        let mut now = self.host.clone();
        now.data_mut().copy_from_slice(&sim.read::<T>(self.address, self.host.data().len()));
        assert!(now.guards_intact(), "written outside of the tensor");
        now
    }
}

/// The parts of a problem that these kernels read.
fn problem(
    [dk, dv]: [usize; 2],
    [heads, kv_heads]: [usize; 2],
    segment_len: usize,
) -> InfiniProblem {
    InfiniProblem {
        key_dim: dk as i32,
        value_dim: dv as i32,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        group: (heads / kv_heads) as i32,
        segment_len: segment_len as i32,
        ..Zeroable::zeroed()
    }
}
