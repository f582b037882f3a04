//! Merges and affine maps of token runs by the plans for CUDA devices, in the simulator: against
//! float64, against the CPU functions, and refused with the same errors.
mod merges;

use crate::common::metric::relative_rms;
use crate::common::simulator::Simulator;
use crate::common::stream::Stream;
use crate::common::{bits, narrow, widen};
use half::{bf16, f16};
use infini_attn::cuda::params::{InfiniCounters, InfiniState};
use infini_attn::cuda::{
    Addresses, DeviceTensor, KeySumsMirror, MapAddresses, Mirror, Operand, Plan, PrefillOptions,
    SegmentMapMirror, StateLayout, plan_add_key_sums, plan_apply, plan_compose, plan_key_sums,
    plan_segment_map,
};
use infini_attn::{
    DType, Element, Error, KeySums, Problem, TensorView, Update, reference, segment_map,
};

const N: usize = 96;
const BATCH: usize = 2;
const HEADS: usize = 2;

fn problem(update: Update, [dk, dv]: [usize; 2], dtype: DType) -> Problem {
    let b = Problem::builder().heads(HEADS).key_dim(dk).value_dim(dv).segment_len(N);
    b.update(update).dtype(dtype).build().expect("a valid problem")
}

/// How far M may be from float64.
fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F16 { 5e-4 } else { 4e-3 }
}

/// The simulated device.
struct Gpu(Simulator);

impl Gpu {
    fn new() -> Self {
        Self(Simulator::new().schedules(2))
    }

    /// Runs a plan with a workspace of exactly its size, which nobody has written.
    fn run(&mut self, plan: &Plan, operands: &[(Operand, u64)]) {
        let workspace = self.0.uninitialised::<u8>("workspace", plan.workspace_bytes() as usize);
        let mut addresses = Addresses::new().with(Operand::Workspace, workspace);
        operands.iter().for_each(|&(operand, address)| addresses.set(operand, address));
        // SAFETY: the simulator checks every access, and what runs is over when this returns.
        unsafe { plan.run(&addresses, &mut self.0) }.unwrap_or_else(|e| panic!("{plan}\n{e}"));
    }

    fn f32s(&self, address: u64, count: usize) -> Vec<f64> {
        widen(&self.0.read::<f32>(address, count))
    }
}

/// A pool of BATCH states on the device.
struct Pool {
    mirror: Mirror,
    address: u64,
}

impl Pool {
    fn new(gpu: &mut Gpu, p: &Problem) -> Self {
        let layout = StateLayout::new(p, BATCH, false).expect("kernels exist");
        let address = gpu.0.uninitialised::<u8>("state", layout.bytes() as usize);
        let mut pool = Self { mirror: Mirror::new(&layout), address };
        pool.run(gpu, &layout.plan_init().expect("valid"), &[]);
        pool
    }

    fn run(&mut self, gpu: &mut Gpu, plan: &Plan, operands: &[(Operand, u64)]) {
        self.mirror.advance(plan).expect("planned for this state");
        gpu.run(plan, &[operands, &[(Operand::State, self.address)]].concat());
    }

    fn parts(&self) -> InfiniState {
        self.mirror.layout().params(self.address)
    }

    /// M and z of all slots.
    fn memories(&self, gpu: &Gpu) -> [Vec<f64>; 2] {
        let (p, at) = (self.mirror.problem(), self.parts());
        let rows = BATCH * HEADS * p.key_dim();
        [gpu.f32s(at.memory, rows * p.value_dim()), gpu.f32s(at.normalizer, rows)]
    }

    /// Counters as mirrored, snapshots of what M is.
    #[track_caller]
    fn check<T: Element>(&self, gpu: &Gpu) {
        let (p, at) = (self.mirror.problem(), self.parts());
        let counters: Vec<InfiniCounters> = gpu.0.read(at.counters, BATCH);
        for (slot, c) in counters.iter().enumerate() {
            let m = &self.mirror;
            let want = (m.tokens(slot), m.committed(slot), m.open_len(slot) as u32);
            assert_eq!((c.tokens, c.committed, c.open_len), want, "slot {slot}");
        }
        let dv = p.value_dim();
        let m: Vec<f32> = gpu.0.read(at.memory, BATCH * HEADS * p.key_dim() * dv);
        let scales: Vec<f32> = gpu.0.read(at.snapshot_scale, BATCH * HEADS * dv / 32);
        let scale = |i: usize| scales[i / (p.key_dim() * dv) * (dv / 32) + i % dv / 32];
        let want: Vec<f32> = m.iter().enumerate().map(|(i, m)| m * scale(i)).collect();
        assert!(want.iter().any(|x| (1.0..2.0).contains(&x.abs())), "scales {scales:?}");
        assert!(want.iter().all(|x| x.abs() < 2.0), "scales {scales:?}");
        let got = gpu.0.read::<T>(at.snapshot, want.len());
        assert!(bits(&got) == bits(&narrow::<T>(&want)), "snapshots are not those of M");
    }
}

/// A run of tokens for every sequence, on both sides.
struct Run<T> {
    streams: Vec<Stream<T>>,
    tokens: usize,
    k: (DeviceTensor, u64),
    v: (DeviceTensor, u64),
}

impl<T: Element> Run<T> {
    fn new(gpu: &mut Gpu, p: &Problem, tokens: usize, seed: u64) -> Self {
        let streams: Vec<_> =
            (0..BATCH as u64).map(|b| Stream::<T>::normal(p, tokens, seed + 100 * b)).collect();
        let k: Vec<&[T]> = streams.iter().map(|s| &s.k[..]).collect();
        let v: Vec<&[T]> = streams.iter().map(|s| &s.v[..]).collect();
        // Rows of k further apart than they are long; heads of v outermost.
        let k = upload(gpu, "k", &k, tokens, p.key_dim(), false);
        let v = upload(gpu, "v", &v, tokens, p.value_dim(), true);
        Self { streams, tokens, k, v }
    }

    /// k and v as the CPU functions take them.
    fn on_host(&self) -> [Vec<T>; 2] {
        let all = |part: fn(&Stream<T>) -> &Vec<T>| {
            self.streams.iter().flat_map(|s| part(s).clone()).collect()
        };
        [all(|s| &s.k), all(|s| &s.v)]
    }
}

/// [tokens, HEADS, width] per sequence to the device as [B, T, H, D] between NaN.
fn upload<T: Element>(
    gpu: &mut Gpu,
    name: &str,
    sequences: &[&[T]],
    tokens: usize,
    width: usize,
    heads_first: bool,
) -> (DeviceTensor, u64) {
    let gap = width + 8;
    let (token, head) = if heads_first { (gap, gap * tokens) } else { (gap * HEADS, gap) };
    let batch = gap * HEADS * tokens;
    let mut data = vec![narrow::<T>(&[f32::NAN])[0]; batch * sequences.len() + 8];
    for (b, rows) in sequences.iter().enumerate() {
        for (i, row) in rows.chunks(width).enumerate() {
            let at = b * batch + i / HEADS * token + i % HEADS * head;
            data[at..at + width].copy_from_slice(row);
        }
    }
    let shape = [sequences.len(), tokens, HEADS, width];
    let strides = [batch, token, head, 1].map(|x| x as i64);
    let tensor = DeviceTensor::strided(T::DTYPE, &shape, &strides).expect("valid");
    (tensor, gpu.0.upload(name, &data))
}

/// A map on the device.
struct Map {
    mirror: SegmentMapMirror,
    address: u64,
}

impl Map {
    fn new<T: Element>(
        gpu: &mut Gpu,
        p: &Problem,
        run: &Run<T>,
        (before, sums): (&KeySumsMirror, u64),
        options: &PrefillOptions,
    ) -> Self {
        let (plan, mirror) = plan_segment_map(p, &run.k.0, &run.v.0, before, options).unwrap();
        let address = gpu.0.uninitialised::<u8>("map", mirror.bytes() as usize);
        let operands = [
            (Operand::K, run.k.1),
            (Operand::V, run.v.1),
            (Operand::Before, sums),
            (Operand::Map, address),
        ];
        gpu.run(&plan, &operands);
        Self { mirror, address }
    }

    /// A, B and Δz.
    fn parts(&self, gpu: &Gpu, p: &Problem) -> [Vec<f64>; 3] {
        let MapAddresses { a, b, dz } = self.mirror.addresses(self.address);
        let rows = BATCH * HEADS * p.key_dim();
        [(a, p.key_dim()), (b, p.value_dim()), (dz, 1)].map(|(at, w)| gpu.f32s(at, rows * w))
    }

    fn then(&self, gpu: &mut Gpu, second: &Map) -> Map {
        let (plan, mirror) = plan_compose(&self.mirror, &second.mirror).unwrap();
        let address = gpu.0.uninitialised::<u8>("composed", mirror.bytes() as usize);
        let operands = [
            (Operand::First, self.address),
            (Operand::Second, second.address),
            (Operand::Map, address),
        ];
        gpu.run(&plan, &operands);
        Map { mirror, address }
    }

    fn apply(&self, gpu: &mut Gpu, pool: &mut Pool) {
        let plan = plan_apply(&self.mirror, &pool.mirror).unwrap();
        pool.run(gpu, &plan, &[(Operand::Map, self.address)]);
    }
}

/// Sums over no tokens.
fn zero(gpu: &mut Gpu, p: &Problem) -> (KeySumsMirror, u64) {
    let sums = KeySumsMirror::zero(p, BATCH);
    let address = gpu.0.upload("no sums", &vec![0u8; sums.bytes() as usize]);
    (sums, address)
}

/// Σ of σ(k) rounded to the element type, as the kernels see it.
fn rounded_sums<T: Element>(runs: &[&Run<T>], p: &Problem) -> Vec<f64> {
    let width = HEADS * p.key_dim();
    let mut sums = vec![0.0; BATCH * width];
    for (b, stream) in runs.iter().flat_map(|run| run.streams.iter().enumerate()) {
        for (i, &k) in stream.k.iter().enumerate() {
            let k: f64 = k.into();
            let sigma = if k > 0.0 { k + 1.0 } else { k.exp() };
            let rounded: f64 = narrow::<T>(&[sigma as f32])[0].into();
            sums[b * width + i % width] += rounded;
        }
    }
    sums
}

/// (M, z) of all sequences after the runs, each flushed at its end.
fn expected<T: Element>(p: &Problem, runs: &[&Run<T>]) -> Vec<f64> {
    (0..BATCH)
        .flat_map(|b| {
            let mut state = reference::State::new(p, 1).unwrap();
            for run in runs {
                let inputs = run.streams[b].inputs();
                reference::prefill(p, &inputs, &[0.0; HEADS], &mut state).unwrap();
                state.flush(p, &[0]).unwrap();
            }
            state.m
        })
        .collect()
}

fn check_runs<T: Element>(update: Update, dims: [usize; 2], lens: [usize; 3]) {
    let p = problem(update, dims, T::DTYPE);
    let mut gpu = Gpu::new();
    let [first, second, third] = [0, 1, 2].map(|i| Run::<T>::new(&mut gpu, &p, lens[i], i as u64));
    let options = PrefillOptions::default();
    let mut pool = Pool::new(&mut gpu, &p);
    let (before, none) = zero(&mut gpu, &p);
    Map::new(&mut gpu, &p, &first, (&before, none), &options).apply(&mut gpu, &mut pool);
    pool.check::<T>(&gpu);

    // The second run continues the state, the third what key sums say that both leave.
    let before = KeySumsMirror::from_state(&pool.mirror);
    let found = pool.parts().normalizer;
    let one = Map::new(&mut gpu, &p, &second, (&before, found), &options);
    let (plan, own) = plan_key_sums(&p, &second.k.0).unwrap();
    let sums = gpu.0.uninitialised::<u8>("sums", own.bytes() as usize);
    gpu.run(&plan, &[(Operand::K, second.k.1), (Operand::KeySums, sums)]);
    let (plan, before) = plan_add_key_sums(&before, &own).unwrap();
    let operands = [(Operand::First, found), (Operand::Second, sums), (Operand::KeySums, sums)];
    gpu.run(&plan, &operands);
    let tokens = (lens[0] + lens[1]) as u64;
    assert_eq!(before.tokens(), [tokens; BATCH]);
    let want = rounded_sums(&[&first, &second], &p);
    let shape = [BATCH, HEADS, p.key_dim()];
    relative_rms("key sums", &gpu.f32s(sums, want.len()), &want, &shape, 1e-4).unwrap();
    let two = Map::new(&mut gpu, &p, &third, (&before, sums), &options);

    let both = one.then(&mut gpu, &two);
    check_composition(&p, &one.parts(&gpu, &p), &two.parts(&gpu, &p), &both.parts(&gpu, &p));
    both.apply(&mut gpu, &mut pool);
    pool.check::<T>(&gpu);
    assert_eq!(pool.mirror.committed(1), lens.iter().sum::<usize>() as u64);
    let runs = [&first, &second, &third];
    let [m, z] = pool.memories(&gpu);
    let shape = [BATCH, HEADS, p.key_dim(), p.value_dim()];
    relative_rms("M", &m, &expected(&p, &runs), &shape, tolerance(T::DTYPE)).unwrap();
    relative_rms("z", &z, &rounded_sums(&runs, &p), &shape[..3], 1e-4).unwrap();
}

/// `both` is `one` followed by `two`, in f32.
fn check_composition(p: &Problem, one: &[Vec<f64>; 3], two: &[Vec<f64>; 3], both: &[Vec<f64>; 3]) {
    let dk = p.key_dim();
    for (name, i, width) in [("A₂ A₁", 0, dk), ("A₂ B₁ + B₂", 1, p.value_dim())] {
        let product = |at: usize| {
            let (row, column) = (at / width, at % width);
            let of = |k: usize| two[0][row * dk + k] * one[i][(row / dk * dk + k) * width + column];
            let own = if i == 1 { two[1][at] } else { 0.0 };
            own + (0..dk).map(of).sum::<f64>()
        };
        let want: Vec<f64> = (0..both[i].len()).map(product).collect();
        relative_rms(name, &both[i], &want, &[BATCH, HEADS, dk, width], 1e-5).unwrap();
    }
    let want: Vec<f64> = one[2].iter().zip(&two[2]).map(|(a, b)| a + b).collect();
    relative_rms("Δz", &both[2], &want, &[BATCH, HEADS, dk], 1e-5).unwrap();
}

#[test]
fn runs_compose_to_the_whole_stream() {
    // Whole segments and not, less than a segment, nothing.
    check_runs::<bf16>(Update::Delta, [64, 64], [200, 193, 96]);
    check_runs::<f16>(Update::Delta, [64, 128], [192, 1, 150]);
    check_runs::<bf16>(Update::Delta, [128, 64], [100, 0, 70]);
    check_runs::<f16>(Update::Linear, [96, 96], [130, 97, 30]);
}

fn check_against_cpu<T: Element>(update: Update, dims: [usize; 2]) {
    let p = problem(update, dims, T::DTYPE);
    let mut gpu = Gpu::new();
    let [old, run] = [200, 2 * N + 17].map(|len| Run::<T>::new(&mut gpu, &p, len, len as u64));
    let (plan, found) = plan_key_sums(&p, &old.k.0).unwrap();
    let sums = gpu.0.uninitialised::<u8>("sums", found.bytes() as usize);
    gpu.run(&plan, &[(Operand::K, old.k.1), (Operand::KeySums, sums)]);
    let map = Map::new(&mut gpu, &p, &run, (&found, sums), &PrefillOptions::default());
    assert_eq!(map.mirror.tokens(), [run.tokens as u64; BATCH]);

    let host = |run: &Run<T>| {
        let [k, v] = run.on_host();
        let (k_shape, v_shape) =
            ([BATCH, run.tokens, HEADS, p.key_dim()], [BATCH, run.tokens, HEADS, p.value_dim()]);
        (k, v, k_shape, v_shape)
    };
    let (k, _, k_shape, _) = host(&old);
    let before = infini_attn::key_sums(&p, TensorView::new(&k, &k_shape).unwrap()).unwrap();
    let (k, v, k_shape, v_shape) = host(&run);
    let (k, v) = (TensorView::new(&k, &k_shape).unwrap(), TensorView::new(&v, &v_shape).unwrap());
    let want = segment_map(&p, k, v, &before).unwrap();

    let got = map.parts(&gpu, &p);
    for (name, got, want) in [("A", &got[0], want.a()), ("B", &got[1], want.b())] {
        let want_values = widen(want.as_slice().unwrap());
        relative_rms(name, got, &want_values, want.shape(), tolerance(T::DTYPE)).unwrap();
    }
    if update == Update::Linear {
        assert_eq!(got[0], widen(want.a().as_slice().unwrap()), "the identity");
    }
    relative_rms("Δz", &got[2], &rounded_sums(&[&run], &p), want.dz().shape(), 1e-4).unwrap();

    // One segment at a time, and as many as fit: the same bits.
    let options = PrefillOptions { workspace_bytes: 1, ..Default::default() };
    let again = Map::new(&mut gpu, &p, &run, (&found, sums), &options);
    assert!(again.parts(&gpu, &p) == got, "runs of one segment differ");
}

#[test]
fn maps_are_those_of_the_cpu() {
    check_against_cpu::<f16>(Update::Delta, [64, 64]);
    check_against_cpu::<bf16>(Update::Delta, [96, 96]);
    check_against_cpu::<bf16>(Update::Linear, [64, 128]);
}

#[test]
fn what_does_not_fit_is_refused_as_on_the_cpu() {
    let p = problem(Update::Delta, [64, 64], DType::F16);
    let other = problem(Update::Linear, [64, 64], DType::F16);
    let (host, device) = (KeySums::zero(&p, 2).unwrap(), KeySumsMirror::zero(&p, 2));
    let data = vec![f16::ZERO; 4 * 8 * HEADS * 128];
    let options = PrefillOptions::default();
    let check = |k: &[usize], v: &[usize], host: &KeySums, device: &KeySumsMirror| {
        let view = |shape: &[usize]| {
            TensorView::new(&data[..shape.iter().product()], shape).expect("valid")
        };
        let tensor = |shape: &[usize]| DeviceTensor::contiguous(DType::F16, shape).expect("valid");
        let want = segment_map(&p, view(k), view(v), host).unwrap_err().to_string();
        let got = plan_segment_map(&p, &tensor(k), &tensor(v), device, &options).unwrap_err();
        assert_eq!(got.to_string(), want);
    };
    let shape = [2, 8, HEADS, 64];
    check(&[2, 8, 64], &shape, &host, &device);
    check(&[2, 8, 1, 64], &shape, &host, &device);
    check(&shape, &[2, 8, HEADS, 96], &host, &device);
    check(&shape, &[2, 7, HEADS, 64], &host, &device);
    check(&shape, &shape, &KeySums::zero(&other, 2).unwrap(), &KeySumsMirror::zero(&other, 2));
    check(&shape, &shape, &KeySums::zero(&p, 3).unwrap(), &KeySumsMirror::zero(&p, 3));

    let k = DeviceTensor::contiguous(DType::BF16, &shape).unwrap();
    let error = plan_key_sums(&p, &k).unwrap_err();
    assert!(matches!(error, Error::DType { argument: "k", .. }), "{error}");
    let k = DeviceTensor::strided(DType::F16, &shape, &[1 << 12, 132, 66, 1]).unwrap();
    let error = plan_key_sums(&p, &k).unwrap_err();
    assert!(matches!(error, Error::Stride { argument: "k", .. }), "{error}");

    let k = DeviceTensor::contiguous(DType::F16, &shape).unwrap();
    let map = plan_segment_map(&p, &k, &k, &device, &options).unwrap().1;
    let error = plan_compose(&map, &map).unwrap_err().to_string();
    assert!(error.contains("second (sequence 0)") && error.contains("0 earlier"), "{error}");
    let layout = StateLayout::new(&p, 2, false).unwrap();
    let mut state = Mirror::new(&layout);
    let plan = plan_apply(&map, &state).unwrap();
    state.advance(&plan).unwrap();
    assert_eq!((state.tokens(1), state.committed(1), state.open_len(1)), (8, 8, 0));
    let error = plan_apply(&map, &state).unwrap_err().to_string();
    assert!(error.contains("map (sequence 0)"), "{error}");
    // The plan was made for the state as it was.
    assert!(matches!(state.advance(&plan), Err(Error::Value { .. })));
    let layout = StateLayout::new(&p, 3, false).unwrap();
    let error = plan_apply(&map, &Mirror::new(&layout)).unwrap_err();
    assert!(matches!(error, Error::Length { argument: "state", .. }), "{error}");
}
