//! A plan: what a call does on the device, step by step, before any address is known.

pub mod address;
pub mod allocation;
pub mod call;
pub mod effect;
pub mod kernel;
pub mod kernels;
pub mod launcher;
pub mod layout;
pub mod mirror;
pub mod params;
pub mod problem;
pub mod replaced;
pub mod sequences;
pub mod target;
pub mod tensor;
pub mod tensor_map;

use std::fmt;

use crate::error::{Error, Result};
use crate::trace::Span;
use address::{Addresses, Bytes, Operand, Parameters, Requirement};
use allocation::{Allocation, PART_ALIGN};
use effect::{Effect, Kind, Tokens};
use kernel::{Arch, Kernel};
use launcher::{Launch, Launcher};
use layout::StateLayout;
use target::Chosen;
use tensor_map::TensorMap;

/// Most blocks in x, y and z.
const MAX_GRID: [usize; 3] = [i32::MAX as usize, 65_535, 65_535];

/// What a call does on the device: fills, copied tables and launches, in order. Made by host code
/// alone ([`plan_prefill`](super::plan_prefill) and its like), printable, and run any number of times
/// where its kind allows.
#[derive(Clone, Debug)]
pub struct Plan {
    title: String,
    state: Option<StateLayout>,
    steps: Vec<Step>,
    workspace: u64,
    requirements: Vec<Requirement>,
    pub(crate) effect: Effect,
}

#[derive(Clone, Debug)]
enum Step {
    Fill {
        to: u64,
        bytes: u64,
        value: u8,
    },
    Copy {
        to: u64,
        from: Bytes,
    },
    Launch {
        kernel: &'static Kernel,
        grid: [u32; 3],
        cluster: u32,
        early: bool,
        maps: Vec<TensorMap>,
        params: Bytes,
        why: String,
    },
}

/// One launch of a plan.
#[derive(Clone, Copy, Debug)]
pub struct PlannedLaunch<'a> {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Blocks of a cluster along x; 1: no clusters.
    pub cluster: u32,
    /// It begins while the launch before ends.
    pub early: bool,
    /// Its tensor maps; their addresses come with a run.
    pub maps: &'a [TensorMap],
    /// Why it is launched, and like this.
    pub why: &'a str,
}

impl Plan {
    /// A plan without steps, on states of that layout.
    pub(crate) fn new(title: String, state: &StateLayout, effect: Effect) -> Self {
        let (steps, requirements) = (Vec::new(), Vec::new());
        Self { title, state: Some(*state), steps, workspace: 0, requirements, effect }
    }

    /// A plan without steps that touches no state.
    pub(crate) fn stateless(title: String) -> Self {
        let (steps, requirements) = (Vec::new(), Vec::new());
        Self { title, state: None, steps, workspace: 0, requirements, effect: Effect::None }
    }

    /// What it does, and to what.
    pub(crate) fn title(&self) -> &str {
        &self.title
    }

    /// Notes in a call's span what it does.
    pub(crate) fn note(&self, span: &Span) {
        span.plan(&self.title, self);
        match &self.effect {
            // What a table will hold is not known.
            Effect::Tokens(Tokens { kind: Kind::Table(_), .. }) => {}
            Effect::Tokens(Tokens { sequences, .. }) => {
                span.slots(sequences.iter().map(|(slot, _)| *slot));
                span.lens(sequences.iter().map(|(_, len)| *len));
            }
            Effect::Flush(slots) => {
                span.slots(slots.iter().map(|(slot, _)| *slot));
                span.lens(slots.iter().map(|(_, counters)| counters.open_len));
            }
            _ => {}
        }
    }

    /// The layout of the states it works on; none for a plan that touches no state.
    pub fn state(&self) -> Option<&StateLayout> {
        self.state.as_ref()
    }

    /// Bytes of workspace that a run needs at [`Operand::Workspace`]. Its content does not matter,
    /// and it holds nothing afterwards.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace
    }

    /// What a run's addresses must satisfy; an operand that is not listed needs no address.
    pub fn requirements(&self) -> &[Requirement] {
        &self.requirements
    }

    /// The launches, in order.
    pub fn launches(&self) -> impl Iterator<Item = PlannedLaunch<'_>> {
        self.steps.iter().filter_map(|step| match step {
            Step::Launch { kernel, grid, cluster, early, maps, why, .. } => {
                let (grid, cluster, early) = (*grid, *cluster, *early);
                Some(PlannedLaunch { kernel, grid, cluster, early, maps, why })
            }
            _ => None,
        })
    }

    /// Enqueues every step. Allocates nothing on the device and waits for nothing, so that a run may
    /// be captured into a CUDA graph.
    ///
    /// # Errors
    /// [`Error::Address`] for an address that is 0 or not aligned: nothing was enqueued then. The
    /// launcher's errors: what came before the step it names was; where that is anything,
    /// [`Mirror::break_off`](super::Mirror::break_off).
    ///
    /// # Safety
    /// Until the work has finished on the device:
    /// * every address of [`Self::requirements`] is that of an allocation of this device from
    ///   `before` bytes below it to `after` bytes above it, or memory the device can reach as such;
    /// * nothing else writes to any of it, or reads what this writes: the outputs, the state and the
    ///   workspace. Outputs overlap neither each other nor an input;
    /// * the state was initialised by the plan of [`StateLayout::plan_init`], and every plan run on
    ///   it since was accounted for by [`Mirror::advance`](super::Mirror::advance), in the order of
    ///   the runs, on the mirror that this plan was made with;
    /// * a table of sequences in device memory names each slot once.
    ///
    /// The launcher must execute steps in order, on one stream.
    pub unsafe fn run(&self, addresses: &Addresses, launcher: &mut dyn Launcher) -> Result<()> {
        for requirement in &self.requirements {
            requirement.check(addresses)?;
        }
        for step in &self.steps {
            match step {
                Step::Fill { to, bytes, value } => {
                    launcher.fill(addresses.resolve(*to), *bytes, *value)?;
                }
                Step::Copy { to, from } => {
                    launcher.copy(addresses.resolve(*to), &from.resolve(addresses))?;
                }
                Step::Launch { kernel, grid, cluster, early, maps, params, .. } => {
                    let (grid, cluster, early, what) = (*grid, *cluster, *early, &self.title);
                    let params = &params.resolve(addresses);
                    let maps: &Vec<_> = &maps.iter().map(|map| map.resolve(addresses)).collect();
                    let launch = Launch { kernel, grid, cluster, early, maps, params, what };
                    launcher.launch(&launch)?;
                }
            }
        }
        Ok(())
    }

    /// Sets bytes at a symbol.
    pub(crate) fn fill(&mut self, to: u64, bytes: u64, value: u8) {
        if bytes > 0 {
            self.steps.push(Step::Fill { to, bytes, value });
        }
    }

    /// Writes a table at a symbol.
    pub(crate) fn copy(&mut self, to: u64, from: Bytes) {
        if from.len() > 0 {
            self.steps.push(Step::Copy { to, from });
        }
    }

    /// Adds a launch; an empty grid is none. `grid` has a block for all work, of which a persistent
    /// kernel gets as many as find some.
    ///
    /// # Errors
    /// [`Error::Value`] for a grid beyond what devices take.
    pub(crate) fn launch<P: Parameters>(
        &mut self,
        kernel: impl Into<Chosen>,
        grid: [usize; 3],
        params: P,
        why: impl Into<String>,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let Chosen { kernel, maps, cluster, early, most_blocks, passed_over } = kernel.into();
        if grid.iter().zip(MAX_GRID).any(|(got, most)| *got > most) {
            let argument = format!("blocks of {}", kernel.operation);
            let (got, expected) = (format!("{grid:?}"), format!("at most {MAX_GRID:?}"));
            return Err(Error::value(argument, got, expected));
        }
        let [x, y, z] = grid;
        let grid = [x.min(most_blocks), y, z].map(|blocks| blocks as u32);
        let mut why = why.into();
        if cluster > 1 {
            why += &format!("; clusters of {cluster}");
        }
        // Only after a kernel: copies know nothing of it.
        let early = early && matches!(self.steps.last(), Some(Step::Launch { .. }));
        if early {
            why += "; begins early";
        }
        if let Some(reason) = passed_over {
            why += &format!("; portable: {reason}");
        }
        let params = Bytes::new(&[params]);
        self.steps.push(Step::Launch { kernel, grid, cluster, early, maps, params, why });
        Ok(())
    }

    /// States what a run needs besides the steps: the tensors, the state, the workspace. A plan
    /// without steps needs nothing.
    pub(crate) fn finish(mut self, tensors: Vec<Requirement>, workspace: &Allocation) -> Self {
        if self.steps.is_empty() {
            return self;
        }
        self.workspace = workspace.bytes();
        self.requirements = tensors;
        let state = self.state.map_or(0, |state| state.bytes());
        let parts = [(Operand::State, state), (Operand::Workspace, self.workspace)];
        self.requirements.extend(parts.into_iter().filter_map(|(operand, after)| {
            (after > 0).then_some(Requirement { operand, align: PART_ALIGN, before: 0, after })
        }));
        self
    }
}

/// A table: every step with its grid, threads and shared bytes, and why it is there.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        let newest = self.launches().map(|launch| launch.kernel.arch).max().unwrap_or_default();
        match newest {
            Arch::Sm80 => {
                writeln!(f, "kernels: sm80, for every device of compute capability 8.0 and later")?;
            }
            Arch::Sm90 => {
                writeln!(
                    f,
                    "kernels: sm90 where there are any, sm80 otherwise, for devices of compute capability 9.0"
                )?;
            }
        }
        let mut rows = vec![["step", "grid", "threads", "shared", "why"].map(String::from)];
        for step in &self.steps {
            rows.push(match step {
                Step::Fill { bytes, value, .. } => {
                    let why = format!("{bytes} bytes of {value}");
                    ["fill".into(), String::new(), String::new(), String::new(), why]
                }
                Step::Copy { from, .. } => {
                    let why = format!("{} bytes of tables", from.len());
                    ["copy".into(), String::new(), String::new(), String::new(), why]
                }
                Step::Launch { kernel, grid, why, .. } => [
                    kernel.symbol.into(),
                    grid.map(|blocks| blocks.to_string()).join(" × "),
                    kernel.threads.to_string(),
                    kernel.shared_bytes.to_string(),
                    why.clone(),
                ],
            });
        }
        let width =
            |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
        let widths = [0, 1, 2, 3].map(width);
        for [step, grid, threads, shared, why] in &rows {
            let [a, b, c, d] = widths;
            writeln!(f, "  {step:a$}  {grid:>b$}  {threads:>c$}  {shared:>d$}  {why}")?;
        }
        write!(f, "workspace: {} bytes", self.workspace)
    }
}
