//! Tables of cosines and sines as arguments, and what else goes by that name.

use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::dlpack::{Memory, Scalar};
use crate::error;
use crate::tensor::{self, Kind};

/// The tables (cos, sin) [positions, R/2] for q [B, T, Hq, Dk], given B, T and Dk.
pub fn tables<'py>(
    rope: &Bound<'py, PyAny>,
    call: [usize; 3],
) -> PyResult<(Memory<'py>, Memory<'py>)> {
    const EXPECTED: &str = "a tuple (cos, sin)";
    let pair: Bound<'py, PyTuple> = match rope.cast::<PyList>() {
        Ok(list) => list.to_tuple(),
        Err(_) => error::typed("rope", rope, EXPECTED)?,
    };
    if pair.len() != 2 {
        return Err(error::value("rope", format_args!("{} tables", pair.len()), EXPECTED));
    }
    let (kind, cos) = tensor::borrow("rope.cos", &pair.get_item(0)?)?;
    let (_, sin) = tensor::borrow("rope.sin", &pair.get_item(1)?)?;
    match conversion(kind, &cos, &sin, call)? {
        Some(line) => {
            let got = format!("tables {:?} that hold every frequency twice", cos.shape());
            Err(error::value("rope", got, format_args!("[positions, R/2], that is {line}")))
        }
        None => Ok((cos, sin)),
    }
}

/// The arguments that say the same as tables of the form Hugging Face's models make: every frequency
/// twice, a row per token of the call. None for other tables.
fn conversion(
    kind: Kind,
    cos: &Memory<'_>,
    sin: &Memory<'_>,
    [batch, tokens, key_dim]: [usize; 3],
) -> PyResult<Option<String>> {
    let (select, positions) = match *cos.shape() {
        // Half of that many columns rotates all channels.
        [rows, width] if width > key_dim / 2 => {
            (":", if rows == tokens { format!("range({tokens})") } else { String::new() })
        }
        [1, t, _] if t == tokens => ("0, :", format!("range({tokens})")),
        [b, t, _] if (b, t) == (batch, tokens) => {
            let arange = if kind == Kind::Torch { "torch.arange" } else { "numpy.arange" };
            ("...", format!("{arange}({}).reshape({b}, {t})", b * t))
        }
        _ => return Ok(None),
    };
    let width = cos.shape()[cos.shape().len() - 1];
    if cos.shape() != sin.shape() || !width.is_multiple_of(2) || width == 0 {
        return Ok(None);
    }
    let (cos_rows, sin_rows) = (tensor::as_f32(cos)?, tensor::as_f32(sin)?);
    let all =
        |twice: fn(&[f32]) -> bool| cos_rows.chunks(width).chain(sin_rows.chunks(width)).all(twice);
    let (columns, interleaved) = if all(|row| row[..row.len() / 2] == row[row.len() / 2..]) {
        (format!(":{}", width / 2), "")
    } else if all(|row| row.chunks(2).all(|pair| pair[0] == pair[1])) {
        ("::2".to_owned(), ", rope_interleaved=True")
    } else {
        return Ok(None);
    };
    let flat = if select == "..." { format!(".reshape(-1, {})", width / 2) } else { String::new() };
    // As f32, the last dimension contiguous.
    let converted = match kind {
        _ if cos.data_type() == f32::DATA_TYPE && columns != "::2" => "",
        Kind::Torch => ".float().contiguous()",
        _ => ".astype('float32')",
    };
    let table = |name| format!("{name}[{select}, {columns}]{flat}{converted}");
    let positions =
        if positions.is_empty() { positions } else { format!(", positions={positions}") };
    let (cos, sin) = (table("cos"), table("sin"));
    Ok(Some(format!("rope=({cos}, {sin}){positions}{interleaved}")))
}
