//! A state on candle's device, whichever that is.

use candle_core::{DType, Device, Result};
#[cfg(feature = "cuda")]
use infini_attn::cuda;
use infini_attn::{Problem, Slots};

use crate::error::{refused, wrapped};

/// The streams of one layer on a device of candle's: [`infini_attn::State`] on the CPU, with the feature
/// `cuda` [`infini_attn::cuda::State`](https://docs.rs/infini-attn). [`Slots`] has what they share, and
/// [`Pool`](infini_attn::Pool)s of it have slots of all layers.
///
/// ```
/// use candle_core::Device;
/// use infini_attn_candle::{Pool, Problem, Slots, State};
/// let layer = Problem::builder().heads(4).kv_heads(2).head_dim(64).segment_len(128).build()?;
/// let state = State::new(&layer, 2, false, &Device::Cpu)?;
/// assert_eq!((state.sequences(), state.tokens(0)), (2, 0));
/// let mut pool = Pool::from_layers(State::layers(&[layer; 3], 2, false, &Device::Cpu)?)?;
/// let slot = pool.allocate()?;
/// # assert_eq!(pool.index(slot)?, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
#[cfg_attr(
    feature = "cuda",
    expect(clippy::large_enum_variant, reason = "a few hundred bytes a layer")
)]
pub enum State {
    /// On the CPU.
    Cpu(infini_attn::State),
    /// On a CUDA device, on the stream of the `Device` of candle's that it was made with.
    #[cfg(feature = "cuda")]
    Cuda(cuda::State),
}

/// The same expression of either.
macro_rules! either {
    ($value:expr, $state:ident => $e:expr) => {
        match $value {
            State::Cpu($state) => $e,
            #[cfg(feature = "cuda")]
            State::Cuda($state) => $e,
        }
    };
}

impl State {
    /// Empty streams in slots 0 to `slots` − 1. `rotation`: with room for rotated keys, which on a CUDA
    /// device calls with [`Batch::rope`](crate::Batch::rope) need. (The CPU makes it when it is needed.)
    /// The layers of a model are better made together, by [`Self::layers`].
    ///
    /// # Errors
    /// For memory that is not there; for a device that is neither a CPU nor one of CUDA; for a CUDA device of
    /// `Device::new_cuda`, whose stream is another one in every thread: take `Device::new_cuda_with_stream`.
    pub fn new(problem: &Problem, slots: usize, rotation: bool, device: &Device) -> Result<Self> {
        let mut one = Self::layers(&[*problem], slots, rotation, device)?;
        Ok(one.remove(0))
    }

    /// A state per layer of a model. On a CUDA device they share the workspace of their calls.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn layers(
        problems: &[Problem],
        slots: usize,
        #[cfg_attr(not(feature = "cuda"), expect(unused_variables))] rotation: bool,
        device: &Device,
    ) -> Result<Vec<Self>> {
        let layers: infini_attn::Result<_> = match device {
            Device::Cpu => {
                problems.iter().map(|p| Ok(Self::Cpu(infini_attn::State::new(p, slots)?))).collect()
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(theirs) => {
                cuda::Device::from_stream(theirs.cuda_stream()).and_then(|device| {
                    let state = |p| cuda::State::new(&device, p, slots, rotation);
                    problems.iter().map(|p| Ok(Self::Cuda(state(p)?))).collect()
                })
            }
            other => {
                return Err(refused("device", format!("{:?}", other.location()), "Cpu or Cuda"));
            }
        };
        layers.map_err(wrapped)
    }

    /// A copy on the host; of a CUDA device it waits.
    ///
    /// # Errors
    /// For memory that is not there; the device's.
    pub fn to_host(&self) -> Result<infini_attn::State> {
        let all: Vec<_> = (0..self.sequences()).collect();
        self.to_host_slots(&all).map_err(wrapped)
    }

    /// Where it is, in words.
    pub(crate) fn place(&self) -> String {
        match self {
            Self::Cpu(_) => "Cpu".into(),
            #[cfg(feature = "cuda")]
            Self::Cuda(state) => format!("Cuda {{ gpu_id: {} }}", state.device().ordinal()),
        }
    }
}

impl Slots for State {
    fn problem(&self) -> &Problem {
        either!(self, state => state.problem())
    }

    fn sequences(&self) -> usize {
        either!(self, state => state.sequences())
    }

    fn tokens(&self, slot: usize) -> u64 {
        either!(self, state => state.tokens(slot))
    }

    fn open_len(&self, slot: usize) -> usize {
        either!(self, state => state.open_len(slot))
    }

    fn bytes(&self) -> usize {
        either!(self, state => state.bytes())
    }

    fn reset(&mut self, slots: &[usize]) -> infini_attn::Result<()> {
        either!(self, state => state.reset(slots))
    }

    fn fork(&self, slots: &[usize]) -> infini_attn::Result<Self> {
        match self {
            Self::Cpu(state) => state.fork(slots).map(Self::Cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda(state) => state.fork(slots).map(Self::Cuda),
        }
    }

    fn copy_slots(&mut self, from: &Self, pairs: &[(usize, usize)]) -> infini_attn::Result<()> {
        match (self, from) {
            (Self::Cpu(state), Self::Cpu(from)) => state.copy_slots(from, pairs),
            #[cfg(feature = "cuda")]
            (Self::Cuda(state), Self::Cuda(from)) => state.copy_slots(from, pairs),
            #[cfg(feature = "cuda")]
            (state, from) => Err(infini_attn::Error::Value {
                argument: "from".into(),
                got: format!("a state on {}", from.place()),
                expected: format!("one on {}", state.place()),
            }),
        }
    }

    fn copy_within(&mut self, pairs: &[(usize, usize)]) -> infini_attn::Result<()> {
        either!(self, state => state.copy_within(pairs))
    }

    fn truncate(&mut self, slot: usize, tokens: u64) -> infini_attn::Result<()> {
        either!(self, state => state.truncate(slot, tokens))
    }

    fn check_truncate(&self, slot: usize, tokens: u64) -> infini_attn::Result<()> {
        either!(self, state => state.check_truncate(slot, tokens))
    }

    fn to_host_slots(&self, slots: &[usize]) -> infini_attn::Result<infini_attn::State> {
        either!(self, state => state.to_host_slots(slots))
    }

    fn restore(&mut self, slots: &[usize], from: &infini_attn::State) -> infini_attn::Result<()> {
        either!(self, state => state.restore(slots, from))
    }

    fn resized(&self, slots: usize) -> infini_attn::Result<Self> {
        match self {
            Self::Cpu(state) => state.resized(slots).map(Self::Cpu),
            #[cfg(feature = "cuda")]
            Self::Cuda(state) => state.resized(slots).map(Self::Cuda),
        }
    }

    /// Of the CPU's state, or of a CUDA device's where that is larger: with 16-bit elements a device has room
    /// for more slots (`Pool::<infini_attn::cuda::State>::slots_in`).
    fn state_bytes(problem: &Problem, slots: usize, rotation: bool) -> infini_attn::Result<u64> {
        let bytes = infini_attn::State::state_bytes(problem, slots, rotation)?;
        #[cfg(feature = "cuda")]
        let bytes = bytes.max(cuda::State::state_bytes(problem, slots, rotation).unwrap_or(0));
        Ok(bytes)
    }
}

/// The element type of a problem for tensors of candle's.
///
/// # Errors
/// For types other than f32, f16 and bf16.
pub fn element_type(dtype: DType) -> Result<infini_attn::DType> {
    match dtype {
        DType::F32 => Ok(infini_attn::DType::F32),
        DType::F16 => Ok(infini_attn::DType::F16),
        DType::BF16 => Ok(infini_attn::DType::BF16),
        other => Err(refused("dtype", format!("{other:?}"), "F32, F16 or BF16")),
    }
}
