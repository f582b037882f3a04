//! The only place where shapes, lengths, slots and positions are checked.

use std::ops::Range;

use super::form::{Form, Gate, Lengths, OutputForm, Positions, RopeForm, Sequence};
use crate::alloc;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::memory::{Counters, Named, add_tokens, check_slots_by};
use crate::problem::Problem;
use crate::tensor::Layout;

/// What a call's arguments come to, in room that the next call can use again.
#[derive(Default)]
pub(crate) struct Tables {
    pub sequences: Vec<Sequence>,
    named: Named,
}

impl Tables {
    /// Bytes of its room.
    pub fn bytes(&self) -> usize {
        size_of::<Sequence>() * self.sequences.capacity()
            + size_of::<(usize, usize)>() * self.named.capacity()
    }
}

impl Form<'_> {
    /// Checks everything against the problem and a state's counters, and names the sequences.
    #[allow(dead_code, reason = "only devices make tables of their own")]
    pub fn resolve(&self, problem: &Problem, counters: &[Counters]) -> Result<Vec<Sequence>> {
        let mut tables = Tables::default();
        self.resolve_into(problem, counters, &mut tables)?;
        Ok(tables.sequences)
    }

    /// The same, into tables of an earlier call.
    pub fn resolve_into(
        &self,
        problem: &Problem,
        counters: &[Counters],
        tables: &mut Tables,
    ) -> Result<()> {
        let rank = if self.packed() { 3 } else { 4 };
        let names = if self.packed() { "[total, H, D]" } else { "[B, T, H, D]" };
        if self.q.shape().len() != rank {
            return Err(Error::shape("q", self.q.shape(), format!("rank {rank} {names}")));
        }
        let lead = &self.q.shape()[..rank - 2];
        for (argument, layout, heads, dim) in [
            ("q", &self.q, problem.heads(), problem.key_dim()),
            ("k", &self.k, problem.kv_heads(), problem.key_dim()),
            ("v", &self.v, problem.kv_heads(), problem.value_dim()),
        ] {
            layout.check_shape(argument, &[lead, &[heads, dim]], names)?;
            layout.check_rows(argument)?;
        }
        check_gate(problem, self.gate)?;
        let count = check_lengths(&self.lengths, lead)?;
        check_slot_list(count, self.slots, counters.len(), &mut tables.named)?;
        let slot = |i| self.slots.map_or(i, |slots| slots[i]);
        let sequences = (0..count).map(|i| {
            let position = counters[slot(i)].tokens as usize;
            sequence(&self.lengths, lead, i, slot(i), position)
        });
        alloc::refill(&mut tables.sequences, sequences, "the table of sequences")?;
        let sequences = &tables.sequences;
        for (i, s) in sequences.iter().enumerate() {
            add_tokens(format_args!("q (sequence {i})"), s.position as u64, s.len as u64)?;
        }
        self.check_rope(problem, sequences, counters)
    }

    fn check_rope(
        &self,
        problem: &Problem,
        sequences: &[Sequence],
        counters: &[Counters],
    ) -> Result<()> {
        for s in sequences.iter().filter(|s| s.len > 0) {
            counters[s.slot].check_rotation(s.slot, self.rope.is_some())?;
        }
        let Some(rope) = &self.rope else { return Ok(()) };
        rope.check(problem)?;
        let rows = rope.cos.shape()[0];
        let count = match rope.positions {
            Positions::Continued => return check_continued(rows, sequences),
            Positions::Given(list) => list.len(),
            Positions::Device(count) => count,
        };
        let tokens = self.tokens();
        let all = sequences.len().saturating_mul(tokens);
        let per_batch = if self.packed() { tokens } else { all };
        if count != tokens && count != per_batch {
            let expected = format!("{tokens} (shared) or {per_batch} (per sequence)");
            return Err(Error::Length { argument: "positions", got: count, expected });
        }
        if let Positions::Device(_) = rope.positions {
            return Ok(());
        }
        for (b, s) in sequences.iter().enumerate() {
            for t in 0..s.len {
                // `as usize` in `position` turns a negative entry into a huge one: refused as well.
                let p = self.position(s, t);
                if p >= rows {
                    return Err(outside(rows, b, t, (p as i64).to_string()));
                }
            }
        }
        Ok(())
    }
}

impl Counters {
    /// New tokens of an open segment must come with rotation exactly if its first ones did.
    pub fn check_rotation(&self, slot: usize, rotated: bool) -> Result<()> {
        if self.open_len > 0 && self.rotated != rotated {
            let (open_len, rotated) = (self.open_len, self.rotated);
            return Err(Error::RotationChanged { slot, open_len, rotated });
        }
        Ok(())
    }
}

impl RopeForm<'_> {
    fn check(&self, problem: &Problem) -> Result<()> {
        let cos = self.cos.shape();
        if cos.len() != 2 {
            return Err(Error::shape("rope.cos", cos, "[positions, R/2]"));
        }
        self.sin.check_shape("rope.sin", &[cos], "the shape of rope.cos")?;
        if cos[1] > problem.key_dim() / 2 {
            let expected = format!("[positions, R/2] with R ≤ Dk = {}", problem.key_dim());
            return Err(Error::shape("rope.cos", cos, expected));
        }
        self.cos.check_rows("rope.cos")?;
        self.sin.check_rows("rope.sin")
    }
}

/// Positions continued from the state must end inside the tables.
pub(crate) fn check_continued(rows: usize, sequences: &[Sequence]) -> Result<()> {
    for (b, s) in sequences.iter().enumerate().filter(|(_, s)| s.len > 0) {
        if s.position + s.len > rows {
            return Err(outside(rows, b, s.len - 1, (s.position + s.len - 1).to_string()));
        }
    }
    Ok(())
}

fn outside(rows: usize, sequence: usize, token: usize, got: String) -> Error {
    let argument = format!("positions (sequence {sequence}, token {token})");
    Error::value(argument, got, format!("0 to {rows} − 1 (rows of rope.cos)"))
}

impl OutputForm {
    /// Checks every output's shape against the problem and the queries.
    pub fn check(&self, problem: &Problem, q: &Layout) -> Result<()> {
        let lead = &q.shape()[..q.shape().len() - 2];
        let o = [lead, &[problem.heads(), problem.value_dim()]];
        let lse = [&lead[..lead.len() - 1], &[problem.heads(), lead[lead.len() - 1]]];
        let named =
            [("o", Some(&self.o)), ("a_dot", self.a_dot.as_ref()), ("a_mem", self.a_mem.as_ref())];
        for (argument, layout) in named.into_iter().filter_map(|(n, l)| Some((n, l?))) {
            layout.check_shape(argument, &o, "[B, T, Hq, Dv] or packed [total, Hq, Dv]")?;
            layout.check_rows(argument)?;
        }
        if let Some(layout) = &self.lse {
            layout.check_shape("lse", &lse, "[B, Hq, T] or packed [Hq, total]")?;
            layout.check_rows("lse")?;
        }
        Ok(())
    }
}

pub(crate) fn check_dtype<T: Element>(argument: &'static str, expected: DType) -> Result<()> {
    dtype_is(argument, T::DTYPE, expected)
}

pub(crate) fn dtype_is(argument: &'static str, got: DType, expected: DType) -> Result<()> {
    if got != expected {
        return Err(Error::DType { argument, got, expected });
    }
    Ok(())
}

fn check_gate(problem: &Problem, gate: Gate<'_>) -> Result<()> {
    let got = match gate {
        Gate::Given(logits) => logits.len(),
        Gate::Device(len) => len,
    };
    if got != problem.heads() {
        let expected = format!("{} (one logit per query head)", problem.heads());
        return Err(Error::Length { argument: "gate", got, expected });
    }
    let Gate::Given(logits) = gate else { return Ok(()) };
    match logits.iter().position(|b| b.is_nan()) {
        Some(h) => Err(Error::value(format!("gate[{h}]"), "NaN", "a number or ±infinity")),
        None => Ok(()),
    }
}

/// Checks the token ranges; how many sequences they are.
fn check_lengths(lengths: &Lengths<'_>, lead: &[usize]) -> Result<usize> {
    match *lengths {
        Lengths::Full => Ok(lead[0]),
        Lengths::Padded(lens) => {
            check_batch("seq_lens", lens.len(), lead[0])?;
            let fits = |len: i32| usize::try_from(len).is_ok_and(|len| len <= lead[1]);
            if let Some(b) = lens.iter().position(|&len| !fits(len)) {
                let expected = format!("0 to T = {}", lead[1]);
                return Err(Error::value(format!("seq_lens[{b}]"), lens[b], expected));
            }
            Ok(lens.len())
        }
        Lengths::Ranges(ranges) => {
            check_batch("seq_ranges", ranges.len(), lead[0])?;
            let fits = |r: &Range<i32>| {
                0 <= r.start
                    && r.start <= r.end
                    && usize::try_from(r.end).is_ok_and(|e| e <= lead[1])
            };
            if let Some(b) = ranges.iter().position(|range| !fits(range)) {
                let expected = format!("a range of 0 to T = {}, not backwards", lead[1]);
                let got = format!("{:?}", ranges[b]);
                return Err(Error::value(format!("seq_ranges[{b}]"), got, expected));
            }
            Ok(ranges.len())
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
            Ok(cu.len() - 1)
        }
    }
}

/// As many entries of `argument` as there are rows in the batch.
fn check_batch(argument: &'static str, got: usize, rows: usize) -> Result<()> {
    if got != rows {
        let expected = format!("{rows} (the batch size)");
        return Err(Error::Length { argument, got, expected });
    }
    Ok(())
}

/// Sequence `i` of checked lengths.
fn sequence(
    lengths: &Lengths<'_>,
    lead: &[usize],
    i: usize,
    slot: usize,
    position: usize,
) -> Sequence {
    let (batch, first, len) = match *lengths {
        Lengths::Full => (i, 0, lead[1]),
        Lengths::Padded(lens) => (i, 0, lens[i] as usize),
        Lengths::Ranges(ranges) => (i, ranges[i].start as usize, ranges[i].len()),
        Lengths::Packed(cu) => (0, cu[i] as usize, (cu[i + 1] - cu[i]) as usize),
    };
    Sequence { slot, batch, first, len, position }
}

/// Every sequence must have a slot of its own, of those that are there.
fn check_slot_list(
    sequences: usize,
    slots: Option<&[usize]>,
    available: usize,
    named: &mut Named,
) -> Result<()> {
    let Some(slots) = slots else {
        if sequences != available {
            let expected = format!("{sequences} (the batch size), or explicit slots");
            return Err(Error::Length { argument: "state", got: available, expected });
        }
        return Ok(());
    };
    if slots.len() != sequences {
        let expected = format!("{sequences} (the number of sequences)");
        return Err(Error::Length { argument: "slots", got: slots.len(), expected });
    }
    check_slots_by(slots, available, named)
}

/// Refuses a sequence of more than `max` new tokens.
pub(crate) fn check_longest(sequences: &[Sequence], max: Option<usize>) -> Result<()> {
    let longest = sequences.iter().enumerate().max_by_key(|(_, s)| s.len);
    if let (Some(max), Some((b, s))) = (max, longest)
        && s.len > max
    {
        let expected = format!("0 to {max} new tokens (use prefill for more)");
        return Err(Error::value(format!("q (sequence {b})"), s.len, expected));
    }
    Ok(())
}
