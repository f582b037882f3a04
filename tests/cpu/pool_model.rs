//! An engine's day: conversations that come, fork, take drafts back and go, in a pool that is always
//! short of slots, each beside a stream of its own that nothing else touches.

use crate::common::metric::relative_rms;
use crate::common::model::{Entry, run_entry};
use crate::common::stream::Stream;
use crate::pool::{layers, tokens};
use infini_attn::{
    Error, Inputs, MAX_DECODE_TOKENS, Outputs, Pool, Slot, State, TensorView, TensorViewMut,
};
use proptest::prelude::*;

const SLOTS: usize = 6;
const GATE: [f32; 2] = [0.3, -0.2];

#[derive(Clone, Debug)]
enum Event {
    /// A conversation begins, if there is room.
    Arrive,
    /// One ends.
    Leave(usize),
    /// One goes on twice.
    Fork(usize),
    /// Some tokens of one are taken back.
    Truncate(usize, u64),
    /// One is put aside and comes back in another slot.
    Move(usize),
    /// One takes the place of another.
    Copy(usize, usize),
    /// Tokens for some of them (by bits), as many as given, in turn; fails in a layer.
    Step(u8, [usize; 3], Option<usize>),
    /// Room for two more.
    Reserve,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let count = || prop_oneof![6 => Just(1usize), 2 => 2usize..6, 1 => 0usize..40];
    let fails = prop_oneof![5 => Just(None), 1 => (0usize..3).prop_map(Some)];
    let event = prop_oneof![
        8 => Just(Event::Arrive),
        4 => (0..SLOTS).prop_map(Event::Leave),
        2 => (0..SLOTS).prop_map(Event::Fork),
        2 => (0..SLOTS, 0u64..8).prop_map(|(i, n)| Event::Truncate(i, n)),
        1 => (0..SLOTS).prop_map(Event::Move),
        1 => (0..SLOTS, 0..SLOTS).prop_map(|(i, j)| Event::Copy(i, j)),
        12 => (any::<u8>(), [count(), count(), count()], fails)
            .prop_map(|(who, counts, fails)| Event::Step(who, counts, fails)),
        1 => Just(Event::Reserve),
    ];
    prop::collection::vec(event, 60..120)
}

/// A conversation: its slot, and per layer a state of one stream.
struct Conversation {
    slot: Slot,
    alone: Vec<State>,
}

struct Engine {
    pool: Pool<State>,
    live: Vec<Conversation>,
    seed: u64,
    arrived: usize,
}

/// The state of one slot, in memory of its own.
fn apart(states: &[State]) -> Vec<State> {
    states.iter().map(|s| State::from_bytes(&s.to_bytes().unwrap()).unwrap()).collect()
}

impl Engine {
    fn new() -> Self {
        let pool = Pool::<State>::new(&layers(), SLOTS).unwrap();
        Self { pool, live: vec![], seed: 0, arrived: 0 }
    }

    fn take(&mut self, event: &Event) -> Result<(), TestCaseError> {
        let live = self.live.len();
        let is_full = live == self.pool.slots();
        match *event {
            Event::Arrive => match self.pool.allocate() {
                Ok(slot) => {
                    let alone = layers().iter().map(|p| State::new(p, 1).unwrap()).collect();
                    self.live.push(Conversation { slot, alone });
                    self.arrived += 1;
                }
                Err(error) => prop_assert!(is_full, "{}", error),
            },
            Event::Reserve if self.pool.slots() < 2 * SLOTS => {
                self.pool.reserve(self.pool.slots() + 2).unwrap();
            }
            _ if live == 0 => {}
            Event::Leave(i) => {
                let gone = self.live.swap_remove(i % live);
                self.pool.free(gone.slot).unwrap();
                prop_assert!(self.pool.index(gone.slot).is_err());
            }
            Event::Fork(i) => match self.pool.fork(self.live[i % live].slot) {
                Ok(slot) => {
                    let alone = apart(&self.live[i % live].alone);
                    self.live.push(Conversation { slot, alone });
                }
                Err(error) => prop_assert!(is_full, "{}", error),
            },
            Event::Truncate(i, back) => self.truncate(i % live, back)?,
            Event::Move(i) => {
                let c = &mut self.live[i % live];
                let aside = self.pool.snapshot(&[c.slot]).unwrap();
                self.pool.free(c.slot).unwrap();
                c.slot = self.pool.allocate().unwrap();
                self.pool.restore(&[c.slot], &aside).unwrap();
            }
            Event::Copy(i, j) if i % live != j % live => {
                let (from, to) = (i % live, j % live);
                self.pool.copy_slots(&[(self.live[from].slot, self.live[to].slot)]).unwrap();
                self.live[to].alone = apart(&self.live[from].alone);
            }
            Event::Step(who, counts, fails) => self.step(who, counts, fails)?,
            Event::Copy(..) | Event::Reserve => {}
        }
        Ok(())
    }

    fn truncate(&mut self, i: usize, back: u64) -> Result<(), TestCaseError> {
        let Conversation { slot, alone } = &mut self.live[i];
        let tokens = alone[0].tokens(0).saturating_sub(back);
        let possible = alone.iter().all(|s| s.tokens(0) - s.open_len(0) as u64 <= tokens);
        match self.pool.truncate(*slot, tokens) {
            Ok(()) => alone.iter_mut().for_each(|s| s.truncate(0, tokens).unwrap()),
            Err(error) => prop_assert!(matches!(error, Error::Committed { .. }), "{:?}", error),
        }
        let seen = alone[0].tokens(0);
        prop_assert!(!possible || seen == tokens);
        Ok(())
    }

    /// One batch through every layer; then each conversation alone.
    fn step(
        &mut self,
        who: u8,
        counts: [usize; 3],
        fails: Option<usize>,
    ) -> Result<(), TestCaseError> {
        let chosen: Vec<_> = (0..self.live.len().min(8)).filter(|i| who >> i & 1 == 1).collect();
        let batch: Vec<_> = (chosen.iter().zip(counts.iter().cycle()))
            .map(|(&i, &count)| (self.live[i].slot, count))
            .collect();
        self.seed += 8;
        let seed = self.seed;
        let mut outputs = vec![];
        let result = self.pool.step(&batch, |layers, slots| {
            for (l, layer) in layers.iter_mut().enumerate() {
                if fails == Some(l) {
                    return Err(Error::Cancelled { taken: vec![] });
                }
                let streams =
                    (0u64..).zip(&batch).map(|(i, &(_, count))| tokens(l, count, seed + i));
                outputs.push(forward(layer, &streams.collect::<Vec<_>>(), slots)?);
            }
            Ok(())
        });
        prop_assert_eq!(result.is_err(), fails.is_some());
        if fails.is_some() {
            return Ok(());
        }
        for (l, outputs) in outputs.iter().enumerate() {
            for (b, (&i, &(_, count))) in chosen.iter().zip(&batch).enumerate() {
                let stream = tokens(l, count, seed + b as u64);
                // A batch that brings a prompt is prefilled.
                let short = batch.iter().all(|&(_, count)| count <= MAX_DECODE_TOKENS);
                let entry = if short { Entry::Decode } else { Entry::Prefill };
                let alone = &mut self.live[i].alone[l];
                let want = run_entry(entry, count, &stream.inputs(), &GATE, alone).o;
                let close = relative_rms("o", &outputs[b], &want, &[want.len()], 1e-5);
                prop_assert!(close.is_ok(), "layer {}, sequence {}: {:?}", l, b, close);
            }
        }
        Ok(())
    }

    /// Every conversation stands where its own streams do, bit for bit.
    fn check(&self) -> Result<(), TestCaseError> {
        prop_assert_eq!(self.pool.available() + self.live.len(), self.pool.slots());
        for (i, c) in self.live.iter().enumerate() {
            let taken = self.pool.snapshot(&[c.slot]).unwrap();
            for (got, want) in taken.layers().iter().zip(&c.alone) {
                let same = got.to_bytes().unwrap() == want.to_bytes().unwrap();
                prop_assert!(same, "conversation {} of {}", i, self.live.len());
            }
        }
        Ok(())
    }
}

/// A packed batch through one layer: the output rows of each sequence.
fn forward(
    state: &mut State,
    streams: &[Stream<f32>],
    slots: &[usize],
) -> Result<Vec<Vec<f64>>, Error> {
    let p = *state.problem();
    let mut cu = vec![0];
    let mut all = tokens(0, 0, 0);
    all.problem = p;
    for stream in streams {
        all.append(stream);
        cu.push(all.tokens as i32);
    }
    let view = |data, heads| TensorView::new(data, &[all.tokens, heads, p.key_dim()]);
    let inputs = Inputs::new(view(&all.q, 2)?, view(&all.k, 1)?, view(&all.v, 1)?);
    let width = 2 * p.value_dim();
    let mut o = vec![f32::NAN; all.tokens * width];
    let outputs = Outputs::new(TensorViewMut::new(&mut o, &[all.tokens, 2, p.value_dim()])?);
    let inputs = inputs.cu_seqlens(&cu).slots(slots);
    infini_attn::forward(&p, &inputs, &GATE, state, outputs)?;
    let rows = |cu: &[i32]| o[cu[0] as usize * width..cu[1] as usize * width].iter();
    Ok(cu.windows(2).map(|cu| rows(cu).map(|&x| f64::from(x)).collect()).collect())
}

/// More than a thousand conversations in all.
#[test]
fn a_pool_is_as_many_streams_of_their_own() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let arrived = AtomicUsize::new(0);
    let config = ProptestConfig::with_cases(100);
    proptest!(config, |(events in events())| {
        let mut engine = Engine::new();
        for event in &events {
            engine.take(event)?;
            engine.check()?;
        }
        arrived.fetch_add(engine.arrived, Ordering::Relaxed);
    });
    assert!(arrived.into_inner() > 1000, "conversations");
}
