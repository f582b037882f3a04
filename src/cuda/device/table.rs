//! Which slots a batch brings tokens to, in device memory: a captured step reads it in every replay.

use super::{Buffer, Device};
use crate::cuda::plan::effect::PAD_SLOT;
use crate::cuda::plan::launcher::Launcher;
use crate::cuda::plan::params::InfiniSequence;
use crate::error::{Error, Result};

/// Slot and number of new tokens of every sequence of a batch [B, T, H, D], in device memory:
/// [`record_decode`](crate::cuda::record_decode) with [`Inputs::sequences_table`] captures a step that
/// looks there in every replay, so that one graph serves a batch that changes.
///
/// Belongs to the stream of the [`Device`] it was made with. Between replays [`Self::write`] sets it; or
/// work of the application on that stream does, at [`Self::address`].
///
/// [`Inputs::sequences_table`]: crate::cuda::Inputs::sequences_table
#[derive(Debug)]
pub struct SequenceTable {
    device: Device,
    data: Buffer,
    sequences: usize,
}

impl SequenceTable {
    /// The table of a batch of `sequences`, all of them padding.
    ///
    /// # Errors
    /// [`Error::Value`] for more than 2^31 − 1 sequences, [`Error::Driver`] when the device's memory does
    /// not suffice, [`Error::Capturing`].
    pub fn new(device: &Device, sequences: usize) -> Result<Self> {
        if i32::try_from(sequences).is_err() {
            return Err(Error::value("sequences", sequences, format!("at most {}", i32::MAX)));
        }
        let bytes = (sequences * size_of::<InfiniSequence>()) as u64;
        let data = device.allocate(bytes, "a table of sequences")?;
        let mut table = Self { device: device.clone(), data, sequences };
        table.write(&vec![(PAD_SLOT, 0); sequences])?;
        Ok(table)
    }

    /// Enqueues that the table holds these sequences: slot, or [`PAD_SLOT`], and number of new tokens.
    /// [`State::advance_table`](crate::cuda::State::advance_table) with the same comes before the replay,
    /// and checks what depends on the state.
    ///
    /// # Errors
    /// Nothing is written then: [`Error::Length`] for another number of sequences, [`Error::Value`] for a
    /// slot or length beyond 2^31 − 1. [`Error::Capturing`]; the device's.
    pub fn write(&mut self, sequences: &[(usize, usize)]) -> Result<()> {
        self.device.refuse_capture("writing a table of sequences", "write it between replays")?;
        if sequences.len() != self.sequences {
            let expected = format!("{} (the number of sequences)", self.sequences);
            return Err(Error::Length { argument: "sequences", got: sequences.len(), expected });
        }
        let number = |b: usize, what: &str, got: usize| {
            let wrong = |_| Error::value(format!("sequences[{b}] ({what})"), got, "less than 2^31");
            i32::try_from(got).map_err(wrong)
        };
        let entry = |(b, &(slot, len)): (usize, &(usize, usize))| {
            // PAD_SLOT has all bits set.
            let slot = if slot == PAD_SLOT { slot as i32 } else { number(b, "slot", slot)? };
            let (batch, len) = (number(b, "batch", b)?, number(b, "length", len)?);
            Ok(InfiniSequence { first: 0, slot, batch, len, reserved: 0 })
        };
        let entries: Vec<_> = sequences.iter().enumerate().map(entry).collect::<Result<_>>()?;
        if entries.is_empty() {
            return Ok(());
        }
        self.device.launcher().copy(self.data.address, bytemuck::cast_slice(&entries))
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Where it lies: [`InfiniSequence`] `[sequences]`. Entry b has `first` 0, `batch` b, and a `slot`
    /// that no other has, or −1 for padding.
    pub fn address(&self) -> u64 {
        self.data.address
    }

    /// The device and stream it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }
}
