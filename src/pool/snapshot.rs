//! Slots taken out of a pool, on the host.

use std::path::Path;

use crate::error::{Error, Result};
use crate::memory::State;
use crate::memory::io::layers;
use crate::problem::Problem;

/// What [`Pool::snapshot`](super::Pool::snapshot) has taken out of a pool: a state per layer, of as many
/// slots each. Copies of it share memory, as those of a [`State`].
///
/// ```
/// use infini_attn::{Pool, Problem, Snapshot, State};
/// let layer = Problem::builder().heads(2).head_dim(8).segment_len(16).build()?;
/// let mut pool = Pool::<State>::new(&[layer; 2], 4)?;
/// let slot = pool.allocate()?;
/// let path = std::env::temp_dir().join(format!("conversation-{}", std::process::id()));
/// pool.snapshot(&[slot])?.save(&path)?;
/// let back = Snapshot::load_for(&[layer; 2], &path)?;
/// pool.restore(&[slot], &back)?;
/// # std::fs::remove_file(&path).ok();
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Snapshot {
    layers: Vec<State>,
}

impl Snapshot {
    /// Of states that are there.
    ///
    /// # Errors
    /// [`Error::Length`] without layers or when they differ in slots.
    pub fn from_layers(layers: Vec<State>) -> Result<Self> {
        let slots = layers.first().map_or(0, State::sequences);
        let other = layers.iter().map(State::sequences).find(|&others| others != slots);
        let refuse = |got, expected| Err(Error::Length { argument: "layers", got, expected });
        match other {
            _ if layers.is_empty() => refuse(0, "at least one".into()),
            Some(others) => refuse(others, format!("{slots} slots, as in layer 0")),
            None => Ok(Self { layers }),
        }
    }

    /// The states, a layer each.
    pub fn layers(&self) -> &[State] {
        &self.layers
    }

    /// The same, to own.
    pub fn into_layers(self) -> Vec<State> {
        self.layers
    }

    /// Slots that were taken out.
    pub fn sequences(&self) -> usize {
        self.layers[0].sequences()
    }

    /// Bytes held, whether or not copies share them.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(State::bytes).sum()
    }

    /// Writes all layers to one file, the way [`State::save`] writes a state: safetensors with a tensor of
    /// bytes `layers.I` per layer, which is a state file in itself.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        layers::save(&self.layers, path.as_ref())
    }

    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    /// Those of [`State::load`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_file(path.as_ref(), |_, _, _| Ok(()))
    }

    /// Reads it and refuses it unless it has a layer for each of these problems.
    ///
    /// # Errors
    /// Those of [`Self::load`], [`Error::Length`] for another number of layers, [`Error::Problem`] naming
    /// the first field that differs.
    pub fn load_for(problems: &[Problem], path: impl AsRef<Path>) -> Result<Self> {
        Self::from_file(path.as_ref(), |i, layers, found| {
            check_count(layers, problems.len())?;
            problems[i].check_same(found)
        })
    }

    fn from_file(
        path: &Path,
        accept: impl Fn(usize, usize, &Problem) -> Result<()>,
    ) -> Result<Self> {
        // Files without layers or with different slots in them are no snapshots.
        let name = || path.display().to_string();
        Self::from_layers(layers::load(path, accept)?)
            .map_err(|e| Error::Format { path: name(), reason: e.to_string() })
    }

    /// Whether it has a layer for each of these problems.
    pub(super) fn check_layers<'a>(
        &self,
        problems: impl ExactSizeIterator<Item = &'a Problem>,
    ) -> Result<()> {
        check_count(self.layers.len(), problems.len())?;
        let layers = self.layers.iter().zip(problems);
        layers.into_iter().try_for_each(|(layer, problem)| problem.check_same(layer.problem()))
    }
}

fn check_count(got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let expected = format!("{expected} (the layers of the model)");
    Err(Error::Length { argument: "layers", got, expected })
}
