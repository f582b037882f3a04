//! What is printed.

use std::time::Duration;

use infini_attn::Problem;

use crate::Cli;
use crate::engine::Engine;

const MIB: f64 = (1 << 20) as f64;

pub fn title(cli: &Cli, problem: &Problem) -> anyhow::Result<String> {
    let slot = problem.state_bytes(1, true)? as f64 * cli.layers as f64 / MIB;
    Ok(format!(
        "{} layers of {} heads ({} of keys and values) x {} channels, segments of {} tokens\n\
         {} slots of {slot:.2} MiB, whatever the length of a conversation: {:.1} MiB in all",
        cli.layers,
        cli.heads,
        cli.kv_heads,
        cli.dim,
        cli.segment,
        cli.slots,
        slot * cli.slots as f64,
    ))
}

pub fn table(engine: &Engine<'_>) -> String {
    let (counts, prefixes) = (&engine.counts, engine.prefixes());
    let mut steps = counts.steps.clone();
    steps.sort_unstable();
    let all: Duration = steps.iter().sum();
    let at = |share: f64| {
        let i = (share * steps.len() as f64) as usize;
        steps.get(i.min(steps.len().saturating_sub(1))).map_or(0.0, |s| 1e3 * s.as_secs_f64())
    };
    let per_second = |tokens: usize| tokens as f64 / all.as_secs_f64().max(1e-9);
    let known = prefixes.counters();
    [
        row("steps", format!("{} in {:.2} s", steps.len(), all.as_secs_f64())),
        row(
            "prompts",
            format!(
                "{} tokens read, {:.0} tokens/s; {} known",
                counts.read,
                per_second(counts.read),
                counts.known
            ),
        ),
        row(
            "answers",
            format!("{} tokens, {:.0} tokens/s", counts.answered, per_second(counts.answered)),
        ),
        row(
            "time of a step",
            format!("p50 {:.2} ms, p99 {:.2} ms, most {:.2} ms", at(0.5), at(0.99), at(1.0)),
        ),
        row("most at once", format!("{} live, {} waiting", counts.most_live, counts.most_waiting)),
        row(
            "beginnings",
            format!(
                "{} hits, {} misses, {} kept in {:.1} MiB",
                known.hits,
                known.misses,
                prefixes.len(),
                prefixes.bytes() as f64 / MIB
            ),
        ),
        row("states", format!("{:.1} MiB", engine.pool().bytes() as f64 / MIB)),
    ]
    .concat()
}

fn row(name: &str, value: String) -> String {
    format!("{name:15} {value}\n")
}
