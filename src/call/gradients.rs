//! Arguments and results of [`prefill_backward`](crate::prefill_backward).

use crate::call::Inputs;
use crate::call::form::OutputForm;
use crate::error::{Error, Result};
use crate::problem::Problem;
use crate::tensor::{Rows, RowsMut, TensorView, TensorViewMut};

/// What a [`prefill()`](crate::prefill()) has put out, and the gradients of a loss L with respect to it.
#[derive(Clone, Copy, Debug)]
pub struct OutputGradients<'a, T> {
    pub(crate) o: TensorView<'a, T>,
    pub(crate) lse: TensorView<'a, f32>,
    pub(crate) d_o: TensorView<'a, T>,
    pub(crate) a_dot: Option<[TensorView<'a, T>; 2]>,
    pub(crate) d_a_mem: Option<TensorView<'a, T>>,
    pub(crate) d_lse: Option<TensorView<'a, f32>>,
}

impl<'a, T> OutputGradients<'a, T> {
    /// The outputs o [B, T, Hq, Dv] (packed: [total, Hq, Dv]) and log-sum-exp [B, Hq, T] (packed:
    /// [Hq, total]) of the call, and dL/do. What belongs to padding is not read.
    pub fn new(o: TensorView<'a, T>, lse: TensorView<'a, f32>, d_o: TensorView<'a, T>) -> Self {
        Self { o, lse, d_o, a_dot: None, d_a_mem: None, d_lse: None }
    }

    /// The local branch that the call has put out too, and dL/dA_dot; both shaped like o.
    pub fn a_dot(mut self, a_dot: TensorView<'a, T>, d_a_dot: TensorView<'a, T>) -> Self {
        self.a_dot = Some([a_dot, d_a_dot]);
        self
    }

    /// dL/dA_mem, shaped like o.
    pub fn a_mem(mut self, d_a_mem: TensorView<'a, T>) -> Self {
        self.d_a_mem = Some(d_a_mem);
        self
    }

    /// dL/dlse, shaped like the log-sum-exp.
    pub fn lse(mut self, d_lse: TensorView<'a, f32>) -> Self {
        self.d_lse = Some(d_lse);
        self
    }
}

/// Where the gradients with respect to a call's inputs go; those of padding are 0.
#[derive(Debug)]
pub struct InputGradients<'a, T> {
    pub(crate) q: TensorViewMut<'a, T>,
    pub(crate) k: TensorViewMut<'a, T>,
    pub(crate) v: TensorViewMut<'a, T>,
    pub(crate) gate: &'a mut [f32],
    pub(crate) bptt_segments: Option<usize>,
}

impl<'a, T> InputGradients<'a, T> {
    /// dL/dq, dL/dk and dL/dv, shaped like q, k and v, and dL/dβ `[Hq]`. All of it is overwritten.
    pub fn new(
        q: TensorViewMut<'a, T>,
        k: TensorViewMut<'a, T>,
        v: TensorViewMut<'a, T>,
        gate: &'a mut [f32],
    ) -> Self {
        Self { q, k, v, gate, bptt_segments: None }
    }

    /// Truncated propagation: the segments of a sequence's call, counted from the first, which may have been
    /// open before, form blocks of so many, and what a block finds in the memory is a constant. So dL/dM
    /// and dL/dz of the state before the call are 0, of a sequence with tokens.
    pub fn bptt_segments(mut self, segments: usize) -> Self {
        self.bptt_segments = Some(segments);
        self
    }
}

/// Rows of everything that was put out, and of the gradients to it.
pub(crate) struct OutputGradientRows<'a, T> {
    pub o: Rows<'a, T>,
    pub lse: Rows<'a, f32>,
    pub d_o: Rows<'a, T>,
    /// A_dot and its gradient.
    pub a_dot: Option<[Rows<'a, T>; 2]>,
    pub d_a_mem: Option<Rows<'a, T>>,
    pub d_lse: Option<Rows<'a, f32>>,
}

/// Writable rows of the gradients to q, k and v.
pub(crate) struct GradientRows<'a, T> {
    pub q: RowsMut<'a, T>,
    pub k: RowsMut<'a, T>,
    pub v: RowsMut<'a, T>,
}

impl<'a, T> OutputGradients<'a, T> {
    /// Checks every shape; the inputs have been checked.
    pub(crate) fn check(&self, problem: &Problem, inputs: &Inputs<'_, T>) -> Result<()> {
        let [a_dot, d_a_dot] = self.a_dot.map_or([None, None], |both| both.map(Some));
        let form = OutputForm {
            o: self.o.layout(),
            lse: Some(self.lse.layout()),
            a_dot: a_dot.map(|x| x.layout()),
            a_mem: None,
        };
        form.check(problem, &inputs.q.layout())?;
        for (argument, x) in
            [("d_o", Some(self.d_o)), ("d_a_dot", d_a_dot), ("d_a_mem", self.d_a_mem)]
        {
            let Some(x) = x else { continue };
            x.layout().check_shape(argument, &[self.o.shape()], "the shape of o")?;
            x.layout().check_rows(argument)?;
        }
        let Some(d_lse) = self.d_lse else { return Ok(()) };
        d_lse.layout().check_shape("d_lse", &[self.lse.shape()], "the shape of lse")?;
        d_lse.layout().check_rows("d_lse")
    }

    pub(crate) fn rows(&self) -> OutputGradientRows<'a, T> {
        OutputGradientRows {
            o: self.o.rows(),
            lse: self.lse.head_rows(),
            d_o: self.d_o.rows(),
            a_dot: self.a_dot.map(|both| both.map(|x| x.rows())),
            d_a_mem: self.d_a_mem.map(|x| x.rows()),
            d_lse: self.d_lse.map(|x| x.head_rows()),
        }
    }
}

impl<T> InputGradients<'_, T> {
    /// Checks every shape; the inputs have been checked.
    pub(crate) fn check(&self, problem: &Problem, inputs: &Inputs<'_, T>) -> Result<()> {
        for (argument, x, like, name) in [
            ("dq", &self.q, inputs.q, "the shape of q"),
            ("dk", &self.k, inputs.k, "the shape of k"),
            ("dv", &self.v, inputs.v, "the shape of v"),
        ] {
            x.layout().check_shape(argument, &[like.shape()], name)?;
            x.layout().check_rows(argument)?;
        }
        if self.gate.len() != problem.heads() {
            let expected = format!("{} (one per query head)", problem.heads());
            return Err(Error::Length { argument: "d_gate", got: self.gate.len(), expected });
        }
        match self.bptt_segments {
            Some(0) => Err(Error::value("bptt_segments", 0, "at least 1")),
            _ => Ok(()),
        }
    }
}

impl<'a, T> GradientRows<'a, T> {
    pub(crate) fn of(gradients: &'a mut InputGradients<'_, T>) -> Self {
        let InputGradients { q, k, v, .. } = gradients;
        Self { q: q.rows(), k: k.rows(), v: v.rows() }
    }
}
