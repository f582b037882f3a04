//! The operator on tensors in the CPU's memory.

use candle_core::{CpuStorage, Layout, Result, Storage, WithDType};
use infini_attn::{Element, Inputs, Outputs, Rope, TensorView, TensorViewMut};

use crate::error::{refused, wrapped, zeros};
use crate::gradient::Record;
use crate::operator::{Call, Lent, Output, OutputShapes, Rotation, described, strides};

pub fn forward<T: Element + WithDType>(
    call: &Call<'_>,
    qkv: [(&CpuStorage, &Layout); 3],
    shapes: &OutputShapes,
    state: &mut infini_attn::State,
) -> Result<Vec<Output<CpuStorage>>> {
    let [q, k, v] = qkv.map(|(storage, layout)| view::<T>(storage.as_slice()?, layout));
    let gate = call.gate.view()?;
    let gate = gate.as_slice().expect("contiguous");
    let rope = call.rope.as_ref().map(|rope| rotation(rope, call.positions)).transpose()?;
    let inputs = described!(Inputs::new(q?, k?, v?), call.batch, rope);

    let mut o = zeros::<T>(&shapes.o, "o")?;
    let mut others = match call.parts {
        true => Some((
            zeros::<f32>(&shapes.lse, "lse")?,
            zeros::<T>(&shapes.o, "a_dot")?,
            zeros::<T>(&shapes.o, "a_mem")?,
        )),
        false => None,
    };
    let mut outputs = Outputs::new(TensorViewMut::new(&mut o, &shapes.o).map_err(wrapped)?);
    if let Some((lse, a_dot, a_mem)) = &mut others {
        outputs = outputs
            .lse(TensorViewMut::new(lse, &shapes.lse).map_err(wrapped)?)
            .a_dot(TensorViewMut::new(a_dot, &shapes.o).map_err(wrapped)?)
            .a_mem(TensorViewMut::new(a_mem, &shapes.o).map_err(wrapped)?);
    }
    let mut record = call.record.borrow_mut();
    if let Some(Record { tape, lse }) = &mut *record {
        *lse = zeros::<f32>(&shapes.lse, "lse")?;
        let lse = TensorViewMut::new(lse, &shapes.lse).map_err(wrapped)?;
        outputs = outputs.lse(lse).tape(tape);
    }
    let problem = *state.problem();
    infini_attn::forward(&problem, &inputs, gate, state, outputs).map_err(wrapped)?;
    let mut all = vec![(T::to_cpu_storage_owned(o), shapes.o.clone())];
    if let Some((lse, a_dot, a_mem)) = others {
        all.push((f32::to_cpu_storage_owned(lse), shapes.lse.clone()));
        all.extend([a_dot, a_mem].map(|x| (T::to_cpu_storage_owned(x), shapes.o.clone())));
    }
    Ok(all)
}

/// A rotation as the core takes it.
pub fn rotation<'a>(rope: &'a Rotation<'_>, positions: &'a [i64]) -> Result<Rope<'a>> {
    let rope = Rope::new(rope.cos.view()?, rope.sin.view()?).interleaved(rope.interleaved);
    Ok(rope.positions(positions))
}

pub fn view<'a, T: Element>(data: &'a [T], layout: &Layout) -> Result<TensorView<'a, T>> {
    TensorView::strided(data, layout.start_offset(), layout.dims(), &strides(layout))
        .map_err(wrapped)
}

impl Lent<'_> {
    fn view(&self) -> Result<TensorView<'_, f32>> {
        match &*self.storage {
            Storage::Cpu(storage) => view(storage.as_slice()?, self.layout),
            _ => Err(refused(self.name, "a tensor on another device", "one on Cpu (the state's)")),
        }
    }
}
