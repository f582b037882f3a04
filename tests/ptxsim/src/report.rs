//! What a launch did: findings, counts, traffic, the coarse bound; as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::json;

use crate::bound::{Bound, Work};
use crate::count::{Class, Counters, SharedPhases, Traffic};
use crate::diagnostic::{Diagnostic, Findings, Kind, Location, Place};
use crate::gang::Outcome;
use crate::launch::{Grid, Timing};
use crate::order::OrderCost;

/// What one line of the PTX text did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Line of the PTX text.
    pub ptx_line: u32,
    /// CUDA source file and line.
    pub source: Option<(Arc<str>, u32)>,
    /// Mnemonic.
    pub mnemonic: Arc<str>,
    /// Class.
    pub class: Class,
    /// Warp instructions executed.
    pub executed: u64,
    /// Shared-memory wavefronts.
    pub shared: SharedPhases,
    /// Tensor-core flop.
    pub flops: u64,
    /// Global traffic.
    pub global: Traffic,
    /// What order among blocks costs.
    pub order: OrderCost,
}

/// Traffic of one buffer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BufferTraffic {
    /// Name.
    pub name: String,
    /// All traffic.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// Distinct bytes read.
    pub distinct_read: u64,
    /// Distinct bytes written.
    pub distinct_written: u64,
}

impl BufferTraffic {
    /// Bytes moved over distinct bytes; 1 where nothing was touched.
    pub fn ratio(&self) -> f64 {
        match self.distinct_read + self.distinct_written {
            0 => 1.0,
            distinct => (self.traffic.read + self.traffic.written) as f64 / distinct as f64,
        }
    }
}

/// How one run was scheduled.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Schedule {
    /// Seed.
    pub seed: u64,
    /// Timing of asynchronous operations.
    pub timing: Timing,
}

/// The report of a launch, or of several schedules of it.
#[derive(Clone, Debug)]
pub struct Report {
    findings: Findings,
    warnings: Findings,
    /// Lines that were executed, in the order of the text.
    pub lines: Vec<Line>,
    /// Buffers that were touched.
    pub buffers: Vec<BufferTraffic>,
    /// The coarse bound.
    pub bound: Bound,
    /// The runs; counts are those of the first.
    pub schedules: Vec<Schedule>,
    /// Whether every run came to its end.
    pub complete: bool,
}

impl Report {
    pub(crate) fn new(grid: &Grid<'_>, outcomes: Vec<Outcome>) -> Self {
        let mut counters = Counters::new(grid.kernel.instrs.len());
        let (mut findings, mut warnings) = (Findings::default(), Findings::default());
        let mut complete = true;
        for outcome in outcomes {
            counters.merge(outcome.counters);
            findings.merge(outcome.findings);
            warnings.merge(outcome.warnings);
            complete &= outcome.complete;
        }
        let lines = lines(grid, &counters);
        let buffers = buffers(grid, &counters);
        let of = |class| lines.iter().filter(|l| l.class == class).map(|l| l.executed).sum();
        let work = Work {
            blocks: grid.blocks().into(),
            flops: counters.flops.values().sum(),
            instructions: counters.executed.iter().sum(),
            special: of(Class::Special),
            wavefronts: counters.shared.values().map(|p| p.phases).sum(),
            distinct: buffers.iter().map(|b| b.distinct_read + b.distinct_written).sum(),
            moved: buffers.iter().map(|b| b.traffic.sectors() * 32).sum(),
        };
        let bound = Bound::new(grid.arch, &work);
        let schedule = Schedule { seed: grid.options.seed, timing: grid.options.timing };
        Self { findings, warnings, lines, buffers, bound, schedules: vec![schedule], complete }
    }

    /// Whether nothing was found and every run came to its end.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty() && self.complete
    }

    /// What was found.
    pub fn diagnostics(&self) -> impl Iterator<Item = &Diagnostic> {
        self.findings.iter()
    }

    /// What breaks a rule that hardware is known not to insist on ([`Options::strict_proxies`]), or
    /// does no harm; a clean report may have some.
    ///
    /// [`Options::strict_proxies`]: crate::Options::strict_proxies
    pub fn warnings(&self) -> impl Iterator<Item = &Diagnostic> {
        self.warnings.iter()
    }

    /// Whether something of this kind was found.
    pub fn has(&self, kind: Kind) -> bool {
        self.diagnostics().any(|d| d.kind == kind)
    }

    /// Warp instructions executed of a class.
    pub fn executed(&self, class: Class) -> u64 {
        self.lines.iter().filter(|l| l.class == class).map(|l| l.executed).sum()
    }

    /// All warp instructions executed.
    pub fn instructions(&self) -> u64 {
        self.lines.iter().map(|l| l.executed).sum()
    }

    /// Tensor-core flop.
    pub fn tensor_flops(&self) -> u64 {
        self.lines.iter().map(|l| l.flops).sum()
    }

    /// Shared-memory wavefronts.
    pub fn shared_phases(&self) -> SharedPhases {
        self.lines.iter().fold(SharedPhases::default(), |mut sum, l| {
            sum += l.shared;
            sum
        })
    }

    /// What order among blocks costs.
    pub fn order(&self) -> OrderCost {
        self.lines.iter().fold(OrderCost::default(), |mut sum, l| {
            sum += l.order;
            sum
        })
    }

    /// Traffic of a buffer, by name.
    pub fn buffer(&self, name: &str) -> Option<&BufferTraffic> {
        self.buffers.iter().find(|b| b.name == name)
    }

    /// Adds the findings of another schedule of the same launch.
    pub fn merge(&mut self, other: Self) {
        self.findings.merge(other.findings);
        self.warnings.merge(other.warnings);
        self.schedules.extend(other.schedules);
        self.complete &= other.complete;
    }

    /// Notes that a run left another byte in a buffer than the first.
    pub(crate) fn schedule_dependent(
        &mut self,
        (number, buffer): (u32, &str),
        offset: u64,
        run: &Schedule,
    ) {
        let first = self.schedules[0];
        let message = format!(
            "byte {offset} of {buffer} depends on the schedule: seed {} {:?} and seed {} {:?} differ",
            first.seed, first.timing, run.seed, run.timing
        );
        let at = Location { ptx_line: 0, source: None, block: [0; 3], warp: 0, lane: 0 };
        let kind = Kind::ScheduleDependent;
        let place = Place { space: "global".into(), buffer: buffer.into(), offset: offset as i64 };
        let (other, address, repeated) = (None, Some(place), 1);
        let diagnostic = Diagnostic { kind, message, at, other, address, repeated };
        // One for each buffer, which has no instruction to be found at.
        self.findings.add(u32::MAX, Some(number), diagnostic);
    }
}

fn lines(grid: &Grid<'_>, counters: &Counters) -> Vec<Line> {
    let mut traffic: BTreeMap<u32, Traffic> = BTreeMap::new();
    for ((pc, _), t) in &counters.traffic {
        *traffic.entry(*pc).or_default() += *t;
    }
    let executed = counters.executed.iter().enumerate().filter(|(_, n)| **n > 0);
    executed
        .map(|(pc, executed)| {
            let instr = &grid.kernel.instrs[pc];
            let pc = pc as u32;
            Line {
                ptx_line: instr.line,
                source: grid.kernel.source(instr),
                mnemonic: instr.mnemonic.clone(),
                class: instr.class,
                executed: *executed,
                shared: counters.shared.get(&pc).copied().unwrap_or_default(),
                flops: counters.flops.get(&pc).copied().unwrap_or_default(),
                global: traffic.get(&pc).copied().unwrap_or_default(),
                order: counters.order.get(&pc).copied().unwrap_or_default(),
            }
        })
        .collect()
}

fn buffers(grid: &Grid<'_>, counters: &Counters) -> Vec<BufferTraffic> {
    let mut traffic: BTreeMap<usize, Traffic> = BTreeMap::new();
    for ((_, buffer), t) in &counters.traffic {
        *traffic.entry(*buffer).or_default() += *t;
    }
    traffic
        .into_iter()
        .map(|(number, traffic)| {
            let touched = counters.touched.get(&number);
            BufferTraffic {
                name: grid.buffer(number).map_or_else(String::new, |b| b.name.clone()),
                traffic,
                distinct_read: touched.map_or(0, |t| t.read.len()),
                distinct_written: touched.map_or(0, |t| t.written.len()),
            }
        })
        .collect()
}

fn is_race(kind: Kind) -> bool {
    matches!(kind, Kind::Race | Kind::PendingRead | Kind::PendingWrite | Kind::MissingProxyFence)
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (races, errors): (Vec<_>, Vec<_>) = self.diagnostics().partition(|d| is_race(d.kind));
        let mut classes: BTreeMap<Class, u64> = BTreeMap::new();
        self.lines.iter().for_each(|l| *classes.entry(l.class).or_default() += l.executed);
        let conflicts: Vec<_> = self.lines.iter().filter(|l| l.shared.phases > 0).collect();
        let conflict = |l: &&Line| {
            json!({
                "ptx_line": l.ptx_line, "source": l.source, "mnemonic": l.mnemonic,
                "phases": l.shared.phases, "excess": l.shared.excess,
            })
        };
        let shared = self.shared_phases();
        let mut bytes = serde_json::Map::new();
        for b in &self.buffers {
            let mut value = json!(b);
            value["ratio"] = json!(b.ratio());
            // Names are the caller's and may repeat.
            let same = self.buffers.iter().take_while(|o| !std::ptr::eq(*o, b));
            let name = match same.filter(|o| o.name == b.name).count() {
                0 => b.name.clone(),
                n => format!("{}#{}", b.name, n + 1),
            };
            bytes.insert(name, value);
        }
        let report = json!({
            "clean": self.is_clean(),
            "complete": self.complete,
            "errors": errors,
            "races": races,
            "warnings": self.warnings().collect::<Vec<_>>(),
            "findings_dropped": self.findings.dropped(),
            "counts": {
                "warp_instructions": self.instructions(),
                "tensor_flops": self.tensor_flops(),
                "barriers": self.executed(Class::Barrier),
                "classes": classes,
                "lines": self.lines,
            },
            "bank_conflicts": {
                "phases": shared.phases,
                "excess": shared.excess,
                "lines": conflicts.iter().map(conflict).collect::<Vec<_>>(),
            },
            "order": self.order(),
            "global_bytes": bytes,
            "bound": self.bound,
            "schedules": self.schedules,
        });
        report.serialize(serializer)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for diagnostic in self.warnings() {
            writeln!(f, "warning: {diagnostic}")?;
        }
        for diagnostic in self.diagnostics() {
            writeln!(f, "{diagnostic}")?;
        }
        if self.findings.dropped() > 0 {
            writeln!(f, "{} further findings were only counted", self.findings.dropped())?;
        }
        if !self.complete {
            writeln!(f, "the kernel did not come to its end")?;
        }
        let shared = self.shared_phases();
        writeln!(
            f,
            "{} warp instructions, {} tensor flop, {} shared wavefronts ({} by conflicts)",
            self.instructions(),
            self.tensor_flops(),
            shared.phases,
            shared.excess
        )?;
        for l in self.lines.iter().filter(|l| !l.order.is_none()) {
            let OrderCost { memory_barriers, invalidations } = l.order;
            writeln!(
                f,
                "PTX line {}, {}: {memory_barriers} memory barriers, {invalidations} invalidations",
                l.ptx_line, l.mnemonic
            )?;
        }
        for b in &self.buffers {
            writeln!(
                f,
                "{}: {} bytes read, {} written, {:.2} x the distinct bytes",
                b.name,
                b.traffic.read,
                b.traffic.written,
                b.ratio()
            )?;
        }
        write!(f, "limited by {}:", self.bound.limiter)?;
        self.bound
            .named()
            .iter()
            .try_for_each(|(name, s)| write!(f, " {name} {:.2} us", s * 1e6))?;
        writeln!(f)
    }
}
