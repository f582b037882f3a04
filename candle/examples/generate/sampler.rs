//! The next token from logits: the likeliest, or drawn among the likeliest.

use anyhow::Result;
use candle_core::{D, DType, Tensor};
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;

/// Draws by softmax(logits / temperature), among the likeliest tokens that have the probability `top_p`
/// together; at temperature 0 it takes the likeliest.
pub struct Sampler {
    rng: StdRng,
    temperature: f64,
    top_p: f64,
}

impl Sampler {
    pub fn new(seed: u64, temperature: f64, top_p: f64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), temperature, top_p }
    }

    /// A token of logits [V].
    pub fn draw(&mut self, logits: &Tensor) -> Result<u32> {
        if self.temperature < 1e-7 {
            return Ok(logits.argmax(D::Minus1)?.to_scalar()?);
        }
        let logits = (logits.to_dtype(DType::F32)? / self.temperature)?;
        let mut weights = candle_nn::ops::softmax_last_dim(&logits)?.to_vec1::<f32>()?;
        self.keep_likeliest(&mut weights);
        Ok(WeightedIndex::new(&weights)?.sample(&mut self.rng) as u32)
    }

    /// Zeros to all but the likeliest that reach `top_p`; the one that reaches it stays.
    fn keep_likeliest(&self, weights: &mut [f32]) {
        if self.top_p >= 1.0 {
            return;
        }
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        let mut sum = 0.0;
        for token in order {
            if sum >= self.top_p {
                weights[token] = 0.0;
            }
            sum += f64::from(weights[token]);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// How often each token is drawn of 2000 times, by logits of probabilities ½, ⅜, ⅛, 0.
    fn drawn(temperature: f64, top_p: f64) -> Result<[usize; 4]> {
        let logits = [0.5f32.ln(), 0.375f32.ln(), 0.125f32.ln(), f32::NEG_INFINITY];
        let logits = Tensor::new(&logits, &Device::Cpu)?;
        let mut sampler = Sampler::new(7, temperature, top_p);
        let mut counts = [0; 4];
        for _ in 0..2000 {
            counts[sampler.draw(&logits)? as usize] += 1;
        }
        Ok(counts)
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() -> Result<()> {
        assert_eq!(drawn(0.0, 1.0)?, [2000, 0, 0, 0]);
        for (counts, likely) in [
            (drawn(1.0, 1.0)?, [0.5, 0.375, 0.125, 0.0]),
            (drawn(1.0, 0.6)?, [4.0 / 7.0, 3.0 / 7.0, 0.0, 0.0]),
            (drawn(1.0, 0.5)?, [1.0, 0.0, 0.0, 0.0]),
            // Squares of the probabilities: 16, 9 and 1.
            (drawn(0.5, 1.0)?, [16.0 / 26.0, 9.0 / 26.0, 1.0 / 26.0, 0.0]),
        ] {
            for (count, likely) in counts.into_iter().zip(likely) {
                assert!((count as f64 / 2000.0 - likely).abs() < 0.05, "{counts:?}: {likely}");
            }
        }
        Ok(())
    }
}
