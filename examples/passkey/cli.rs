//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use infini_attn::Update;

use crate::features::VALUES;

/// Where the memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Place {
    Cpu,
    Cuda,
}

/// Hides a passkey in up to a million tokens of real text and finds it again through the
/// compressive memory of Infini-attention alone.
///
/// Tokens are bytes. "The pass key is 71432." (five random digits) is written over the text at its
/// start, middle or end, and the stream goes through `infini_attn::prefill` a few segments at a
/// time, in constant memory. Then a new segment asks "What is the pass key? The pass key is " and
/// the five digits are read off one by one. The gate is open (beta = +infinity): the local
/// attention contributes nothing, only the memory can answer.
///
/// Nothing is trained. A token's key is a linear map of the 20 bytes before it (one-hot), the same
/// map for every token, constructed so that sigma(k) underflows to 0 unless those bytes are "The
/// pass key is " followed by 0 to 4 more; which channels light up says how many. Its value is the
/// digit the token is, or 0. A query is the key that the next token would have.
///
/// Rows of the table: "constructed", those projections; and three controls: "decoy", the same with
/// "The bass key is 83910." (one letter off, other digits) elsewhere in the text; "memory reset",
/// the memory forgotten before the question (10 % per digit is chance); "random", projections
/// drawn from a normal distribution, whose memory averages over all digits of the text. Those fail
/// at the start and in the middle, as the paper's model does before fine-tuning, and at the end too:
/// there the paper's model still has the needle in its local window, and here the question opens a
/// new one.
#[derive(Debug, Parser)]
#[command(name = "passkey", max_term_width = 100)]
pub struct Cli {
    /// Text files to hide the passkey in, one after another (UTF-8). Default: the sources of this
    /// repository and of the crates in cargo's registry. Lines that already hold the phrase are
    /// left out; the text is repeated only when there is too little of it
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,

    /// Tokens before the question, each length a row of the table; K = 1024, M = 1024 K
    #[arg(
        long = "length",
        value_name = "TOKENS",
        value_delimiter = ',',
        default_value = "32K,128K,512K,1M",
        value_parser = parse_tokens
    )]
    pub lengths: Vec<usize>,

    /// Tokens per segment
    #[arg(long, value_name = "TOKENS", default_value = "2048", value_parser = parse_tokens)]
    pub segment: usize,

    /// How a segment is written into the memory: linear (eq. 8 of the paper) or delta (eq. 9)
    #[arg(long, value_name = "RULE", default_value = "delta")]
    pub update: Update,

    /// Heads, each with a memory of its own [1 to 16]
    #[arg(long, default_value = "2", value_parser = between::<1, 16>)]
    pub heads: usize,

    /// Channels per head, of keys and values both [10 to 256]
    #[arg(long, default_value = "64", value_parser = between::<VALUES, 256>)]
    pub dim: usize,

    /// Draws passkeys, places and projections; the same seed gives the same run
    #[arg(long, default_value = "2404")]
    pub seed: u64,

    /// Where the memory lies and is worked on; cuda needs a build with --features cuda, a device of
    /// compute capability 8.0 and one of its head dimensions
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: Place,

    /// Heat map of the table (SVG)
    #[arg(long, value_name = "FILE", default_value = "target/passkey.svg", value_parser = svg)]
    pub plot: PathBuf,
}

/// Shortest segment: the question and its answer must fit into one, so that the memory holds
/// nothing of them.
const MIN_SEGMENT: usize = 64;
/// Longest stream.
const MAX_LENGTH: usize = 1 << 30;

impl Cli {
    /// What single options cannot check.
    pub fn check(&self) -> anyhow::Result<()> {
        let (segment, shortest) = (self.segment, 3 * self.segment.min(MAX_LENGTH));
        if !(MIN_SEGMENT..=MAX_LENGTH).contains(&segment) {
            anyhow::bail!("--segment: {segment} given, {MIN_SEGMENT} to {MAX_LENGTH} expected");
        }
        for &length in &self.lengths {
            if !(shortest..=MAX_LENGTH).contains(&length) {
                anyhow::bail!(
                    "--length: {length} given, {shortest} (start, middle and end are segments of \
                     their own) to {MAX_LENGTH} expected"
                );
            }
        }
        Ok(())
    }
}

/// A number of tokens: 2048, 32K, 1M.
fn parse_tokens(text: &str) -> Result<usize, String> {
    let (number, unit) = match text.trim_end_matches(['k', 'K', 'm', 'M']) {
        number if number.len() == text.len() => (number, 1),
        number if text.ends_with(['k', 'K']) => (number, 1 << 10),
        number => (number, 1 << 20),
    };
    let one_suffix = text.len() - number.len() <= 1;
    let parsed = number.parse::<usize>().ok().and_then(|n| n.checked_mul(unit));
    parsed
        .filter(|&n| n > 0 && one_suffix)
        .ok_or_else(|| "a positive whole number expected, such as 2048, 32K or 1M".into())
}

/// 32768 as 32K.
pub fn show_tokens(n: usize) -> String {
    match n {
        _ if n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        _ if n.is_multiple_of(1 << 10) => format!("{}K", n >> 10),
        _ => n.to_string(),
    }
}

fn between<const LEAST: usize, const MOST: usize>(text: &str) -> Result<usize, String> {
    (text.parse().ok())
        .filter(|n| (LEAST..=MOST).contains(n))
        .ok_or_else(|| format!("a whole number from {LEAST} to {MOST} expected"))
}

fn svg(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension() {
        Some(end) if end.eq_ignore_ascii_case("svg") => Ok(path),
        _ => Err("a file name ending in .svg expected".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts() {
        assert_eq!(parse_tokens("2048"), Ok(2048));
        assert_eq!(parse_tokens("32K"), Ok(32 << 10));
        assert_eq!(parse_tokens("1m"), Ok(1 << 20));
        for bad in ["", "K", "1KK", "1MK", "-1", "0", "0K", "1.5M", "1G", "99999999999999999999M"] {
            assert!(parse_tokens(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown_as_given() {
        for text in ["32K", "1M", "1025", "3M", "1023K"] {
            assert_eq!(show_tokens(parse_tokens(text).unwrap()), text);
        }
    }

    #[test]
    fn bad_values_are_refused_and_named() {
        let refuse = |args: &[&str], named: &str| {
            let args = ["passkey"].iter().chain(args);
            let message = match Cli::try_parse_from(args) {
                Err(e) => e.to_string(),
                Ok(cli) => cli.check().expect_err(named).to_string(),
            };
            assert!(message.contains(named), "{message}");
        };
        refuse(&["--dim", "9"], "from 10 to 256");
        refuse(&["--heads", "0"], "from 1 to 16");
        refuse(&["--update", "hebb"], "linear or delta");
        refuse(&["--length", "32Q"], "32K or 1M");
        refuse(&["--length", "32K,4K"], "--length: 4096 given, 6144");
        refuse(&["--segment", "32"], "--segment: 32 given, 64");
        refuse(&["--plot", "map.png"], ".svg");
        refuse(&["--device", "tpu"], "cpu, cuda");
        assert!(Cli::try_parse_from(["passkey"]).unwrap().check().is_ok());
    }
}
