//! Delta-rule memories of disjoint token runs as affine maps, on the device: key sums of every run,
//! their prefix sums, maps in parallel, then composed in order or applied to a state.
//!
//! | plan | launches |
//! |---|---|
//! | key sums | `segment_state` without values, `normaliser_scan` |
//! | their sum | `sum` |
//! | map | per run of segments `segment_state`, `normaliser_scan` (Δz, then what segments find), `segment_transition`, `memory_scan` (A, then B) |
//! | composition | `compose` (A, then B), `sum` of Δz |
//! | application | `compose` and `sum` (M), `sum` (z), `snapshot`, the counters, copied |
//!
//! Sums and maps are f32 arrays at addresses of the caller. What they were made from stays on the
//! host, in [`KeySumsMirror`] and [`SegmentMapMirror`], and is checked whenever they meet.

use std::ops::Range;
use std::slice::from_ref;

use bytemuck::Zeroable;

use super::merge::add_up;
use super::phases::{Arrays, Phases, Run, Splits};
use super::prefill::PrefillOptions;
use crate::call::maps::{MapTokens, check_batch, check_keys, check_map, sum_tokens};
use crate::cuda::plan::Plan;
use crate::cuda::plan::address::{Operand, Requirement};
use crate::cuda::plan::allocation::{Allocation, PART_ALIGN};
use crate::cuda::plan::effect::{Change, Effect};
use crate::cuda::plan::kernels::find_for;
use crate::cuda::plan::mirror::Mirror;
use crate::cuda::plan::params::*;
use crate::cuda::plan::target::Target;
use crate::cuda::plan::tensor::{DeviceTensor, ROW_ALIGN};
use crate::dtype::DType;
use crate::error::Result;
use crate::problem::Problem;

/// The host's part of [`KeySums`](crate::KeySums) in device memory: the sums are f32 [B, Hkv, Dk].
#[derive(Clone, Debug, PartialEq)]
pub struct KeySumsMirror {
    problem: Problem,
    tokens: Vec<u64>,
}

impl KeySumsMirror {
    /// The sums over no tokens, for `batch` sequences: all of them must be 0.
    pub fn zero(problem: &Problem, batch: usize) -> Self {
        Self { problem: *problem, tokens: vec![0; batch] }
    }

    /// What a run that continues the state finds. The sums are the state's normaliser, where it
    /// lies: [`StateLayout::params`](crate::cuda::StateLayout::params).
    pub fn from_state(state: &Mirror) -> Self {
        let tokens = state.counters().iter().map(|c| c.committed).collect();
        Self { problem: *state.problem(), tokens }
    }

    /// Tokens summed, per sequence.
    pub fn tokens(&self) -> &[u64] {
        &self.tokens
    }

    /// Bytes of the sums; their address must be a multiple of 16.
    pub fn bytes(&self) -> u64 {
        4 * self.count() as u64
    }

    fn count(&self) -> usize {
        self.tokens.len() * self.problem.kv_heads() * self.problem.key_dim()
    }

    fn requirement(&self, operand: Operand) -> Requirement {
        Requirement { operand, align: ROW_ALIGN as u64, before: 0, after: self.bytes() }
    }
}

/// Where the parts of a map lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapAddresses {
    /// A, f32 [B, Hkv, Dk, Dk].
    pub a: u64,
    /// B, f32 [B, Hkv, Dk, Dv].
    pub b: u64,
    /// Δz, f32 [B, Hkv, Dk].
    pub dz: u64,
}

/// The host's part of a [`SegmentMap`](crate::SegmentMap) in device memory.
#[derive(Clone, Debug, PartialEq)]
pub struct SegmentMapMirror {
    problem: Problem,
    before: Vec<u64>,
    tokens: Vec<u64>,
}

impl SegmentMapMirror {
    /// Tokens of the run, per sequence.
    pub fn tokens(&self) -> &[u64] {
        &self.tokens
    }

    /// Bytes of the map; its address must be a multiple of 256.
    pub fn bytes(&self) -> u64 {
        let [a, b, dz] = self.sizes();
        a + b + dz
    }

    /// Its parts in an allocation at `address`; with 0 their offsets.
    pub fn addresses(&self, address: u64) -> MapAddresses {
        let [a, b, _] = self.sizes();
        MapAddresses { a: address, b: address + a, dz: address + a + b }
    }

    /// Bytes of every part, multiples of 256.
    fn sizes(&self) -> [u64; 3] {
        let p = &self.problem;
        [p.key_dim(), p.value_dim(), 1]
            .map(|columns| (4 * self.rows() * columns) as u64)
            .map(|bytes| bytes.next_multiple_of(PART_ALIGN))
    }

    /// Rows of all matrices.
    fn rows(&self) -> usize {
        self.tokens.len() * self.problem.kv_heads() * self.problem.key_dim()
    }

    fn run(&self) -> MapTokens<'_> {
        MapTokens { problem: &self.problem, before: &self.before, tokens: &self.tokens }
    }

    fn symbols(&self, operand: Operand) -> MapAddresses {
        self.addresses(operand.at(0))
    }

    fn requirement(&self, operand: Operand) -> Requirement {
        Requirement { operand, align: PART_ALIGN, before: 0, after: self.bytes() }
    }
}

/// Plans [`key_sums`](crate::key_sums) on the device: k at [`Operand::K`], the sums at
/// [`Operand::KeySums`].
///
/// # Errors
/// Those of [`key_sums`](crate::key_sums); [`Error::Unsupported`](crate::Error::Unsupported) when no
/// kernels are compiled for the problem, [`Error::Stride`](crate::Error::Stride) for rows that do
/// not start at multiples of 16 bytes.
pub fn plan_key_sums(problem: &Problem, k: &DeviceTensor) -> Result<(Plan, KeySumsMirror)> {
    /// Tokens that are summed by one block, and parts of the pieces that a prefix sum walks over.
    const SPLIT: usize = 512;
    const SPLITS: usize = 8;
    let (batch, tokens) = check_keys(problem, k.dtype(), &k.layout())?;
    k.check_row_align("k")?;
    let sums = KeySumsMirror { problem: *problem, tokens: vec![tokens as u64; batch] };
    let title = format!("key sums of {batch} × {tokens} tokens; {}", problem.shapes());
    let mut plan = Plan::stateless(title);
    let mut workspace = Allocation::new(Operand::Workspace);
    let splits = Splits { count: SPLITS, len: SPLIT };
    let run = run(problem, &vec![true; batch], 0..tokens, SPLITS * SPLIT);
    let phases = Phases {
        p: *problem,
        target: Target::default(),
        lead: [batch, tokens],
        k: k.rows(Operand::K),
        v: Zeroable::zeroed(),
        state: Zeroable::zeroed(),
        splits,
        arrays: Arrays::for_sums(problem, SPLITS, run.pieces.len(), &mut workspace)?,
    };
    let end = Operand::KeySums.at(0);
    for table in Run::copy_tables(from_ref(&run), &mut plan, &mut workspace)? {
        phases.state(&run, table, &mut plan)?;
        phases.normaliser(&run, table, [end, end], &mut plan)?;
    }
    let requirements =
        [k.requirement(Operand::K, ROW_ALIGN), Some(sums.requirement(Operand::KeySums))];
    Ok((plan.finish(requirements.into_iter().flatten().collect(), &workspace), sums))
}

/// Plans [`KeySums::add`](crate::KeySums::add) on the device: [`Operand::First`] plus
/// [`Operand::Second`] to [`Operand::KeySums`], which may be either.
///
/// # Errors
/// Those of [`KeySums::add`](crate::KeySums::add).
pub fn plan_add_key_sums(
    first: &KeySumsMirror,
    second: &KeySumsMirror,
) -> Result<(Plan, KeySumsMirror)> {
    first.problem.check_same(&second.problem)?;
    check_batch("other", second.tokens.len(), first.tokens.len())?;
    let tokens = sum_tokens("other", &first.tokens, &second.tokens)?;
    let sums = KeySumsMirror { problem: first.problem, tokens };
    let mut plan = Plan::stateless(format!("add key sums; {}", first.problem.shapes()));
    let mut workspace = Allocation::new(Operand::Workspace);
    let inputs = [Operand::First, Operand::Second].map(|operand| operand.at(0));
    let out = Operand::KeySums.at(0);
    add_up(&inputs, out, sums.count(), "sums", &mut plan, &mut workspace)?;
    let operands = [Operand::First, Operand::Second, Operand::KeySums];
    let requirements = operands.map(|operand| sums.requirement(operand)).to_vec();
    Ok((plan.finish(requirements, &workspace), sums))
}

/// Plans [`segment_map`](crate::segment_map) on the device: k and v at [`Operand::K`] and
/// [`Operand::V`], the sums of `before` at [`Operand::Before`], the map at [`Operand::Map`].
///
/// # Errors
/// Those of [`segment_map`](crate::segment_map);
/// [`Error::Unsupported`](crate::Error::Unsupported) when no kernels are compiled for the problem,
/// [`Error::Stride`](crate::Error::Stride) for rows that do not start at multiples of 16 bytes; those
/// of [`Target::check`].
pub fn plan_segment_map(
    problem: &Problem,
    k: &DeviceTensor,
    v: &DeviceTensor,
    before: &KeySumsMirror,
    options: &PrefillOptions,
) -> Result<(Plan, SegmentMapMirror)> {
    options.target.check()?;
    let found = (&before.problem, &before.tokens[..]);
    let (k_layout, v_layout) = (k.layout(), v.layout());
    let (batch, tokens) =
        check_map(problem, (k.dtype(), &k_layout), (v.dtype(), &v_layout), found)?;
    k.check_row_align("k")?;
    v.check_row_align("v")?;
    let map = SegmentMapMirror {
        problem: *problem,
        before: before.tokens.clone(),
        tokens: vec![tokens as u64; batch],
    };
    let title = format!("map of {batch} × {tokens} tokens; {}", problem.shapes());
    let mut plan = Plan::stateless(title);
    let mut workspace = Allocation::new(Operand::Workspace);
    let (n, splits) = (problem.segment_len(), Splits::of(problem, &options.target)?);
    let mut one = Allocation::new(Operand::Workspace);
    Arrays::new(problem, splits.count, 1, &mut one)?;
    let per_run = Run::units(tokens.div_ceil(n), batch, one.bytes(), options.workspace_bytes);
    let at = map.symbols(Operand::Map);
    plan.fill(at.dz, 4 * map.rows() as u64, 0);
    let phases = Phases {
        p: *problem,
        target: options.target,
        lead: [batch, tokens],
        k: k.rows(Operand::K),
        v: v.rows(Operand::V),
        state: Zeroable::zeroed(),
        splits,
        arrays: Arrays::new(problem, splits.count, batch * per_run, &mut workspace)?,
    };
    let z = workspace.part(&[map.rows()], 4)?;
    let runs = (0..tokens.max(1)).step_by(per_run * n).map(|first| {
        let empty: Vec<bool> = before.tokens.iter().map(|&t| first == 0 && t == 0).collect();
        run(problem, &empty, first..tokens.min(first + per_run * n), n)
    });
    let runs: Vec<Run> = runs.collect();
    let tables = Run::copy_tables(&runs, &mut plan, &mut workspace)?;
    for (i, (run, table)) in runs.iter().zip(tables).enumerate() {
        phases.state(run, table, &mut plan)?;
        phases.normaliser(run, table, [at.dz, at.dz], &mut plan)?;
        let start = if i == 0 { Operand::Before.at(0) } else { z };
        phases.normaliser(run, table, [start, z], &mut plan)?;
        phases.transition(run, table, &mut plan)?;
        scan(&phases, run, table, i == 0, at, &mut plan)?;
    }
    let tensors = [k.requirement(Operand::K, ROW_ALIGN), v.requirement(Operand::V, ROW_ALIGN)];
    let own = [before.requirement(Operand::Before), map.requirement(Operand::Map)];
    Ok((plan.finish(tensors.into_iter().flatten().chain(own).collect(), &workspace), map))
}

/// The tokens `range` of every sequence in segments of `len`; `empty`: which sequences find no
/// memory.
fn run(p: &Problem, empty: &[bool], range: Range<usize>, len: usize) -> Run {
    let (mut pieces, mut chains) = (Vec::new(), Vec::new());
    for (b, &empty) in empty.iter().enumerate() {
        let first_piece = pieces.len();
        pieces.extend(range.clone().step_by(len).map(|first| InfiniPiece {
            first: first as i64,
            position: 0,
            slot: b as i32,
            batch: b as i32,
            len: len.min(range.end - first) as i32,
            cached: 0,
            full: 1,
            empty: (empty && first == range.start).into(),
        }));
        chains.push(InfiniChain {
            slot: b as i32,
            first_piece: first_piece as i32,
            pieces: (pieces.len() - first_piece) as i32,
            empty: empty.into(),
            ..Zeroable::zeroed()
        });
    }
    Run::new(p, pieces, chains)
}

/// A and B of the run, from the identity and 0 in the first, behind those of the run before.
fn scan(
    phases: &Phases,
    run: &Run,
    table: InfiniRun,
    first: bool,
    map: MapAddresses,
    plan: &mut Plan,
) -> Result<()> {
    for (why, kind, b, at, columns) in [
        ("A", INFINI_START_IDENTITY, 0, map.a, phases.p.key_dim()),
        ("B", INFINI_START_ZERO, phases.arrays.b, map.b, phases.p.value_dim()),
    ] {
        let scan = InfiniMemoryScan {
            start_kind: (if first { kind } else { INFINI_START_MEMORY }) as i32,
            b,
            start: at,
            end: at,
            columns: columns as i64,
            ..Zeroable::zeroed()
        };
        phases.scan(run, table, scan, why, plan)?;
    }
    Ok(())
}

/// Plans [`compose`](crate::compose) on the device: the maps at [`Operand::First`] and
/// [`Operand::Second`] to one at [`Operand::Map`], which must be neither.
///
/// # Errors
/// Those of [`compose`](crate::compose).
pub fn plan_compose(
    first: &SegmentMapMirror,
    second: &SegmentMapMirror,
) -> Result<(Plan, SegmentMapMirror)> {
    first.run().check_followed_by(&second.run())?;
    let tokens = sum_tokens("second", &first.tokens, &second.tokens)?;
    let map = SegmentMapMirror { tokens, ..first.clone() };
    let p = &map.problem;
    let title = format!("compose {} maps; {}", map.tokens.len(), p.shapes());
    let mut plan = Plan::stateless(title);
    let mut workspace = Allocation::new(Operand::Workspace);
    let [one, two, out] =
        [Operand::First, Operand::Second, Operand::Map].map(|operand| map.symbols(operand));
    let a = Product { a: two.a, b: one.a, d: 0, c: out.a, columns: p.key_dim() };
    a.launch(p, map.tokens.len(), "A = A₂ A₁", &mut plan)?;
    let b = Product { a: two.a, b: one.b, d: two.b, c: out.b, columns: p.value_dim() };
    b.launch(p, map.tokens.len(), "B = A₂ B₁ + B₂", &mut plan)?;
    add_up(&[one.dz, two.dz], out.dz, map.rows(), "Δz", &mut plan, &mut workspace)?;
    let operands = [Operand::First, Operand::Second, Operand::Map];
    let requirements = operands.map(|operand| map.requirement(operand)).to_vec();
    Ok((plan.finish(requirements, &workspace), map))
}

/// Plans [`apply`](crate::apply) on the device: the map at [`Operand::Map`], the state at
/// [`Operand::State`].
///
/// # Errors
/// Those of [`apply`](crate::apply).
pub fn plan_apply(map: &SegmentMapMirror, state: &Mirror) -> Result<Plan> {
    let after = map.run().apply(state.problem(), state.counters())?;
    let (p, layout, at) = (&map.problem, state.layout(), map.symbols(Operand::Map));
    let title = format!("apply {} maps; {}", map.tokens.len(), p.shapes());
    let changes = Change::all(state.counters(), &after);
    let mut plan = Plan::new(title, layout, Effect::Set(changes));
    let mut workspace = Allocation::new(Operand::Workspace);
    let count = map.rows() * p.value_dim();
    let moved = workspace.part(&[count], 4)?;
    let own = layout.symbols();
    let product = Product { a: at.a, b: own.memory, d: at.b, c: moved, columns: p.value_dim() };
    product.launch(p, map.tokens.len(), "A M + B", &mut plan)?;
    add_up(&[moved], own.memory, count, "M", &mut plan, &mut workspace)?;
    let z = own.normalizer;
    add_up(&[z, at.dz], z, map.rows(), "z + Δz", &mut plan, &mut workspace)?;
    layout.snapshots(&mut plan, 0, layout.slots())?;
    layout.set_counters(&mut plan, 0, &after);
    Ok(plan.finish(vec![map.requirement(Operand::Map)], &workspace))
}

/// c = a b + d for the matrices of all sequences and KV heads.
struct Product {
    a: u64,
    b: u64,
    /// 0: absent.
    d: u64,
    c: u64,
    columns: usize,
}

impl Product {
    fn launch(&self, p: &Problem, batch: usize, why: &str, plan: &mut Plan) -> Result<()> {
        /// Matrices per launch: a grid's z.
        const MOST: usize = 65_535;
        const TILE: usize = 32;
        let (dk, matrices) = (p.key_dim(), batch * p.kv_heads());
        for first in (0..matrices).step_by(MOST) {
            let count = MOST.min(matrices - first);
            let skip = |x: u64, columns| {
                if x == 0 { 0 } else { x + (4 * first * dk * columns) as u64 }
            };
            let params = InfiniCompose {
                a: skip(self.a, dk),
                b: skip(self.b, self.columns),
                d: skip(self.d, self.columns),
                c: skip(self.c, self.columns),
                matrices: count as i64,
                key_dim: dk as i32,
                columns: self.columns as i32,
            };
            let grid = [self.columns / TILE, dk / TILE, count];
            plan.launch(find_for("compose", DType::F32)?, grid, params, why)?;
        }
        Ok(())
    }
}
