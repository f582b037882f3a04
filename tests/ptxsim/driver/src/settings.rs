//! What the environment asks for.

use std::fs::OpenOptions;
use std::path::PathBuf;

use ptxsim::{Arch, Options, Report};
use serde_json::{Map, Value};

use crate::summary::Summary;

/// Of the variables, before the name of an option.
const PREFIX: &str = "PTXSIM_";

/// What becomes of a launch in which something was found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Findings {
    /// It fails, and every later call of its context.
    Fail,
    /// It is told; what the launch left can be read if it came to its end.
    Tell,
}

#[derive(Debug)]
pub struct Settings {
    /// `PTXSIM_ARCH`, sm_80 without.
    pub arch: Arch,
    /// `PTXSIM_` and the name of an option of the simulator in capitals: `PTXSIM_SEED`.
    pub options: Options,
    /// `PTXSIM_FINDINGS`: fail or tell.
    pub findings: Findings,
    /// `PTXSIM_REPORT`: stderr or a file.
    pub summary: Summary,
}

impl Settings {
    /// Of the environment that `variable` gives.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let of = |name: &str| variable(&format!("{PREFIX}{name}"));
        let arch = match of("ARCH") {
            None => Arch::Sm80,
            Some(name) => name.parse().map_err(|error| format!("{PREFIX}ARCH: {error}"))?,
        };
        let findings = match of("FINDINGS").as_deref() {
            None | Some("fail") => Findings::Fail,
            Some("tell") => Findings::Tell,
            Some(other) => return Err(format!("{PREFIX}FINDINGS={other}: fail or tell expected")),
        };
        let summary = match of("REPORT").as_deref() {
            None => Summary::Findings,
            Some("stderr") => Summary::Words,
            Some(path) => {
                let opened = OpenOptions::new().append(true).create(true).open(PathBuf::from(path));
                Summary::Lines(opened.map_err(|e| format!("{PREFIX}REPORT={path}: {e}"))?)
            }
        };
        Ok(Self { arch, options: options(of)?, findings, summary })
    }

    /// Whether calls after a launch succeed.
    pub fn goes_on(&self, report: &Report) -> bool {
        report.is_clean() || self.findings == Findings::Tell && report.complete
    }
}

/// The options of the simulator, each of which a variable may set.
fn options(of: impl Fn(&str) -> Option<String>) -> Result<Options, String> {
    let defaults = serde_json::to_value(Options::default()).map_err(|e| e.to_string())?;
    let names = defaults.as_object().into_iter().flat_map(Map::keys);
    let mut given = Map::new();
    for name in names {
        let variable = name.to_uppercase();
        let Some(text) = of(&variable) else { continue };
        let value = serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.clone()));
        let alone = Value::from(Map::from_iter([(name.clone(), value.clone())]));
        serde_json::from_value::<Options>(alone)
            .map_err(|error| format!("{PREFIX}{variable}={text}: {error}"))?;
        given.insert(name.clone(), value);
    }
    serde_json::from_value(given.into()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use ptxsim::numeric::tensor::Accumulation;
    use ptxsim::{Residency, Timing};

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, String> {
        Settings::read(|name| {
            variables.iter().find(|v| v.0 == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn every_option_has_a_variable() {
        let settings = read(&[
            ("PTXSIM_ARCH", "sm_90a"),
            ("PTXSIM_SEED", "7"),
            ("PTXSIM_TIMING", "lazy"),
            ("PTXSIM_RESIDENCY", "co-resident"),
            ("PTXSIM_STRICT_PROXIES", "true"),
            ("PTXSIM_ACCUMULATION", "chain"),
            ("PTXSIM_PERTURB", "3"),
            ("PTXSIM_CHECKS", "false"),
            ("PTXSIM_FINDINGS", "tell"),
            ("PTXSIM_REPORT", "stderr"),
        ]);
        let Settings { arch, options, findings, summary } = settings.unwrap();
        assert_eq!((arch, findings), (Arch::Sm90a, Findings::Tell));
        assert!(matches!(summary, Summary::Words));
        assert_eq!((options.seed, options.perturb), (7, Some(3)));
        assert_eq!((options.timing, options.residency), (Timing::Lazy, Residency::CoResident));
        assert_eq!(options.accumulation, Accumulation::Chain);
        assert!(options.strict_proxies && !options.checks);
    }

    #[test]
    fn nothing_set_is_the_default() {
        let Settings { arch, options, findings, summary } = read(&[("SEED", "7")]).unwrap();
        assert_eq!((arch, options.seed, options.checks), (Arch::Sm80, 0, true));
        assert!(findings == Findings::Fail && matches!(summary, Summary::Findings));
    }

    #[test]
    fn a_wrong_value_is_named() {
        let refused = |name, value, expected: &str| {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(error.starts_with(name) && error.contains(expected), "{error}");
        };
        refused("PTXSIM_ARCH", "sm_70", "sm_80");
        refused("PTXSIM_SEED", "-1", "expected u64");
        refused("PTXSIM_SEED", "", "expected u64");
        refused("PTXSIM_TIMING", "late", "expected `eager` or `lazy`");
        refused("PTXSIM_RESIDENCY", "all", "co-resident");
        refused("PTXSIM_STRICT_PROXIES", "1", "expected a boolean");
        refused("PTXSIM_FINDINGS", "ignore", "fail or tell");
        refused("PTXSIM_REPORT", "/none/report", "/none/report");
    }
}
