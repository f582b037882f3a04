//! rotate_keys, append, clear_padding, table.

use bytemuck::Zeroable;
use half::{bf16, f16};
use infini_attn::Element;
use infini_attn::cuda::params::*;

use super::*;
use crate::common::buffers::{Arrangement, CANARY, Strided};
use crate::common::{bits, scalar, widen};

const N: usize = 13;
const KV_HEADS: usize = 2;

/// Random rows between NaN.
fn rows<T: Element>(shape: &[usize], how: Arrangement, seed: u64) -> Strided<T> {
    let mut x = Strided::with_margin(shape, how, f32::NAN, MARGIN);
    let [batch, tokens, heads, width]: [usize; 4] = shape.try_into().expect("rank 4");
    let values = random(seed, batch * tokens * heads * width);
    for (i, row) in values.chunks(width).enumerate() {
        let row: Vec<T> = row.iter().map(|&x| scalar(x)).collect();
        x.set_row(&[i / heads / tokens, i / heads % tokens, i % heads], &row);
    }
    x
}

/// A [records, Hkv, n, width] array of canaries.
fn canaries<T: Element>(records: usize, n: usize, width: usize) -> Strided<T> {
    Strided::with_margin(&[records, KV_HEADS, n, width], Arrangement::Contiguous, CANARY, MARGIN)
}

/// Address of the first element of a contiguous array.
fn start<T: Element>(x: &OnDevice<T>) -> u64 {
    x.tensor.data
}

/// Rotary tables with rows further apart than they are long, NaN between them.
struct Tables {
    cos: Strided<f32>,
    sin: Strided<f32>,
    half: usize,
    interleaved: bool,
}

impl Tables {
    const ROWS: usize = 40;

    /// Rows `gaps` elements further apart than they are long.
    fn new(half: usize, interleaved: bool, gaps: [usize; 2]) -> Self {
        let table = |gap, seed| {
            let mut x = Strided::with_margin(&[Self::ROWS, half], Arrangement::Gaps, f32::NAN, gap);
            for (i, row) in random(seed, Self::ROWS * half).chunks(half.max(1)).enumerate() {
                x.set_row(&[i], row);
            }
            x
        };
        Self { cos: table(gaps[0], 5), sin: table(gaps[1], 6), half, interleaved }
    }

    fn upload(&self, sim: &mut Simulator) -> InfiniRope {
        let mut address =
            |name, x: &Strided<f32>| sim.upload(name, x.data()) + 4 * x.offset() as u64;
        InfiniRope {
            cos: address("cos", &self.cos),
            sin: address("sin", &self.sin),
            cos_stride: self.cos.strides()[0],
            sin_stride: self.sin.strides()[0],
            rows: Self::ROWS as i64,
            half: self.half as i32,
            interleaved: self.interleaved.into(),
            ..Zeroable::zeroed()
        }
    }

    /// The rotated row in float64; as it is where the position lies outside of the tables.
    fn rotate(&self, row: &[f64], position: i64) -> Vec<f64> {
        let mut out = row.to_vec();
        let Some(position) = usize::try_from(position).ok().filter(|&x| x < Self::ROWS) else {
            return out;
        };
        for i in 0..self.half {
            let (a, b) = if self.interleaved { (2 * i, 2 * i + 1) } else { (i, i + self.half) };
            let (cos, sin) = (self.cos.get(&[position, i]), self.sin.get(&[position, i]));
            let (cos, sin) = (f64::from(cos), f64::from(sin));
            (out[a], out[b]) = (row[a] * cos - row[b] * sin, row[b] * cos + row[a] * sin);
        }
        out
    }
}

/// Pieces of two batches in segments of `n` tokens.
struct Pieces {
    n: usize,
    /// Tokens of a batch.
    tokens: usize,
    /// Rows that are read at a time.
    block: usize,
    all: Vec<InfiniPiece>,
}

impl Pieces {
    /// Two pieces of batch 1 and a short one of batch 0, not in order.
    fn short() -> Self {
        let all = [(1, 2, 9, 9, 4), (1, 11, 18, 13, 0), (0, 1, 0, 5, 0)];
        Self { n: N, tokens: 24, block: 1, all: all.map(|piece| Self::piece(N, piece)).into() }
    }

    /// Those that end before, at and behind 128 keys, one that leaves less than 128 rows free, and
    /// one that fills its segment.
    fn long() -> Self {
        let lens = [(0, 127), (127, 128), (255, 129), (384, 257), (641, 300)];
        let all = lens.map(|(first, len)| Self::piece(300, (0, first, 0, len, 0))).into();
        Self { n: 300, tokens: 941, block: 128, all }
    }

    fn piece(
        n: usize,
        (batch, first, position, len, cached): (i32, i64, i64, i32, i32),
    ) -> InfiniPiece {
        InfiniPiece {
            first,
            position,
            slot: 2 - batch,
            batch,
            len,
            cached,
            full: i32::from((cached + len) as usize == n),
            empty: 1,
        }
    }
}

fn run_of(sim: &mut Simulator, pieces: &[InfiniPiece], chains: &[InfiniChain]) -> InfiniRun {
    InfiniRun {
        pieces: sim.upload("pieces", pieces),
        chains: sim.upload("chains", chains),
        piece_count: pieces.len() as i32,
        chain_count: chains.len() as i32,
    }
}

/// The keys of pieces through rotate_keys. `positions`: the caller's, for the tokens of 2 batches.
fn check_rotation<T: Element>(
    Pieces { n, tokens, block, all: pieces }: Pieces,
    dk: usize,
    tables: &Tables,
    how: Arrangement,
    positions: Option<Vec<i64>>,
    outside: bool,
) {
    let mut sim = simulator();
    let k = rows::<T>(&[2, tokens, KV_HEADS, dk], how, 1);
    let k = OnDevice::rows(&mut sim, "k", k);
    let rotated = OnDevice::rows(&mut sim, "rotated", canaries::<T>(pieces.len(), n, dk));
    let status = sim.upload("status", &[0u32]);
    let mut rope = tables.upload(&mut sim);
    if let Some(positions) = &positions {
        (rope.positions, rope.positions_batch) =
            (sim.upload("positions", positions), tokens as i64);
    }
    let params = InfiniRotateKeys {
        problem: problem([dk, 64], [4, KV_HEADS], n),
        k: k.tensor,
        rope,
        run: run_of(&mut sim, &pieces, &[]),
        status,
        rotated: start(&rotated),
        block: block as i64,
    };
    let grid = [n.div_ceil(8), KV_HEADS, pieces.len()];
    let report = launch(&mut sim, &symbol::<T>("rotate_keys"), grid, &params);
    assert_moved_once(&report, &["k", "rotated"]);

    let got = rotated.read(&sim);
    let canary: f64 = scalar::<T>(CANARY).into();
    let half_step =
        if T::DTYPE == infini_attn::DType::BF16 { 2f64.powi(-8) } else { 2f64.powi(-11) };
    for (i, piece) in pieces.iter().enumerate() {
        for j in 0..n {
            for h in 0..KV_HEADS {
                let got = widen(got.row(&[i, h, j]));
                let len = piece.len as usize;
                if j >= len {
                    // The rest of the last block.
                    let rest = if j < len.next_multiple_of(block) { 0.0 } else { canary };
                    assert!(got.iter().all(|&x| x == rest), "row {j} of piece {i}: {got:?}");
                    continue;
                }
                let token = piece.first as usize + j;
                let position = match &positions {
                    Some(given) => given[piece.batch as usize * tokens + token],
                    None => piece.position + j as i64,
                };
                let row = widen(k.host.row(&[piece.batch as usize, token, h]));
                let want = tables.rotate(&row, position);
                for (c, (&got, &want)) in got.iter().zip(&want).enumerate() {
                    let rotates = c < 2 * tables.half;
                    let allowed = if rotates { half_step * want.abs() + 4e-6 } else { 0.0 };
                    let at = format!("piece {i} head {h} token {j} channel {c}");
                    assert!((got - want).abs() <= allowed, "{at}: {got}, {want} expected");
                }
            }
        }
    }
    let reported = sim.read::<u32>(status, 1)[0];
    assert_eq!(reported, if outside { INFINI_STATUS_POSITION } else { 0 });
}

#[test]
fn keys_rotate() {
    use Arrangement::{Contiguous, Gaps, HeadsFirst, Reversed};
    // Whole 16-byte chunks, rotation of a part of the channels, pairs that split a chunk.
    for (half, interleaved, how) in
        [(32, false, Gaps), (8, false, Contiguous), (32, true, Reversed), (12, true, HeadsFirst)]
    {
        for gaps in [[4, 8], [1, 4], [8, 3]] {
            let tables = Tables::new(half, interleaved, gaps);
            check_rotation::<bf16>(Pieces::short(), 64, &tables, how, None, false);
        }
    }
    for (half, interleaved, how) in
        [(48, false, Reversed), (5, false, Gaps), (47, true, Contiguous), (0, false, Gaps)]
    {
        check_rotation::<f16>(
            Pieces::short(),
            96,
            &Tables::new(half, interleaved, [8, 4]),
            how,
            None,
            false,
        );
    }
}

#[test]
fn positions_are_looked_up_and_checked() {
    let tables = Tables::new(20, false, [1, 3]);
    let mut given: Vec<i64> = (0..48).map(|i| (i * 7) % Tables::ROWS as i64).collect();
    check_rotation::<f16>(
        Pieces::short(),
        64,
        &tables,
        Arrangement::Gaps,
        Some(given.clone()),
        false,
    );
    // Token 14 of batch 1 and token 1 of batch 0; the last row of the tables is inside.
    (given[24 + 14], given[1], given[2]) = (-1, Tables::ROWS as i64, Tables::ROWS as i64 - 1);
    check_rotation::<bf16>(Pieces::short(), 64, &tables, Arrangement::Gaps, Some(given), true);
}

#[test]
fn rows_behind_the_last_key_are_zero_as_far_as_copies_bring_them() {
    let pieces = Pieces::long();
    let positions = (0..2 * pieces.tokens).map(|i| (i % Tables::ROWS) as i64).collect();
    let tables = Tables::new(32, false, [4, 8]);
    check_rotation::<bf16>(pieces, 64, &tables, Arrangement::Gaps, Some(positions), false);
}

/// Three chains: one whose last piece waits behind 4 cached tokens, one that fills its segment, one
/// that a later run continues.
fn check_append<T: Element>(dims: [usize; 2], rotation: bool, how: Arrangement) {
    const SLOTS: usize = 4;
    let piece = |batch: i32, slot, first, len, cached: i32| InfiniPiece {
        first,
        position: 0,
        slot,
        batch,
        len,
        cached,
        full: i32::from((cached + len) as usize == N),
        empty: 0,
    };
    let pieces = [
        piece(0, 2, 3, 7, 4),
        piece(1, 0, 0, 13, 0),
        piece(1, 0, 13, 1, 0),
        piece(2, 3, 5, 10, 3),
        piece(3, 1, 0, 9, 0),
    ];
    let chain = |slot, first_piece, pieces, ends, tokens, committed| InfiniChain {
        tokens,
        committed,
        slot,
        first_piece,
        pieces,
        empty: 0,
        ends,
        reserved: 0,
    };
    let chains = [
        chain(2, 0, 1, 1, 50, 39),
        chain(0, 1, 2, 1, (1 << 40) + 14, (1 << 40) + 13),
        chain(3, 3, 1, 1, 26, 26),
        chain(1, 4, 1, 0, 9, 0),
    ];
    let mut sim = simulator();
    let [dk, dv] = dims;
    let k = OnDevice::rows(&mut sim, "k", rows::<T>(&[4, 20, KV_HEADS, dk], how, 1));
    let v = OnDevice::rows(&mut sim, "v", rows::<T>(&[4, 20, KV_HEADS, dv], how, 2));
    let contiguous = Arrangement::Contiguous;
    let rotated = rows::<T>(&[pieces.len(), KV_HEADS, N, dk], contiguous, 3);
    let rotated = OnDevice::rows(&mut sim, "rotated", rotated);
    let open = [("open_k", dk), ("open_k_rotated", dk), ("open_v", dv)]
        .map(|(name, width)| OnDevice::rows(&mut sim, name, canaries::<T>(SLOTS, N, width)));
    let stale = InfiniCounters { tokens: 7, committed: 1, taken: 3, ..Zeroable::zeroed() };
    let counters = sim.upload("counters", &[stale; SLOTS]);

    let mut params = InfiniAppend::zeroed();
    params.problem = problem(dims, [4, KV_HEADS], N);
    (params.call.k, params.call.v) = (k.tensor, v.tensor);
    (params.state.open_k, params.state.open_v) = (start(&open[0]), start(&open[2]));
    (params.state.counters, params.state.slots) = (counters, SLOTS as i64);
    params.run = run_of(&mut sim, &pieces, &chains);
    if rotation {
        params.call.rope = Tables::new(dk / 2, false, [4, 8]).upload(&mut sim);
        (params.state.open_k_rotated, params.rotated) = (start(&open[1]), start(&rotated));
    }
    let grid = [N.div_ceil(8), KV_HEADS, chains.len()];
    let report = launch(&mut sim, &symbol::<T>("append"), grid, &params);
    assert_moved_once(&report, &["k", "v", "rotated", "open_k", "open_k_rotated", "open_v"]);

    let mut want = open.each_ref().map(|x| x.host.clone());
    for index in [0, 2] {
        let piece: &InfiniPiece = &pieces[index];
        for (h, j) in (0..KV_HEADS).flat_map(|h| (0..piece.len as usize).map(move |j| (h, j))) {
            let from = [piece.batch as usize, piece.first as usize + j, h];
            let to = [piece.slot as usize, h, piece.cached as usize + j];
            want[0].set_row(&to, k.host.row(&from));
            want[2].set_row(&to, v.host.row(&from));
            if rotation {
                want[1].set_row(&to, rotated.host.row(&[index, h, j]));
            }
        }
    }
    for (x, want) in open.iter().zip(&want) {
        assert!(x.read(&sim).bits() == want.bits(), "{dims:?}, rotation {rotation}, {how:?}");
    }
    let got: Vec<_> = (sim.read::<InfiniCounters>(counters, SLOTS).iter())
        .map(|c| (c.tokens, c.committed, c.open_len, c.taken))
        .collect();
    let big = 1u64 << 40;
    assert_eq!(got, [(big + 14, big + 13, 1, 0), (7, 1, 0, 3), (50, 39, 11, 0), (26, 26, 0, 0)]);
    for slot in [0, 2] {
        let rotated = sim.read::<InfiniCounters>(counters, SLOTS)[slot].rotated;
        assert_eq!(rotated, u32::from(rotation), "slot {slot}");
    }
}

#[test]
fn the_last_piece_is_appended() {
    check_append::<bf16>([64, 96], false, Arrangement::Gaps);
    check_append::<bf16>([128, 64], true, Arrangement::Reversed);
    check_append::<f16>([96, 96], true, Arrangement::HeadsFirst);
}

/// `asked`: a_dot, a_mem and lse.
fn check_padding<T: Element>(dv: usize, how: Arrangement, asked: bool, table: &str) {
    const HEADS: usize = 3;
    const TOKENS: usize = 11;
    // The last is padding itself, whatever its length.
    let (slots, lens) = ([5, 4, 3, 2, INFINI_PAD_SLOT], [4, TOKENS, 0, 4, 7]);
    let starts = [3, 0, 5, 0, 0];
    let ranges = [3..7, 0..TOKENS, 5..5, 0..4, 0..0];
    let mut sim = simulator();
    let sequences: Vec<_> = (slots.into_iter().enumerate())
        .map(|(b, slot)| InfiniSequence {
            first: starts[b],
            slot,
            batch: b as i32,
            len: lens[b] as i32,
            reserved: 0,
        })
        .collect();
    let mut outputs = Vec::new();
    for name in ["o", "a_dot", "a_mem"] {
        let x = Strided::<T>::with_margin(&[ranges.len(), TOKENS, HEADS, dv], how, CANARY, MARGIN);
        outputs.push(OnDevice::rows(&mut sim, name, x));
    }
    let lse = Strided::<f32>::with_margin(&[ranges.len(), HEADS, TOKENS], how, CANARY, MARGIN);
    let lse = OnDevice::logs(&mut sim, "lse", lse);

    let mut params = InfiniClearPadding::zeroed();
    params.problem = problem([64, dv], [HEADS, 1], N);
    params.call.o = outputs[0].tensor;
    if asked {
        (params.call.a_dot, params.call.a_mem) = (outputs[1].tensor, outputs[2].tensor);
        params.call.lse = lse.tensor;
    }
    let s = &mut params.sequences;
    (s.count, s.tokens, s.max_len) = (ranges.len() as i32, TOKENS as i32, TOKENS as i32);
    match table {
        "device" => s.table = sim.upload("sequences", &sequences),
        _ => {
            s.in_line = 1;
            s.inline_sequences[..ranges.len()].copy_from_slice(&sequences);
        }
    }
    let grid = [TOKENS.div_ceil(8), HEADS, ranges.len()];
    let report = launch(&mut sim, &symbol::<T>("clear_padding"), grid, &params);
    assert_moved_once(&report, &["o", "a_dot", "a_mem", "lse"]);

    let (outputs, lse) = (outputs.iter().map(|x| x.read(&sim)).collect::<Vec<_>>(), lse.read(&sim));
    for (i, output) in outputs.iter().enumerate() {
        for at in (0..ranges.len() * TOKENS * HEADS)
            .map(|i| [i / HEADS / TOKENS, i / HEADS % TOKENS, i % HEADS])
        {
            let cleared = !ranges[at[0]].contains(&at[1]) && (i == 0 || asked);
            let want: T = scalar(if cleared { 0.0 } else { CANARY });
            assert_eq!(bits(output.row(&at)), bits(&vec![want; dv]), "output {i}, {at:?}");
            let log = lse.get(&[at[0], at[2], at[1]]);
            let cleared = !ranges[at[0]].contains(&at[1]) && asked;
            assert_eq!(log, if cleared { f32::NEG_INFINITY } else { CANARY }, "{at:?}");
        }
    }
}

#[test]
fn padding_is_cleared() {
    check_padding::<bf16>(64, Arrangement::Gaps, true, "device");
    check_padding::<f16>(96, Arrangement::HeadsFirst, false, "inline");
    check_padding::<f16>(288, Arrangement::Reversed, true, "inline");
}

#[test]
fn tables_are_written() {
    for words in [0, 1, 255, 960] {
        let mut sim = simulator();
        let to = sim.upload("table", &[u32::MAX; 1000]);
        let mut params = InfiniTable { to: to + 4, bytes: 4 * words as i64, ..Zeroable::zeroed() };
        params.data.iter_mut().zip(1..).for_each(|(x, i)| *x = i);
        launch(&mut sim, "infini_table_sm80", [1, 1, 1], &params);
        let want: Vec<u32> =
            (0..1000u32).map(|i| if i >= 1 && i <= words { i } else { u32::MAX }).collect();
        assert_eq!(sim.read::<u32>(to, 1000), want);
    }
}
