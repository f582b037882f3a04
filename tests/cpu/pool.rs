//! The slots of a pool: taken, given back, copied, cut short, and steps that fail.

use crate::common::model::{Entry, run_entry};
use crate::common::stream::Stream;
use infini_attn::{Error, Pool, PrefixCache, Problem, Slot, Snapshot, State, flush};

/// Layers that differ in segment length and dimensions.
pub fn layers() -> Vec<Problem> {
    let problem = |dim, n| {
        let builder = Problem::builder().heads(2).kv_heads(1).head_dim(dim);
        builder.segment_len(n).build().unwrap()
    };
    vec![problem(8, 4), problem(4, 6), problem(8, 16)]
}

fn pool(slots: usize) -> Pool<State> {
    Pool::<State>::new(&layers(), slots).unwrap()
}

/// The tokens of a layer.
pub fn tokens(layer: usize, count: usize, seed: u64) -> Stream<f32> {
    Stream::normal(&layers()[layer], count, 10 * seed + layer as u64)
}

/// Brings tokens to one slot in a layer, by way of a state of that slot alone.
fn bring(layer: usize, state: &mut State, slot: usize, count: usize, seed: u64) {
    let (stream, slots) = (tokens(layer, count, seed), [slot]);
    run_entry(Entry::Forward, count, &stream.inputs().slots(&slots), &[0.2; 2], state);
}

fn advance(pool: &mut Pool<State>, slot: Slot, count: usize, seed: u64) {
    let step = |layers: &mut [State], slots: &[usize]| {
        for (l, layer) in layers.iter_mut().enumerate() {
            bring(l, layer, slots[0], count, seed);
        }
        Ok::<(), Error>(())
    };
    pool.step(&[(slot, count)], step).unwrap();
}

pub fn bytes(snapshot: &Snapshot) -> Vec<Vec<u8>> {
    snapshot.layers().iter().map(|state| state.to_bytes().unwrap()).collect()
}

fn slot_bytes(pool: &Pool<State>, slot: Slot) -> Vec<Vec<u8>> {
    bytes(&pool.snapshot(&[slot]).unwrap())
}

#[test]
fn slots_are_taken_until_there_are_none() {
    let mut pool = pool(2);
    let held = pool.bytes();
    let (a, b) = (pool.allocate().unwrap(), pool.allocate().unwrap());
    assert_eq!((pool.index(a).unwrap(), pool.index(b).unwrap(), pool.available()), (0, 1, 0));
    for result in [pool.allocate(), pool.fork(a)] {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::PoolFull { slots: 2 }), "{error:?}");
    }
    assert_eq!(pool.bytes(), held);
    advance(&mut pool, a, 21, 1);
    pool.free(a).unwrap();
    let again = pool.allocate().unwrap();
    assert_eq!((again.index(), pool.tokens(again).unwrap()), (0, 0));
    assert!(pool.layers().iter().all(|layer| layer.memory().at(&[0, 0, 0, 0]) == 0.0));
    // More room on request, and what is there stays.
    advance(&mut pool, b, 7, 2);
    let before = slot_bytes(&pool, b);
    pool.reserve(5).unwrap();
    assert_eq!((pool.slots(), pool.available(), pool.index(b).unwrap()), (5, 3, 1));
    assert_eq!(slot_bytes(&pool, b), before);
    let third = pool.allocate().unwrap();
    assert_eq!(third.index(), 2);
    pool.reserve(3).unwrap();
    assert_eq!(pool.slots(), 5);
}

#[test]
fn a_handle_that_was_given_back_is_worthless() {
    let mut pool = pool(2);
    let old = pool.allocate().unwrap();
    pool.free(old).unwrap();
    let refused = |error: Error, expected: &str| {
        assert!(matches!(error, Error::StaleSlot { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused(pool.free(old).unwrap_err(), "generation 1 given, a slot that is taken expected");
    let new = pool.allocate().unwrap();
    assert_eq!(old.index(), new.index());
    refused(pool.index(old).unwrap_err(), "generation 1 given, 3 expected");
    refused(pool.reset(old).unwrap_err(), "3 expected");
    refused(pool.tokens(old).unwrap_err(), "3 expected");
    refused(pool.truncate(old, 0).unwrap_err(), "3 expected");
    refused(pool.fork(old).unwrap_err(), "3 expected");
    refused(pool.snapshot(&[new, old]).unwrap_err(), "3 expected");
    refused(pool.copy_slots(&[(new, old)]).unwrap_err(), "3 expected");
    let taken = pool.snapshot(&[new]).unwrap();
    refused(pool.restore(&[old], &taken).unwrap_err(), "3 expected");
    refused(pool.step(&[(old, 1)], |_, _| Ok::<(), Error>(())).unwrap_err(), "3 expected");
    let mut other = self::pool(2);
    let foreign = other.allocate().unwrap();
    refused(pool.index(foreign).unwrap_err(), "a handle of this pool expected");
    assert_eq!(pool.available(), 1);
}

#[test]
fn a_step_that_fails_in_a_late_layer_is_undone_in_all() {
    // 1: stays in its segments; 3: fills some layers'; 40: fills all several times.
    for count in [1, 3, 40] {
        let mut pool = pool(3);
        let slots = [(); 3].map(|()| pool.allocate().unwrap());
        slots.iter().zip([2, 5, 9]).for_each(|(&slot, n)| advance(&mut pool, slot, n, n as u64));
        let before = slots.map(|slot| slot_bytes(&pool, slot));
        let error = pool.step(&[(slots[2], count), (slots[0], 1)], |layers, slots| {
            for (l, layer) in layers.iter_mut().enumerate() {
                if l == 2 {
                    return Err(Error::Cancelled { taken: vec![0, 0] });
                }
                bring(l, layer, slots[0], count, 70);
                bring(l, layer, slots[1], 1, 71);
            }
            Ok(())
        });
        assert!(matches!(error, Err(Error::Cancelled { .. })), "{error:?}");
        assert!(slots.map(|slot| slot_bytes(&pool, slot)) == before, "{count} tokens");
        // And again, as though nothing had happened.
        let mut alone = self::pool(1);
        let slot = alone.allocate().unwrap();
        advance(&mut alone, slot, 9, 9);
        advance(&mut alone, slot, count, 70);
        advance(&mut pool, slots[2], count, 70);
        assert_eq!(slot_bytes(&pool, slots[2]), slot_bytes(&alone, slot));
    }
}

#[test]
fn a_slot_that_cannot_be_put_back_is_refused_until_it_is_emptied() {
    let mut pool = pool(2);
    let [bad, good] = [(); 2].map(|()| pool.allocate().unwrap());
    advance(&mut pool, good, 3, 1);
    // More tokens than were spoken of: the memory has taken them.
    let result = pool.step(&[(bad, 1), (good, 1)], |layers, slots| {
        bring(0, &mut layers[0], slots[0], 9, 2);
        Err::<(), _>(Error::Cancelled { taken: vec![9] })
    });
    assert!(result.is_err());
    let unfinished = |error: Error| {
        assert!(matches!(error, Error::Unfinished { slot: 0 }), "{error:?}");
    };
    unfinished(pool.index(bad).unwrap_err());
    unfinished(pool.fork(bad).unwrap_err());
    unfinished(pool.step(&[(bad, 1)], |_, _| Ok::<(), Error>(())).unwrap_err());
    assert_eq!(pool.tokens(good).unwrap(), 3);
    // Each of the ways back.
    let taken = pool.snapshot(&[good]).unwrap();
    let break_again = |pool: &mut Pool<State>| {
        let seen = pool.tokens(bad).unwrap();
        let result = pool.step(&[(bad, 1)], |layers, slots| {
            bring(0, &mut layers[0], slots[0], 9, 2);
            Err::<(), _>(Error::Cancelled { taken: vec![9] })
        });
        assert!(result.is_err() && pool.index(bad).is_err(), "{seen}");
    };
    pool.restore(&[bad], &taken).unwrap();
    assert_eq!(slot_bytes(&pool, bad), slot_bytes(&pool, good));
    pool.reset(bad).unwrap();
    break_again(&mut pool);
    pool.copy_slots(&[(good, bad)]).unwrap();
    assert_eq!(slot_bytes(&pool, bad), slot_bytes(&pool, good));
    pool.reset(bad).unwrap();
    break_again(&mut pool);
    pool.free(bad).unwrap();
    let next = pool.allocate().unwrap();
    assert_eq!(pool.tokens(next).unwrap(), 0);
}

#[test]
fn truncation_reaches_back_as_far_as_every_layer_can() {
    let mut pool = pool(1);
    let slot = pool.allocate().unwrap();
    advance(&mut pool, slot, 19, 3); // Open segments begin at 16, 18 and 16.
    let before = slot_bytes(&pool, slot);
    let error = pool.truncate(slot, 17).unwrap_err();
    assert!(matches!(error, Error::Committed { slot: 0, tokens: 17, least: 18 }), "{error:?}");
    assert!(pool.truncate(slot, 20).is_err());
    assert_eq!(slot_bytes(&pool, slot), before);
    pool.truncate(slot, 18).unwrap();
    assert!(pool.layers().iter().all(|layer| layer.tokens(0) == 18));
    assert_eq!([0, 1, 2].map(|l| pool.layers()[l].open_len(0)), [2, 0, 2]);
}

#[test]
fn layers_must_go_with_each_other() {
    let p = layers()[0];
    let state = |slots| State::new(&p, slots).unwrap();
    let text = |result: infini_attn::Result<Pool<State>>| result.unwrap_err().to_string();
    assert_eq!(text(Pool::<State>::new(&[], 3)), "layers: 0 elements given, at least one expected");
    assert_eq!(
        text(Pool::from_layers(vec![state(3), state(2)])),
        "layers: 2 elements given, 3 slots, as in layer 0 expected"
    );
    let mut used = state(3);
    bring(0, &mut used, 1, 2, 1);
    assert_eq!(
        text(Pool::from_layers(vec![state(3), used])),
        "layers[1] (slot 1): 2 tokens seen given, an empty slot expected"
    );
    let mut pool = pool(1);
    let slot = pool.allocate().unwrap();
    let other = Snapshot::from_layers(vec![state(1); 3]).unwrap();
    let error = pool.restore(&[slot], &other).unwrap_err().to_string();
    assert!(error.contains("key_dim = 8, the call has key_dim = 4"), "{error}");
    let few = Snapshot::from_layers(vec![state(1)]).unwrap();
    let error = pool.restore(&[slot], &few).unwrap_err().to_string();
    assert_eq!(error, "layers: 1 elements given, 3 (the layers of the model) expected");
    // Layers put in the place of others with fewer slots.
    pool.reserve(4).unwrap();
    let late = [(); 3].map(|()| pool.allocate().unwrap())[2];
    pool.layers_mut()[1] = State::new(&layers()[1], 1).unwrap();
    assert!(pool.step(&[(late, 1)], |_, _| Ok::<(), Error>(())).is_err());
    assert!(pool.truncate(late, 0).is_err() && pool.snapshot(&[late]).is_err());
}

#[test]
fn slots_in_a_budget() {
    let layers = layers();
    let each: u64 = layers.iter().map(|p| p.state_bytes(1, true).unwrap()).sum();
    let slots = |budget| Pool::<State>::slots_in(&layers, true, budget).unwrap();
    assert_eq!((slots(0), slots(each - 1), slots(each), slots(10 * each + 1)), (0, 0, 1, 10));
    assert_eq!(slots(u64::MAX), i32::MAX as usize);
}

#[test]
fn prefixes_give_way_in_the_order_of_their_use() {
    let mut pool = pool(1);
    let slot = pool.allocate().unwrap();
    advance(&mut pool, slot, 5, 1);
    let snapshot = pool.snapshot(&[slot]).unwrap();
    let each = snapshot.bytes();
    let mut prefixes = PrefixCache::new(2 * each + each / 2);
    assert!(prefixes.insert("a", snapshot.clone()) && prefixes.insert("b", snapshot.clone()));
    assert!(prefixes.get(&"a").is_some());
    assert!(prefixes.insert("c", snapshot.clone()));
    assert_eq!((prefixes.len(), prefixes.bytes()), (2, 2 * each));
    assert!(prefixes.get(&"b").is_none());
    assert_eq!(prefixes.longest(["b", "c", "a"].iter()).map(|(i, _)| i), Some(1));
    assert!(prefixes.insert("c", snapshot.clone()));
    assert_eq!((prefixes.len(), prefixes.bytes()), (2, 2 * each));
    let counters = prefixes.counters();
    assert_eq!(
        (counters.hits, counters.misses, counters.insertions, counters.evictions),
        (2, 1, 4, 1)
    );
    assert!(!PrefixCache::new(each - 1).insert("a", snapshot.clone()));
    assert_eq!(bytes(&prefixes.remove(&"c").unwrap()), bytes(&snapshot));
    assert_eq!((prefixes.len(), prefixes.bytes(), prefixes.is_empty()), (1, each, false));
}

/// The open segment goes into one layer's memory, and the step fails: as many tokens, another state.
#[test]
fn a_flush_in_a_step_that_fails_is_noticed() {
    let mut pool = pool(1);
    let slot = pool.allocate().unwrap();
    advance(&mut pool, slot, 3, 1);
    let result = pool.step(&[(slot, 0)], |states, slots| {
        flush(&layers()[0], &mut states[0], slots)?;
        Err::<(), _>(Error::Cancelled { taken: vec![0] })
    });
    assert!(matches!(result, Err(Error::Cancelled { .. })));
    assert!(matches!(pool.index(slot), Err(Error::Unfinished { slot: 0 })));
}
