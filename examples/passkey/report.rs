//! The table and the heat map.

use std::fmt::Write;
use std::fs::OpenOptions;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use infini_attn::Problem;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::cli::show_tokens;
use crate::experiment::{Cell, DEPTHS, KEYS, Kind, Line};

/// Rows by kind, then length. A cell: share of the digits recalled, passkeys recalled whole.
pub fn table(lines: &[Line], problem: &Problem) -> String {
    let mut text = format!("{:<20}{:>6}", "projections", "length");
    for depth in DEPTHS {
        write!(text, "{depth:>13}").expect("a String takes all");
    }
    writeln!(text, "{:>13}{:>11}{:>11}{:>8}", "tokens/s", "state", "KV cache", "ratio")
        .expect("a String takes all");
    for line in Kind::ALL.iter().flat_map(|&kind| of_kind(lines, kind)) {
        write!(text, "{:<20}{:>6}", line.kind.name(), show_tokens(line.length))
            .expect("a String takes all");
        for cell in line.cells {
            let recall = format!("{:.0} %", 100.0 * cell.recall());
            write!(text, "{recall:>7} ({}/{KEYS})", cell.whole).expect("a String takes all");
        }
        let cache = cache_bytes(line.length, problem);
        let ratio = cache as f64 / line.state_bytes as f64;
        let speed = format!("{:.2} M", line.speed / 1e6);
        let (state, cache) = (bytes(line.state_bytes), bytes(cache));
        writeln!(text, "{speed:>13}{state:>11}{cache:>11}{ratio:>7.0}x")
            .expect("a String takes all");
    }
    text
}

/// What attention over the whole stream would keep: keys and values of every token.
fn cache_bytes(tokens: usize, problem: &Problem) -> usize {
    let channels = problem.kv_heads() * (problem.key_dim() + problem.value_dim());
    tokens * channels * problem.dtype().bytes()
}

fn of_kind(lines: &[Line], kind: Kind) -> impl Iterator<Item = &Line> {
    lines.iter().filter(move |line| line.kind == kind)
}

fn bytes(n: usize) -> String {
    match n as f64 {
        n if n >= 1024.0 * 1024.0 * 1024.0 => format!("{:.2} GiB", n / (1u64 << 30) as f64),
        n if n >= 1024.0 * 1024.0 => format!("{:.1} MiB", n / (1u64 << 20) as f64),
        n => format!("{:.1} KiB", n / 1024.0),
    }
}

/// Makes the heat map's folder and opens its file, so that a bad path shows before the run.
pub fn prepare(path: &Path) -> Result<()> {
    let folder = path.parent().map_or(Ok(()), std::fs::create_dir_all);
    let open = || OpenOptions::new().create(true).append(true).open(path);
    folder.and_then(|()| open()).map(drop).with_context(|| path.display().to_string())
}

/// Size of a cell and margins, in pixels.
const CELL: (i32, i32) = (96, 44);
const LEFT: i32 = 70;
const TOP: i32 = 96;
const GAP: i32 = 36;

/// One panel per kind of row, depth across, length down.
pub fn plot(lines: &[Line], lengths: &[usize], title: &str, path: &Path) -> Result<()> {
    let panel = CELL.0 * DEPTHS.len() as i32;
    let width = LEFT + Kind::ALL.len() as i32 * (panel + GAP);
    let height = TOP + CELL.1 * lengths.len() as i32 + 50;
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    let text = |text: &str, x, y, size: f64, pos, color: &RGBColor| {
        let style = ("sans-serif", size).into_font().color(color).pos(pos);
        area.draw_text(text, &style, (x, y)).map_err(drawing)
    };
    let centre = Pos::new(HPos::Center, VPos::Center);
    let left = Pos::new(HPos::Left, VPos::Center);
    text(title, LEFT, 24, 18.0, left, &BLACK)?;
    for (row, &length) in lengths.iter().enumerate() {
        let y = TOP + CELL.1 * row as i32 + CELL.1 / 2;
        let right = Pos::new(HPos::Right, VPos::Center);
        text(&show_tokens(length), LEFT - 10, y, 14.0, right, &BLACK)?;
    }
    for (i, &kind) in Kind::ALL.iter().enumerate() {
        let x0 = LEFT + i as i32 * (panel + GAP);
        text(kind.name(), x0 + panel / 2, TOP - 40, 16.0, centre, &BLACK)?;
        for (column, depth) in DEPTHS.iter().enumerate() {
            let x = x0 + CELL.0 * column as i32;
            text(depth, x + CELL.0 / 2, TOP - 16, 14.0, centre, &BLACK)?;
            for (row, line) in of_kind(lines, kind).enumerate() {
                let y = TOP + CELL.1 * row as i32;
                let cell = line.cells[column];
                let corners = [(x, y), (x + CELL.0 - 2, y + CELL.1 - 2)];
                let fill = shade(cell);
                area.draw(&Rectangle::new(corners, fill.filled())).map_err(drawing)?;
                let label = format!("{:.0} % ({}/{KEYS})", 100.0 * cell.recall(), cell.whole);
                let ink = if cell.recall() > 0.5 { WHITE } else { BLACK };
                text(&label, x + CELL.0 / 2, y + CELL.1 / 2, 14.0, centre, &ink)?;
            }
        }
    }
    let foot = format!(
        "digits recalled, and passkeys recalled whole of {KEYS}, by text length and depth of the needle"
    );
    text(&foot, LEFT, height - 22, 13.0, left, &BLACK)?;
    area.present().map_err(drawing)?;
    drop(area);
    std::fs::write(path, svg).with_context(|| path.display().to_string())
}

/// From pale to blue as more is recalled.
fn shade(cell: Cell) -> RGBColor {
    let mix = |none: f64, all: f64| (none + (all - none) * cell.recall()).round() as u8;
    RGBColor(mix(247.0, 8.0), mix(243.0, 81.0), mix(236.0, 156.0))
}

fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("heat map: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Vec<Line> {
        let cells = [Cell { digits: 25, whole: 5 }, Cell { digits: 3, whole: 0 }, Cell::default()];
        let line = |kind, length| Line { kind, length, cells, speed: 2.5e6, state_bytes: 2 << 20 };
        Kind::ALL.iter().flat_map(|&k| [line(k, 32 << 10), line(k, 1 << 20)]).collect()
    }

    #[test]
    fn table_has_every_figure() {
        let problem = Problem::builder().heads(2).head_dim(64).build().unwrap();
        let text = table(&lines(), &problem);
        let row = text.lines().find(|l| l.starts_with("random") && l.contains("1M")).unwrap();
        for figure in ["100 % (5/5)", "12 % (0/5)", "0 % (0/5)", "2.50 M", "2.0 MiB", "1.00 GiB"] {
            assert!(row.contains(figure), "{figure}: {row}");
        }
        assert!(row.ends_with(" 512x"), "{row}");
        let width = text.lines().next().unwrap().len();
        assert!(text.lines().all(|l| l.len() == width), "{text}");
    }

    #[test]
    fn heat_map_has_every_cell() {
        let name = format!("infini-attn-passkey-{}.svg", std::process::id());
        let path = std::env::temp_dir().join(name);
        prepare(&path).unwrap();
        plot(&lines(), &[32 << 10, 1 << 20], "title", &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(svg.matches("100 %").count(), 8);
        assert_eq!(svg.matches("#08519C").count(), 8);
        assert!(Kind::ALL.iter().all(|k| svg.contains(k.name())));
    }
}
