//! The operator on tensors in the CPU's memory.

use candle_core::{CpuStorage, Layout, Result, Storage, WithDType};
use infini_attn::{Element, Inputs, Outputs, Rope, TensorView, TensorViewMut};

use crate::error::{refused, wrapped, zeros};
use crate::operator::{Call, Lent, Output, OutputShapes, described, strides};

pub fn forward<T: Element + WithDType>(
    call: &Call<'_>,
    qkv: [(&CpuStorage, &Layout); 3],
    shapes: &OutputShapes,
    state: &mut infini_attn::State,
) -> Result<Vec<Output<CpuStorage>>> {
    let [q, k, v] = qkv.map(|(storage, layout)| view::<T>(storage.as_slice()?, layout));
    let gate = call.gate.view()?;
    let gate = gate.as_slice().expect("contiguous");
    let rope = match &call.rope {
        Some(rope) => Some(
            Rope::new(rope.cos.view()?, rope.sin.view()?)
                .interleaved(rope.interleaved)
                .positions(call.positions),
        ),
        None => None,
    };
    let inputs = described!(Inputs::new(q?, k?, v?), call, rope);

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
    let problem = *state.problem();
    infini_attn::forward(&problem, &inputs, gate, state, outputs).map_err(wrapped)?;
    let mut all = vec![(T::to_cpu_storage_owned(o), shapes.o.clone())];
    if let Some((lse, a_dot, a_mem)) = others {
        all.push((f32::to_cpu_storage_owned(lse), shapes.lse.clone()));
        all.extend([a_dot, a_mem].map(|x| (T::to_cpu_storage_owned(x), shapes.o.clone())));
    }
    Ok(all)
}

fn view<'a, T: Element>(data: &'a [T], layout: &Layout) -> Result<TensorView<'a, T>> {
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
