//! What was loaded into a context: once for all devices in it, whichever context object of cudarc they
//! were made from.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule};

use super::encoded_maps::EncodedMaps;
use super::host_tables::HostTables;
use super::wait_report::WaitReport;
use crate::cuda::plan::target::Target;

/// Of the contexts that have devices.
static CONTEXTS: Mutex<Vec<Weak<Loaded>>> = Mutex::new(Vec::new());

/// What was loaded into a context so far.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Keeps the context, and so its handle.
    pub context: Arc<CudaContext>,
    pub capability: (i32, i32),
    pub tables: Mutex<Tables>,
    /// Of the modules whose waits give up.
    pub waits: Mutex<Vec<WaitReport>>,
    pub maps: EncodedMaps,
    pub host_tables: HostTables,
    /// Asked once.
    pub target: OnceLock<Target>,
}

#[derive(Debug, Default)]
pub(super) struct Tables {
    /// By file.
    pub modules: HashMap<&'static str, Arc<CudaModule>>,
    /// By symbol.
    pub functions: HashMap<&'static str, CudaFunction>,
}

impl Loaded {
    /// That of the context.
    pub fn of(context: &Arc<CudaContext>, capability: (i32, i32)) -> Arc<Self> {
        let mut all = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|loaded| loaded.strong_count() > 0);
        let mut alive = all.iter().filter_map(Weak::upgrade);
        if let Some(loaded) = alive.find(|loaded| *loaded.context == **context) {
            return loaded;
        }
        let loaded = Arc::new(Self {
            context: context.clone(),
            capability,
            tables: Mutex::default(),
            waits: Mutex::default(),
            maps: EncodedMaps::default(),
            host_tables: HostTables::default(),
            target: OnceLock::new(),
        });
        all.push(Arc::downgrade(&loaded));
        loaded
    }

    /// Where a wait gave up.
    pub fn wait_report(&self) -> Option<String> {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.iter().find_map(WaitReport::text)
    }
}
