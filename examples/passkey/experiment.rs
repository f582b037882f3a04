//! The experiment: streams with a needle, the question, and what is recalled.

use std::ops::Range;
use std::time::Instant;

use anyhow::Result;
use indicatif::ProgressBar;
use infini_attn::{Problem, Slots};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cli::show_tokens;
use crate::features::{DIGITS, PHRASE, Projections, WINDOW};
use crate::haystack::Haystack;
use crate::memory::{Backend, Text};

/// Passkeys per cell of the table.
pub const KEYS: usize = 5;
/// Where the needle lies: in the first segment, around the middle, in the last segment.
pub const DEPTHS: [&str; 3] = ["start", "middle", "end"];
/// One letter off the phrase.
const DECOY: &str = "The bass key is ";

/// Tokens of one call to `prefill`, at least: short segments go several at a time.
const CALL_TOKENS: usize = 2048;

/// The rows of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The constructed projections.
    Constructed,
    /// The same, with a decoy elsewhere in the text.
    Decoy,
    /// The constructed projections, but the memory is reset before the question.
    Reset,
    /// Random projections.
    Random,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Constructed, Kind::Decoy, Kind::Reset, Kind::Random];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Constructed => "constructed",
            Kind::Decoy => "decoy in the text",
            Kind::Reset => "memory reset",
            Kind::Random => "random projections",
        }
    }

    /// Passes over the streams; `Reset` asks the streams of `Constructed` once more.
    const STREAMED: [Kind; 3] = [Kind::Constructed, Kind::Decoy, Kind::Random];
}

/// What was recalled at one length and depth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// Digits recalled, of KEYS · DIGITS.
    pub digits: usize,
    /// Passkeys recalled whole, of KEYS.
    pub whole: usize,
}

impl Cell {
    /// Share of the digits recalled.
    pub fn recall(self) -> f64 {
        self.digits as f64 / (KEYS * DIGITS) as f64
    }
}

/// One row of the table.
#[derive(Clone, Debug)]
pub struct Line {
    pub kind: Kind,
    /// Tokens before the question.
    pub length: usize,
    pub cells: [Cell; DEPTHS.len()],
    /// Tokens per second, all streams together: features and memory.
    pub speed: f64,
    /// Bytes of state of one stream, open segment included.
    pub state_bytes: usize,
}

/// A passkey and what was written over the text of its stream.
#[derive(PartialEq, Eq)]
struct Stream {
    key: [u8; DIGITS],
    depth: usize,
    written: Vec<(usize, String)>,
}

pub struct Experiment<'a, B> {
    pub problem: Problem,
    pub backend: &'a B,
    pub seed: u64,
    pub haystack: &'a Haystack,
    pub progress: &'a ProgressBar,
}

impl<B: Backend> Experiment<'_, B> {
    /// All rows of one length.
    pub fn run(&self, length: usize) -> Result<Vec<Line>> {
        let (heads, dim) = (self.problem.heads(), self.problem.key_dim());
        let constructed = Projections::constructed(heads, dim, &mut self.rng(0));
        let random = Projections::random(heads, dim, &mut self.rng(1));
        let mut lines = vec![];
        for kind in Kind::STREAMED {
            self.progress.set_message(format!("{} tokens, {}", show_tokens(length), kind.name()));
            let projections = if kind == Kind::Random { &random } else { &constructed };
            let streams = self.streams(length, kind == Kind::Decoy);
            let mut caller = Caller::new(self.backend, &self.problem, projections);
            let start = Instant::now();
            let mut state = self.read(&mut caller, &streams, length)?;
            let seconds = start.elapsed().as_secs_f64();
            let state_bytes = state.bytes() / state.sequences();
            let mut line = |kind, cells| {
                let speed = self.work(&streams, length) as f64 / seconds;
                lines.push(Line { kind, length, cells, speed, state_bytes });
            };
            if kind == Kind::Constructed {
                let all: Vec<usize> = (0..streams.len()).collect();
                let mut blank = state.fork(&all)?;
                blank.reset(&all)?;
                line(Kind::Reset, self.ask(&mut caller, &mut blank, &streams, length)?);
            }
            line(kind, self.ask(&mut caller, &mut state, &streams, length)?);
        }
        Ok(lines)
    }

    /// Independent draws for each purpose.
    fn rng(&self, purpose: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(purpose);
        rng
    }

    /// KEYS streams for each depth. The keys and places of a length are the same in every row.
    fn streams(&self, length: usize, decoy: bool) -> Vec<Stream> {
        let mut rng = self.rng(2 + length as u64);
        let mut streams = vec![];
        for depth in 0..DEPTHS.len() {
            for _ in 0..KEYS {
                let mut sentence = |phrase: &str, depth| {
                    let key: [u8; DIGITS] = std::array::from_fn(|_| rng.random_range(0..10));
                    let digits: String = key.iter().map(u8::to_string).collect();
                    let text = format!("\n{phrase}{digits}.\n");
                    let zone = zone(depth, length, self.problem.segment_len());
                    let at = rng.random_range(zone.start..=zone.end - text.len());
                    (key, (at, text))
                };
                let (key, needle) = sentence(PHRASE, depth);
                // The last thing read, or halfway where the needle is that.
                let (_, other) = sentence(DECOY, if depth == 2 { 1 } else { 2 });
                let written = if decoy { vec![needle, other] } else { vec![needle] };
                streams.push(Stream { key, depth, written });
            }
        }
        streams
    }

    /// Sends every stream through `prefill`, padded with text to the end of its last segment. Up to
    /// its first written byte a stream is the text alone: slot 0 reads that, and is forked where a
    /// stream departs from it. Slot i of the result belongs to stream i.
    fn read(
        &self,
        caller: &mut Caller<'_, B>,
        streams: &[Stream],
        length: usize,
    ) -> Result<B::State> {
        let mut state = self.backend.state(&self.problem)?;
        let mut readers = vec![None];
        for call in self.calls(length) {
            let known = readers.len();
            readers.extend(streams.iter().filter(|s| call.contains(&s.departs())).map(Some));
            if readers.len() > known {
                let from = |slot| if slot < known { slot } else { 0 };
                state = state.fork(&Vec::from_iter((0..readers.len()).map(from)))?;
            }
            let reads = call.start.saturating_sub(WINDOW)..call.end;
            let (own, shared): (Vec<usize>, Vec<usize>) = (0..readers.len())
                .partition(|&slot| readers[slot].is_some_and(|s| s.writes_in(&reads)));
            // Where nothing is written all read the same text: its features serve all.
            caller.encode(&self.bytes(None, call.start, call.len()));
            for slots in shared.chunks(KEYS) {
                caller.prefill(slots, &mut state)?;
            }
            for slot in own {
                caller.encode(&self.bytes(readers[slot], call.start, call.len()));
                caller.prefill(&[slot], &mut state)?;
            }
            self.progress.inc((call.len() * readers.len()) as u64);
        }
        let slot_of = |s: &Stream| readers.iter().position(|r| *r == Some(s));
        Ok(state.fork(&Vec::from_iter(streams.iter().filter_map(slot_of)))?)
    }

    /// Token ranges of the calls that read a text: whole segments.
    fn calls(&self, length: usize) -> impl Iterator<Item = Range<usize>> {
        let segment = self.problem.segment_len();
        let step = segment * CALL_TOKENS.div_ceil(segment);
        let end = length.next_multiple_of(segment);
        (0..end).step_by(step).map(move |at| at..end.min(at + step))
    }

    /// Tokens that `read` sends through the memory.
    fn work(&self, streams: &[Stream], length: usize) -> u64 {
        let slots = |call: &Range<usize>| {
            1 + streams.iter().filter(|stream| stream.departs() < call.end).count()
        };
        self.calls(length).map(|call| (call.len() * slots(&call)) as u64).sum()
    }

    /// Tokens of all passes over all lengths: the progress bar's end.
    pub fn total(&self, lengths: &[usize]) -> u64 {
        let pass = |kind, length| self.work(&self.streams(length, kind == Kind::Decoy), length);
        lengths.iter().flat_map(|&l| Kind::STREAMED.map(|kind| pass(kind, l))).sum()
    }

    /// Opens a new segment with the question and reads off the answers, digit by digit: each digit
    /// decoded is the next token.
    fn ask(
        &self,
        caller: &mut Caller<'_, B>,
        state: &mut B::State,
        streams: &[Stream],
        length: usize,
    ) -> Result<[Cell; DEPTHS.len()]> {
        let end = length.next_multiple_of(self.problem.segment_len());
        let question = format!("\nWhat is the pass key? {PHRASE}");
        let projections = caller.projections;
        let mut ties = self.rng((1 << 40) + length as u64);
        let mut cells = [Cell::default(); DEPTHS.len()];
        for (slot, stream) in streams.iter().enumerate() {
            let mut bytes = self.bytes(Some(stream), end, 0);
            bytes.extend(question.as_bytes());
            let mut answer = [0; DIGITS];
            for digit in &mut answer {
                caller.encode(&bytes);
                let output = caller.prefill(&[slot], state)?;
                *digit = projections.decode(&output, &mut ties);
                bytes.drain(..bytes.len() - WINDOW);
                bytes.push(b'0' + *digit);
            }
            let cell = &mut cells[stream.depth];
            cell.digits += answer.iter().zip(stream.key).filter(|(a, k)| **a == *k).count();
            cell.whole += usize::from(answer == stream.key);
        }
        Ok(cells)
    }

    /// Tokens `at..at + count` of a stream (or of the text alone) and the WINDOW bytes before.
    fn bytes(&self, stream: Option<&Stream>, at: usize, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(WINDOW + count);
        let start = at as isize - WINDOW as isize;
        self.haystack.extend(start, WINDOW + count, &mut bytes);
        for (place, text) in stream.iter().flat_map(|s| &s.written) {
            for (i, byte) in text.bytes().enumerate() {
                let index = (place + i) as isize - start;
                if let Some(b) = usize::try_from(index).ok().and_then(|i| bytes.get_mut(i)) {
                    *b = byte;
                }
            }
        }
        bytes
    }
}

impl Stream {
    /// The first token that is not the text's own.
    fn departs(&self) -> usize {
        self.written.iter().map(|(at, _)| *at).min().unwrap_or(usize::MAX)
    }

    fn writes_in(&self, range: &Range<usize>) -> bool {
        self.written.iter().any(|(at, text)| *at < range.end && at + text.len() > range.start)
    }
}

/// The tokens among which the needle of a depth is placed.
fn zone(depth: usize, length: usize, segment: usize) -> Range<usize> {
    let start = match depth {
        0 => 0,
        1 => length / 2 / segment * segment,
        _ => length - segment,
    };
    start..start + segment
}

/// One call after another: features of some text, then `prefill`.
struct Caller<'a, B: Backend> {
    backend: &'a B,
    projections: &'a Projections,
    text: Text,
    features: Option<B::Features>,
}

impl<'a, B: Backend> Caller<'a, B> {
    fn new(backend: &'a B, problem: &Problem, projections: &'a Projections) -> Self {
        Self { backend, projections, text: Text::new(problem), features: None }
    }

    /// `bytes` begins with the WINDOW bytes before the first token.
    fn encode(&mut self, bytes: &[u8]) {
        self.features = None;
        self.projections.encode(bytes, &mut self.text.keys, &mut self.text.values);
    }

    /// Feeds the encoded text to each of `slots`; gives the last token's output, [H, D], in the
    /// last of them.
    fn prefill(&mut self, slots: &[usize], state: &mut B::State) -> Result<Vec<f32>> {
        let features = match &mut self.features {
            Some(features) => features,
            none => none.insert(self.backend.features(&self.text)?),
        };
        self.backend.prefill(&self.text, features, slots, state)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use infini_attn::Update;
    use rand::{RngExt, SeedableRng};
    use tempfile::NamedTempFile;

    use super::*;
    use crate::memory::Cpu;

    /// A text that no change of the repository touches, for what chance finds depends on it: digits
    /// among other characters.
    fn noise(length: usize) -> NamedTempFile {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
        let text: Vec<u8> = (0..length).map(|_| rng.random_range(b' '..=b'~')).collect();
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&text).unwrap();
        file
    }

    fn lines(update: Update, heads: usize, dim: usize, segment: usize, length: usize) -> Vec<Line> {
        let problem = Problem::builder()
            .heads(heads)
            .head_dim(dim)
            .segment_len(segment)
            .update(update)
            .build()
            .unwrap();
        let text = noise(length + segment);
        let haystack = Haystack::read(&[text.path().into()], length + segment, PHRASE).unwrap();
        let progress = ProgressBar::hidden();
        let (seed, backend) = (7, &Cpu);
        let experiment =
            Experiment { problem, backend, seed, haystack: &haystack, progress: &progress };
        let lines = experiment.run(length).unwrap();
        assert_eq!(progress.position(), experiment.total(&[length]));
        lines
    }

    fn check(lines: &[Line]) {
        assert_eq!(lines.len(), Kind::ALL.len());
        let all = KEYS * DIGITS * DEPTHS.len();
        for line in lines {
            let found: usize = line.cells.iter().map(|c| c.digits).sum();
            match line.kind {
                Kind::Constructed | Kind::Decoy => assert_eq!(found, all, "{line:?}"),
                // 7.5 of 75 by chance; 20 lie 4.8 standard deviations off.
                Kind::Reset | Kind::Random => {
                    assert!(found < 20, "{line:?}");
                    assert!(line.cells.iter().all(|c| c.whole == 0), "{line:?}");
                }
            }
        }
    }

    #[test]
    fn delta_finds_the_passkey_and_the_controls_do_not() {
        check(&lines(Update::Delta, 2, 64, 256, 8 << 10));
    }

    #[test]
    fn linear_finds_the_passkey_and_the_controls_do_not() {
        check(&lines(Update::Linear, 2, 64, 256, 8 << 10));
    }

    #[test]
    fn odd_shapes() {
        check(&lines(Update::Delta, 1, 10, 100, 3001));
    }

    /// Forking a common beginning and sharing its features is the same as reading every stream
    /// from its first token to its last.
    #[test]
    fn forked_streams_are_in_the_state_of_whole_ones() {
        let problem = Problem::builder().heads(2).head_dim(16).segment_len(256).build().unwrap();
        let haystack = Haystack::read(&[], 8192, PHRASE).unwrap();
        let progress = ProgressBar::hidden();
        let (seed, backend) = (3, &Cpu);
        let e = Experiment { problem, backend, seed, haystack: &haystack, progress: &progress };
        let projections = Projections::random(2, 16, &mut e.rng(1));
        let mut caller = Caller::new(backend, &problem, &projections);
        let streams = e.streams(8000, true);
        let forked = e.read(&mut caller, &streams, 8000).unwrap();
        assert_eq!(forked.sequences(), streams.len());
        for (slot, stream) in streams.iter().enumerate() {
            let mut whole = backend.state(&problem).unwrap();
            caller.encode(&e.bytes(Some(stream), 0, 8192));
            caller.prefill(&[0], &mut whole).unwrap();
            assert_eq!(forked.tokens(slot), whole.tokens(0));
            for (head, d, c) in (0..2 * 256).map(|i| (i / 256, i / 16 % 16, i % 16)) {
                let (a, b) =
                    (forked.memory().at(&[slot, head, d, c]), whole.memory().at(&[0, head, d, c]));
                assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "stream {slot}: {a} {b}");
            }
        }
    }

    #[test]
    fn decoy_is_in_the_stream() {
        let problem = Problem::builder().segment_len(64).build().unwrap();
        let haystack = Haystack::read(&[], 640, PHRASE).unwrap();
        let progress = ProgressBar::hidden();
        let (seed, backend) = (1, &Cpu);
        let e = Experiment { problem, backend, seed, haystack: &haystack, progress: &progress };
        for stream in e.streams(640, true) {
            let text = e.bytes(Some(&stream), 0, 640);
            let text = String::from_utf8_lossy(&text);
            let key: String = stream.key.iter().map(u8::to_string).collect();
            assert_eq!(text.matches(&format!("{PHRASE}{key}.")).count(), 1);
            assert_eq!(text.matches(PHRASE).count(), 1);
            assert_eq!(text.matches(DECOY).count(), 1);
        }
    }
}
