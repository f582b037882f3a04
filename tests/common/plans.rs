//! Plans as tests see them: what they do, written down.

use bytemuck::pod_read_unaligned as read;
use infini_attn::cuda::{
    Addresses, Call, DeviceTensor, Launch, Launcher, Mirror, Operand, Plan, PrefillOptions,
    StateLayout, TensorMap, plan_prefill,
};
use infini_attn::{DType, Problem, ProblemBuilder, Result};

/// 4 query heads on 2 KV heads, (Dk, Dv) = (64, 128), N = 128, bf16.
pub fn problem(change: impl FnOnce(ProblemBuilder) -> ProblemBuilder) -> Problem {
    let base = Problem::builder().heads(4).kv_heads(2).key_dim(64).value_dim(128).segment_len(128);
    change(base.dtype(DType::BF16)).build().expect("valid")
}

pub fn mirror(p: &Problem, slots: usize) -> Mirror {
    Mirror::new(&StateLayout::new(p, slots, true).expect("supported"))
}

pub fn tensor(p: &Problem, lead: &[usize], heads: usize, dim: usize) -> DeviceTensor {
    DeviceTensor::contiguous(p.dtype(), &[lead, &[heads, dim]].concat()).expect("shape")
}

pub fn f32s(shape: &[usize]) -> DeviceTensor {
    DeviceTensor::contiguous(DType::F32, shape).expect("shape")
}

/// A call of contiguous tensors: [B, T] or [total].
pub fn call<'a>(p: &Problem, lead: &[usize]) -> Call<'a> {
    let (dk, dv) = (p.key_dim(), p.value_dim());
    let (q, o) = (tensor(p, lead, p.heads(), dk), tensor(p, lead, p.heads(), dv));
    let (k, v) = (tensor(p, lead, p.kv_heads(), dk), tensor(p, lead, p.kv_heads(), dv));
    Call::new(q, k, v, f32s(&[p.heads()]), o)
}

#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Fill { to: u64, bytes: u64, value: u8 },
    Copy { to: u64, from: Vec<u8> },
    Launch { operation: &'static str, grid: [u32; 3], maps: Vec<TensorMap>, params: Vec<u8> },
}

/// Writes down what a plan does.
#[derive(Default)]
pub struct Recorder(pub Vec<Step>);

impl Launcher for Recorder {
    fn launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        let (operation, grid) = (launch.kernel.operation, launch.grid);
        let (maps, params) = (launch.maps.to_vec(), launch.params.to_vec());
        self.0.push(Step::Launch { operation, grid, maps, params });
        Ok(())
    }

    fn fill(&mut self, to: u64, bytes: u64, value: u8) -> Result<()> {
        self.0.push(Step::Fill { to, bytes, value });
        Ok(())
    }

    fn copy(&mut self, to: u64, from: &[u8]) -> Result<()> {
        self.0.push(Step::Copy { to, from: from.to_vec() });
        Ok(())
    }
}

/// Operands lie this far from each other.
pub const APART: u64 = 1 << 42;

pub fn base(operand: Operand) -> u64 {
    use Operand::*;
    let all = [Q, K, V, O, Lse, ADot, AMem, Gate, Cos, Sin, Positions, Sequences, State, Workspace];
    APART * (1 + all.iter().position(|known| *known == operand).expect("known") as u64)
}

/// An address for everything that the plan asks for, and nothing else.
pub fn addresses(plan: &Plan) -> Addresses {
    let needs = plan.requirements().iter();
    needs.fold(Addresses::new(), |all, r| all.with(r.operand, base(r.operand)))
}

pub fn run(plan: &Plan) -> Vec<Step> {
    let mut recorder = Recorder::default();
    // SAFETY: nothing is executed.
    unsafe { plan.run(&addresses(plan), &mut recorder) }.expect("runs");
    recorder.0
}

/// Operations and grids of a plan.
pub fn launches(plan: &Plan) -> Vec<(&'static str, [u32; 3])> {
    plan.launches().map(|l| (l.kernel.operation, l.grid)).collect()
}

/// Parameters of the `n`-th launch of an operation.
pub fn params<P: bytemuck::Pod>(plan: &Plan, operation: &str, n: usize) -> P {
    let steps = run(plan);
    let mut found = steps.iter().filter_map(|step| match step {
        Step::Launch { operation: name, params, .. } if *name == operation => Some(params),
        _ => None,
    });
    read(found.nth(n).unwrap_or_else(|| panic!("{operation} is launched")))
}

/// The table that a run writes at an address.
pub fn table<P: bytemuck::Pod>(plan: &Plan, address: u64, count: usize) -> Vec<P> {
    let steps = run(plan);
    let bytes = steps.iter().find_map(|step| match step {
        Step::Copy { to, from } if (*to..*to + from.len() as u64).contains(&address) => {
            Some(&from[(address - to) as usize..])
        }
        _ => None,
    });
    let bytes = &bytes.expect("a table is there")[..count * size_of::<P>()];
    bytes.chunks_exact(size_of::<P>()).map(read).collect()
}

/// A mirror whose slots have seen so many tokens.
pub fn after(p: &Problem, tokens: &[i32]) -> Mirror {
    let mut state = mirror(p, tokens.len());
    let most = tokens.iter().copied().max().unwrap_or(0) as usize;
    let call = call(p, &[tokens.len(), most]).seq_lens(tokens);
    let plan = plan_prefill(p, &call, &state, &PrefillOptions::default()).expect("valid");
    state.advance(&plan).expect("as planned");
    state
}
