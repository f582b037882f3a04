//! The measure of every comparison: relative RMS error, with the worst element's coordinates.

/// Relative RMS error of `got` against `want`: the RMS of the difference over the RMS of `want`.
///
/// # Errors
/// A sentence naming the worst element's coordinates in `shape` when the error exceeds `tolerance`,
/// when either side holds a NaN, when an infinity stands on one side only, and, where `want` is 0
/// throughout, when `got` is not.
pub fn relative_rms(
    what: &str,
    got: &[f64],
    want: &[f64],
    shape: &[usize],
    tolerance: f64,
) -> Result<f64, String> {
    rms(what, got, want, shape, tolerance, 0.0)
}

/// As [`relative_rms`] for logarithms, which pass through 0: the scale is at least 1.
///
/// # Errors
/// As [`relative_rms`].
pub fn log_rms(
    what: &str,
    got: &[f64],
    want: &[f64],
    shape: &[usize],
    tolerance: f64,
) -> Result<f64, String> {
    rms(what, got, want, shape, tolerance, 1.0)
}

fn rms(
    what: &str,
    got: &[f64],
    want: &[f64],
    shape: &[usize],
    tolerance: f64,
    least_scale: f64,
) -> Result<f64, String> {
    assert_eq!(got.len(), want.len(), "{what}: lengths compared");
    assert_eq!(got.len(), shape.iter().product::<usize>(), "{what}: shape {shape:?}");
    let (mut difference, mut scale, mut count) = (0.0, 0.0, 0.0);
    let mut worst = (0.0, 0);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        if g == w && g.is_infinite() {
            continue;
        }
        if !g.is_finite() || !w.is_finite() {
            let at = coordinates(i, shape);
            return Err(format!("{what}: {g} at {at:?} of {shape:?}, {w} expected"));
        }
        difference += (g - w) * (g - w);
        scale += w * w;
        count += 1.0;
        if (g - w).abs() > worst.0 {
            worst = ((g - w).abs(), i);
        }
    }
    let scale = f64::max(scale, count * least_scale * least_scale);
    let rms = if difference == 0.0 { 0.0 } else { (difference / scale).sqrt() };
    if rms <= tolerance {
        return Ok(rms);
    }
    let (i, at) = (worst.1, coordinates(worst.1, shape));
    Err(format!(
        "{what}: relative RMS error {rms:.2e} > {tolerance:.0e}; worst at {at:?} of {shape:?}: \
         {} given, {} expected",
        got[i], want[i]
    ))
}

fn coordinates(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut at = vec![0; shape.len()];
    for (a, &extent) in at.iter_mut().zip(shape).rev() {
        *a = index % extent;
        index /= extent;
    }
    at
}
