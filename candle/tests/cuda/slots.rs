//! States: slots, the host, files.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use infini_attn_candle::{Batch, Slots, State};

use crate::data::{Scale, call, on, same_bits};

/// A call on one slot leaves the others' bits.
pub fn other_slots_keep_their_bits(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::F16)?;
    let qkv = on(device, &scale.inputs(2, scale.tokens, DType::F16)?)?;
    let mut state = State::new(&problem, 3, false, device)?;
    call(&qkv, &mut state, &Batch::new().slots(&[0, 2]))?;
    let others = |state: &State| -> Result<_> { Ok(state.to_host_slots(&[0, 1])?.to_bytes()?) };
    let before = (others(&state)?, state.to_host_slots(&[2])?.to_bytes()?);
    let one = [qkv[0].narrow(0, 1, 1)?, qkv[1].narrow(0, 1, 1)?, qkv[2].narrow(0, 1, 1)?];
    call(&one, &mut state, &Batch::new().slots(&[2]))?;
    ensure!(others(&state)? == before.0, "slots 0 and 1");
    ensure!(state.to_host_slots(&[2])?.to_bytes()? != before.1, "slot 2 took nothing in");
    ensure!([0, 1, 2].map(|slot| state.tokens(slot) / scale.tokens as u64) == [1, 0, 2]);
    Ok(())
}

/// A state that was saved goes on with the bits of one that was not.
pub fn to_a_file_and_back(device: &Device) -> Result<()> {
    let scale = Scale::of(device)?;
    let problem = scale.problem(DType::BF16)?;
    let qkv = on(device, &scale.inputs(1, scale.tokens, DType::BF16)?)?;
    let next = |state: &mut State| -> Result<Tensor> {
        let first = |t: &Tensor| t.narrow(1, 0, 5);
        call(&[first(&qkv[0])?, first(&qkv[1])?, first(&qkv[2])?], state, &Batch::new())
    };
    let mut state = State::new(&problem, 1, false, device)?;
    call(&qkv, &mut state, &Batch::new())?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("state.safetensors");
    state.to_host()?.save(&file)?;

    let mut loaded = State::new(&problem, 2, false, device)?;
    loaded.restore(&[1], &infini_attn::State::load(&file)?)?;
    ensure!((loaded.tokens(1), loaded.open_len(1)) == (state.tokens(0), state.open_len(0)));
    let mut loaded = loaded.fork(&[1])?;
    same_bits("after a file", &next(&mut loaded)?, &next(&mut state)?)
}
