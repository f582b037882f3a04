//! The operator on tensors in the memory of a CUDA device. Everything is enqueued while candle's locks and
//! cudarc's guards of the tensors are held.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Storage};
use infini_attn::Element;
use infini_attn::cuda::{Gate, Inputs, Outputs, Rope, State, TensorView, TensorViewMut};

use crate::error::{elements, refused, wrapped};
use crate::operator::{Call, Lent, Output, OutputShapes, described, strides};

pub fn forward<T: Element + CudaDType + DeviceRepr>(
    call: &Call<'_>,
    qkv: [(&CudaStorage, &Layout); 3],
    shapes: &OutputShapes,
    state: &mut State,
) -> Result<Vec<Output<CudaStorage>>> {
    let device = &qkv[0].0.device;
    let [q, k, v] = qkv.map(|(s, layout)| view::<T>(s.as_cuda_slice()?, layout));
    let first = call.gate.layout.start_offset();
    let gate = call.gate.slice()?.slice(first..first + call.gate.layout.shape().elem_count());
    let gate = Gate::lent(state.device(), &gate).map_err(wrapped)?;
    let rope = match &call.rope {
        Some(rope) => Some(
            Rope::new(rope.cos.device_view()?, rope.sin.device_view()?)
                .interleaved(rope.interleaved)
                .positions(call.positions),
        ),
        None => None,
    };
    let inputs = described!(Inputs::new(q?, k?, v?), call.batch, rope);

    let mut o = buffer::<T>(device, &shapes.o, "o")?;
    let mut others = match call.parts {
        true => Some((
            buffer::<f32>(device, &shapes.lse, "lse")?,
            buffer::<T>(device, &shapes.o, "a_dot")?,
            buffer::<T>(device, &shapes.o, "a_mem")?,
        )),
        false => None,
    };
    let mut outputs = Outputs::new(writable(&mut o, &shapes.o)?);
    if let Some((lse, a_dot, a_mem)) = &mut others {
        outputs = outputs
            .lse(writable(lse, &shapes.lse)?)
            .a_dot(writable(a_dot, &shapes.o)?)
            .a_mem(writable(a_mem, &shapes.o)?);
    }
    let problem = *state.problem();
    infini_attn::cuda::forward(&problem, &inputs, &gate, state, outputs).map_err(wrapped)?;
    let mut all = vec![output(o, &shapes.o, device)];
    if let Some((lse, a_dot, a_mem)) = others {
        all.push(output(lse, &shapes.lse, device));
        all.extend([a_dot, a_mem].map(|x| output(x, &shapes.o, device)));
    }
    Ok(all)
}

/// A tensor that stands for none: candle has no empty ones on a device.
pub fn nothing(device: &CudaDevice) -> Result<CudaStorage> {
    Ok(CudaStorage::wrap_cuda_slice(buffer::<u8>(device, &[], "a tensor")?, device.clone()))
}

fn view<'a, T: Element + DeviceRepr>(
    data: &'a CudaSlice<T>,
    layout: &Layout,
) -> Result<TensorView<'a, T>> {
    TensorView::strided(data, layout.start_offset(), layout.dims(), &strides(layout))
        .map_err(wrapped)
}

fn writable<'a, T: Element + DeviceRepr>(
    data: &'a mut CudaSlice<T>,
    shape: &[usize],
) -> Result<TensorViewMut<'a, T>> {
    TensorViewMut::strided(data, 0, shape, &strides(&Layout::contiguous(shape))).map_err(wrapped)
}

/// Memory of candle's allocator for an output, of any content: the call writes all of it. One element at
/// least, for there are no empty allocations.
fn buffer<T: DeviceRepr>(device: &CudaDevice, shape: &[usize], what: &str) -> Result<CudaSlice<T>> {
    let count = elements::<T>(shape, what)?.max(1);
    // SAFETY: the elements are numbers, and every plan writes all rows of its outputs, padding too. Where
    // a call fails, nobody reads them.
    unsafe { device.alloc(count) }
}

fn output<T: CudaDType>(
    data: CudaSlice<T>,
    shape: &[usize],
    device: &CudaDevice,
) -> Output<CudaStorage> {
    (CudaStorage::wrap_cuda_slice(data, device.clone()), shape.to_vec())
}

impl Lent<'_> {
    fn slice(&self) -> Result<&CudaSlice<f32>> {
        match &*self.storage {
            Storage::Cuda(storage) => storage.as_cuda_slice(),
            _ => Err(refused(self.name, "a tensor on another device", "one on that of the state")),
        }
    }

    fn device_view(&self) -> Result<TensorView<'_, f32>> {
        view(self.slice()?, self.layout)
    }
}
