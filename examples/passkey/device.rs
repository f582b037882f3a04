//! The memory on a CUDA device, in f16.

use anyhow::Result;
use cudarc::driver::CudaSlice;
use half::f16;
use infini_attn::cuda::{Device, Gate, Inputs, Outputs, State, TensorView, TensorViewMut, prefill};
use infini_attn::{DType, Element, Problem};

use crate::memory::{Backend, Text};

pub struct Cuda(Device);

impl Cuda {
    pub fn open() -> Result<Self> {
        Ok(Self(Device::new(0)?))
    }
}

/// In device memory.
pub struct Features {
    keys: CudaSlice<f16>,
    values: CudaSlice<f16>,
    gate: Gate<'static>,
}

impl Backend for Cuda {
    type State = State;
    type Features = Features;

    fn dtype(&self) -> DType {
        DType::F16
    }

    fn describe(&self) -> Result<String> {
        Ok(format!("{}, f16", self.0.name()?))
    }

    fn state(&self, problem: &Problem) -> Result<State> {
        Ok(State::new(&self.0, problem, 1, false)?)
    }

    fn features(&self, text: &Text) -> Result<Features> {
        let upload = |wide: &[f32]| {
            let mut narrow = vec![f16::ZERO; wide.len()];
            f16::narrow(wide, &mut narrow);
            self.0.upload(&narrow)
        };
        let (keys, values) = (upload(&text.keys)?, upload(&text.values)?);
        Ok(Features { keys, values, gate: Gate::new(&self.0, &text.gate)? })
    }

    fn prefill(
        &self,
        text: &Text,
        features: &mut Features,
        slots: &[usize],
        state: &mut State,
    ) -> Result<Vec<f32>> {
        let (shape, strides) = text.shared(slots.len());
        let view = |data, offset| TensorView::strided(data, offset, &shape, &strides);
        let width = text.width();
        let (q, k) = (view(&features.keys, width)?, view(&features.keys, 0)?);
        let inputs = Inputs::new(q, k, view(&features.values, 0)?).slots(slots);
        let stream = self.0.stream();
        let mut o = stream.alloc_zeros::<f16>(shape.iter().product())?;
        let outputs = Outputs::new(TensorViewMut::new(&mut o, &shape)?);
        prefill(&text.problem, &inputs, &features.gate, state, outputs)?;
        let last = stream.clone_dtoh(&o.slice(o.len() - width..))?;
        self.0.synchronize()?;
        let mut wide = vec![0.0; width];
        f16::widen(&last, &mut wide);
        Ok(wide)
    }
}
