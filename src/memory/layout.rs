//! Where the parts of a state lie in one allocation on the host.

use super::blocks::KeyBlocks;
use super::too_large;
use crate::error::Result;
use crate::problem::Problem;

/// Every part begins at a multiple of so many bytes.
const ALIGNMENT: u64 = 256;

/// Where the parts of a state of some slots lie in one allocation of the host, each at a multiple of 256
/// bytes, in the order of [`Self::parts`]. Zeros are empty streams. [`StateViewMut`](crate::StateViewMut)
/// works on such memory. (On a device it is `cuda::StateLayout`.)
///
/// ```
/// use infini_attn::{HostLayout, Problem};
/// let problem = Problem::builder().heads(8).kv_heads(2).head_dim(64).segment_len(512).build()?;
/// let layout = HostLayout::new(&problem, 4, false)?;
/// let shapes: Vec<_> = layout.parts().iter().map(|part| (part.name, &part.shape[..])).collect();
/// assert_eq!(
///     shapes,
///     [
///         ("memory", &[4, 2, 64, 64][..]),   // M
///         ("normalizer", &[4, 2, 64]),       // z
///         ("open_k", &[4, 2, 2, 64, 256]),   // keys of the open segment, in blocks of 256
///         ("open_v", &[4, 2, 512, 64]),      // its values
///         ("counters", &[4, 4]),             // tokens, committed, open_len, rotated (0 or 1)
///     ]
/// );
/// # Ok::<(), infini_attn::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct HostLayout {
    problem: Problem,
    slots: usize,
    rotation: bool,
    bytes: u64,
    parts: Vec<HostPart>,
}

/// A part of a state in a [`HostLayout`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostPart {
    /// What it is called: `memory`, `normalizer`, `open_k`, `open_k_rotated`, `open_v` or `counters`.
    pub name: &'static str,
    /// Its extents, the first of them the slots. Key `j`, channel `d` of an open segment stands at
    /// [j / width, d, j mod width] of [blocks, Dk, width].
    pub shape: Vec<usize>,
    /// Bytes of an element: counters are i64, everything else f32.
    pub element_bytes: usize,
    /// Bytes from the beginning of the allocation.
    pub offset: u64,
}

impl HostPart {
    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.element_bytes as u64
    }
}

impl HostLayout {
    /// The layout of `slots` states; `rotation`: with room for rotated keys, which a call with
    /// [`Rope`](crate::Rope) needs.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) for more bytes than memory can have.
    pub fn new(problem: &Problem, slots: usize, rotation: bool) -> Result<Self> {
        // Six paddings of a part; then nothing below overflows.
        let bytes = super::state_bytes(problem, slots, rotation) + 6 * u128::from(ALIGNMENT);
        if isize::try_from(bytes).is_err() {
            return Err(too_large(problem, slots, rotation));
        }
        let (h, dk, dv) = (problem.kv_heads(), problem.key_dim(), problem.value_dim());
        let blocks = KeyBlocks::new(problem);
        let keys = [blocks.count(), dk, blocks.width];
        let parts: [(&str, &[usize], usize); 6] = [
            ("memory", &[h, dk, dv], 4),
            ("normalizer", &[h, dk], 4),
            ("open_k", &[h, keys[0], keys[1], keys[2]], 4),
            ("open_k_rotated", &[h, keys[0], keys[1], keys[2]], 4),
            ("open_v", &[h, problem.segment_len(), dv], 4),
            ("counters", &[4], 8),
        ];
        let mut offset = 0;
        let wanted = parts.into_iter().filter(|part| rotation || part.0 != "open_k_rotated");
        let parts = wanted.map(|(name, of_slot, element_bytes)| {
            let shape = [&[slots], of_slot].concat();
            let part = HostPart { name, shape, element_bytes, offset };
            offset += part.bytes().next_multiple_of(ALIGNMENT);
            part
        });
        let parts = parts.collect();
        Ok(Self { problem: *problem, slots, rotation, bytes: offset, parts })
    }

    /// The problem its states belong to.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Whether there is room for rotated keys.
    pub fn rotation(&self) -> bool {
        self.rotation
    }

    /// Bytes of the allocation ([`Problem::state_bytes`] and padding).
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The parts, in order; without rotation there is no `open_k_rotated`.
    pub fn parts(&self) -> &[HostPart] {
        &self.parts
    }
}
