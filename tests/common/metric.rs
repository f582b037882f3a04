//! The measure of every comparison: relative RMS error, with the worst element's coordinates.

/// Relative RMS error of `got` against `want`: the RMS of the difference over the RMS of `want`.
///
/// # Errors
/// A sentence naming the worst element's coordinates in `shape` when the error exceeds `tolerance`,
/// when either side holds a NaN, when an infinity stands on one side only, and, where `want` is 0
/// throughout, when `got` is not.
pub fn relative_rms<'a>(
    what: &str,
    got: &[f64],
    want: &[f64],
    shape: impl Into<Axes<'a>>,
    tolerance: f64,
) -> Result<f64, String> {
    rms(what, got, want, shape.into(), tolerance, 0.0)
}

/// Fails where [`relative_rms`] does.
pub fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    relative_rms(what, got, want, &[want.len()], tolerance).unwrap_or_else(|e| panic!("{e}"));
}

/// As [`relative_rms`] for logarithms, which pass through 0: the scale is at least 1.
///
/// # Errors
/// As [`relative_rms`].
pub fn log_rms<'a>(
    what: &str,
    got: &[f64],
    want: &[f64],
    shape: impl Into<Axes<'a>>,
    tolerance: f64,
) -> Result<f64, String> {
    rms(what, got, want, shape.into(), tolerance, 1.0)
}

/// As [`relative_rms`] for what cancels: the scale is at least `least`.
///
/// # Errors
/// As [`relative_rms`].
pub fn rms_above<'a>(
    what: &str,
    got: &[f64],
    want: &[f64],
    shape: impl Into<Axes<'a>>,
    tolerance: f64,
    least: f64,
) -> Result<f64, String> {
    rms(what, got, want, shape.into(), tolerance, least)
}

/// That no row, along the last axis, has a relative RMS error above the tolerance: few wrong rows are
/// little of a long tensor's error. Rows of small values are held to a tenth of what all have.
///
/// # Errors
/// A sentence that says how many rows have, and where.
pub fn rows_are_close<'a>(
    what: &str,
    got: &[f64],
    want: &[f64],
    shape: impl Into<Axes<'a>>,
    tolerance: f64,
) -> Result<(), String> {
    let axes = shape.into();
    let (width, lead) = axes.shape.split_last().expect("an axis");
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>();
    let least = 0.01 * norm(want) / (want.len() / width).max(1) as f64;
    let rows = got.chunks_exact(*width).zip(want.chunks_exact(*width));
    let error = |(got, want): (&[f64], &[f64])| {
        let difference: Vec<f64> = got.iter().zip(want).map(|(g, w)| g - w).collect();
        (norm(&difference) / norm(want).max(least)).sqrt()
    };
    let errors: Vec<f64> = rows.map(error).collect();
    // A NaN is above every tolerance.
    let is_off = |i: &usize| errors[*i].is_nan() || errors[*i] > tolerance;
    let off: Vec<usize> = (0..errors.len()).filter(is_off).collect();
    let Some(first) = off.first() else { return Ok(()) };
    let place = pattern(&off, Axes { shape: lead, ..axes });
    Err(format!("{what}: row {first} has a relative RMS error of {:.2e}; {place}", errors[*first]))
}

/// The shape of a tensor, and what its axes are called.
#[derive(Clone, Copy)]
pub struct Axes<'a> {
    shape: &'a [usize],
    names: &'static [&'static str],
    /// Tokens of a segment, where the first axis is that of tokens.
    segment: Option<usize>,
}

impl<'a> Axes<'a> {
    /// [tokens, heads, channels] or [tokens, heads].
    pub fn tokens(shape: &'a [usize], segment: Option<usize>) -> Self {
        Self { shape, names: &["token", "head", "channel"], segment }
    }

    /// [KV heads, Dk, Dv] or [KV heads, Dk].
    pub fn memory(shape: &'a [usize]) -> Self {
        Self { shape, names: &["KV head", "key channel", "value channel"], segment: None }
    }

    fn name(&self, axis: usize) -> String {
        self.names.get(axis).map_or_else(|| format!("axis {axis}"), |name| (*name).into())
    }

    /// Where an element is.
    fn place(&self, index: usize) -> String {
        let at = coordinates(index, self.shape);
        if self.names.is_empty() {
            return format!("{at:?} of {:?}", self.shape);
        }
        let mut words: Vec<String> =
            at.iter().enumerate().map(|(axis, i)| format!("{} {i}", self.name(axis))).collect();
        if let Some(n) = self.segment {
            words[0] += &format!(" (segment {}, row {})", at[0] / n, at[0] % n);
        }
        format!("{} of {:?}", words.join(", "), self.shape)
    }
}

impl<'a> From<&'a [usize]> for Axes<'a> {
    fn from(shape: &'a [usize]) -> Self {
        Self { shape, names: &[], segment: None }
    }
}

impl<'a, const N: usize> From<&'a [usize; N]> for Axes<'a> {
    fn from(shape: &'a [usize; N]) -> Self {
        shape[..].into()
    }
}

impl<'a> From<&'a Vec<usize>> for Axes<'a> {
    fn from(shape: &'a Vec<usize>) -> Self {
        shape[..].into()
    }
}

fn rms(
    what: &str,
    got: &[f64],
    want: &[f64],
    axes: Axes<'_>,
    tolerance: f64,
    least_scale: f64,
) -> Result<f64, String> {
    let shape = axes.shape;
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
    let place = pattern(&off, axes);
    if let Some(i) = lost {
        let at = axes.place(i);
        return Err(format!("{what}: {} at {at}, {} expected; {place}", got[i], want[i]));
    }
    let (i, at) = (worst.1, axes.place(worst.1));
    Err(format!(
        "{what}: relative RMS error {rms:.2e} > {tolerance:.0e}; worst at {at}: {} given, {} \
         expected; {place}",
        got[i], want[i]
    ))
}

/// Where elements are off, axis by axis: errors that follow a tile, a warp or a stage show as a
/// period.
fn pattern(off: &[usize], axes: Axes<'_>) -> String {
    let shape = axes.shape;
    let texts = (0..shape.len()).map(|axis| {
        let mut indices: Vec<usize> = off.iter().map(|&i| coordinates(i, shape)[axis]).collect();
        indices.sort_unstable();
        indices.dedup();
        format!("{}: {}", axes.name(axis), along(&indices, shape[axis]))
    });
    let places = texts.collect::<Vec<_>>().join("; ");
    let all: usize = shape.iter().product();
    match off {
        [] => format!("none of {all} stands out"),
        _ => format!("{} of {all} are far off ({places})", off.len()),
    }
}

/// Sorted indices of an axis, as residues of the power of two that holds them in the smallest share,
/// if that is half or less, else as ranges.
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
            // They come back, and leave others out.
            2 * residues.len() <= indices.len() && 2 * residues.len() <= *period
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

pub fn coordinates(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut at = vec![0; shape.len()];
    for (a, &extent) in at.iter_mut().zip(shape).rev() {
        *a = index % extent;
        index /= extent;
    }
    at
}
