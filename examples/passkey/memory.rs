//! States on the CPU or on a CUDA device, behind the few operations of the experiment.

use anyhow::Result;
#[cfg(feature = "cuda")]
use infini_attn::cuda;
use infini_attn::{DType, Inputs, Outputs, Problem, State, TensorView, TensorViewMut, prefill};

/// Where the memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Place {
    Cpu,
    Cuda,
}

/// A place that was opened.
pub enum Backend {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(cuda::Device),
}

impl Backend {
    pub fn open(place: Place) -> Result<Self> {
        match place {
            Place::Cpu => Ok(Self::Cpu),
            #[cfg(feature = "cuda")]
            Place::Cuda => Ok(Self::Cuda(cuda::Device::new(0)?)),
            #[cfg(not(feature = "cuda"))]
            Place::Cuda => anyhow::bail!(
                "--device cuda: built without CUDA; cargo run --release --features cuda --example \
                 passkey -- --device cuda"
            ),
        }
    }

    /// Element type of keys, values and outputs: the constructed ones are exact in either.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Cpu => DType::F32,
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => DType::F16,
        }
    }

    pub fn describe(&self) -> Result<String> {
        match self {
            Self::Cpu => Ok("the CPU, f32".into()),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Ok(format!("{}, f16", device.name()?)),
        }
    }

    /// One empty stream.
    pub fn state(&self, problem: &Problem) -> Result<Memory> {
        match self {
            Self::Cpu => Ok(Memory::Cpu(State::new(problem, 1)?)),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => {
                Ok(Memory::Cuda(Box::new(cuda::State::new(device, problem, 1, false)?)))
            }
        }
    }
}

/// A pool of states.
pub enum Memory {
    Cpu(State),
    #[cfg(feature = "cuda")]
    Cuda(Box<cuda::State>),
}

impl Memory {
    pub fn fork(&self, slots: &[usize]) -> Result<Self> {
        match self {
            Self::Cpu(state) => Ok(Self::Cpu(state.fork(slots)?)),
            #[cfg(feature = "cuda")]
            Self::Cuda(state) => Ok(Self::Cuda(Box::new(state.fork(slots)?))),
        }
    }

    pub fn reset(&mut self, slots: &[usize]) -> Result<()> {
        match self {
            Self::Cpu(state) => Ok(state.reset(slots)?),
            #[cfg(feature = "cuda")]
            Self::Cuda(state) => Ok(state.reset(slots)?),
        }
    }

    pub fn sequences(&self) -> usize {
        match self {
            Self::Cpu(state) => state.sequences(),
            #[cfg(feature = "cuda")]
            Self::Cuda(state) => state.sequences(),
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Self::Cpu(state) => state.bytes(),
            #[cfg(feature = "cuda")]
            Self::Cuda(state) => state.bytes(),
        }
    }
}

/// Features of one text, and the call that feeds them to slots.
pub struct Feed {
    problem: Problem,
    gate: Vec<f32>,
    /// Keys [T + 1, H, D], values [T, H, D].
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    outputs: Vec<f32>,
    #[cfg(feature = "cuda")]
    on_device: Option<device::Features>,
}

impl Feed {
    /// With the gate open: the local attention contributes nothing.
    pub fn new(problem: &Problem) -> Self {
        Self {
            problem: *problem,
            gate: vec![f32::INFINITY; problem.heads()],
            keys: vec![],
            values: vec![],
            outputs: vec![],
            #[cfg(feature = "cuda")]
            on_device: None,
        }
    }

    /// Keys and values, about to be replaced.
    pub fn features(&mut self) -> (&mut Vec<f32>, &mut Vec<f32>) {
        #[cfg(feature = "cuda")]
        {
            self.on_device = None;
        }
        (&mut self.keys, &mut self.values)
    }

    /// Feeds the text to each of `slots`; gives the last token's output, [H, D], in the last of
    /// them.
    pub fn prefill(&mut self, slots: &[usize], state: &mut Memory) -> Result<&[f32]> {
        let width = self.problem.heads() * self.problem.key_dim();
        match state {
            Memory::Cpu(state) => self.prefill_cpu(slots, state)?,
            #[cfg(feature = "cuda")]
            Memory::Cuda(state) => {
                let (keys, values, gate) = (&self.keys, &self.values, &self.gate);
                let features = match &mut self.on_device {
                    Some(features) => features,
                    none => none.insert(device::Features::new(state.device(), keys, values, gate)?),
                };
                self.outputs = features.prefill(&self.problem, slots, state)?;
            }
        }
        Ok(&self.outputs[self.outputs.len() - width..])
    }

    fn prefill_cpu(&mut self, slots: &[usize], state: &mut State) -> Result<()> {
        let (shape, strides) = shared(&self.problem, slots.len(), self.values.len());
        let view = |data, offset| TensorView::strided(data, offset, &shape, &strides);
        let width = strides[1] as usize;
        // The query of a token is the key of the next.
        let inputs =
            Inputs::new(view(&self.keys, width)?, view(&self.keys, 0)?, view(&self.values, 0)?);
        self.outputs.resize(shape.iter().product(), 0.0);
        let outputs = Outputs::new(TensorViewMut::new(&mut self.outputs, &shape)?);
        prefill(&self.problem, &inputs.slots(slots), &self.gate, state, outputs)?;
        Ok(())
    }
}

/// Shape and strides of one text for all slots: batch stride 0.
fn shared(problem: &Problem, slots: usize, elements: usize) -> ([usize; 4], [i64; 4]) {
    let (heads, dim) = (problem.heads(), problem.key_dim());
    let width = heads * dim;
    ([slots, elements / width, heads, dim], [0, width as i64, dim as i64, 1])
}

#[cfg(feature = "cuda")]
mod device {
    use anyhow::Result;
    use cudarc::driver::CudaSlice;
    use half::f16;
    use infini_attn::cuda::{
        Device, Gate, Inputs, Outputs, State, TensorView, TensorViewMut, prefill,
    };
    use infini_attn::{Element, Problem};

    /// Features in device memory, in f16.
    pub struct Features {
        keys: CudaSlice<f16>,
        values: CudaSlice<f16>,
        gate: Gate,
    }

    impl Features {
        pub fn new(device: &Device, keys: &[f32], values: &[f32], gate: &[f32]) -> Result<Self> {
            let upload = |wide: &[f32]| {
                let mut narrow = vec![f16::ZERO; wide.len()];
                f16::narrow(wide, &mut narrow);
                device.upload(&narrow)
            };
            let (keys, values, gate) = (upload(keys)?, upload(values)?, Gate::new(device, gate)?);
            Ok(Self { keys, values, gate })
        }

        /// The last token's output in the last slot, [H, D].
        pub fn prefill(
            &self,
            problem: &Problem,
            slots: &[usize],
            state: &mut State,
        ) -> Result<Vec<f32>> {
            let (shape, strides) = super::shared(problem, slots.len(), self.values.len());
            let view = |data, offset| TensorView::strided(data, offset, &shape, &strides);
            let width = strides[1] as usize;
            let (q, k) = (view(&self.keys, width)?, view(&self.keys, 0)?);
            let inputs = Inputs::new(q, k, view(&self.values, 0)?).slots(slots);
            let stream = state.device().stream().clone();
            let mut o = stream.alloc_zeros::<f16>(shape.iter().product())?;
            let outputs = Outputs::new(TensorViewMut::new(&mut o, &shape)?);
            prefill(problem, &inputs, &self.gate, state, outputs)?;
            let last = stream.clone_dtoh(&o.slice(o.len() - width..))?;
            state.device().synchronize()?;
            let mut wide = vec![0.0; width];
            f16::widen(&last, &mut wide);
            Ok(wide)
        }
    }
}
