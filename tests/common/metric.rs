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
    let mut lost = None;
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        if g == w && g.is_infinite() {
            continue;
        }
        if !g.is_finite() || !w.is_finite() {
            lost = lost.or(Some(i));
            continue;
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
    if rms <= tolerance && lost.is_none() {
        return Ok(rms);
    }
    // Far beyond what rounding leaves of a single element.
    let beyond = 8.0 * tolerance * (scale / f64::max(count, 1.0)).sqrt();
    let off = |(g, w): (&f64, &f64)| !(g == w || (g - w).abs() <= beyond);
    let off: Vec<usize> = (0..got.len()).filter(|&i| off((&got[i], &want[i]))).collect();
    let place = pattern(&off, shape);
    if let Some(i) = lost {
        let at = coordinates(i, shape);
        return Err(format!(
            "{what}: {} at {at:?} of {shape:?}, {} expected; {place}",
            got[i], want[i]
        ));
    }
    let (i, at) = (worst.1, coordinates(worst.1, shape));
    Err(format!(
        "{what}: relative RMS error {rms:.2e} > {tolerance:.0e}; worst at {at:?} of {shape:?}: \
         {} given, {} expected; {place}",
        got[i], want[i]
    ))
}

/// Where elements are off, axis by axis: errors that follow a tile, a warp or a stage show as a
/// period.
fn pattern(off: &[usize], shape: &[usize]) -> String {
    let axes = (0..shape.len()).map(|axis| {
        let mut indices: Vec<usize> = off.iter().map(|&i| coordinates(i, shape)[axis]).collect();
        indices.sort_unstable();
        indices.dedup();
        format!("axis {axis}: {}", along(&indices, shape[axis]))
    });
    let axes = axes.collect::<Vec<_>>().join("; ");
    let all: usize = shape.iter().product();
    match off {
        [] => format!("none of {all} elements stands out"),
        _ => format!("{} of {all} elements are far off ({axes})", off.len()),
    }
}

/// Sorted indices of an axis, as residues of the power of two that holds them in the fewest, if
/// that is half of all or less, else as ranges.
fn along(indices: &[usize], extent: usize) -> String {
    if indices.len() == extent {
        return "all".into();
    }
    let periods = (3..=12).map(|log| 1usize << log).filter(|period| 2 * period <= extent);
    let residues = periods.map(|period| {
        let mut residues: Vec<usize> = indices.iter().map(|i| i % period).collect();
        residues.sort_unstable();
        residues.dedup();
        (period, residues)
    });
    let fewest = residues
        .filter(|(period, residues)| {
            let several = indices.last().map(|i| i / period) > indices.first().map(|i| i / period);
            several && 2 * residues.len() <= *period
        })
        .min_by_key(|(period, residues)| (residues.len() * 4096 / period, *period));
    match fewest {
        Some((period, residues)) => format!("{} of every {period}", ranges(&residues)),
        None => ranges(indices),
    }
}

/// The first few ranges of sorted numbers.
fn ranges(numbers: &[usize]) -> String {
    const MOST: usize = 4;
    let chunks: Vec<_> = numbers.chunk_by(|a, b| a + 1 == *b).collect();
    let text = |chunk: &&[usize]| match chunk {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    };
    let shown = chunks.iter().take(MOST).map(text).collect::<Vec<_>>().join(", ");
    if chunks.len() > MOST { format!("{shown}, ...") } else { shown }
}

fn coordinates(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut at = vec![0; shape.len()];
    for (a, &extent) in at.iter_mut().zip(shape).rev() {
        *a = index % extent;
        index /= extent;
    }
    at
}
