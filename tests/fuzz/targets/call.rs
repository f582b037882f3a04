//! Calls with arguments that fit, but for a few: a refusal leaves state and outputs as they were, and
//! what is accepted gives what the float64 reference does.

use std::ops::Range;

use arbitrary::{Arbitrary, Result, Unstructured};
use infini_attn::{
    Denominator, Error, Inputs, Outputs, Problem, Rope, State, TensorView, TensorViewMut, Update,
    decode, flush, key_sums, prefill, reference, segment_map,
};

use super::Outcome;

/// What outputs hold before a call.
const UNTOUCHED: f32 = 7654.25;
/// Relative RMS error of f32 results, of sums over a few values.
const TOLERANCE: f64 = 1e-4;

pub fn run(data: &[u8]) -> Outcome {
    stream(&mut Unstructured::new(data)).unwrap_or(Outcome::Skipped)
}

/// Some calls on one state; the outcome is the best.
fn stream(u: &mut Unstructured<'_>) -> Result<Outcome> {
    let mut tame = true;
    let Ok(problem) = problem(u, &mut tame)? else { return Ok(Outcome::Refused) };
    let slots = u.int_in_range(0..=3)?;
    let mut state = State::new(&problem, slots).expect("room");
    let mut oracle = reference::State::new(&problem, slots).expect("room");
    let mut best = Outcome::Refused;
    for _ in 0..u.int_in_range(1..=4)? {
        let before = state.to_bytes().expect("room");
        let (refused, accepted) = match u.int_in_range(0..=9)? {
            0 => manage(u, &mut state, &mut oracle)?,
            1 => maps(u, &state)?,
            _ => Call::new(u, &problem, slots)?.make(u, &mut state, &mut oracle, &mut tame)?,
        };
        if refused {
            assert!(state.to_bytes().expect("room") == before, "a refusal has changed the state");
        } else if accepted {
            best = Outcome::Accepted;
        }
        let bytes = state.to_bytes().expect("room");
        assert!(State::from_bytes(&bytes).expect("saved").to_bytes().expect("room") == bytes);
    }
    Ok(best)
}

/// `tame` is left as it is where results can be compared.
fn problem(u: &mut Unstructured<'_>, tame: &mut bool) -> Result<infini_attn::Result<Problem>> {
    let kv_heads = u.int_in_range(0..=3)?.max(u8::from(u.ratio(15, 16)?)).into();
    let heads = kv_heads * usize::from(u.int_in_range(1..=3u8)?) + usize::from(u.ratio(1, 16)?);
    let mut few = |most: u8| -> Result<usize> {
        let least = u8::from(!u.ratio(1, 32)?);
        Ok(u.int_in_range(least..=most)?.into())
    };
    let b = Problem::builder().kv_heads(kv_heads).heads(heads);
    let b = b.key_dim(few(5)?).value_dim(few(5)?).segment_len(few(5)?);
    let b = b.update(if bool::arbitrary(u)? { Update::Delta } else { Update::Linear });
    let b = match u.int_in_range(0..=7)? {
        0 => {
            *tame = false;
            b.denominator(Denominator::Clamp(f32::arbitrary(u)?))
        }
        1 => b.denominator(Denominator::Clamp(1e-3)),
        2 => b.denominator(Denominator::Add(1e-3)),
        _ => b,
    };
    let b = match u.int_in_range(0..=7)? {
        0 => {
            *tame = false;
            b.scale(f64::arbitrary(u)?)
        }
        1 => b.scale(0.25),
        _ => b,
    };
    Ok(b.build())
}

/// Slots of the state, or some that are not.
fn slots(u: &mut Unstructured<'_>, available: usize) -> Result<Vec<usize>> {
    let mut slots: Vec<_> = (0..available).collect();
    slots.truncate(u.int_in_range(0..=available)?);
    if u.ratio(1, 8)? {
        slots.push(if bool::arbitrary(u)? { 0 } else { usize::arbitrary(u)? });
    }
    Ok(slots)
}

/// Whether it was refused, and whether anything was accepted.
type Done = (bool, bool);

fn manage(
    u: &mut Unstructured<'_>,
    state: &mut State,
    oracle: &mut reference::State,
) -> Result<Done> {
    let slots = slots(u, state.sequences())?;
    let problem = *state.problem();
    let done = match u.int_in_range(0..=2)? {
        0 => {
            let done = flush(&problem, state, &slots);
            assert_eq!(done.is_ok(), oracle.flush(&problem, &slots).is_ok(), "{done:?}");
            done
        }
        // The reference has no reset: it goes on with a state that nothing has happened to.
        1 if slots.len() == state.sequences() => {
            let done = state.reset(&slots);
            if done.is_ok() {
                *oracle = reference::State::new(&problem, state.sequences()).expect("room");
            }
            done
        }
        _ => state.fork(&slots).map(|fork| assert_eq!(fork.sequences(), slots.len())),
    };
    Ok((done.is_err(), done.is_ok()))
}

/// Sums and maps of a few keys, made and refused.
fn maps(u: &mut Unstructured<'_>, state: &State) -> Result<Done> {
    let p = state.problem();
    let shape = [state.sequences(), u.int_in_range(0..=6)?, p.kv_heads(), p.key_dim()];
    let mut like_v = shape;
    like_v[3] = p.value_dim();
    let [k, v] = [shape, like_v].map(|shape| vec![0.5f32; shape.iter().product()]);
    let k = TensorView::new(&k, &shape).expect("its shape");
    let v = TensorView::new(&v, &like_v).expect("its shape");
    let Ok(sums) = key_sums(p, k) else { return Ok((true, false)) };
    _ = segment_map(p, k, v, &sums);
    Ok((false, true))
}

/// The arguments of a prefill or a decode.
struct Call {
    problem: Problem,
    /// q, k, v, o: shapes and data.
    tensors: [(Vec<usize>, Vec<f32>); 4],
    lens: Option<Vec<i32>>,
    ranges: Option<Vec<Range<i32>>>,
    cu: Option<Vec<i32>>,
    slots: Option<Vec<usize>>,
    gate: Vec<f32>,
    tables: Option<(Vec<usize>, Vec<f32>, Vec<f32>)>,
    positions: Option<Vec<i64>>,
    lse: bool,
    /// Whether all numbers are ordinary ones.
    tame: bool,
}

impl Call {
    fn new(u: &mut Unstructured<'_>, p: &Problem, slots: usize) -> Result<Self> {
        let batch = if u.ratio(1, 8)? { u.int_in_range(0..=4)? } else { slots };
        let tokens = u.int_in_range(0..=9)?;
        let packed = u.ratio(1, 4)?;
        let mut tame = true;
        let tensor = |u: &mut Unstructured<'_>, heads, dim, tame: &mut bool| {
            let lead = if packed { vec![tokens] } else { vec![batch, tokens] };
            let mut shape = [lead, vec![heads, dim]].concat();
            if u.ratio(1, 40)? {
                let at = u.choose_index(shape.len())?;
                shape[at] = u.int_in_range(0..=6)?;
            }
            let data = numbers(u, shape.iter().product(), tame)?;
            Ok((shape, data))
        };
        let q = tensor(u, p.heads(), p.key_dim(), &mut tame)?;
        let k = tensor(u, p.kv_heads(), p.key_dim(), &mut tame)?;
        let v = tensor(u, p.kv_heads(), p.value_dim(), &mut tame)?;
        let o = tensor(u, p.heads(), p.value_dim(), &mut true)?;
        let lens: Option<Vec<i32>> = match !packed && u.ratio(1, 3)? {
            true => Some((0..batch).map(|_| odd(u, 0..=tokens as i32)).collect::<Result<_>>()?),
            false => None,
        };
        // Padding on the left as well, as far as there is room.
        let ranges = match &lens {
            Some(lens) if bool::arbitrary(u)? => {
                let range = |&len: &i32| {
                    let first = odd(u, 0..=(tokens as i32).saturating_sub(len).max(0))?;
                    Ok(first..first.saturating_add(len))
                };
                Some(lens.iter().map(range).collect::<Result<_>>()?)
            }
            _ => None,
        };
        let cu = match packed {
            true => {
                let mut cu = vec![0];
                for _ in 1..batch {
                    cu.push(u.int_in_range(0..=tokens as i32)?);
                }
                cu.push(odd(u, tokens as i32..=tokens as i32)?);
                if !u.ratio(1, 16)? {
                    cu.sort_unstable();
                }
                Some(cu)
            }
            false => None,
        };
        let slots = if u.ratio(1, 4)? { Some(self::slots(u, slots)?) } else { None };
        let heads = p.heads() + usize::from(u.ratio(1, 40)?);
        let gate = numbers(u, heads, &mut tame)?;
        let (tables, positions) = Self::rotation(u, p, batch * tokens, tokens, &mut tame)?;
        let (tensors, lse) = ([q, k, v, o], bool::arbitrary(u)?);
        Ok(Self {
            problem: *p,
            tensors,
            lens,
            ranges,
            cu,
            slots,
            gate,
            tables,
            positions,
            lse,
            tame,
        })
    }

    #[allow(clippy::type_complexity)]
    fn rotation(
        u: &mut Unstructured<'_>,
        p: &Problem,
        all: usize,
        tokens: usize,
        tame: &mut bool,
    ) -> Result<(Option<(Vec<usize>, Vec<f32>, Vec<f32>)>, Option<Vec<i64>>)> {
        if !u.ratio(1, 4)? {
            return Ok((None, None));
        }
        let columns = u.int_in_range(0..=p.key_dim() / 2 + 1)?;
        let shape = vec![u.int_in_range(0..=60)?, columns];
        let len = shape.iter().product();
        let tables = (shape, numbers(u, len, tame)?, numbers(u, len, tame)?);
        let positions = match u.int_in_range(0..=3)? {
            0 => Some((0..all).map(|_| odd(u, 0..=40)).collect::<Result<_>>()?),
            1 => Some((0..tokens).map(|_| odd(u, 0..=40)).collect::<Result<_>>()?),
            _ => None,
        };
        Ok((Some(tables), positions))
    }

    fn inputs(&self) -> infini_attn::Result<Inputs<'_, f32>> {
        let view = |i: usize| TensorView::new(&self.tensors[i].1, &self.tensors[i].0);
        let mut inputs = Inputs::new(view(0)?, view(1)?, view(2)?);
        if let Some(lens) = &self.lens {
            inputs = inputs.seq_lens(lens);
        }
        if let Some(ranges) = &self.ranges {
            inputs = inputs.seq_ranges(ranges);
        }
        if let Some(cu) = &self.cu {
            inputs = inputs.cu_seqlens(cu);
        }
        if let Some(slots) = &self.slots {
            inputs = inputs.slots(slots);
        }
        if let Some((shape, cos, sin)) = &self.tables {
            let table = |data| TensorView::new(data, shape);
            let mut rope = Rope::new(table(cos)?, table(sin)?);
            if let Some(positions) = &self.positions {
                rope = rope.positions(positions);
            }
            inputs = inputs.rope(rope);
        }
        Ok(inputs)
    }

    fn make(
        &self,
        u: &mut Unstructured<'_>,
        state: &mut State,
        oracle: &mut reference::State,
        tame: &mut bool,
    ) -> Result<Done> {
        let (shape, _) = &self.tensors[3];
        let mut o = vec![UNTOUCHED; shape.iter().product()];
        let logs = match shape.len() {
            4 => vec![shape[0], shape[2], shape[1]],
            _ => vec![shape[1], shape[0]],
        };
        let mut lse = vec![UNTOUCHED; logs.iter().product()];
        let Ok(inputs) = self.inputs() else { return Ok((true, false)) };
        let mut outputs = Outputs::new(TensorViewMut::new(&mut o, shape).expect("its shape"));
        if self.lse {
            outputs = outputs.lse(TensorViewMut::new(&mut lse, &logs).expect("its shape"));
        }
        let entry = if u.ratio(1, 3)? { decode::<f32> } else { prefill::<f32> };
        match entry(&self.problem, &inputs, &self.gate, state, outputs) {
            Err(error) => {
                let text = error.to_string();
                assert!(!text.is_empty() && !matches!(error, Error::Io { .. }), "{error:?}");
                assert!(o.iter().chain(&lse).all(|&x| x == UNTOUCHED), "{text}: outputs written");
                Ok((true, false))
            }
            Ok(()) => {
                let want = reference::prefill(&self.problem, &inputs, &self.gate, oracle)
                    .expect("what the CPU accepts");
                // What is not tame stays in the state.
                *tame &= self.tame;
                if *tame {
                    compare("o", &o, &want.o);
                }
                if *tame && self.lse {
                    compare("lse", &lse, &want.lse);
                }
                for slot in 0..state.sequences() {
                    let got = (state.tokens(slot), state.committed(slot), state.open_len(slot));
                    let want = (oracle.tokens(slot), oracle.committed(slot), oracle.open_len(slot));
                    assert_eq!(got, want, "slot {slot}");
                }
                Ok((false, true))
            }
        }
    }
}

/// A number of the range, seldom another.
fn odd<T: for<'a> Arbitrary<'a> + arbitrary::unstructured::Int>(
    u: &mut Unstructured<'_>,
    range: std::ops::RangeInclusive<T>,
) -> Result<T> {
    if u.ratio(1, 60)? { T::arbitrary(u) } else { u.int_in_range(range) }
}

/// Numbers about 1, all of them but few; anything that f32 holds otherwise, and then not tame.
fn numbers(u: &mut Unstructured<'_>, len: usize, tame: &mut bool) -> Result<Vec<f32>> {
    let wild = u.ratio(1, 20)?;
    let seed = u32::arbitrary(u)?;
    // An own generator: bytes are for what matters.
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x
    };
    let mut numbers: Vec<f32> =
        (0..len).map(|_| next() as f32 / (1u64 << 31) as f32 - 1.0).collect();
    if wild && len > 0 {
        *tame = false;
        numbers[u.choose_index(len)?] = f32::arbitrary(u)?;
    }
    Ok(numbers)
}

fn compare(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let (mut error, mut size) = (0.0, 0.0);
    for (&got, &want) in got.iter().zip(want) {
        if f64::from(got) == want {
            continue;
        }
        error += (f64::from(got) - want).powi(2);
        size += want.powi(2);
    }
    assert!(error <= (TOLERANCE * TOLERANCE) * size.max(1e-12), "{what}: {error:e} of {size:e}");
}
