//! What a model's conversations have seen.

use std::path::Path;

use candle_core::{DType, Device, Result};
use infini_attn::{Pool, Problem, Slot, Snapshot};

use crate::batch::Rope;
use crate::config::Config;
use crate::error::{refused, wrapped};
use crate::state::State;

/// The states of all layers of a [`Model`](crate::Model), a slot per conversation, of one size however long
/// conversations get; and the tables of its rotation.
#[derive(Debug)]
pub struct Cache {
    pub(crate) pool: Pool<State>,
    pub(crate) rope: Rope,
    layers: Vec<Problem>,
    pub(crate) kind: Kind,
}

/// What models and caches have in common that belong together.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kind {
    layers: usize,
    /// Whatever the type of elements.
    problem: Problem,
    /// Of the rotation.
    frequencies: Vec<f64>,
}

impl Kind {
    pub fn of(config: &Config) -> Result<Self> {
        config.check()?;
        let (problem, frequencies) = (config.problem(DType::F32)?, config.frequencies()?);
        Ok(Self { layers: config.num_hidden_layers, problem, frequencies })
    }

    /// That a cache of this kind belongs to a model of that.
    pub fn check_same(&self, model: &Self) -> Result<()> {
        if self.layers != model.layers {
            let (got, expected) = (self.layers, format!("{} (the model's)", model.layers));
            return Err(refused("cache", format!("{got} layers"), expected));
        }
        model.problem.check_same(&self.problem).map_err(wrapped)?;
        if self.frequencies != model.frequencies {
            return Err(refused("cache", "one of another rotation", "the model's"));
        }
        Ok(())
    }
}

impl Cache {
    /// Room for so many conversations of a model whose weights are of type `dtype`, on its device.
    ///
    /// # Errors
    /// For a configuration without settings or with values that the operator does not serve; those of
    /// [`State::new`].
    pub fn new(config: &Config, slots: usize, dtype: DType, device: &Device) -> Result<Self> {
        let kind = Kind::of(config)?;
        let layers = vec![config.problem(dtype)?; config.num_hidden_layers];
        let states = State::layers(&layers, slots, true, device)?;
        let pool = Pool::from_layers(states).map_err(wrapped)?;
        Ok(Self { pool, rope: config.rope(device)?, layers, kind })
    }

    /// The slots.
    pub fn pool(&self) -> &Pool<State> {
        &self.pool
    }

    /// The slots, to be allocated, freed, forked, truncated: `infini_attn`'s documentation of `Pool`, and
    /// docs/engines.md.
    pub fn pool_mut(&mut self) -> &mut Pool<State> {
        &mut self.pool
    }

    /// Tables of the rotation, for modules of one's own.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Runs a model of one's own, which brings so many new tokens to each of the slots in every layer: `run`
    /// gets the layers' states, the slots for [`Batch::slots`](crate::Batch::slots), and the rotation. If it
    /// fails, all layers stand where they stood (`Pool::step`).
    ///
    /// # Errors
    /// Those of `run`; for slots that are not in use or named twice.
    pub fn step<T>(
        &mut self,
        sequences: &[(Slot, usize)],
        run: impl FnOnce(&mut [State], &[usize], &Rope) -> Result<T>,
    ) -> Result<T> {
        let rope = &self.rope;
        let run = |states: &mut [State], slots: &[usize]| Ok(run(states, slots, rope)?);
        self.pool.step(sequences, run).map_err(|StepError(error)| error)
    }

    /// Writes a conversation to a file.
    ///
    /// # Errors
    /// For a slot that is not in use, for a file that cannot be written.
    pub fn save(&self, slot: Slot, path: impl AsRef<Path>) -> Result<()> {
        self.pool.snapshot(&[slot]).and_then(|snapshot| snapshot.save(path)).map_err(wrapped)
    }

    /// Lets a slot continue where a file stands that [`Self::save`] wrote.
    ///
    /// # Errors
    /// For a slot that is not in use, for a file that cannot be read or is of another model; the slot stays
    /// as it was.
    pub fn load(&mut self, slot: Slot, path: impl AsRef<Path>) -> Result<()> {
        let snapshot = Snapshot::load_for(&self.layers, path).map_err(wrapped)?;
        self.pool.restore(&[slot], &snapshot).map_err(wrapped)
    }
}

/// An error of either crate, where one function meets both.
struct StepError(candle_core::Error);

impl From<candle_core::Error> for StepError {
    fn from(error: candle_core::Error) -> Self {
        Self(error)
    }
}

impl From<infini_attn::Error> for StepError {
    fn from(error: infini_attn::Error) -> Self {
        Self(wrapped(error))
    }
}
