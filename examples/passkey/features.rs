//! From bytes to keys, queries and values: a fixed causal window, one linear map for every token.

use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;

/// What stands before the passkey, in the text and in the question.
pub const PHRASE: &str = "The pass key is ";
/// Digits of a passkey.
pub const DIGITS: usize = 5;
/// Values of a digit.
pub const VALUES: usize = 10;
/// Bytes a key depends on: the last digit still sees the whole phrase.
pub const WINDOW: usize = PHRASE.len() + DIGITS - 1;

/// Logit per matching byte. One mismatch puts a channel at −GAIN / 2, and exp(−100) is below the
/// smallest normal f32 (exp(−87.3)): σ(k) is 0 there.
const GAIN: f32 = 200.0;

/// The maps of all heads side by side; `width` = heads · dim channels.
pub struct Projections {
    width: usize,
    /// W, [WINDOW, 256, width]: what the byte `lag + 1` places back adds to each channel. The sum
    /// over lags is W times the one-hot code of the window.
    weights: Vec<f32>,
    /// b, [width].
    bias: Vec<f32>,
    /// Which digit each value channel stands for, [width].
    value_of: Vec<usize>,
}

impl Projections {
    /// Each channel is told to look for the phrase `i` bytes back, i = 0 to 4, and nothing else.
    pub fn constructed(heads: usize, dim: usize, rng: &mut ChaCha8Rng) -> Self {
        let mut p = Self::zero(heads, dim, rng);
        p.bias.fill(GAIN * (0.5 - PHRASE.len() as f32));
        for (channel, digit) in deal(heads, dim, DIGITS, rng).into_iter().enumerate() {
            for (back, byte) in PHRASE.bytes().rev().enumerate() {
                p.weights[((digit + back) * 256 + usize::from(byte)) * p.width + channel] = GAIN;
            }
        }
        p
    }

    /// Nothing is told: W is normal, so that every channel is N(0, 1). One W for keys and queries
    /// (the likeliest to work: equal windows have equal features).
    pub fn random(heads: usize, dim: usize, rng: &mut ChaCha8Rng) -> Self {
        let mut p = Self::zero(heads, dim, rng);
        let normal = Normal::new(0.0, (WINDOW as f32).powf(-0.5)).expect("a positive deviation");
        p.weights.iter_mut().for_each(|w| *w = normal.sample(rng));
        p
    }

    fn zero(heads: usize, dim: usize, rng: &mut ChaCha8Rng) -> Self {
        let width = heads * dim;
        Self {
            width,
            weights: vec![0.0; WINDOW * 256 * width],
            bias: vec![0.0; width],
            value_of: deal(heads, dim, VALUES, rng),
        }
    }

    /// Keys and values of the tokens after the first WINDOW bytes of `bytes`; `keys` gets one row
    /// more, the key of the token to come. Row t + 1 of `keys` is the query of token t: it asks
    /// for what followed the same window before.
    pub fn encode(&self, bytes: &[u8], keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let tokens = bytes.len() - WINDOW;
        keys.resize((tokens + 1) * self.width, 0.0);
        values.resize(tokens * self.width, 0.0);
        (keys.par_chunks_mut(self.width).with_min_len(64))
            .zip(bytes.par_windows(WINDOW))
            .for_each(|(row, window)| self.key(window, row));
        (values.par_chunks_mut(self.width).with_min_len(64))
            .zip(&bytes[WINDOW..])
            .for_each(|(row, &byte)| self.value(byte, row));
    }

    /// k = W · one-hot(window) + b.
    fn key(&self, window: &[u8], row: &mut [f32]) {
        row.copy_from_slice(&self.bias);
        for (lag, &byte) in window.iter().rev().enumerate() {
            let weights = &self.weights[(lag * 256 + usize::from(byte)) * self.width..];
            row.iter_mut().zip(weights).for_each(|(k, w)| *k += w);
        }
    }

    /// One-hot code of a digit, 0 for every other byte.
    fn value(&self, byte: u8, row: &mut [f32]) {
        if !byte.is_ascii_digit() {
            return row.fill(0.0);
        }
        let digit = usize::from(byte - b'0');
        for (v, &of) in row.iter_mut().zip(&self.value_of) {
            *v = if of == digit { 1.0 } else { 0.0 };
        }
    }

    /// The digit whose channels, averaged over the heads, answer loudest; ties (a silent memory)
    /// are drawn.
    pub fn decode(&self, output: &[f32], rng: &mut ChaCha8Rng) -> u8 {
        let mut score = [0.0f32; VALUES];
        let mut channels = [0.0f32; VALUES];
        for (&o, &of) in output.iter().zip(&self.value_of) {
            score[of] += o;
            channels[of] += 1.0;
        }
        score.iter_mut().zip(channels).for_each(|(s, n)| *s /= n);
        let most = score.into_iter().fold(f32::NEG_INFINITY, f32::max);
        let best: Vec<usize> = (0..VALUES).filter(|&d| score[d] >= most).collect();
        // NaN scores leave nobody; then it is a guess as well.
        match best.len() {
            0 => rng.random_range(0..VALUES) as u8,
            n => best[rng.random_range(0..n)] as u8,
        }
    }
}

/// Deals each head's channels out to `kinds` in an order of its own, as evenly as it goes.
fn deal(heads: usize, dim: usize, kinds: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut all = Vec::with_capacity(heads * dim);
    for _ in 0..heads {
        let mut head: Vec<usize> = (0..dim).map(|c| c % kinds).collect();
        head.shuffle(rng);
        all.extend(head);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    const DIM: usize = 16;

    fn keys(p: &Projections, text: &str) -> Vec<Vec<f32>> {
        let bytes = [&[0; WINDOW], text.as_bytes()].concat();
        let (mut keys, mut values) = (vec![], vec![]);
        p.encode(&bytes, &mut keys, &mut values);
        keys.chunks_exact(p.width).map(<[f32]>::to_vec).collect()
    }

    #[test]
    fn keys_fire_on_the_phrase_alone() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let p = Projections::constructed(2, DIM, &mut rng);
        let text = "The bass key is 83910. The pass key 71432 is The pass key is 71432.";
        let first = text.find(PHRASE).unwrap() + PHRASE.len();
        let fired = |row: &[f32]| row.iter().filter(|&&k| k > -88.0).count();
        for (t, row) in keys(&p, text).iter().enumerate() {
            let digit = (first..first + DIGITS).contains(&t);
            assert_eq!(fired(row) > 0, digit, "token {t}");
            assert!(row.iter().all(|&k| k == GAIN / 2.0 || k <= -GAIN / 2.0), "token {t}");
        }
        // No channel answers for two digits, and each head has some for every digit.
        let rows = &keys(&p, text)[first..first + DIGITS];
        for c in 0..p.width {
            assert_eq!(rows.iter().filter(|r| r[c] > 0.0).count(), 1);
        }
        for (row, head) in rows.iter().flat_map(|r| [(r, 0), (r, 1)]) {
            assert!(fired(&row[head * DIM..][..DIM]) >= DIM / DIGITS);
        }
    }

    #[test]
    fn digits_before_do_not_matter() {
        let p = Projections::constructed(1, DIM, &mut ChaCha8Rng::seed_from_u64(2));
        let (a, b) = (keys(&p, "The pass key is 71432"), keys(&p, "The pass key is ?????"));
        assert_eq!(a, b);
    }

    #[test]
    fn random_keys_are_standard_normal() {
        let p = Projections::random(2, 64, &mut ChaCha8Rng::seed_from_u64(3));
        let all = keys(&p, include_str!("features.rs")).concat();
        let mean = all.iter().sum::<f32>() / all.len() as f32;
        let var = all.iter().map(|k| (k - mean).powi(2)).sum::<f32>() / all.len() as f32;
        assert!(mean.abs() < 0.1 && (var - 1.0).abs() < 0.2, "{mean} {var}");
    }

    #[test]
    fn values_decode_to_their_digit() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let p = Projections::constructed(2, VALUES, &mut rng);
        let mut row = vec![0.0; p.width];
        for digit in 0..VALUES as u8 {
            p.value(b'0' + digit, &mut row);
            assert_eq!(p.decode(&row, &mut rng), digit);
        }
        p.value(b'x', &mut row);
        let guesses: Vec<u8> = (0..200).map(|_| p.decode(&row, &mut rng)).collect();
        assert!((0..10).all(|d| guesses.contains(&d)), "silence is answered by a draw");
    }
}
