//! States from states: copies, which share buffers until one of them is written to, and slots that are
//! taken out or put together.

use std::sync::Arc;

use super::floats::Floats;
use super::open::{InUse, Open, OpenSegments};
use super::{Counters, State, check_slot, too_large};
use crate::alloc;
use crate::error::{Error, Result};

impl State {
    /// A new state whose slot i continues where `slots[i]` stands now. A slot may be named several
    /// times (sampling several continuations of one prompt).
    ///
    /// # Errors
    /// [`Error::Value`] for a slot out of range, [`Error::OutOfMemory`].
    pub fn fork(&self, slots: &[usize]) -> Result<State> {
        (0..slots.len()).try_for_each(|i| check_slot(slots, i, self.sequences()))?;
        let copy = |all: &[f32]| -> Result<Arc<Floats>> {
            let each = all.len() / self.sequences().max(1);
            let mut copy = alloc::reserved(&[slots.len(), each], "")?;
            slots.iter().for_each(|slot| copy.extend_from_slice(&all[slot * each..][..each]));
            Ok(Arc::new(copy.into()))
        };
        let make = || -> Result<State> {
            Ok(State {
                problem: self.problem,
                counters: alloc::collected(slots.iter().map(|&slot| self.counters[slot]), "")?,
                m: copy(&self.m)?,
                z: copy(&self.z)?,
                open: self.copy_open(slots.iter().copied())?,
            })
        };
        make().map_err(|_| {
            too_large(&self.problem, slots.len(), !self.open.read().k_rotated.is_empty())
        })
    }

    /// The slots of all the states, one state after another, as one state: requests join a batch.
    /// (They leave it by [`Self::fork`].)
    ///
    /// ```
    /// # use infini_attn::{Problem, State};
    /// # let problem = Problem::builder().head_dim(8).segment_len(16).build()?;
    /// let (two, three) = (State::new(&problem, 2)?, State::new(&problem, 3)?);
    /// assert_eq!(State::concat(&[&two, &three])?.sequences(), 5);
    /// # Ok::<(), infini_attn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Length`] without states, [`Error::Problem`] when their problems differ,
    /// [`Error::OutOfMemory`].
    pub fn concat(states: &[&State]) -> Result<State> {
        let Some(first) = states.first() else {
            let expected = "at least one state".into();
            return Err(Error::Length { argument: "states", got: 0, expected });
        };
        let problem = first.problem;
        states.iter().try_for_each(|s| problem.check_same(&s.problem))?;
        let slots = states.iter().fold(0usize, |n, s| n.saturating_add(s.sequences()));
        let rotated = states.iter().any(|s| !s.open.read().k_rotated.is_empty());
        fn join<T: Copy>(states: &[&State], part: impl Fn(&State) -> &[T]) -> Result<Vec<T>> {
            let len = states.iter().fold(0usize, |n, s| n.saturating_add(part(s).len()));
            let mut all = alloc::reserved(&[len], "")?;
            states.iter().for_each(|s| all.extend_from_slice(part(s)));
            Ok(all)
        }
        let make = || -> Result<State> {
            let mut open = OpenSegments::new(&problem, slots, rotated)?;
            let mut first = 0;
            for state in states {
                let slots = state.in_use(0..state.sequences()).zip(first..);
                open.take_over(&problem, &state.open.read(), slots);
                first += state.sequences();
            }
            Ok(State {
                problem,
                counters: join(states, |s| &s.counters)?,
                m: Arc::new(join(states, |s| &s.m)?.into()),
                z: Arc::new(join(states, |s| &s.z)?.into()),
                open: Open::new(open),
            })
        };
        make().map_err(|_| too_large(&problem, slots, rotated))
    }

    /// [`Clone`], which panics where memory does not suffice: for a state of so many slots that their
    /// counters may not fit into it twice.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn try_clone(&self) -> Result<State> {
        if self.is_lent() {
            let slots = alloc::collected(0..self.sequences(), "the slots of a state")?;
            return self.fork(&slots);
        }
        Ok(State {
            problem: self.problem,
            counters: alloc::copied(&self.counters, "the counters of a state")?,
            m: Arc::clone(&self.m),
            z: Arc::clone(&self.z),
            open: self.open.clone(),
        })
    }

    /// Whether it is without room for rotated keys and cannot make any.
    pub(super) fn cannot_rotate(&self) -> bool {
        self.is_lent() && self.sequences() > 0 && self.open.read().k_rotated.is_empty()
    }

    /// Whether it lies in memory that is not its own: no copy shares that.
    fn is_lent(&self) -> bool {
        self.m.is_lent()
    }
}

impl Clone for State {
    fn clone(&self) -> Self {
        self.try_clone().unwrap_or_else(|e| panic!("{e}"))
    }
}

/// A buffer that copies of a state share, for one of them to write to: a copy if others hold it.
fn own<'a>(shared: &'a mut Arc<Floats>, what: &str) -> Result<&'a mut Floats> {
    if Arc::get_mut(shared).is_none() {
        *shared = Arc::new(alloc::copied(shared, what)?.into());
    }
    Ok(Arc::get_mut(shared).expect("just made"))
}

impl State {
    /// Room for rotated keys; whether this, the first call that rotates, made it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Value`] where the memory is lent and has none.
    pub(crate) fn ensure_rotated(&mut self) -> Result<bool> {
        let first = self.open.read().k_rotated.is_empty() && self.sequences() > 0;
        if self.cannot_rotate() {
            let expected = "a state with room for rotated keys";
            return Err(Error::value("rope", "a rotation", expected));
        }
        if first {
            let open = self.own_open()?;
            let len = open.k.len();
            open.k_rotated = alloc::zeroed(&[len], "the rotated keys of the open segments")?.into();
        }
        Ok(first)
    }

    /// Takes that room away again.
    pub(crate) fn forget_rotated(&mut self) {
        if let Some(open) = self.open.alone() {
            open.k_rotated = Vec::new().into();
        }
    }

    /// M and z, to write to.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; the state is as it was then, here and below.
    pub(crate) fn own_memory(&mut self) -> Result<(&mut Floats, &mut Floats)> {
        Ok((own(&mut self.m, "a copy of M")?, own(&mut self.z, "a copy of z")?))
    }

    /// The open segments, to write to.
    pub(crate) fn own_open(&mut self) -> Result<&mut OpenSegments> {
        if self.open.alone().is_none() {
            self.open = self.copy_open(0..self.sequences())?;
        }
        Ok(self.open.alone().expect("just made"))
    }

    /// Open segments of copies of slots.
    fn copy_open(&self, slots: impl ExactSizeIterator<Item = usize>) -> Result<Open> {
        let (p, open, len) = (&self.problem, self.open.read(), slots.len());
        let rotated = !open.k_rotated.is_empty();
        let mut copy =
            OpenSegments::new(p, len, rotated).map_err(|_| too_large(p, len, rotated))?;
        copy.take_over(p, &open, self.in_use(slots).zip(0..));
        Ok(Open::new(copy))
    }

    pub(super) fn in_use(&self, slots: impl Iterator<Item = usize>) -> impl Iterator<Item = InUse> {
        slots.map(|slot| {
            let c = &self.counters[slot];
            InUse { slot, rows: c.open_len, rotated: c.rotated }
        })
    }

    /// Counters and open segments of a state just assembled, to fill in.
    pub(crate) fn assembled(&mut self) -> (&[Counters], &mut OpenSegments) {
        (&self.counters, self.open.alone().expect("a state just assembled has no copies"))
    }

    /// Notes how far the rows of the slots go, after a call has moved their counters.
    pub(crate) fn note_filled(&mut self, slots: impl IntoIterator<Item = usize>) {
        if let Some(open) = self.open.alone() {
            slots.into_iter().for_each(|slot| open.filled[slot] = self.counters[slot].open_len);
        }
    }
}
