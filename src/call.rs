//! One call's arguments, and their validation: the only place where shapes, lengths, slots and
//! positions are checked. Backends receive a resolved [`Batch`].

use crate::memory::Counters;
use crate::tensor::{Rows, RowsMut};
use crate::{DType, Element, Error, Problem, Result, TensorView, TensorViewMut};

/// How the tokens of a batch are laid out.
#[derive(Clone, Copy, Debug)]
enum Lengths<'a> {
    /// [B, T, H, D], every sequence T tokens long.
    Full,
    /// [B, T, H, D], sequence b is `lens[b]` tokens long, the rest is padding.
    Padded(&'a [i32]),
    /// [total, H, D], sequence b is tokens `cu[b]..cu[b + 1]`.
    Packed(&'a [i32]),
}

/// Queries, keys and values of one call, with their batch layout.
///
/// q [B, T, Hq, Dk], k [B, T, Hkv, Dk], v [B, T, Hkv, Dv], **unrotated**: rotation belongs to the
/// local branch only and is done inside ([`Self::rope`]). The last dimension is contiguous, all
/// other strides are free.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Queries [B, T, Hq, Dk] (packed: [total, Hq, Dk]).
    pub q: TensorView<'a, T>,
    /// Keys [B, T, Hkv, Dk] (packed: [total, Hkv, Dk]).
    pub k: TensorView<'a, T>,
    /// Values [B, T, Hkv, Dv] (packed: [total, Hkv, Dv]).
    pub v: TensorView<'a, T>,
    lengths: Lengths<'a>,
    slots: Option<&'a [usize]>,
    rope: Option<Rope<'a>>,
}

impl<'a, T> Inputs<'a, T> {
    /// A batch in which every sequence is T tokens long and sequence b uses slot b of the state.
    pub fn new(q: TensorView<'a, T>, k: TensorView<'a, T>, v: TensorView<'a, T>) -> Self {
        Self { q, k, v, lengths: Lengths::Full, slots: None, rope: None }
    }

    /// Padded batch: sequence b has `lens[b]` ≤ T tokens. Padded output rows are 0, their
    /// log-sum-exp is −∞.
    pub fn seq_lens(mut self, lens: &'a [i32]) -> Self {
        self.lengths = Lengths::Padded(lens);
        self
    }

    /// Packed batch: q, k, v are [total, H, D] and sequence b is tokens `cu[b]..cu[b + 1]`;
    /// `cu[0]` = 0 and the last entry is total.
    pub fn cu_seqlens(mut self, cu: &'a [i32]) -> Self {
        self.lengths = Lengths::Packed(cu);
        self
    }

    /// The state's slot of each sequence, all distinct. Without it sequence b uses slot b and the
    /// state must have exactly B slots.
    pub fn slots(mut self, slots: &'a [usize]) -> Self {
        self.slots = Some(slots);
        self
    }

    /// Rotates q and k in the local branch.
    pub fn rope(mut self, rope: Rope<'a>) -> Self {
        self.rope = Some(rope);
        self
    }
}

/// Rotary position embedding of the local branch: the first R channels of q and k are rotated, the
/// rest pass. The memory always sees unrotated q and k.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    cos: TensorView<'a, f32>,
    sin: TensorView<'a, f32>,
    interleaved: bool,
    positions: Option<&'a [i64]>,
}

impl<'a> Rope<'a> {
    /// Tables [positions, R/2]; they may carry a magnitude factor. Channel i pairs with i + R/2
    /// (rotate-half). The row of a token is its absolute position, continued from the state.
    pub fn new(cos: TensorView<'a, f32>, sin: TensorView<'a, f32>) -> Self {
        Self { cos, sin, interleaved: false, positions: None }
    }

    /// Pairs channel 2i with 2i + 1 instead of i with i + R/2.
    pub fn interleaved(mut self, interleaved: bool) -> Self {
        self.interleaved = interleaved;
        self
    }

    /// Explicit table rows: T of them (shared by all sequences) or B·T (row-major), packed: total.
    /// Entries of padded tokens are not read. The state's own position count is unaffected.
    pub fn positions(mut self, positions: &'a [i64]) -> Self {
        self.positions = Some(positions);
        self
    }

    /// Rotates one row of at least R channels in place by table row `position`.
    pub(crate) fn rotate<F>(&self, row: &mut [F], position: usize)
    where
        F: Copy
            + From<f32>
            + std::ops::Mul<Output = F>
            + std::ops::Add<Output = F>
            + std::ops::Sub<Output = F>,
    {
        let half = self.cos.shape()[1];
        if half == 0 {
            return; // tables without columns have no rows to point at
        }
        // SAFETY: `check` compared both shapes, `Batch` every position.
        let (cos, sin) =
            unsafe { (self.cos.rows().row(0, position, 0), self.sin.rows().row(0, position, 0)) };
        for i in 0..half {
            let (a, b) = if self.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (x, y) = (row[a], row[b]);
            let (c, s) = (F::from(cos[i]), F::from(sin[i]));
            row[a] = x * c - y * s;
            row[b] = y * c + x * s;
        }
    }

    fn check(&self, problem: &Problem) -> Result<()> {
        if self.cos.shape().len() != 2 {
            return Err(Error::shape("rope.cos", self.cos.shape(), "[positions, R/2]"));
        }
        self.sin.check_shape("rope.sin", self.cos.shape(), "the shape of rope.cos")?;
        if 2 * self.cos.shape()[1] > problem.key_dim() {
            let expected = format!("[positions, R/2] with R ≤ Dk = {}", problem.key_dim());
            return Err(Error::shape("rope.cos", self.cos.shape(), expected));
        }
        self.cos.check_rows("rope.cos")?;
        self.sin.check_rows("rope.sin")
    }
}

/// Where the results go. o [B, T, Hq, Dv]; on request the log-sum-exp of the local branch (natural
/// log of Σ exp(scale · q·k), [B, Hq, T]) and the two branches before the gate. Packed: [total, Hq,
/// Dv] and [Hq, total].
#[derive(Debug)]
pub struct Outputs<'a, T> {
    pub(crate) o: TensorViewMut<'a, T>,
    pub(crate) lse: Option<TensorViewMut<'a, f32>>,
    pub(crate) a_dot: Option<TensorViewMut<'a, T>>,
    pub(crate) a_mem: Option<TensorViewMut<'a, T>>,
}

impl<'a, T> Outputs<'a, T> {
    /// Only the gated output.
    pub fn new(o: TensorViewMut<'a, T>) -> Self {
        Self { o, lse: None, a_dot: None, a_mem: None }
    }

    /// Also the local branch's log-sum-exp, f32 [B, Hq, T].
    pub fn lse(mut self, lse: TensorViewMut<'a, f32>) -> Self {
        self.lse = Some(lse);
        self
    }

    /// Also the local branch A_dot, shaped like o.
    pub fn a_dot(mut self, a_dot: TensorViewMut<'a, T>) -> Self {
        self.a_dot = Some(a_dot);
        self
    }

    /// Also the memory branch A_mem, shaped like o.
    pub fn a_mem(mut self, a_mem: TensorViewMut<'a, T>) -> Self {
        self.a_mem = Some(a_mem);
        self
    }

    /// Output rows for concurrent writers.
    pub(crate) fn rows(&mut self) -> OutputRows<'_, T> {
        OutputRows {
            o: self.o.rows(),
            lse: self.lse.as_mut().map(TensorViewMut::head_rows),
            a_dot: self.a_dot.as_mut().map(TensorViewMut::rows),
            a_mem: self.a_mem.as_mut().map(TensorViewMut::rows),
        }
    }
}

/// Writable rows of every requested output.
pub(crate) struct OutputRows<'a, T> {
    pub o: RowsMut<'a, T>,
    pub lse: Option<RowsMut<'a, f32>>,
    pub a_dot: Option<RowsMut<'a, T>>,
    pub a_mem: Option<RowsMut<'a, T>>,
}

/// One sequence of a call: where its tokens lie and which slot holds its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// Slot of the state.
    pub slot: usize,
    /// Index into the batch dimension (0 when packed).
    pub batch: usize,
    /// Index of its first token in the token dimension (0 when padded).
    pub first: usize,
    /// Number of tokens.
    pub len: usize,
    /// Position of its first token when none are given: tokens seen before.
    pub position: usize,
}

/// A call whose every argument was checked.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// Padded length of the token dimension: T, or total when packed.
    pub tokens: usize,
    /// Rotation, if any.
    pub rope: Option<Rope<'a>>,
    /// Whether sequences follow each other without padding.
    pub packed: bool,
}

impl<'a> Batch<'a> {
    /// Table row for token `t` of a sequence.
    pub(crate) fn position(&self, seq: &Sequence, t: usize) -> usize {
        match self.rope.and_then(|r| r.positions) {
            None => seq.position + t,
            Some(p) if self.packed || p.len() == self.tokens => p[seq.first + t] as usize,
            Some(p) => p[seq.batch * self.tokens + t] as usize,
        }
    }
}

/// Checks inputs and gate against the problem and a state's counters.
pub(crate) fn resolve<'a, T>(
    problem: &Problem,
    inputs: &Inputs<'a, T>,
    gate: &[f32],
    counters: &[Counters],
) -> Result<(Batch<'a>, Vec<Sequence>)> {
    let packed = matches!(inputs.lengths, Lengths::Packed(_));
    let rank = if packed { 3 } else { 4 };
    let names = if packed { "[total, H, D]" } else { "[B, T, H, D]" };
    if inputs.q.shape().len() != rank {
        return Err(Error::shape("q", inputs.q.shape(), format!("rank {rank} {names}")));
    }
    let lead = &inputs.q.shape()[..rank - 2];
    for (argument, view, heads, dim) in [
        ("q", &inputs.q, problem.heads(), problem.key_dim()),
        ("k", &inputs.k, problem.kv_heads(), problem.key_dim()),
        ("v", &inputs.v, problem.kv_heads(), problem.value_dim()),
    ] {
        view.check_shape(argument, &[lead, &[heads, dim]].concat(), names)?;
        view.check_rows(argument)?;
    }
    check_gate(problem, gate)?;
    let tokens = lead[lead.len() - 1];
    let mut sequences = ranges(&inputs.lengths, lead)?;
    assign_slots(&mut sequences, inputs.slots, counters)?;
    let batch = Batch { tokens, rope: inputs.rope, packed };
    check_rope(problem, &batch, &sequences, counters)?;
    Ok((batch, sequences))
}

fn check_gate(problem: &Problem, gate: &[f32]) -> Result<()> {
    if gate.len() != problem.heads() {
        let expected = format!("{} (one logit per query head)", problem.heads());
        return Err(Error::Length { argument: "gate", got: gate.len(), expected });
    }
    match gate.iter().position(|b| b.is_nan()) {
        Some(h) => Err(Error::value(format!("gate[{h}]"), "NaN", "a number or ±infinity")),
        None => Ok(()),
    }
}

/// Token ranges of every sequence, slots and positions still open.
fn ranges(lengths: &Lengths<'_>, lead: &[usize]) -> Result<Vec<Sequence>> {
    let sequence = |batch, first, len| Sequence { slot: 0, batch, first, len, position: 0 };
    match *lengths {
        Lengths::Full => Ok((0..lead[0]).map(|b| sequence(b, 0, lead[1])).collect()),
        Lengths::Padded(lens) => {
            if lens.len() != lead[0] {
                let expected = format!("{} (the batch size)", lead[0]);
                return Err(Error::Length { argument: "seq_lens", got: lens.len(), expected });
            }
            let fits = |&len: &i32| usize::try_from(len).ok().filter(|&l| l <= lead[1]);
            (lens.iter().enumerate())
                .map(|(b, len)| match fits(len) {
                    Some(n) => Ok(sequence(b, 0, n)),
                    None => {
                        let expected = format!("0 to T = {}", lead[1]);
                        Err(Error::value(format!("seq_lens[{b}]"), len, expected))
                    }
                })
                .collect()
        }
        Lengths::Packed(cu) => {
            let Some((&0, _)) = cu.split_first() else {
                let got = cu.first().map_or("nothing".into(), i32::to_string);
                return Err(Error::value("cu_seqlens[0]", got, "0"));
            };
            if let Some(i) = cu.windows(2).position(|w| w[1] < w[0]) {
                let expected = format!("at least cu_seqlens[{i}] = {}", cu[i]);
                return Err(Error::value(format!("cu_seqlens[{}]", i + 1), cu[i + 1], expected));
            }
            let last = cu[cu.len() - 1];
            if last as usize != lead[0] {
                let expected = format!("total = {}", lead[0]);
                return Err(Error::value(format!("cu_seqlens[{}]", cu.len() - 1), last, expected));
            }
            Ok(cu.windows(2).map(|w| sequence(0, w[0] as usize, (w[1] - w[0]) as usize)).collect())
        }
    }
}

fn assign_slots(
    sequences: &mut [Sequence],
    slots: Option<&[usize]>,
    counters: &[Counters],
) -> Result<()> {
    match slots {
        None if sequences.len() != counters.len() => {
            let expected = format!("{} (the batch size), or explicit slots", sequences.len());
            return Err(Error::Length { argument: "state", got: counters.len(), expected });
        }
        None => sequences.iter_mut().enumerate().for_each(|(b, s)| s.slot = b),
        Some(slots) => {
            if slots.len() != sequences.len() {
                let expected = format!("{} (the number of sequences)", sequences.len());
                return Err(Error::Length { argument: "slots", got: slots.len(), expected });
            }
            check_slots(slots, counters.len())?;
            sequences.iter_mut().zip(slots).for_each(|(s, &slot)| s.slot = slot);
        }
    }
    for s in sequences {
        s.position = counters[s.slot].tokens as usize;
    }
    Ok(())
}

/// Slots must lie inside the state and be distinct.
pub(crate) fn check_slots(slots: &[usize], available: usize) -> Result<()> {
    let mut taken = vec![None; available];
    for (i, &slot) in slots.iter().enumerate() {
        match taken.get_mut(slot) {
            None => {
                let expected = format!("less than the state's {available} slots");
                return Err(Error::value(format!("slots[{i}]"), slot, expected));
            }
            Some(Some(first)) => {
                let expected = format!("a slot other than slots[{first}]");
                return Err(Error::value(format!("slots[{i}]"), slot, expected));
            }
            Some(free) => *free = Some(i),
        }
    }
    Ok(())
}

fn check_rope(
    problem: &Problem,
    batch: &Batch<'_>,
    sequences: &[Sequence],
    counters: &[Counters],
) -> Result<()> {
    for s in sequences.iter().filter(|s| s.len > 0) {
        let c = &counters[s.slot];
        if c.open_len > 0 && c.rotated != batch.rope.is_some() {
            let (slot, open_len, rotated) = (s.slot, c.open_len, c.rotated);
            return Err(Error::RotationChanged { slot, open_len, rotated });
        }
    }
    let Some(rope) = &batch.rope else { return Ok(()) };
    rope.check(problem)?;
    let rows = rope.cos.shape()[0];
    let outside = |b: usize, t: usize, got: String| {
        let argument = format!("positions (sequence {b}, token {t})");
        Err(Error::value(argument, got, format!("0 to {rows} − 1 (rows of rope.cos)")))
    };
    let Some(positions) = rope.positions else {
        for (b, s) in sequences.iter().enumerate().filter(|(_, s)| s.len > 0) {
            if s.position + s.len > rows {
                return outside(b, s.len - 1, (s.position + s.len - 1).to_string());
            }
        }
        return Ok(());
    };
    let per_batch = if batch.packed { batch.tokens } else { sequences.len() * batch.tokens };
    if positions.len() != batch.tokens && positions.len() != per_batch {
        let expected = format!("{} (shared) or {per_batch} (per sequence)", batch.tokens);
        return Err(Error::Length { argument: "positions", got: positions.len(), expected });
    }
    for (b, s) in sequences.iter().enumerate() {
        for t in 0..s.len {
            // `as usize` in `position` turns a negative entry into a huge one: refused as well.
            let p = batch.position(s, t);
            if p >= rows {
                return outside(b, t, (p as i64).to_string());
            }
        }
    }
    Ok(())
}

/// Checks the element type and every output's shape.
pub(crate) fn check_outputs<T: Element>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    outputs: &Outputs<'_, T>,
) -> Result<()> {
    check_dtype::<T>("q", problem.dtype())?;
    let q = inputs.q.shape();
    let lead = &q[..q.len() - 2];
    let o = [lead, &[problem.heads(), problem.value_dim()]].concat();
    let lse = [&lead[..lead.len() - 1], &[problem.heads(), lead[lead.len() - 1]]].concat();
    let named = [
        ("o", Some(&outputs.o)),
        ("a_dot", outputs.a_dot.as_ref()),
        ("a_mem", outputs.a_mem.as_ref()),
    ];
    for (argument, view) in named.into_iter().filter_map(|(n, v)| v.map(|v| (n, v))) {
        view.check_shape(argument, &o, "[B, T, Hq, Dv] or packed [total, Hq, Dv]")?;
        view.check_rows(argument)?;
    }
    if let Some(view) = &outputs.lse {
        view.check_shape("lse", &lse, "[B, Hq, T] or packed [Hq, total]")?;
        view.check_rows("lse")?;
    }
    Ok(())
}

pub(crate) fn check_dtype<T: Element>(argument: &'static str, expected: DType) -> Result<()> {
    if T::DTYPE != expected {
        return Err(Error::DType { argument, got: T::DTYPE, expected });
    }
    Ok(())
}

impl<'a, T> Inputs<'a, T> {
    /// q, k and v by rows; only after `resolve` has accepted them.
    pub(crate) fn rows(&self) -> InputRows<'a, T> {
        InputRows { q: self.q.rows(), k: self.k.rows(), v: self.v.rows() }
    }
}

/// Rows of q, k and v.
#[derive(Clone, Copy)]
pub(crate) struct InputRows<'a, T> {
    pub q: Rows<'a, T>,
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
}
