//! Pools of states on the device: conversations that come and go, and steps that a driver breaks off.

use anyhow::{Context, Result, ensure};
use half::bf16;
use infini_attn::cuda::{self, Device, Gate, Inputs, Outputs, TensorView, TensorViewMut};
use infini_attn::{Error, Pool, Problem, Slot, Snapshot};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::calls::problem;
use crate::common::bits;
use crate::common::say::say;
use crate::common::stream::Stream;
use crate::groups::Group;
use crate::refusals::{Driver, own_context};

const GATE: [f32; 2] = [0.3, -0.2];
const SLOTS: usize = 3;

pub fn groups() -> Vec<Group> {
    let check =
        |name: &str, f: fn(&Device) -> Result<()>| Group::check(&format!("pool::{name}"), f);
    vec![
        check("streams", a_pool_is_as_many_streams_of_their_own),
        check("refusals", a_step_that_is_refused_is_undone_or_its_slots_are_refused),
        check("lost", a_device_that_is_lost_is_an_error_everywhere),
    ]
}

/// Layers that differ in segment length.
fn layers() -> [Problem; 2] {
    [32, 64].map(|n| problem(2, 1, 64, n))
}

struct Scene {
    device: Device,
    gate: Gate<'static>,
}

impl Scene {
    fn new(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), gate: Gate::new(device, &GATE)? })
    }

    fn pool(&self, slots: usize) -> Result<Pool<cuda::State>> {
        let states = layers().map(|p| cuda::State::new(&self.device, &p, slots, false));
        Ok(Pool::from_layers(states.into_iter().collect::<infini_attn::Result<_>>()?)?)
    }

    /// Tokens of a seed each for sequences, through one layer: the output of every sequence.
    fn forward(
        &self,
        state: &mut cuda::State,
        sequences: &[(u64, usize)],
        slots: &[usize],
    ) -> infini_attn::Result<Vec<Vec<u8>>> {
        let p = *state.problem();
        let mut all = Stream::<bf16>::normal(&p, 0, 0);
        let mut cu = vec![0];
        for &(seed, count) in sequences {
            all.append(&Stream::normal(&p, count, seed));
            cu.push(all.tokens as i32);
        }
        if all.tokens == 0 {
            return Ok(vec![vec![]; sequences.len()]);
        }
        let upload = |x: &[bf16]| self.device.upload(x);
        let (q, k, v) = (upload(&all.q)?, upload(&all.k)?, upload(&all.v)?);
        let mut o = upload(&all.q)?;
        let (many, few) = ([all.tokens, 2, 64], [all.tokens, 1, 64]);
        let inputs = Inputs::new(
            TensorView::new(&q, &many)?,
            TensorView::new(&k, &few)?,
            TensorView::new(&v, &few)?,
        );
        let inputs = inputs.cu_seqlens(&cu).slots(slots);
        let outputs = Outputs::new(TensorViewMut::new(&mut o, &many)?);
        cuda::forward(&p, &inputs, &self.gate, state, outputs)?;
        let refused = |e| Error::Driver { what: "a copy".into(), reason: format!("{e:?}") };
        let o = self.device.stream().clone_dtoh(&o).map_err(refused)?;
        self.device.synchronize()?;
        let rows = |cu: &[i32]| bits(&o[cu[0] as usize * 128..cu[1] as usize * 128]);
        Ok(cu.windows(2).map(rows).collect())
    }

    fn step(
        &self,
        pool: &mut Pool<cuda::State>,
        sequences: &[(Slot, u64, usize)],
    ) -> infini_attn::Result<Vec<Vec<Vec<u8>>>> {
        let batch: Vec<_> = sequences.iter().map(|&(slot, _, count)| (slot, count)).collect();
        let tokens: Vec<_> = sequences.iter().map(|&(_, seed, count)| (seed, count)).collect();
        pool.step(&batch, |layers, slots| {
            layers.iter_mut().map(|layer| self.forward(layer, &tokens, slots)).collect()
        })
    }
}

fn bytes(snapshot: &Snapshot) -> Vec<Vec<u8>> {
    snapshot.layers().iter().map(|layer| layer.to_bytes().expect("bytes")).collect()
}

/// Each conversation stands, bit for bit, where a state of its own does.
fn a_pool_is_as_many_streams_of_their_own(device: &Device) -> Result<()> {
    let scene = Scene::new(device)?;
    let mut pool = scene.pool(SLOTS)?;
    let mut live: Vec<(Slot, Vec<cuda::State>)> = vec![];
    let mut rng = StdRng::seed_from_u64(7);
    for seed in 0..24 {
        let i = rng.random_range(0..live.len().max(1));
        match rng.random_range(0..8) {
            _ if live.is_empty() => {}
            0 => {
                let (slot, _) = live.swap_remove(i);
                pool.free(slot)?;
            }
            1 if pool.available() > 0 => {
                let fork = pool.fork(live[i].0)?;
                let alone = live[i].1.iter().map(|s| s.fork(&[0]));
                let alone = alone.collect::<infini_attn::Result<_>>()?;
                live.push((fork, alone));
            }
            2 => {
                let (slot, alone) = &mut live[i];
                let tokens = alone[0].tokens(0).saturating_sub(2);
                match pool.truncate(*slot, tokens) {
                    Ok(()) => alone.iter_mut().try_for_each(|s| s.truncate(0, tokens))?,
                    Err(error) => ensure!(matches!(error, Error::Committed { .. }), "{error}"),
                }
            }
            3 => {
                let aside = pool.snapshot(&[live[i].0])?;
                pool.free(live[i].0)?;
                live[i].0 = pool.allocate()?;
                pool.restore(&[live[i].0], &aside)?;
            }
            4 => pool.reserve(SLOTS + 1)?,
            _ => {}
        }
        if pool.available() > 0 {
            let states = layers().map(|p| cuda::State::new(device, &p, 1, false));
            let alone = states.into_iter().collect::<infini_attn::Result<_>>()?;
            live.push((pool.allocate()?, alone));
        }
        let counts: Vec<_> =
            live.iter().map(|_| [1, 1, 5, 40, 0][rng.random_range(0..5)]).collect();
        let batch = live.iter().zip(&counts).zip(0..);
        let batch: Vec<_> =
            batch.map(|(((slot, _), &count), b)| (*slot, 10 * seed + b, count)).collect();
        let outputs = scene.step(&mut pool, &batch)?;
        for (l, outputs) in outputs.iter().enumerate() {
            for (b, (_, alone)) in live.iter_mut().enumerate() {
                let (_, seed, count) = batch[b];
                let want = scene.forward(&mut alone[l], &[(seed, count)], &[0])?;
                ensure!(
                    outputs[b] == want[0],
                    "layer {l}, {count} tokens in a batch of {counts:?}"
                );
            }
        }
    }
    for (slot, alone) in &live {
        let want =
            alone.iter().map(|s| Ok(s.to_host()?.to_bytes()?)).collect::<Result<Vec<_>>>()?;
        ensure!(bytes(&pool.snapshot(&[*slot])?) == want, "another state");
    }
    Ok(())
}

/// A pool whose first two slots have begun, and what the tests bring to them next.
struct Begun {
    scene: Scene,
    driver: Driver,
}

impl Begun {
    const NEXT: [(u64, usize); 2] = [(3, 5), (4, 1)];

    /// In a context of its own: what a refused call leaves there reaches no other test.
    fn new() -> Result<Option<Self>> {
        let Some(driver) = Driver::open() else {
            say(format_args!("skipped: only the simulator's driver refuses calls"));
            return Ok(None);
        };
        let device = Device::from_stream(own_context()?.new_stream()?)?;
        Ok(Some(Self { scene: Scene::new(&device)?, driver }))
    }

    fn pool(&self) -> Result<(Pool<cuda::State>, [Slot; 2])> {
        let mut pool = self.scene.pool(SLOTS)?;
        let slots = [pool.allocate()?, pool.allocate()?];
        self.scene.step(&mut pool, &[(slots[0], 1, 30), (slots[1], 2, 3)])?;
        Ok((pool, slots))
    }

    /// A step that completes a segment of the first slot in one layer.
    fn step(
        &self,
        pool: &mut Pool<cuda::State>,
        slots: [Slot; 2],
    ) -> infini_attn::Result<Vec<Vec<Vec<u8>>>> {
        let next = |b: usize| (slots[b], Self::NEXT[b].0, Self::NEXT[b].1);
        self.scene.step(pool, &[next(0), next(1)])
    }
}

/// A step of two layers, with each call of the driver refused in turn.
fn a_step_that_is_refused_is_undone_or_its_slots_are_refused(_: &Device) -> Result<()> {
    let Some(begun) = Begun::new()? else { return Ok(()) };
    let (mut pool, slots) = begun.pool()?;
    let before = bytes(&pool.snapshot(&slots)?);
    begun.driver.refuse(None);
    let outputs = begun.step(&mut pool, slots)?;
    let calls = begun.driver.calls();
    let after = bytes(&pool.snapshot(&slots)?);
    let (mut runs, mut undone, mut refused) = (0, 0, 0);
    for (function, count) in calls {
        // Of what is called all the time, some.
        for nth in (1..=count).step_by(count.div_ceil(12) as usize) {
            let (mut pool, slots) = begun.pool()?;
            begun.driver.refuse(Some((&function, nth)));
            let result = begun.step(&mut pool, slots);
            begun.driver.refuse(None);
            let what = || format!("call {nth} of {function} refused: {:?}", result.as_ref().err());
            // Whatever the refused call has left.
            _ = begun.scene.device.is_capturing();
            runs += 1;
            if result.is_ok() {
                ensure!(bytes(&pool.snapshot(&slots)?) == after, "accepted: {}", what());
            } else if pool.indices(&slots).is_ok() {
                undone += 1;
                let now = bytes(&pool.snapshot(&slots).with_context(what)?);
                ensure!(now == before, "{}", what());
                let again = begun.step(&mut pool, slots).with_context(what)?;
                ensure!(again == outputs, "again: {}", what());
                ensure!(bytes(&pool.snapshot(&slots)?) == after, "again: {}", what());
            } else {
                refused += 1;
                settle(&mut pool, slots).with_context(what)?;
            }
        }
    }
    say(format_args!("{runs} calls refused: undone {undone}, slots refused {refused}"));
    ensure!(undone > 0, "no step was undone");
    Ok(())
}

/// Slots that are refused are empty once they are freed, the others can be read.
fn settle(pool: &mut Pool<cuda::State>, slots: [Slot; 2]) -> Result<()> {
    for slot in slots {
        match pool.index(slot) {
            Ok(_) => drop(pool.snapshot(&[slot])?),
            Err(Error::Unfinished { .. }) => {
                pool.free(slot)?;
                let again = pool.allocate()?;
                ensure!(pool.tokens(again)? == 0, "not empty");
                pool.snapshot(&[again])?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// From some call on the driver refuses everything: errors, and no call waits for what will not come.
fn a_device_that_is_lost_is_an_error_everywhere(_: &Device) -> Result<()> {
    let Some(begun) = Begun::new()? else { return Ok(()) };
    let (mut pool, slots) = begun.pool()?;
    begun.driver.refuse(None);
    begun.step(&mut pool, slots)?;
    let calls: u64 = begun.driver.calls().values().sum();
    for nth in (1..=calls).step_by(17) {
        let (mut pool, slots) = begun.pool()?;
        let taken = pool.snapshot(&[slots[1]])?;
        begun.driver.refuse(Some(("*", nth)));
        let step = begun.step(&mut pool, slots);
        let after: Vec<(&str, infini_attn::Result<()>)> = vec![
            ("step", begun.step(&mut pool, slots).map(drop)),
            ("snapshot", pool.snapshot(&slots).map(drop)),
            ("restore", pool.restore(&slots[1..], &taken)),
            ("fork", pool.fork(slots[1]).map(drop)),
            ("reserve", pool.reserve(2 * SLOTS)),
            ("free", pool.free(slots[0])),
            ("synchronize", begun.scene.device.synchronize()),
        ];
        begun.driver.refuse(None);
        _ = begun.scene.device.is_capturing();
        // The last calls of a step give memory back.
        let done = step.is_ok();
        ensure!(!done || nth > calls / 2, "call {nth} and all after it refused: a step");
        for (what, result) in after {
            ensure!(result.is_err(), "call {nth} and all after it refused: {what}");
        }
        settle(&mut pool, slots).with_context(|| format!("call {nth} and all after it"))?;
    }
    Ok(())
}
