//! The bytes of bulk copies: where they lie, and how they are moved.

use std::sync::Arc;

use crate::access::{Region, Window};
use crate::context::Cx;
use crate::decode::Result;
use crate::gang::State;
use crate::launch::Grid;
use crate::tensor_map::{Dtype, TensorMap};

/// Bytes to be moved.
pub struct Move {
    from: From,
    to: Region,
    bytes: u32,
}

enum From {
    Region(Region),
    /// The same bits in every element of `size` bytes.
    Fill {
        bits: u64,
        size: u32,
    },
}

/// An element-wise update instead of a plain write.
pub struct Reduction {
    /// Bytes of an element.
    pub bytes: u32,
    /// New value from old and given.
    pub f: Arc<dyn Fn(u64, u64, u64) -> u64 + Send + Sync>,
}

impl Move {
    /// From one region to another.
    pub fn between(from: Region, to: Region, bytes: u32) -> Self {
        Self { from: From::Region(from), to, bytes }
    }

    /// The same element over and over.
    pub fn fill(to: Region, bytes: u32, bits: u64, size: u32) -> Self {
        Self { from: From::Fill { bits, size }, to, bytes }
    }

    /// The bytes; `grid` is needed where they come from global memory.
    pub fn read(&self, state: &State, grid: Option<&Grid<'_>>) -> Vec<u8> {
        let mut data = Vec::new();
        self.read_into(&mut data, state, grid);
        data
    }

    /// The same in place of what `data` holds.
    fn read_into(&self, data: &mut Vec<u8>, state: &State, grid: Option<&Grid<'_>>) {
        data.clear();
        data.resize(self.bytes as usize, 0);
        match (&self.from, grid) {
            (From::Fill { bits, size }, _) => {
                let element = &bits.to_le_bytes()[..*size as usize];
                data.chunks_exact_mut(element.len()).for_each(|e| e.copy_from_slice(element));
            }
            (From::Region(Region::Global { buffer, offset }), Some(grid)) => {
                grid.existing(*buffer).copy_out(*offset, data);
            }
            (From::Region(Region::Shared { block, address }), _) => {
                let shared = &state.blocks[*block].shared;
                let at = shared.index(*address);
                data.copy_from_slice(&shared.data[at..at + self.bytes as usize]);
            }
            _ => {}
        }
    }

    /// Puts the bytes where they belong.
    pub fn write(
        &self,
        state: &mut State,
        grid: &Grid<'_>,
        bytes: &[u8],
        reduction: Option<&Reduction>,
    ) {
        match (self.to, reduction) {
            (Region::Global { buffer, offset }, None) => {
                grid.existing(buffer).copy_in(offset, bytes)
            }
            (Region::Global { buffer, offset }, Some(r)) => {
                grid.existing(buffer).update(offset, bytes.len(), |at, old| {
                    let given = &bytes[at..at + old.len()];
                    let size = r.bytes as usize;
                    for (old, given) in old.chunks_exact_mut(size).zip(given.chunks_exact(size)) {
                        let new = (r.f)(word(old), word(given), 0).to_le_bytes();
                        old.copy_from_slice(&new[..size]);
                    }
                });
            }
            (Region::Shared { block, address }, _) => {
                state.blocks[block].shared.write(address, bytes)
            }
            _ => {}
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Performs moves in order.
pub fn perform(state: &mut State, grid: &Grid<'_>, moves: &[Move]) {
    let mut bytes = Vec::new();
    for m in moves {
        m.read_into(&mut bytes, state, Some(grid));
        m.write(state, grid, &bytes, None);
    }
}

/// Bytes that lie together in global memory and in the tile.
pub struct Run {
    /// None: outside the tensor.
    pub global: Option<Region>,
    /// How many.
    pub bytes: u32,
    /// Offset in the tile before the swizzle.
    tile: u32,
    map: Option<Arc<TensorMap>>,
}

impl Run {
    /// Bytes that are no tensor.
    pub fn linear(global: Option<Region>, bytes: u32) -> Self {
        Self { global, bytes, tile: 0, map: None }
    }

    /// The moves of the run for a tile at a shared address.
    pub fn placed(&self, block: usize, base: u32, load: bool) -> Vec<Move> {
        let part = |address: u32, from: u32, bytes: u32| {
            let shared = Region::Shared { block, address };
            let global = match self.global {
                Some(Region::Global { buffer, offset }) => {
                    Some(Region::Global { buffer, offset: offset + u64::from(from) })
                }
                _ => None,
            };
            match (load, global, &self.map) {
                (true, Some(global), _) => Some(Move::between(global, shared, bytes)),
                (true, None, Some(map)) => {
                    Some(Move::fill(shared, bytes, map.fill_bits(), map.dtype.bytes()))
                }
                (false, Some(global), _) => Some(Move::between(shared, global, bytes)),
                _ => None,
            }
        };
        match &self.map {
            None => part(base + self.tile, 0, self.bytes).into_iter().collect(),
            Some(map) => {
                let run =
                    crate::tensor_map::Run { global: None, bytes: self.bytes, tile: self.tile };
                let swizzle = |a| crate::layout::swizzle(a, map.swizzle);
                run.place(base.into(), swizzle)
                    .filter_map(|(address, from, bytes)| part(address as u32, from, bytes))
                    .collect()
            }
        }
    }
}

/// Runs of a copy, its bytes, and the element type of a tensor.
pub type Runs = Option<(Vec<Run>, u32, Option<Dtype>)>;

/// The runs of a box; None after a report of a run outside its buffer.
pub fn tensor_runs(cx: &mut Cx<'_, '_>, lane: u32, map: &[u8], at: &[i32]) -> Result<Runs> {
    let map = TensorMap::decode(map).map_err(|e| e.to_string())?;
    let runs = map.runs(at).map_err(|e| e.to_string())?;
    let map = Arc::new(map);
    let mut out = Vec::with_capacity(runs.len());
    for run in runs {
        let global = match run.global {
            None => None,
            Some(offset) => {
                let address = map.address.wrapping_add(offset);
                match cx.locate(lane, Window::Global, address, run.bytes, 1) {
                    None => return Ok(None),
                    found => found,
                }
            }
        };
        out.push(Run { global, bytes: run.bytes, tile: run.tile, map: Some(map.clone()) });
    }
    Ok(Some((out, map.box_bytes() as u32, Some(map.dtype))))
}
