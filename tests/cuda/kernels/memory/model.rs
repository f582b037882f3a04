//! The updates of a memory in f64, line by line.

use infini_attn::Element;

use crate::common::{narrow, widen};

/// How a denominator is made safe: `INFINI_DENOMINATOR_*` and epsilon.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub kind: u32,
    pub epsilon: f32,
}

impl Policy {
    /// 1 / denominator, 0 where it counts as 0.
    pub fn inverse(self, dot: f64) -> f64 {
        let epsilon = f64::from(self.epsilon);
        let den = [dot, dot.max(epsilon), dot + epsilon][self.kind as usize];
        if den.abs() < f64::from(f32::MIN_POSITIVE) { 0.0 } else { 1.0 / den }
    }
}

/// σ(x) = ELU(x) + 1.
pub fn sigma(x: f64) -> f64 {
    if x > 0.0 { x + 1.0 } else { x.exp() }
}

/// σ of every element, rounded to T: what the kernels multiply.
pub fn rounded_sigma<T: Element>(x: &[f64]) -> Vec<f64> {
    let mapped: Vec<f32> = x.iter().map(|&x| sigma(x) as f32).collect();
    widen(&narrow::<T>(&mapped))
}

/// Memory of one KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory {
    pub m: Vec<f64>, // [Dk][Dv]
    pub z: Vec<f64>, // [Dk]
    dv: usize,
}

impl Memory {
    pub fn new(dk: usize, dv: usize) -> Self {
        Self { m: vec![0.0; dk * dv], z: vec![0.0; dk], dv }
    }

    pub fn of(m: &[f32], z: &[f32]) -> Self {
        Self { m: widen(m), z: widen(z), dv: m.len() / z.len() }
    }

    /// Writes a segment: equation (9) given a policy, else (8). `s` [tokens][Dk] is σ(K), `v`
    /// [tokens][Dv].
    pub fn write(&mut self, s: &[f64], v: &[f64], delta: Option<Policy>) {
        let (dk, dv) = (self.z.len(), self.dv);
        let mut change = vec![0.0; dk * dv];
        for (s, v) in s.chunks(dk).zip(v.chunks(dv)) {
            let mut value = v.to_vec();
            if let Some(policy) = delta {
                let dot = s.iter().zip(&self.z).map(|(s, z)| s * z).sum();
                let inverse = policy.inverse(dot);
                for (s, row) in s.iter().zip(self.m.chunks(dv)) {
                    value.iter_mut().zip(row).for_each(|(x, m)| *x -= s * m * inverse);
                }
            }
            for (s, row) in s.iter().zip(change.chunks_mut(dv)) {
                row.iter_mut().zip(&value).for_each(|(x, value)| *x += s * value);
            }
        }
        self.m.iter_mut().zip(change).for_each(|(m, x)| *m += x);
        for s in s.chunks(dk) {
            self.z.iter_mut().zip(s).for_each(|(z, s)| *z += s);
        }
    }
}

/// G = Σ over tokens of σ(k) σ(k)ᵀ / denominator, [Dk][Dk].
pub fn transition(s: &[f64], z: &[f64], policy: Policy) -> Vec<f64> {
    let dk = z.len();
    let mut g = vec![0.0; dk * dk];
    for s in s.chunks(dk) {
        let inverse = policy.inverse(s.iter().zip(z).map(|(s, z)| s * z).sum());
        for (a, row) in s.iter().zip(g.chunks_mut(dk)) {
            row.iter_mut().zip(s).for_each(|(x, b)| *x += a * b * inverse);
        }
    }
    g
}

/// Mean of σ over normal numbers of this mean and deviation.
pub fn mean_sigma((mean, deviation): (f32, f32)) -> f32 {
    let (mut sum, mut weights) = (0.0, 0.0);
    for i in -60..=60 {
        let x = f64::from(i) / 10.0;
        let weight = (-x * x / 2.0).exp();
        sum += weight * sigma(f64::from(mean) + f64::from(deviation) * x);
        weights += weight;
    }
    (sum / weights) as f32
}
