//! What attention reads and writes by tensor copies.

use crate::cuda::plan::kernel::Kernel;
use crate::cuda::plan::params::*;
use crate::cuda::plan::tensor_map::Source;
use crate::problem::Problem;

/// Query rows of a warpgroup.
const QUERIES: usize = 64;

/// Output rows of a warp.
const OUTPUTS: usize = 16;

/// Operands of segment_attention and segment.
pub struct AttentionOperands<'a> {
    pub p: &'a Problem,
    pub call: &'a InfiniCall,
    pub state: &'a InfiniState,
    /// Batches and tokens of the call's tensors.
    pub lead: [usize; 2],
    /// Rotated new keys, where the call rotates: address and records, `[records][Hkv][N][Dk]`.
    pub rotated: Option<(u64, usize)>,
    /// Snapshots of M: `[records][Hkv][Dk][Dv]`.
    pub snapshot: (u64, usize),
    /// Blocks that load keys, values and snapshots together, each its part of the rows.
    pub shared_by: usize,
}

impl AttentionOperands<'_> {
    /// Those of segment_attention, each with the rows of a box.
    pub fn sources(&self, kernel: &Kernel) -> Vec<(Source, usize)> {
        let (p, call, state) = (self.p, self.call, self.state);
        let (dk, dv) = (p.key_dim(), p.value_dim());
        let keys = kernel.keys / self.shared_by;
        // The rows of the snapshot are whole boxes: a power of two of them, as Dk is one.
        let memory = dk.min(1 << kernel.keys.ilog2()) / self.shared_by;
        let o = self.tensor("o", call.o, p.heads(), dv);
        let or_o = |name, tensor: InfiniTensor| match tensor.data {
            0 => o,
            _ => self.tensor(name, tensor, p.heads(), dv),
        };
        let (k, open_k) = match self.rotated {
            Some((data, records)) => {
                let rows = p.segment_len();
                (self.array("rotated keys", data, records, rows, dk), state.open_k_rotated)
            }
            None => (self.tensor("k", call.k, p.kv_heads(), dk), state.open_k),
        };
        let (snapshot, records) = self.snapshot;
        vec![
            (self.tensor("q", call.q, p.heads(), dk), QUERIES),
            (k, keys),
            (self.tensor("v", call.v, p.kv_heads(), dv), keys),
            (self.open(open_k, dk), keys),
            (self.open(state.open_v, dv), keys),
            (self.array("the snapshots", snapshot, records, dk, dv), memory),
            (o, OUTPUTS),
            (or_o("a_dot", call.a_dot), OUTPUTS),
            (or_o("a_mem", call.a_mem), OUTPUTS),
        ]
    }

    /// Those of segment: also the keys as the memory sees them.
    pub fn with_raw_keys(&self, kernel: &Kernel) -> Vec<(Source, usize)> {
        let dk = self.p.key_dim();
        let k = self.tensor("k", self.call.k, self.p.kv_heads(), dk);
        let raw = [(k, kernel.keys), (self.open(self.state.open_k, dk), kernel.keys)];
        self.sources(kernel).into_iter().chain(raw).collect()
    }

    fn tensor(&self, name: &'static str, data: InfiniTensor, heads: usize, width: usize) -> Source {
        let [batches, tokens] = self.lead;
        Source::of_call(name, data, [batches, tokens, heads, width])
    }

    fn array(
        &self,
        name: &'static str,
        data: u64,
        records: usize,
        rows: usize,
        width: usize,
    ) -> Source {
        Source::array(name, data, [records, self.p.kv_heads(), rows, width])
    }

    fn open(&self, part: u64, width: usize) -> Source {
        Source::open(self.p, self.state, part, width)
    }
}
