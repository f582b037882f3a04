//! States of the reference and their gradients as numbers, a row of them per slot: for tensors of other
//! libraries.

use super::backward::{OpenGradient, StateGradient};
use super::forward::{STATE, State, TOKEN};
use super::rows::Token;
use crate::alloc;
use crate::error::{Error, Result};
use crate::memory::Counters;
use crate::problem::Problem;

/// Counters at the end of a row: tokens, committed, open_len, and 1 where the open segment is rotated.
const COUNTERS: usize = 4;

/// Numbers of M, of z, and of a token: key, key as the local branch sees it, value.
fn widths(p: &Problem) -> [usize; 3] {
    let (h, dk, dv) = (p.kv_heads(), p.key_dim(), p.value_dim());
    [h * dk * dv, h * dk, h * (2 * dk + dv)]
}

/// Numbers of a slot as [`State::to_rows`] gives them.
pub fn row_len(problem: &Problem) -> usize {
    let [m, z, token] = widths(problem);
    m + z + problem.segment_len() * token + COUNTERS
}

fn check(problem: &Problem, slots: usize, rows: &[f64], argument: &'static str) -> Result<()> {
    let width = row_len(problem);
    match slots.checked_mul(width) == Some(rows.len()) {
        true => Ok(()),
        false => {
            let expected = format!("{slots} rows of {width}");
            Err(Error::Length { argument, got: rows.len(), expected })
        }
    }
}

/// The tokens of a row as their parts, `[key, key of the local branch, value]` each.
fn tokens<'a>(p: &Problem, row: &'a [f64]) -> impl Iterator<Item = Result<[Vec<f64>; 3]>> + 'a {
    let ([m, z, token], key) = (widths(p), p.kv_heads() * p.key_dim());
    let tokens = row[m + z..row.len() - COUNTERS].chunks_exact(token);
    tokens.map(move |token| {
        let copy = |part: &[f64]| alloc::copied(part, TOKEN);
        Ok([copy(&token[..key])?, copy(&token[key..2 * key])?, copy(&token[2 * key..])?])
    })
}

/// Writes M, z and the tokens of a slot into its row.
fn write<'a>(
    p: &Problem,
    row: &mut [f64],
    m: &[f64],
    z: &[f64],
    tokens: impl Iterator<Item = [&'a Vec<f64>; 3]>,
) {
    let (to_m, rest) = row.split_at_mut(m.len());
    let (to_z, rest) = rest.split_at_mut(z.len());
    to_m.copy_from_slice(m);
    to_z.copy_from_slice(z);
    let [.., width] = widths(p);
    for (to, parts) in rest.chunks_exact_mut(width).zip(tokens) {
        to.iter_mut().zip(parts.into_iter().flatten()).for_each(|(to, x)| *to = *x);
    }
}

impl State {
    /// All slots as rows of [`row_len`] numbers: M [Hkv, Dk, Dv], z [Hkv, Dk]; of each of the N tokens that
    /// an open segment may have its keys [Hkv, Dk], those of the local branch and the values [Hkv, Dv], zeros
    /// where it has none; tokens, committed, open_len, and 1 where the open segment is rotated.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn to_rows(&self) -> Result<Vec<f64>> {
        let (p, [m, z, _]) = (&self.problem, widths(&self.problem));
        let mut rows = alloc::zeroed(&[self.counters.len(), row_len(p)], STATE)?;
        for (slot, row) in rows.chunks_exact_mut(row_len(p)).enumerate() {
            let tokens = self.open[slot].iter().map(|t| [&t.k, &t.k_local, &t.v]);
            write(p, row, &self.m[slot * m..][..m], &self.z[slot * z..][..z], tokens);
            let counters = self.counters[slot].stored();
            let at = row.len() - COUNTERS;
            row[at..].iter_mut().zip(counters).for_each(|(to, n)| *to = n as f64);
        }
        Ok(rows)
    }

    /// The state of such rows. Counters are whole numbers up to 2^53.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Value`] for counters that no sequence of calls leads to,
    /// [`Error::OutOfMemory`].
    pub fn from_rows(problem: &Problem, slots: usize, rows: &[f64]) -> Result<Self> {
        check(problem, slots, rows, "state")?;
        let (mut state, [m, z, _]) = (Self::new(problem, slots)?, widths(problem));
        for (slot, row) in rows.chunks_exact(row_len(problem)).enumerate() {
            state.m[slot * m..][..m].copy_from_slice(&row[..m]);
            state.z[slot * z..][..z].copy_from_slice(&row[m..][..z]);
            let mut stored = [0; COUNTERS];
            for (to, &n) in stored.iter_mut().zip(&row[row.len() - COUNTERS..]) {
                *to = n as i64;
                if *to as f64 != n {
                    let expected = "a whole number";
                    return Err(Error::value(format!("counters[{slot}]"), n, expected));
                }
            }
            state.counters[slot] = Counters::from_stored(stored, problem, true, slot)?;
            for token in tokens(problem, row).take(state.counters[slot].open_len) {
                let [k, k_local, v] = token?;
                alloc::grow(&mut state.open[slot], STATE)?;
                state.open[slot].push(Token { k, k_local, v });
            }
        }
        Ok(state)
    }
}

impl StateGradient {
    /// The gradient as rows like those of a state, zeros where they have counters.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn to_rows(&self, problem: &Problem) -> Result<Vec<f64>> {
        let (p, [m, z, _]) = (problem, widths(problem));
        let mut rows = alloc::zeroed(&[self.open.len(), row_len(p)], STATE)?;
        for (slot, row) in rows.chunks_exact_mut(row_len(p)).enumerate() {
            let tokens = self.open[slot].iter().map(|t| [&t.k, &t.k_rotated, &t.v]);
            write(p, row, &self.m[slot * m..][..m], &self.z[slot * z..][..z], tokens);
        }
        Ok(rows)
    }

    /// The gradient of such rows, to slots whose open segments have so many tokens.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::OutOfMemory`].
    pub fn from_rows(problem: &Problem, open_len: &[usize], rows: &[f64]) -> Result<Self> {
        check(problem, open_len.len(), rows, "state gradient")?;
        let [m, z, _] = widths(problem);
        let slots = open_len.len();
        let mut gradient = Self {
            m: alloc::reserved(&[slots, m], STATE)?,
            z: alloc::reserved(&[slots, z], STATE)?,
            open: alloc::reserved(&[slots], STATE)?,
        };
        for (row, &open_len) in rows.chunks_exact(row_len(problem)).zip(open_len) {
            gradient.m.extend_from_slice(&row[..m]);
            gradient.z.extend_from_slice(&row[m..][..z]);
            let mut open = alloc::reserved(&[open_len], STATE)?;
            for token in tokens(problem, row).take(open_len) {
                let [k, k_rotated, v] = token?;
                open.push(OpenGradient { k, k_rotated, v });
            }
            gradient.open.push(open);
        }
        Ok(gradient)
    }
}
