//! What every kernel executes and moves, counted by the simulator at one shape: tensor-core flops
//! against the formula, shared-memory wavefronts added by bank conflicts, bytes moved against
//! distinct bytes, and the resource that limits it. INFINI_ATTN_BLESS=1 writes the tables of
//! docs/counts.md; a difference is only reported, since compilers differ.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use crate::common::narrow;
use crate::common::say::say;
use crate::common::simulator::Simulator;
use crate::common::stream::normals;
use half::bf16;
use infini_attn::cuda::{
    Addresses, Arch, Call, DecodeOptions, DeviceRope, DeviceTensor, KERNELS, Kernel, KeySumsMirror,
    Launch, Launcher, Mirror, Operand, Plan, PrefillOptions, Requirement, StateLayout, Target,
    plan_apply, plan_compose, plan_copy_slots, plan_decode, plan_flush, plan_key_sums,
    plan_merge_memories, plan_merge_partials, plan_prefill, plan_segment, plan_segment_map,
};
use infini_attn::{DType, Problem, Result, Update};
use ptxsim::Report;
use ptxsim::count::Traffic;

/// What is counted for docs/counts.md.
const SHAPE: Shape = Shape { dk: D, dv: D, heads: HEADS, n: N };
const HEADS: usize = 4;
const D: usize = 128;
const N: usize = 2048;

/// One KV head, one sequence.
#[derive(Clone, Copy)]
struct Shape {
    dk: usize,
    dv: usize,
    heads: usize,
    n: usize,
}

impl Shape {
    fn problem(self, update: Update) -> Problem {
        let b = Problem::builder().heads(self.heads).kv_heads(1).key_dim(self.dk);
        let b = b.value_dim(self.dv).segment_len(self.n).update(update).dtype(DType::BF16);
        b.build().expect("valid")
    }

    /// Tokens of one sequence, with rotation.
    fn call(self, tokens: usize) -> Call<'static> {
        let (q, o) = (rows(tokens, self.heads, self.dk), rows(tokens, self.heads, self.dv));
        let (k, v) = (self.keys(tokens), self.values(tokens));
        let table = || floats(&[16 * self.n, self.dk / 2]);
        Call::new(q, k, v, floats(&[self.heads]), o).rope(DeviceRope::new(table(), table()))
    }

    fn keys(self, tokens: usize) -> DeviceTensor {
        rows(tokens, 1, self.dk)
    }

    fn values(self, tokens: usize) -> DeviceTensor {
        rows(tokens, 1, self.dv)
    }
}

fn rows(tokens: usize, heads: usize, width: usize) -> DeviceTensor {
    DeviceTensor::contiguous(DType::BF16, &[1, tokens, heads, width]).expect("valid")
}

fn floats(shape: &[usize]) -> DeviceTensor {
    DeviceTensor::contiguous(DType::F32, shape).expect("valid")
}

/// One launch.
struct Counted {
    kernel: &'static Kernel,
    /// The plan it belongs to.
    of: &'static str,
    grid: [u32; 3],
    report: Report,
}

/// Runs plans, keeps every report.
struct Counter {
    sim: Simulator,
    of: &'static str,
    launches: Vec<Counted>,
}

impl Launcher for Counter {
    fn launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        let (kernel, grid) = (launch.kernel, launch.grid);
        let report = self.sim.run(launch)?;
        self.launches.push(Counted { kernel, of: self.of, grid, report });
        Ok(())
    }

    fn fill(&mut self, to: u64, bytes: u64, value: u8) -> Result<()> {
        self.sim.fill(to, bytes, value)
    }

    fn copy(&mut self, to: u64, from: &[u8]) -> Result<()> {
        self.sim.copy(to, from)
    }
}

impl Counter {
    /// Runs a plan on N(0, 1) inputs; `known` are the operands that lie somewhere already.
    fn run(&mut self, of: &'static str, plan: &Plan, known: &[(Operand, u64)]) {
        let mut addresses = Addresses::new();
        for need in plan.requirements() {
            let found = known.iter().find(|(operand, _)| *operand == need.operand);
            let address = found.map_or_else(|| self.buffer(need), |(_, address)| *address);
            addresses.set(need.operand, address);
        }
        self.of = of;
        // SAFETY: the simulator checks every access, and what runs is over when this returns.
        unsafe { plan.run(&addresses, self) }.unwrap_or_else(|e| panic!("{plan}\n{e}"));
    }

    fn buffer(&mut self, need: &Requirement) -> u64 {
        let (name, bytes) = (need.operand.to_string(), (need.before + need.after) as usize);
        let start = match need.operand {
            Operand::Q | Operand::K | Operand::V | Operand::Part(_) => {
                self.sim.upload(&name, &narrow::<bf16>(&normals(1, bytes / 2)))
            }
            Operand::Workspace | Operand::O => self.sim.uninitialised::<u8>(&name, bytes),
            // Empty states, sums and maps of nothing.
            Operand::Source(_) | Operand::Before => self.sim.upload(&name, &vec![0u8; bytes]),
            _ => self.sim.upload(&name, &normals(2, bytes / 4)),
        };
        start + need.before
    }
}

/// A state with its mirror.
struct Pool {
    mirror: Mirror,
    address: u64,
}

impl Pool {
    fn new(counter: &mut Counter, problem: &Problem) -> Self {
        let layout = StateLayout::new(problem, 1, true).expect("kernels exist");
        let address = counter.sim.uninitialised::<u8>("state", layout.bytes() as usize);
        let mut pool = Self { mirror: Mirror::new(&layout), address };
        pool.run(counter, "init", &layout.plan_init().expect("valid"));
        pool
    }

    fn run(&mut self, counter: &mut Counter, of: &'static str, plan: &Plan) {
        self.mirror.advance(plan).expect("planned for this state");
        counter.run(of, plan, &[(Operand::State, self.address)]);
    }
}

/// Every plan once; the reports of all launches.
fn launches() -> &'static [Counted] {
    static ALL: OnceLock<Vec<Counted>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut counter = Counter { sim: Simulator::new(), of: "", launches: vec![] };
        streaming(&mut counter, SHAPE).expect("plans");
        maps(&mut counter, SHAPE).expect("plans");
        counter.launches.extend(on_sm90(SHAPE).expect("plans"));
        counter.launches
    })
}

/// What [`on_sm90`] counts besides [`SHAPE`]: other dimensions.
fn wider_and_narrower() -> &'static [(usize, Vec<Counted>)] {
    static ALL: OnceLock<Vec<(usize, Vec<Counted>)>> = OnceLock::new();
    ALL.get_or_init(|| {
        let at = |d| (d, on_sm90(Shape { dk: d, dv: d, ..SHAPE }).expect("plans"));
        [64, 256].map(at).into()
    })
}

/// The plans of [`streaming`] that have kernels of compute capability 9.0, and those kernels. Races
/// are looked for by tests/cuda/operations/table.rs; counts are the same without.
fn on_sm90(shape: Shape) -> Result<Vec<Counted>> {
    const TARGET: Target = Target { arch: Arch::Sm90, ..Target::DEFAULT };
    let mut counter =
        Counter { sim: Simulator::of(TARGET.arch).checks(false), of: "", launches: vec![] };
    let p = shape.problem(Update::Delta);
    let options = PrefillOptions { target: TARGET, ..PrefillOptions::default() };
    let mut pool = Pool::new(&mut counter, &p);
    let plan = plan_prefill(&p, &shape.call(5 * shape.n / 2), &pool.mirror, &options)?;
    pool.run(&mut counter, "prefill on sm90", &plan);
    pool.run(&mut counter, "", &plan_flush(&p, &pool.mirror, &[0])?);
    // One sequence of one KV head fills a device of few multiprocessors alone.
    let small = Target { multiprocessors: 8, ..TARGET };
    let plan = plan_segment(&p, &shape.call(shape.n), &pool.mirror, &small)?;
    pool.run(&mut counter, "segment on sm90", &plan);
    counter.launches.retain(|c| c.kernel.arch == TARGET.arch);
    Ok(counter.launches)
}

/// Two and a half segments by prefill, then decode, a copy, flush, a segment, a padded batch; with rotation,
/// under the delta rule.
fn streaming(counter: &mut Counter, shape: Shape) -> Result<()> {
    let (p, n) = (shape.problem(Update::Delta), shape.n);
    let mut pool = Pool::new(counter, &p);
    let call = |tokens| shape.call(tokens);
    let plan = plan_prefill(&p, &call(5 * n / 2), &pool.mirror, &PrefillOptions::default())?;
    pool.run(counter, "prefill", &plan);
    let plan = plan_decode(&p, &call(1), &pool.mirror, &DecodeOptions::default())?;
    pool.run(counter, "decode", &plan);
    let copy = Pool::new(counter, &p);
    let plan = plan_copy_slots(&pool.mirror, &copy.mirror, &[(0, 0)])?;
    let addresses = [(Operand::State, copy.address), (Operand::Source(0), pool.address)];
    counter.run("copy", &plan, &addresses);
    let plan = plan_flush(&p, &pool.mirror, &[0])?;
    pool.run(counter, "flush", &plan);
    let plan = plan_segment(&p, &call(n), &pool.mirror, &Target::default())?;
    pool.run(counter, "segment", &plan);
    let plan = plan_segment(&p, &call(n).seq_lens(&[33]), &pool.mirror, &Target::default())?;
    pool.run(counter, "padded segment", &plan);
    Ok(())
}

/// Merges of partial results, memories and maps.
fn maps(counter: &mut Counter, shape: Shape) -> Result<()> {
    let (o, lse) = (rows(shape.n, shape.heads, shape.dv), floats(&[1, shape.heads, shape.n]));
    counter.run("merge_partials", &plan_merge_partials(&[o, o], &[lse, lse], &o, None)?, &[]);

    let mut pool = Pool::new(counter, &shape.problem(Update::Linear));
    let other = Mirror::new(pool.mirror.layout());
    let plan = plan_merge_memories(&[&other], &pool.mirror)?;
    pool.run(counter, "merge_memories", &plan);

    let p = shape.problem(Update::Delta);
    let (k, v) = (shape.keys(2 * shape.n), shape.values(2 * shape.n));
    let options = PrefillOptions::default();
    let zero = KeySumsMirror::zero(&p, 1);
    let (plan, sums) = plan_key_sums(&p, &k)?;
    counter.run("key_sums", &plan, &[]);
    let (plan, first) = plan_segment_map(&p, &k, &v, &zero, &options)?;
    counter.run("segment_map", &plan, &[]);
    let (_, second) = plan_segment_map(&p, &k, &v, &sums, &options)?;
    counter.run("compose", &plan_compose(&first, &second)?.0, &[]);
    let mut pool = Pool::new(counter, &p);
    let plan = plan_apply(&first, &pool.mirror)?;
    pool.run(counter, "apply", &plan);
    Ok(())
}

/// Bytes that a launch moves, and distinct bytes. What all lanes read counts once, what is read of a
/// sector in part counts as that part.
fn bytes(report: &Report) -> [u64; 2] {
    let moved = |t: &Traffic| (t.read + t.written).min(32 * t.sectors());
    let moved = report.buffers.iter().map(|b| moved(&b.traffic)).sum();
    let distinct = report.buffers.iter().map(|b| b.distinct_read + b.distinct_written).sum();
    [moved, distinct]
}

/// The launches of an operation inside a plan; at least one.
fn of(operation: &str, plan: &str) -> Vec<&'static Counted> {
    let wanted = |c: &&Counted| c.kernel.operation == operation && c.of == plan;
    let found: Vec<_> = launches().iter().filter(wanted).collect();
    assert!(!found.is_empty(), "{plan} launches no {operation}");
    found
}

/// Of a query head: tiles of 128 rows see all keys up to their end; what is masked is computed as
/// well.
fn local(tokens: u64, d: u64) -> u64 {
    (1..=tokens / 128).map(|tile| 4 * 128 * (128 * tile) * d).sum()
}

fn retrieval(tokens: u64, d: u64) -> u64 {
    2 * tokens * d * d
}

/// Two and a half segments of all query heads; the first finds no memory.
fn prefill_attention(d: u64) -> u64 {
    let n = N as u64;
    let branches = 2 * local(n, d) + local(n / 2, d) + retrieval(n, d) + retrieval(n / 2, d);
    HEADS as u64 * branches
}

/// Three products: with V, with M, and of what M gives.
fn update(tokens: u64, d: u64) -> u64 {
    6 * tokens * d * d
}

#[test]
fn tensor_flops_are_those_of_the_formulas() {
    let (n, d) = (N as u64, D as u64);
    let check = |operation, plan, want: u64| {
        let got: u64 = of(operation, plan).iter().map(|c| c.report.tensor_flops()).sum();
        assert_eq!(got, want, "{operation} of {plan}");
    };
    // Two segments are complete; the second finds a memory.
    check("segment_state", "prefill", 2 * 2 * n * d * d);
    check("segment_transition", "prefill", 2 * n * d * d);
    check("memory_scan", "prefill", 2 * d * d * d);
    check("segment_attention", "prefill", prefill_attention(d));
    check("commit", "flush", update((n / 2 + 1).next_multiple_of(64), d));
    check("segment", "segment", HEADS as u64 * (local(n, d) + retrieval(n, d)) + update(n, d));
    // 16 rows hold the four; warps take 16 keys at a time.
    let tile = 16 * ((n / 2 + 1).next_multiple_of(16) * 4 * d + 2 * d * d);
    check("decode", "decode", tile);
}

/// On compute capability 9.0: the kernels of a dimension that multiply by warpgroups.
fn hopper() -> impl Iterator<Item = (u64, Vec<&'static Counted>)> {
    let scans = |c: &&Counted| c.kernel.operation.ends_with("_scan");
    let here = launches().iter().filter(|c| c.kernel.arch == Arch::Sm90 && !scans(c)).collect();
    let others = wider_and_narrower();
    let others =
        others.iter().map(move |(d, all)| (*d, all.iter().filter(|c| !scans(c)).collect()));
    let all = [(D, here)].into_iter().chain(others);
    all.map(|(d, launches)| (d as u64, launches))
}

#[test]
fn tensor_flops_of_sm90_are_those_of_the_formulas() {
    let n = N as u64;
    for (d, launches) in hopper() {
        let check = |operation, want: u64| {
            let found = launches.iter().filter(|c| c.kernel.operation == operation);
            let got: u64 = found.map(|c| c.report.tensor_flops()).sum();
            assert_eq!(got, want, "{operation} at d = {d}");
        };
        check("segment_state", 2 * 2 * n * d * d);
        check("segment_transition", 2 * n * d * d);
        check("segment_attention", prefill_attention(d));
        check("segment", HEADS as u64 * (local(n, d) + retrieval(n, d)) + update(n, d));
    }
}

#[test]
fn products_of_sm90_are_those_of_warpgroups() {
    for c in hopper().flat_map(|(_, launches)| launches) {
        let lines = c.report.lines.iter().filter(|l| l.mnemonic.starts_with("wgmma.mma_async"));
        let flops: u64 = lines.map(|l| l.flops).sum();
        let (symbol, all) = (c.kernel.symbol, c.report.tensor_flops());
        assert!(100 * flops >= 99 * all && all > 0, "{symbol}: {flops} of {all} flops by wgmma");
    }
}

#[test]
fn attention_on_sm90_is_limited_by_the_tensor_cores() {
    let [attention] = of("segment_attention", "prefill on sm90")[..] else { panic!("one launch") };
    let b = &attention.report.bound;
    assert_eq!(b.limiter, "tensor", "{b:?}");
}

#[test]
fn shared_memory_is_free_of_conflicts_at_every_shape() {
    let mut counter = Counter { sim: Simulator::new(), of: "", launches: vec![] };
    let attention = KERNELS.iter().filter(|k| k.operation == "segment_attention");
    let attention = attention.filter(|k| k.arch == Arch::Sm80);
    for kernel in attention.filter(|k| k.dtype == Some(DType::BF16)) {
        let shape = Shape { dk: kernel.key_dim, dv: kernel.value_dim, heads: 2, n: 192 };
        streaming(&mut counter, shape).expect("plans");
    }
    let wider_and_narrower = wider_and_narrower().iter().flat_map(|(_, launches)| launches);
    for c in counter.launches.iter().chain(launches()).chain(wider_and_narrower) {
        let excess = c.report.lines.iter().filter(|l| l.shared.excess > 0);
        let lines: Vec<_> = excess.map(|l| (&l.source, &l.mnemonic, l.shared)).collect();
        assert!(lines.is_empty(), "{} of {}: {lines:?}", c.kernel.symbol, c.of);
    }
}

#[test]
fn bytes_move_once() {
    let d = D as u64;
    for (operation, plan, again) in [
        ("segment_state", "prefill", 0),
        ("segment_transition", "prefill", 0),
        ("segment_state", "prefill on sm90", 0),
        ("segment_transition", "prefill on sm90", 0),
        // G by every slice of 32 columns, in 16 bits.
        ("memory_scan", "prefill", (d / 32 - 1) * 2 * d * d),
        ("decode", "decode", 0),
        // The snapshot, in 16 bits, by three chunks.
        ("commit", "flush", 2 * 2 * d * d),
        ("copy_slots", "copy", 0),
        ("merge_partials", "merge_partials", 0),
        ("sum", "merge_memories", 0),
        ("snapshot", "merge_memories", 0),
    ] {
        let [moved, distinct] = of(operation, plan)
            .iter()
            .map(|c| bytes(&c.report))
            .fold([0, 0], |[a, b], [moved, distinct]| [a + moved, b + distinct]);
        let ratio = (moved - again) as f64 / distinct as f64;
        assert!(
            ratio <= 1.05,
            "{operation} of {plan}: {moved} bytes, {distinct} distinct, {ratio}"
        );
    }
}

/// Every launch that is not the same as one before: the first table of docs/counts.md.
fn table() -> String {
    let mut rows = vec![];
    let mut seen = BTreeSet::new();
    for c in launches() {
        let (r, [moved, distinct]) = (&c.report, bytes(&c.report));
        if !seen.insert((c.kernel.operation, c.of)) || c.of == "init" {
            continue;
        }
        let b = &r.bound;
        let us = [b.tensor, b.issue, b.shared, b.special, b.memory, b.l2].map(|s| s * 1e6);
        let mut row = format!(
            "| {} | {} | {} | {} | {} | {} | {:.3} | {:.2} |",
            c.kernel.operation,
            c.of,
            c.grid.iter().map(u32::to_string).collect::<Vec<_>>().join("×"),
            r.instructions(),
            r.tensor_flops() / 1_000_000,
            r.shared_phases().phases,
            distinct as f64 / 1e6,
            moved as f64 / distinct as f64,
        );
        us.iter().for_each(|us| row += &format!(" {us:.2} |"));
        rows.push(format!("{row} {} |", b.limiter));
    }
    rows.join("\n")
}

/// segment_attention on compute capability 9.0 by dimension: the second table of docs/counts.md.
fn attention_table() -> String {
    let mut rows: Vec<_> = hopper()
        .map(|(d, launches)| {
            let attention = launches.iter().find(|c| c.kernel.operation == "segment_attention");
            let c = attention.expect("one launch");
            let b = &c.report.bound;
            let all = [b.tensor, b.issue, b.special, b.shared, b.l2, b.memory];
            let most = all.into_iter().fold(0.0, f64::max);
            let part = |s: f64| format!(" {:.2} ({:.0} %) |", s * 1e6, 100.0 * s / most);
            let parts: String = all.into_iter().map(part).collect();
            let (keys, mflop) = (c.kernel.keys, c.report.tensor_flops() / 1_000_000);
            (d, format!("| {d} | {keys} | {mflop} | {} |{parts}", c.report.instructions()))
        })
        .collect();
    rows.sort();
    rows.into_iter().map(|(_, row)| row).collect::<Vec<_>>().join("\n")
}

/// Before the rows of the n-th table of a document, the rows, and what follows.
fn parts(text: &str, n: usize) -> [&str; 3] {
    const MARK: &str = " --- |\n";
    let start = text.match_indices(MARK).nth(n).expect("a table").0 + MARK.len();
    let end = text[start..].find("\n\n").map_or(text.len(), |at| start + at + 1);
    [&text[..start], &text[start..end], &text[end..]]
}

#[test]
fn the_document_has_these_counts() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/counts.md");
    let mut text = std::fs::read_to_string(path).expect("docs/counts.md");
    let tables = [table(), attention_table()];
    if std::env::var_os("INFINI_ATTN_BLESS").is_some() {
        for (n, table) in tables.iter().enumerate() {
            let [before, _, after] = parts(&text, n);
            text = format!("{before}{table}\n{after}");
        }
        std::fs::write(path, text).expect("written");
        return;
    }
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    for (n, table) in tables.iter().enumerate() {
        let [_, rows, _] = parts(&text, n);
        for row in lines(table).difference(&lines(rows)) {
            say(format_args!("docs/counts.md has other counts (or none), now: {row}"));
        }
        let kernels = |text: &str| {
            let first = |row: &str| row.split(" | ").take(2).map(str::to_owned).collect::<Vec<_>>();
            text.lines().map(first).collect::<BTreeSet<_>>()
        };
        assert_eq!(kernels(rows), kernels(table), "rows of docs/counts.md and what ran");
    }
}
