//! One call of which everything can be changed before it goes backward.

use crate::common::buffers::{Arrangement, Asked, OutputBuffers, Strided};
use crate::common::gradients::GradientBuffers;
use crate::common::narrow;
use crate::common::stream::{Stream, normals};
use infini_attn::{
    Element, InputGradients, Inputs, OutputGradients, Problem, Result, State, StateGradient, Tape,
    TensorView, prefill, prefill_backward,
};

/// A packed call, and all that its gradients are made from.
pub struct Fixture<'a, T> {
    pub p: Problem,
    pub stream: &'a Stream<T>,
    pub lead: Vec<usize>,
    pub cu: &'a [i32],
    pub gate: Vec<f32>,
    pub tape: Tape,
    pub out: OutputBuffers<T>,
    pub up: OutputBuffers<T>,
    pub gradient: StateGradient<'static>,
    pub into: GradientBuffers<T>,
}

/// What a test changes about a call.
pub struct Arguments<'a, 'b, T> {
    pub p: Problem,
    pub inputs: Inputs<'a, T>,
    pub gate: &'a [f32],
    pub tape: &'a Tape,
    pub outputs: OutputGradients<'a, T>,
    pub gradient: &'b mut StateGradient<'static>,
    pub into: InputGradients<'b, T>,
    pub bptt_segments: Option<usize>,
}

impl<'a, T: Element> Fixture<'a, T> {
    pub fn new(p: &Problem, lead: &[usize], stream: &'a Stream<T>, cu: &'a [i32]) -> Self {
        Self::taped(p, lead, stream, cu, Tape::every(2).expect("a tape"))
    }

    /// The call fills this tape.
    pub fn taped(
        p: &Problem,
        lead: &[usize],
        stream: &'a Stream<T>,
        cu: &'a [i32],
        mut tape: Tape,
    ) -> Self {
        let (heads, dv, how) = (p.heads(), p.value_dim(), Arrangement::Contiguous);
        let outputs = || OutputBuffers::<T>::new(lead, heads, dv, how, Asked::ALL);
        let gate: Vec<f32> = normals(9, heads);
        let (mut out, mut up) = (outputs(), outputs());
        let random = |seed, x: &mut [T]| x.copy_from_slice(&narrow(&normals(seed, x.len())));
        random(1, up.o.data_mut());
        random(2, up.a_dot.as_mut().expect("asked for").data_mut());
        random(3, up.a_mem.as_mut().expect("asked for").data_mut());
        let lse = up.lse.as_mut().expect("asked for").data_mut();
        lse.copy_from_slice(&normals(4, lse.len()));
        let mut state = State::new(p, cu.len() - 1).expect("a state");
        let mut fixture = Self {
            p: *p,
            stream,
            lead: lead.to_vec(),
            cu,
            gate,
            tape: Tape::new(),
            out: outputs(),
            up,
            gradient: StateGradient::new(p, cu.len() - 1).expect("a gradient"),
            into: GradientBuffers::new(p, lead, how),
        };
        let inputs = fixture.inputs();
        // Twice, so that the second finds a memory and an open segment.
        prefill(p, &inputs, &fixture.gate, &mut state, out.views()).expect("a valid call");
        let views = out.views().tape(&mut tape);
        prefill(p, &inputs, &fixture.gate, &mut state, views).expect("a valid call");
        (fixture.tape, fixture.out) = (tape, out);
        let (m, z) = fixture.gradient.memory_mut().expect("its own");
        m.copy_from_slice(&normals(5, m.len()));
        z.copy_from_slice(&normals(6, z.len()));
        fixture
    }

    pub fn inputs(&self) -> Inputs<'a, T> {
        let (p, s) = (&self.p, self.stream);
        let view = |data, heads, dim| {
            let shape = [&self.lead[..], &[heads, dim]].concat();
            TensorView::new(data, &shape).expect("the stream's shape")
        };
        let q = view(&s.q, p.heads(), p.key_dim());
        let (k, v) =
            (view(&s.k, p.kv_heads(), p.key_dim()), view(&s.v, p.kv_heads(), p.value_dim()));
        Inputs::new(q, k, v).cu_seqlens(self.cu)
    }

    pub fn backward(&mut self, change: impl FnOnce(&mut Arguments<'_, '_, T>)) -> Result<()> {
        let inputs = self.inputs();
        let (out, up) = (&self.out, &self.up);
        fn view<T: Element>(x: &Option<Strided<T>>) -> TensorView<'_, T> {
            x.as_ref().expect("asked for").view()
        }
        let outputs = OutputGradients::new(out.o.view(), view(&out.lse), up.o.view())
            .a_dot(view(&out.a_dot), view(&up.a_dot))
            .a_mem(view(&up.a_mem))
            .lse(view(&up.lse));
        let into = &mut self.into;
        let (q, k, v) = (into.q.view_mut(), into.k.view_mut(), into.v.view_mut());
        let mut arguments = Arguments {
            p: self.p,
            inputs,
            gate: &self.gate,
            tape: &self.tape,
            outputs,
            gradient: &mut self.gradient,
            into: InputGradients::new(q, k, v, &mut into.gate),
            bptt_segments: None,
        };
        change(&mut arguments);
        let Arguments { p, inputs, gate, tape, outputs, gradient, mut into, bptt_segments } =
            arguments;
        if let Some(segments) = bptt_segments {
            into = into.bptt_segments(segments);
        }
        prefill_backward(&p, &inputs, gate, tape, &outputs, gradient, into)
    }
}
