//! A parsed module: its kernels and its variables.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::ast::{self, Init, ParseError, Space};
use crate::decode;
use crate::launch::{FIRST_MODULE_VARIABLE, LaunchError};
use crate::memory::{GlobalBuffer, global_address};
use crate::program::Kernel;

/// A parsed PTX module. A clone has variables of its own.
#[derive(Clone)]
pub struct Module {
    /// As it was parsed.
    pub(crate) ast: Arc<ast::Module>,
    /// Numbers and addresses of `.global` and `.const` variables.
    addresses: BTreeMap<String, u64>,
    /// What the host has put into variables.
    values: BTreeMap<String, Vec<u8>>,
    kernels: Arc<Mutex<BTreeMap<String, Arc<Kernel>>>>,
}

impl Module {
    /// Parses PTX text.
    ///
    /// ```
    /// use ptxsim::Module;
    ///
    /// let header = ".version 8.0 .target sm_80 .address_size 64";
    /// let module = Module::parse(&format!("{header} .visible .entry nothing() {{ ret; }}"))?;
    /// assert!(module.kernels().eq(["nothing"]));
    ///
    /// let error = Module::parse(&format!("{header}\n.visible .entry nothing() {{ ret }}"));
    /// assert_eq!(error.err().map(|e| (e.pos.line, e.pos.column)), Some((2, 33)));
    /// # Ok::<(), ptxsim::ast::ParseError>(())
    /// ```
    ///
    /// # Errors
    /// [`ParseError`] with line and column.
    pub fn parse(ptx: &str) -> Result<Self, ParseError> {
        let ast = crate::parser::parse(ptx)?;
        let variables = ast.variables.iter().filter(|v| v.space != Space::Shared);
        let addresses = variables
            .enumerate()
            .map(|(i, v)| (v.name.clone(), global_address(FIRST_MODULE_VARIABLE + i)))
            .collect();
        let (ast, values) = (Arc::new(ast), BTreeMap::new());
        Ok(Self { ast, addresses, values, kernels: Arc::default() })
    }

    /// Names of the kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.ast.functions.iter().filter(|f| f.entry).map(|f| f.name.as_str())
    }

    /// A kernel, decoded.
    ///
    /// # Errors
    /// [`LaunchError::UnknownKernel`], or [`LaunchError::Decode`] for an instruction the simulator
    /// does not know.
    pub fn kernel(&self, name: &str) -> Result<Arc<Kernel>, LaunchError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(name) {
            return Ok(kernel.clone());
        }
        let function = self.ast.functions.iter().find(|f| f.entry && f.name == name);
        let function = function.ok_or_else(|| LaunchError::UnknownKernel {
            name: name.into(),
            known: self.kernels().collect::<Vec<_>>().join(", "),
        })?;
        let kernel = decode::kernel(&self.ast, function, &self.addresses)
            .map_err(|error| LaunchError::Decode { kernel: name.into(), error })?;
        Ok(kernels.entry(name.into()).or_insert(Arc::new(kernel)).clone())
    }

    /// Bytes of every parameter of a kernel.
    ///
    /// # Errors
    /// As [`Module::kernel`].
    pub fn parameters(&self, name: &str) -> Result<Vec<u32>, LaunchError> {
        Ok(self.kernel(name)?.params.iter().map(|p| p.bytes).collect())
    }

    /// What a `.global` or `.const` variable holds when a launch begins; none of this name: nothing.
    pub fn variable(&self, name: &str) -> Option<Vec<u8>> {
        let variable = self.ast.variables.iter().find(|v| v.name == name);
        let buffer = self.fresh(variable.filter(|v| v.space != Space::Shared)?);
        let mut bytes = vec![0; buffer.bytes as usize];
        buffer.copy_out(0, &mut bytes);
        Some(bytes)
    }

    /// Puts `bytes` at the start of a variable, for every launch from now on; false when there is no
    /// such variable, or it is smaller.
    ///
    /// ```
    /// use ptxsim::Module;
    ///
    /// let header = ".version 8.0 .target sm_80 .address_size 64";
    /// let mut module = Module::parse(&format!("{header} .global .u32 count = 5;"))?;
    /// assert_eq!(module.variable("count"), Some(vec![5, 0, 0, 0]));
    /// assert!(module.set_variable("count", &[7]) && !module.set_variable("count", &[0; 5]));
    /// assert_eq!(module.variable("count"), Some(vec![7, 0, 0, 0]));
    /// assert!(module.variable("sum").is_none() && !module.set_variable("sum", &[]));
    /// # Ok::<(), ptxsim::ast::ParseError>(())
    /// ```
    pub fn set_variable(&mut self, name: &str, bytes: &[u8]) -> bool {
        let Some(mut value) = self.variable(name) else { return false };
        let fits = bytes.len() <= value.len();
        if fits {
            value[..bytes.len()].copy_from_slice(bytes);
            self.values.insert(name.into(), value);
        }
        fits
    }

    /// Fresh `.global` and `.const` variables.
    pub(crate) fn variables(&self) -> Vec<GlobalBuffer> {
        let variables = self.ast.variables.iter().filter(|v| v.space != Space::Shared);
        variables.map(|v| self.fresh(v)).collect()
    }

    fn fresh(&self, v: &ast::Variable) -> GlobalBuffer {
        let size = v.ty.size() * v.vector;
        let count: u64 = v.dims.iter().map(|d| d.unwrap_or(v.init.len() as u64)).product();
        let mut buffer = GlobalBuffer::new(&v.name, (count * u64::from(size)).min(1 << 30));
        // Variables without an initialiser are zero.
        let mut bytes = vec![0; buffer.bytes as usize];
        for (chunk, init) in bytes.chunks_mut(v.ty.size() as usize).zip(&v.init) {
            let bits = match init {
                Init::Bits(bits) => *bits,
                Init::Address { symbol, offset } => {
                    let address = self.addresses.get(symbol).copied().unwrap_or_default();
                    address.wrapping_add(*offset as u64)
                }
            };
            let n = chunk.len();
            chunk.copy_from_slice(&bits.to_le_bytes()[..n]);
        }
        if let Some(value) = self.values.get(&v.name) {
            bytes.clone_from(value);
        }
        buffer.copy_in(0, &bytes);
        buffer.writable = v.space != Space::Const;
        buffer
    }
}
