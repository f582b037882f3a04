//! The gradient with respect to a state.

use std::marker::PhantomData;

use crate::error::{Error, Result};
use crate::memory::blocks::KeyBlocks;
use crate::memory::layout::HostLayout;
use crate::memory::{State, check_slots};
use crate::problem::Problem;
use crate::tensor::TensorView;

/// Gradient of a loss with respect to a [`State`]: to M and z, and to the keys and values of the open
/// segments, of which the rows below the state's `open_len` count. f32, as large as a state.
///
/// [`prefill_backward`](crate::prefill_backward) takes dL/d(state after the call) and leaves dL/d(state
/// before it) in its place; so a stream of calls is differentiated from the last call to the first.
#[derive(Debug)]
pub struct StateGradient<'a> {
    /// Its counters are those of empty streams.
    pub(crate) state: State,
    memory: PhantomData<&'a mut [u8]>,
}

/// The gradient with respect to a token of an open segment, of one KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenGradient {
    /// To the key as the memory will see it (and the local branch, without rotation), `[Dk]`.
    pub k: Vec<f32>,
    /// To the rotated key, `[Dk]`; zeros without rotation.
    pub k_rotated: Vec<f32>,
    /// To the value, `[Dv]`.
    pub v: Vec<f32>,
}

impl StateGradient<'static> {
    /// Zeros: a loss that does not depend on the state.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(problem: &Problem, slots: usize) -> Result<Self> {
        Ok(Self { state: State::new(problem, slots)?, memory: PhantomData })
    }
}

impl<'a> StateGradient<'a> {
    /// The gradient in `memory`, in the form of a state's [`HostLayout`] and worked on in place; the
    /// counters there are not read or written. Gradients of calls with a rotation need a layout with room for
    /// rotated keys.
    ///
    /// # Errors
    /// [`Error::Length`] and [`Error::Address`] unless it is as many bytes as the layout's at a multiple of
    /// 8.
    pub fn lent(layout: &HostLayout, memory: &'a mut [u8]) -> Result<Self> {
        // SAFETY: borrowed for as long as `self` lives: another of a shorter life cannot take its place.
        let (state, _) = unsafe { State::lent_empty(layout, memory) }?;
        Ok(Self { state, memory: PhantomData })
    }

    /// The problem whose states it belongs to.
    pub fn problem(&self) -> &Problem {
        self.state.problem()
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.state.sequences()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.state.bytes()
    }

    /// dL/dM, [slots, Hkv, Dk, Dv].
    pub fn memory(&self) -> TensorView<'_, f32> {
        self.state.memory()
    }

    /// dL/dz, [slots, Hkv, Dk].
    pub fn normalizer(&self) -> TensorView<'_, f32> {
        self.state.normalizer()
    }

    /// dL/dM and dL/dz of all slots, to write to.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], which does not come: nobody else holds this memory.
    pub fn memory_mut(&mut self) -> Result<(&mut [f32], &mut [f32])> {
        let (m, z) = self.state.own_memory()?;
        Ok((m, z))
    }

    /// Room for gradients to rotated keys.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Value`] where the memory is lent and has none.
    pub(crate) fn ensure_rotated(&mut self) -> Result<()> {
        match self.state.ensure_rotated() {
            Err(Error::Value { .. }) => {
                let expected = "one with room for rotated keys (the call has a rotation)";
                Err(Error::value("state gradient", "one without rotation", expected))
            }
            other => other.map(drop),
        }
    }

    /// As many slots as the state has?
    pub(crate) fn check(&self, slots: usize) -> Result<()> {
        if self.slots() != slots {
            let expected = format!("{slots} (slots of the state)");
            return Err(Error::Length { argument: "state gradient", got: self.slots(), expected });
        }
        Ok(())
    }

    /// The gradient to token `j` of a slot's open segment.
    ///
    /// # Errors
    /// [`Error::Value`] for a slot, KV head or token that a state does not have.
    pub fn open(&self, slot: usize, kv_head: usize, j: usize) -> Result<OpenGradient> {
        let p = self.state.problem;
        check_slots(&[slot], self.slots())?;
        for (argument, got, end) in [("kv_head", kv_head, p.kv_heads()), ("j", j, p.segment_len())]
        {
            if got >= end {
                return Err(Error::value(argument, got, format!("less than {end}")));
            }
        }
        let (open, blocks) = (self.state.open.read(), KeyBlocks::new(&p));
        let head = open.head(&p, slot, kv_head);
        let key = |keys: Option<&[f32]>| {
            let mut key = vec![0.0; p.key_dim()];
            if let Some(keys) = keys {
                blocks.get(keys, j, &mut key);
            }
            key
        };
        let v = head.v[j * p.value_dim()..][..p.value_dim()].to_vec();
        Ok(OpenGradient { k: key(Some(head.k)), k_rotated: key(head.k_rotated), v })
    }
}
