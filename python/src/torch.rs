//! PyTorch: whether the program has imported it, which of its tensors hold the values they stand for,
//! and why the others are refused.

use half::{bf16, f16};
use infini_attn::DType;
use pyo3::exceptions::PyAttributeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyModule, PyType};

use crate::dlpack::{Exchange, Scalar};
use crate::error;

/// What is asked of PyTorch in every call, looked up once.
pub struct Torch {
    module: Py<PyModule>,
    tensor: Py<PyType>,
    parameter: Py<PyAny>,
    /// How tensors of these two classes are handed out; None before PyTorch 2.10.
    pub exchange: Option<Exchange>,
    empty: Py<PyAny>,
    forward_ad: Py<PyModule>,
    /// Internal functions that say whether operations are being recorded or transformed instead of
    /// run. Versions without one have no other way to ask.
    tracing_state: Option<Py<PyAny>>,
    modes: Option<Py<PyAny>>,
    transforms: Option<Py<PyAny>>,
    /// Whether autocast is enabled for a device, and for which element type; None before PyTorch 2.4.
    autocast: Option<[Py<PyAny>; 2]>,
}

fn ask<'py>(py: Python<'py>, function: &Option<Py<PyAny>>) -> PyResult<Option<Bound<'py, PyAny>>> {
    function.as_ref().map(|f| f.bind(py).call0()).transpose()
}

const IN_MEMORY: &str = "a tensor whose elements are in memory";

/// PyTorch, if the program has imported it.
pub fn loaded(py: Python<'_>) -> PyResult<Option<&Torch>> {
    static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
    if let Some(torch) = TORCH.get(py) {
        return Ok(Some(torch));
    }
    let modules = py.import("sys")?.getattr("modules")?.cast_into::<PyDict>()?;
    match modules.get_item("torch")?.map(Bound::cast_into::<PyModule>) {
        // A module still being imported has no tensors of which there could be any.
        Some(Ok(torch)) if torch.hasattr("autograd")? && torch.hasattr("nn")? => {
            TORCH.get_or_try_init(py, || Torch::new(&torch)).map(Some)
        }
        _ => Ok(None),
    }
}

impl Torch {
    fn new(torch: &Bound<'_, PyModule>) -> PyResult<Self> {
        let py = torch.py();
        let internal = |path: &[&str]| -> Option<Py<PyAny>> {
            let core = torch.getattr("_C").ok()?;
            path.iter().try_fold(core, |owner, name| owner.getattr(name).ok()).map(Bound::unbind)
        };
        let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
        Ok(Self {
            exchange: Exchange::of(&tensor),
            tensor: tensor.unbind(),
            parameter: torch.getattr("nn")?.getattr("Parameter")?.unbind(),
            empty: torch.getattr("empty")?.unbind(),
            forward_ad: py.import("torch.autograd.forward_ad")?.unbind(),
            tracing_state: internal(&["_get_tracing_state"]),
            modes: internal(&["_len_torch_dispatch_stack"]),
            transforms: internal(&["_functorch", "peek_interpreter_stack"]),
            autocast: match torch.getattr("get_autocast_dtype") {
                Ok(dtype) => Some([torch.getattr("is_autocast_enabled")?.unbind(), dtype.unbind()]),
                Err(_) => None,
            },
            module: torch.clone().unbind(),
        })
    }

    /// Tells PyTorch, which saves tensors for gradients, that a tensor was written to.
    pub fn written(&self, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = tensor.py();
        if tensor.call_method0(intern!(py, "is_inference"))?.is_truthy()? {
            return Ok(());
        }
        let graph = self.module.bind(py).getattr("autograd")?.getattr("graph")?;
        graph.call_method1(intern!(py, "increment_version"), (tensor,)).map(drop)
    }

    /// Whether an object is a tensor.
    pub fn is_tensor(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        object.is_instance(self.tensor.bind(object.py()))
    }

    /// Whether an object is a tensor of PyTorch's own classes, and no other by which somebody gives it
    /// another meaning.
    pub fn is_plain(&self, object: &Bound<'_, PyAny>) -> bool {
        let class = object.get_type_ptr().cast();
        [self.tensor.as_ptr(), self.parameter.as_ptr()].contains(&class)
    }

    /// Whether PyTorch differentiates what is done with any of these objects.
    pub fn wants_gradients(&self, objects: &[&Bound<'_, PyAny>]) -> PyResult<bool> {
        for object in objects {
            let py = object.py();
            if (self.is_plain(object) || self.is_tensor(object)?)
                && object.getattr(intern!(py, "requires_grad"))?.is_truthy()?
            {
                return self.is_grad_enabled(py);
            }
        }
        Ok(false)
    }

    fn is_grad_enabled(&self, py: Python<'_>) -> PyResult<bool> {
        self.module.bind(py).call_method0(intern!(py, "is_grad_enabled"))?.is_truthy()
    }

    /// Refuses a tensor whose values, gradient or tangent a call would lose; returns the one whose
    /// memory to borrow.
    pub fn admit<'py>(
        &self,
        argument: &str,
        tensor: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = tensor.py();
        self.check_eager(argument, py)?;
        if !self.is_plain(tensor) && tensor.hasattr(intern!(py, "fake_mode"))? {
            return Err(error::wrong_type(argument, "a FakeTensor", IN_MEMORY));
        }
        // A lazily negated tensor (the imaginary part of a conjugate) does not hold its values.
        if tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            let got = "a tensor with the negative bit";
            return Err(error::value(argument, got, "tensor.resolve_neg()"));
        }
        // No level of forward-mode differentiation: no tangents.
        let level = self.forward_ad.bind(py).getattr(intern!(py, "_current_level"))?;
        if level.extract::<i64>()? >= 0 && self.has_tangent(tensor)? {
            let expected = "no tangent (this operator computes none: use tensor.detach())";
            return Err(error::value(argument, "a tensor with a forward-mode tangent", expected));
        }
        if !tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
            return Ok(tensor.clone());
        }
        if self.is_grad_enabled(py)? {
            let expected = "no gradient (this operator computes none: use torch.no_grad() or \
                            tensor.detach())";
            return Err(error::value(argument, "a tensor that requires grad", expected));
        }
        if self.exchange.is_some() && self.is_plain(tensor) {
            return Ok(tensor.clone());
        }
        // `__dlpack__` refuses what requires grad, enabled or not.
        tensor.call_method0(intern!(py, "detach"))
    }

    /// Refuses a call while PyTorch records or transforms operations instead of running them: it would
    /// see none here, and what it makes of the outputs would be memory that nobody writes.
    fn check_eager(&self, argument: &str, py: Python<'_>) -> PyResult<()> {
        match self.within(py)? {
            None => Ok(()),
            Some(what) => {
                let expected =
                    "a call outside of it (this operator cannot be traced or transformed)";
                Err(error::value(argument, format_args!("a tensor within {what}"), expected))
            }
        }
    }

    /// Whether PyTorch records operations, and can those of `infini_attn.torch`.
    pub fn is_recording(&self, py: Python<'_>) -> PyResult<bool> {
        if self.within(py)?.is_none() {
            return Ok(false);
        }
        let Some(top) = ask(py, &self.transforms)?.filter(|top| !top.is_none()) else {
            return Ok(true);
        };
        let kind = top.call_method0("key")?.getattr("name")?;
        kind.eq("Functionalize")
    }

    /// What records or transforms operations at present.
    fn within(&self, py: Python<'_>) -> PyResult<Option<String>> {
        if ask(py, &self.tracing_state)?.is_some_and(|state| !state.is_none()) {
            return Ok(Some("torch.jit.trace".into()));
        }
        if ask(py, &self.transforms)?.is_some_and(|top| !top.is_none()) {
            return Ok(Some("a transform of torch.func".into()));
        }
        if let Some(modes) = ask(py, &self.modes)?
            && modes.is_truthy()?
        {
            // Other modes (counters, loggers) run what they see.
            let core = self.module.bind(py).getattr("_C")?;
            for key in ["PROXY", "FAKE", "FUNCTIONAL"] {
                let key = core.getattr("_TorchDispatchModeKey")?.getattr(key)?;
                let mode = core.call_method1("_get_dispatch_mode", (key,))?;
                if !mode.is_none() {
                    return Ok(Some(mode.get_type().name()?.to_string()));
                }
            }
        }
        Ok(None)
    }

    /// Autocast's element type for the CPU, while it is enabled.
    pub fn autocast_dtype<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let device = intern!(py, "cpu");
        let Some([enabled, dtype]) = &self.autocast else { return Ok(None) };
        match enabled.bind(py).call1((device,))?.is_truthy()? {
            true => dtype.bind(py).call1((device,)).map(Some),
            false => Ok(None),
        }
    }

    /// What PyTorch calls an element type.
    pub fn dtype<'py>(&self, py: Python<'py>, dtype: DType) -> PyResult<Bound<'py, PyAny>> {
        let name = match dtype {
            DType::F16 => f16::NAME,
            DType::BF16 => bf16::NAME,
            _ => f32::NAME,
        };
        self.module.bind(py).getattr(name)
    }

    /// A tensor of floats as another element type, as autocast casts; anything else as it is.
    pub fn cast<'py>(
        &self,
        tensor: &Bound<'py, PyAny>,
        dtype: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = tensor.py();
        let module = self.module.bind(py);
        let is_float = self.is_tensor(tensor)?
            && tensor.call_method0(intern!(py, "is_floating_point"))?.is_truthy()?
            && !tensor.getattr(intern!(py, "dtype"))?.is(&module.getattr("float64")?);
        if is_float { tensor.call_method1(intern!(py, "to"), (dtype,)) } else { Ok(tensor.clone()) }
    }

    fn has_tangent(&self, tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        let unpacked = self.forward_ad.bind(tensor.py()).call_method1("unpack_dual", (tensor,))?;
        Ok(!unpacked.getattr("tangent")?.is_none())
    }

    /// Why the memory of a tensor cannot be had, `e` being what PyTorch says; `expected` is the element
    /// types that are accepted.
    pub fn why_not(
        &self,
        argument: &str,
        tensor: &Bound<'_, PyAny>,
        e: &PyErr,
        expected: &str,
    ) -> PyResult<PyErr> {
        let py = tensor.py();
        let is = |name: &str| match tensor.getattr(name) {
            Ok(answer) if answer.is_callable() => answer.call0()?.is_truthy(),
            Ok(answer) => answer.is_truthy(),
            Err(e) if e.is_instance_of::<PyAttributeError>(py) => Ok(false),
            Err(e) => Err(e),
        };
        let refuse = |got: &str, wanted: &str| Ok(error::wrong_type(argument, got, wanted));
        if !self.is_plain(tensor) {
            let class = tensor.get_type().fully_qualified_name()?;
            return refuse(&class.to_string(), IN_MEMORY);
        }
        if is("is_nested")? {
            return refuse("a nested tensor", "a padded tensor (tensor.to_padded_tensor)");
        }
        let strided = self.module.bind(py).getattr("strided")?;
        let layout = tensor.getattr("layout")?;
        if !layout.eq(&strided)? {
            return refuse(&format!("a tensor of layout {layout}"), "tensor.to_dense()");
        }
        if is("is_quantized")? {
            return refuse("a quantized tensor", "tensor.dequantize()");
        }
        let device = tensor.getattr("device")?;
        if device.getattr("type")?.extract::<String>()? != "cpu" {
            let expected = "cpu (the only one built in)";
            return Ok(error::value(argument, format_args!("device {device}"), expected));
        }
        if is("_is_zerotensor")? {
            return refuse("a zero tensor without memory", "tensor.clone()");
        }
        let wrapped = |name| -> PyResult<bool> {
            let functions = self.module.bind(py).getattr("_C")?.getattr("_functorch")?;
            functions.call_method1(name, (tensor,))?.is_truthy()
        };
        for name in ["is_batchedtensor", "is_gradtrackingtensor", "is_functionaltensor"] {
            if wrapped(name).unwrap_or(false) {
                return refuse("a tensor that a transform of torch.func has left", IN_MEMORY);
            }
        }
        let freed = tensor.call_method0("untyped_storage")?.call_method0("nbytes")?;
        if !freed.is_truthy()? {
            return refuse("a tensor whose memory was freed", IN_MEMORY);
        }
        let dtype = tensor.getattr("dtype")?;
        Ok(error::dtype(argument, format_args!("{dtype} ({})", e.value(py)), expected))
    }

    /// A new tensor in CPU memory, contiguous, its elements not yet set.
    pub fn empty<'py, T: Scalar>(
        &self,
        py: Python<'py>,
        shape: &[usize],
    ) -> PyResult<Bound<'py, PyAny>> {
        let kwargs = PyDict::new(py);
        kwargs.set_item(intern!(py, "dtype"), self.module.bind(py).getattr(T::NAME)?)?;
        // Not the default device.
        kwargs.set_item(intern!(py, "device"), intern!(py, "cpu"))?;
        self.empty.bind(py).call((shape,), Some(&kwargs))
    }
}
