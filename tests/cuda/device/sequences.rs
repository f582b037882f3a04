//! A captured step whose slots and lengths lie in device memory.

use anyhow::Result;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice};
use half::bf16;
use infini_attn::cuda::{
    self, Device, Gate, Inputs, Outputs, PAD_SLOT, Plan, SequenceTable, TensorView, TensorViewMut,
};
use infini_attn::{Error, Problem};

use crate::calls::problem;
use crate::common::stream::Stream;
use crate::groups::Group;

const GATE: [f32; 2] = [0.3, -0.4];
/// Sequences and tokens of the batch.
const B: usize = 3;
const T: usize = 2;
const SLOTS: usize = 4;

pub fn groups() -> Vec<Group> {
    let check =
        |name: &str, f: fn(&Device) -> Result<()>| Group::check(&format!("sequences::{name}"), f);
    vec![
        check("replay", one_step_serves_a_batch_that_changes),
        check("refusals", what_does_not_fit_is_refused),
    ]
}

/// q, k, v, o of the batch, and log-sum-exps.
struct Batch {
    p: Problem,
    rows: [CudaSlice<bf16>; 4],
    lse: CudaSlice<f32>,
}

impl Batch {
    fn new(device: &Device, p: &Problem) -> Result<Self> {
        let s = Stream::<bf16>::normal(p, B * T, 5);
        let upload = |x: &[bf16]| device.upload(x);
        let rows = [upload(&s.q)?, upload(&s.k)?, upload(&s.v)?, upload(&s.q)?];
        Ok(Self { p: *p, rows, lse: device.upload(&[7.0; B * 2 * T])? })
    }

    fn views(&mut self) -> (Inputs<'_, bf16>, Outputs<'_, bf16>) {
        let [q, k, v, o] = &mut self.rows;
        let [many, few] = [self.p.heads(), self.p.kv_heads()].map(|h| [B, T, h, 64]);
        let view = |x, shape| TensorView::new(x, shape).expect("its shape");
        let inputs = Inputs::new(view(q, &many), view(k, &few), view(v, &few));
        let outputs = Outputs::new(TensorViewMut::new(o, &many).expect("its shape"));
        let lse = TensorViewMut::new(&mut self.lse, &[B, self.p.heads(), T]).expect("its shape");
        (inputs, outputs.lse(lse))
    }

    fn read(&self, device: &Device) -> Result<(Vec<bf16>, Vec<f32>)> {
        let stream = device.stream();
        let all = (stream.clone_dtoh(&self.rows[3])?, stream.clone_dtoh(&self.lse)?);
        device.synchronize()?;
        Ok(all)
    }
}

/// The graph of one step, and its plan.
fn record(
    state: &cuda::State,
    batch: &mut Batch,
    gate: &Gate,
    table: &SequenceTable,
) -> Result<(CudaGraph, Plan)> {
    let p = batch.p;
    let (inputs, outputs) = batch.views();
    let inputs = inputs.sequences_table(table);
    cuda::prepare_decode(&p, &inputs, gate, state, &outputs)?;
    let stream = state.device().stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    // SAFETY: everything outlives the graph, which runs on the device's stream.
    let plan = unsafe { cuda::record_decode(&p, &inputs, gate, state, outputs) };
    let graph = stream.end_capture(CUgraphInstantiate_flags(0))?.expect("a graph");
    Ok((graph, plan?))
}

/// Against calls of the sequences that are there.
fn one_step_serves_a_batch_that_changes(device: &Device) -> Result<()> {
    let p = problem(2, 1, 64, 4);
    let gate = Gate::new(device, &GATE)?;
    let mut state = cuda::State::new(device, &p, SLOTS, false)?;
    let mut plain = cuda::State::new(device, &p, SLOTS, false)?;
    let (mut batch, mut single) = (Batch::new(device, &p)?, Batch::new(device, &p)?);
    let mut table = SequenceTable::new(device, B)?;
    let (graph, plan) = record(&state, &mut batch, &gate, &table)?;
    for sequences in [
        [(2, 1), (PAD_SLOT, 0), (0, 2)],
        [(PAD_SLOT, 9), (2, 2), (PAD_SLOT, 2)],
        [(2, 2), (0, 2), (3, 1)],
        [(PAD_SLOT, 0); B],
        [(1, 0), (0, 1), (2, 2)],
    ] {
        state.advance_table(&plan, &sequences)?;
        table.write(&sequences)?;
        graph.launch()?;
        let got = batch.read(device)?;

        // Slots that are not named are not touched by sequences of no tokens.
        let free = (0..SLOTS).filter(|slot| sequences.iter().all(|(named, _)| named != slot));
        let mut free = free.collect::<Vec<_>>().into_iter();
        let plain_slots = sequences.map(|(slot, _)| match slot {
            PAD_SLOT => free.next().expect("enough slots"),
            slot => slot,
        });
        let lens = sequences.map(|(slot, len)| if slot == PAD_SLOT { 0 } else { len as i32 });
        let (inputs, outputs) = single.views();
        let inputs = inputs.slots(&plain_slots).seq_lens(&lens);
        cuda::decode(&p, &inputs, &gate, &mut plain, outputs)?;
        let want = single.read(device)?;
        assert!(got == want, "{sequences:?}");
        for (b, len) in lens.into_iter().enumerate() {
            let rows = &got.0[(b * T + len as usize) * 2 * 64..(b + 1) * T * 2 * 64];
            assert!(rows.iter().all(|x| x.to_bits() == 0), "sequence {b} of {sequences:?}");
        }
    }
    state.status().expect("padding is not reported");
    assert_eq!((state.tokens(2), state.tokens(0), state.tokens(3), state.tokens(1)), (7, 5, 1, 0));
    assert!(state.to_host()?.to_bytes()? == plain.to_host()?.to_bytes()?, "other states");
    let before = state.mirror().clone();
    state.refresh()?;
    assert!(*state.mirror() == before, "the device moved otherwise");

    // What the host would have refused is skipped on the device, and reported.
    table.write(&[(SLOTS, 1), (PAD_SLOT, 0), (1, 1)])?;
    graph.launch()?;
    assert!(matches!(state.status(), Err(Error::Status { bits: 1 })));
    state.refresh()?;
    assert_eq!((state.tokens(1), state.tokens(0)), (1, 5));
    Ok(())
}

fn what_does_not_fit_is_refused(device: &Device) -> Result<()> {
    let p = problem(2, 1, 64, 4);
    let gate = Gate::new(device, &GATE)?;
    let mut state = cuda::State::new(device, &p, B, false)?;
    let mut batch = Batch::new(device, &p)?;
    let side = device.on(device.stream().context().new_stream()?)?;
    let tables = [(device, B), (device, B + 1), (&side, B)];
    let [mut table, larger, elsewhere] =
        tables.map(|(d, n)| SequenceTable::new(d, n).expect("room"));
    let small = cuda::State::new(device, &p, B - 1, false)?;
    let (inputs, outputs) = batch.views();
    let prepare = |inputs: &Inputs<'_, bf16>, state: &cuda::State| {
        cuda::prepare_decode(&p, inputs, &gate, state, &outputs)
    };
    let with = inputs.sequences_table(&table);
    for (result, expected) in [
        (
            prepare(&inputs.sequences_table(&larger), &state),
            "sequences_table: 4 elements given, 3 (seq",
        ),
        (
            prepare(&with, &small),
            "sequences_table: 3 elements given, at most 2 (slots of the state)",
        ),
        (
            prepare(&inputs.sequences_table(&elsewhere), &state),
            "sequences_table: of another stream",
        ),
        (prepare(&with.slots(&[0, 1, 2]), &state), "sequences_table: with lengths or slots"),
        (prepare(&with.seq_lens(&[0, 1, 2]), &state), "sequences_table: with lengths or slots"),
    ] {
        let text = result.expect_err(expected).to_string();
        assert!(text.starts_with(expected), "{text}");
    }
    let text = cuda::decode(&p, &with, &gate, &mut state, outputs).expect_err("now").to_string();
    assert!(text.starts_with("sequences_table: a table in device memory given"), "{text}");
    for (sequences, expected) in [
        (&[(0, 1)][..], "sequences: 1 elements given, 3 (the number of sequences) expected"),
        (&[(0, 1), (PAD_SLOT - 1, 0), (1, 1)], "sequences[1] (slot): "),
        (&[(0, 1), (1, 1 << 31), (2, 1)], "sequences[1] (length): 2147483648 given"),
    ] {
        let text = table.write(sequences).expect_err(expected).to_string();
        assert!(text.starts_with(expected), "{text}");
    }
    Ok(())
}
