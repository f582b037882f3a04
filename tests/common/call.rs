//! One call of a case: its buffers and lengths, for every kind of backend.

use std::ops::Range;

use infini_attn::{Element, Inputs, Rope, TensorView};

use super::buffers::Strided;
use super::cases::{Batch, Rotation};

/// Rows of the rotation tables; more than any rotating case has tokens.
pub const TABLE_ROWS: usize = 1024;

/// Arguments of one call.
#[derive(Clone, Debug)]
pub struct Call<'a, T> {
    /// [B, T, Hq, Dk] or [total, Hq, Dk]; what belongs to no token is NaN.
    pub q: Strided<T>,
    /// [B, T, Hkv, Dk] or [total, Hkv, Dk].
    pub k: Strided<T>,
    /// [B, T, Hkv, Dv] or [total, Hkv, Dv].
    pub v: Strided<T>,
    pub batch: Batch,
    /// Tokens of every sequence.
    pub lens: Vec<i32>,
    /// Where they lie in their rows.
    pub ranges: Vec<Range<i32>>,
    /// Their running sum, from 0.
    pub cu: Vec<i32>,
    /// Slot of every sequence; none: the identity.
    pub slots: Option<Vec<usize>>,
    pub rope: Option<CallRope<'a>>,
}

/// Rotation of one call.
#[derive(Clone, Debug)]
pub struct CallRope<'a> {
    pub rotation: Rotation,
    /// [TABLE_ROWS, R / 2]
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// Table rows: T, B · T or total of them; none: continued from the state.
    pub positions: Option<Vec<i64>>,
}

/// The batch layout and slots of a call, on inputs for any memory.
macro_rules! laid_out {
    ($inputs:expr, $call:expr) => {{
        let inputs = match $call.batch {
            $crate::common::cases::Batch::Full => $inputs,
            $crate::common::cases::Batch::Padded => $inputs.seq_lens(&$call.lens),
            $crate::common::cases::Batch::Ranges => $inputs.seq_ranges(&$call.ranges),
            $crate::common::cases::Batch::Packed => $inputs.cu_seqlens(&$call.cu),
        };
        match &$call.slots {
            Some(slots) => inputs.slots(slots),
            None => inputs,
        }
    }};
}
#[allow(unused_imports, reason = "not every backend has inputs of its own")]
pub(crate) use laid_out;

impl<T: Element> Call<'_, T> {
    /// The most tokens of a sequence.
    pub fn longest(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0) as usize
    }

    /// Slot of every sequence.
    pub fn slots(&self) -> Vec<usize> {
        self.slots.clone().unwrap_or_else(|| (0..self.lens.len()).collect())
    }

    /// As the CPU backend and the reference take it.
    pub fn inputs(&self) -> Inputs<'_, T> {
        let inputs = Inputs::new(self.q.view(), self.k.view(), self.v.view());
        let inputs = laid_out!(inputs, self);
        match &self.rope {
            Some(r) => inputs.rope(rope(&r.rotation, r.cos, r.sin, r.positions.as_deref())),
            None => inputs,
        }
    }
}

/// Rotation by tables of [`TABLE_ROWS`] rows.
pub fn rope<'a>(
    rotation: &Rotation,
    cos: &'a [f32],
    sin: &'a [f32],
    positions: Option<&'a [i64]>,
) -> Rope<'a> {
    let shape = [TABLE_ROWS, rotation.channels / 2];
    let table = |data| TensorView::new(data, &shape).expect("a table of this shape");
    let rope = Rope::new(table(cos), table(sin)).interleaved(rotation.interleaved);
    match positions {
        Some(list) => rope.positions(list),
        None => rope,
    }
}

/// Leading extents of a call's tensors.
pub struct CallShape {
    /// [B, T] or [total].
    pub lead: Vec<usize>,
    /// First token of every sequence in the token dimension.
    first: Vec<usize>,
}

impl CallShape {
    pub fn new(batch: Batch, lens: &[usize]) -> Self {
        let longest = lens.iter().copied().max().unwrap_or(0);
        let lead = match batch {
            Batch::Full => vec![lens.len(), longest],
            Batch::Padded | Batch::Ranges => vec![lens.len(), longest + 2],
            Batch::Packed => vec![lens.iter().sum()],
        };
        let first = |b: usize| match batch {
            Batch::Full | Batch::Padded => 0,
            Batch::Ranges => (longest + 2 - lens[b]) * (2 - b % 3) / 2,
            Batch::Packed => lens[..b].iter().sum(),
        };
        let first = (0..lens.len()).map(first).collect();
        Self { lead, first }
    }

    /// Where the tokens of every sequence, of so many each, lie in the token dimension.
    pub fn ranges(&self, lens: &[usize]) -> Vec<Range<i32>> {
        self.first.iter().zip(lens).map(|(&at, &len)| at as i32..(at + len) as i32).collect()
    }

    /// Rows of padding of a sequence of `len` tokens, as counted within its row.
    pub fn padding(&self, b: usize, len: usize) -> impl Iterator<Item = usize> + use<> {
        let padded = if let [_, tokens] = self.lead[..] { tokens } else { 0 };
        let own = self.first[b]..self.first[b] + len;
        (0..padded).filter(move |t| !own.contains(t))
    }

    /// Leading indices of a token in q, k, v and o.
    pub fn token(&self, b: usize, t: usize) -> Vec<usize> {
        if self.lead.len() == 2 { vec![b, self.first[b] + t] } else { vec![self.first[b] + t] }
    }

    /// Indices of a row's log-sum-exp.
    pub fn lse(&self, b: usize, t: usize, h: usize) -> Vec<usize> {
        match self.lead.len() {
            2 => vec![b, h, self.first[b] + t],
            _ => vec![h, self.first[b] + t],
        }
    }
}
