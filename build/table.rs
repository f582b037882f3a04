//! The table of kernels, from the lines that kernels/describe.cpp prints.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use xxhash_rust::xxh3::xxh3_128;

use super::{Result, read, tools, write};

/// One line of describe.cpp.
struct Line {
    arch: String,
    operation: String,
    dtype: Option<String>,
    /// Dk, Dv, threads, shared_bytes, blocks_per_sm, rows, columns, keys, registers.
    numbers: [u32; 9],
}

impl Line {
    fn parse(text: &str) -> Option<Line> {
        let mut words = text.split_whitespace();
        let (arch, operation) = (words.next()?.to_owned(), words.next()?.to_owned());
        let dtype = Some(words.next()?.to_owned()).filter(|dtype| dtype != "any");
        let numbers: Vec<u32> = words.map(|word| word.parse().ok()).collect::<Option<_>>()?;
        Some(Line { arch, operation, dtype, numbers: numbers.try_into().ok()? })
    }

    fn symbol(&self) -> String {
        let dtype = self.dtype.iter().map(|dtype| format!("_{dtype}")).collect::<String>();
        let dims = match self.numbers {
            [0, 0, ..] => String::new(),
            [dk, dv, ..] if dv == 0 || dk == dv => format!("_d{dk}"),
            [dk, dv, ..] => format!("_d{dk}x{dv}"),
        };
        format!("infini_{}_{}{dtype}{dims}", self.operation, self.arch)
    }

    fn file(&self) -> String {
        format!("{}/{}", self.arch, self.operation)
    }

    fn rust(&self) -> Result<String> {
        let arch = match &*self.arch {
            "sm80" => "Sm80",
            "sm90" => "Sm90",
            other => return Err(format!("describe.cpp: {other}, sm80 or sm90 expected")),
        };
        let dtype = match self.dtype.as_deref() {
            None => "None",
            Some("bf16") => "Some(DType::BF16)",
            Some("f16") => "Some(DType::F16)",
            Some(other) => {
                return Err(format!("describe.cpp: dtype {other}, bf16 or f16 expected"));
            }
        };
        let [key_dim, value_dim, rest @ ..] = self.numbers;
        let [threads, shared_bytes, blocks_per_sm, rows, columns, keys, registers] = rest;
        Ok(format!(
            "Kernel {{ arch: Arch::{arch}, operation: {:?}, symbol: {:?}, file: {:?}, dtype: {dtype}, \
             key_dim: {key_dim}, value_dim: {value_dim}, threads: {threads}, \
             shared_bytes: {shared_bytes}, blocks_per_sm: {blocks_per_sm}, rows: {rows}, \
             columns: {columns}, keys: {keys}, \
             launch_registers: {registers} }},\n",
            self.operation,
            self.symbol(),
            self.file()
        ))
    }

    /// The row of the documentation, without dtypes.
    fn documentation(&self) -> String {
        let mut row = format!("| {} | `{}` ", self.arch, self.operation);
        for number in self.numbers {
            match number {
                0 => row += "| – ",
                _ => _ = write!(row, "| {number} "),
            }
        }
        row
    }
}

/// Source of the table and of the functions that hold the compiled files.
pub fn generate(
    host_compiler: &Path,
    kernels: &Path,
    out: &Path,
    files: &[String],
) -> Result<String> {
    let lines = describe(host_compiler, kernels, out)?;
    write(&out.join("kernels.md"), &documentation(&lines))?;
    let mut source = String::from("pub(super) static EMBEDDED: &[Kernel] = &[\n");
    for line in &lines {
        source += &line.rust()?;
    }
    source += "];\n";
    let params = format!("{:032x}", xxh3_128(read(&kernels.join("params.h"))?.as_bytes()));
    _ = writeln!(source, "pub(super) static PARAMS: &str = {params:?};");
    write(&out.join("table.txt"), &text(&lines, &params))?;
    let (mut fatbins, mut texts) = (String::new(), String::new());
    for file in files {
        _ = writeln!(
            fatbins,
            "{file:?} => {{ static IMAGE: &Image<[u8]> = \
             &Image(*include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{file}.fatbin\"))); \
             Some(&IMAGE.0) }}"
        );
        let text = format!("include_str!(concat!(env!(\"OUT_DIR\"), \"/{file}.ptx\"))");
        _ = writeln!(texts, "{file:?} => Some({text}),");
    }
    for (function, kind, arms) in [("fatbin", "[u8]", fatbins), ("ptx", "str", texts)] {
        _ = write!(
            source,
            "pub(super) fn embedded_{function}(file: &str) -> Option<&'static {kind}> {{\n\
             match file {{\n{arms}_ => None,\n}}\n}}\n"
        );
    }
    Ok(source)
}

/// The table for programs that replace kernels when they run: a hash of params.h, which must be
/// the same, then a line per kernel: symbol, threads, shared_bytes, blocks_per_sm, rows,
/// columns, keys, registers.
fn text(lines: &[Line], params: &str) -> String {
    let mut text = format!("params {params}\n");
    for line in lines {
        let numbers = line.numbers[2..].iter().map(|n| format!(" {n}")).collect::<String>();
        _ = writeln!(text, "{}{numbers}", line.symbol());
    }
    text
}

/// Compiles and runs describe.cpp.
fn describe(host_compiler: &Path, kernels: &Path, out: &Path) -> Result<Vec<Line>> {
    let program = out.join("describe");
    let mut compiler = Command::new(host_compiler);
    compiler.arg("-std=c++17").arg("-I").arg(kernels);
    tools::execute(compiler.arg(kernels.join("describe.cpp")).arg("-o").arg(&program))?;
    let output = tools::execute(&mut Command::new(&program))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| Line::parse(line).ok_or_else(|| format!("describe.cpp printed {line:?}")))
        .collect()
}

/// One row per operation and dimensions.
fn documentation(lines: &[Line]) -> String {
    let mut rows = BTreeMap::<_, Vec<&str>>::new();
    for (index, line) in lines.iter().enumerate() {
        let same = |other: &Line| {
            (&other.arch, &other.operation, other.numbers)
                == (&line.arch, &line.operation, line.numbers)
        };
        let first = lines.iter().position(same).unwrap_or(index);
        rows.entry(first).or_default().push(line.dtype.as_deref().unwrap_or("any"));
    }
    let mut text = String::from(
        "| arch | operation | Dk | Dv | threads | shared bytes | blocks per SM | rows | columns \
         | keys | registers | dtypes |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (first, dtypes) in rows {
        _ = writeln!(text, "{}| {} |", lines[first].documentation(), dtypes.join(", "));
    }
    text
}
