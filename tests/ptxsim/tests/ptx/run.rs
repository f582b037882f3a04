//! Texts of PTX that must parse, and launches of them that must be valid.

use ptxsim::{Arg, Device, Launch, Module, Report};

/// What a module begins with.
pub const HEADER: &str = ".version 8.0\n.target sm_90a\n.address_size 64\n";

/// A text with the numbers of its lines.
pub fn numbered(text: &str) -> String {
    text.lines().enumerate().map(|(i, line)| format!("{:4} {line}\n", i + 1)).collect()
}

/// The module of a text; an error shows the text.
#[track_caller]
pub fn parse(text: &str) -> Module {
    Module::parse(text).unwrap_or_else(|error| panic!("{error}\n{}", numbered(text)))
}

/// Launches the only kernel of a text.
#[track_caller]
pub fn launch(
    device: &mut Device,
    text: &str,
    [blocks, threads]: [u32; 2],
    args: &[Arg],
) -> Report {
    let module = parse(text);
    let kernel = module.kernels().next().expect("a kernel");
    let report = device.launch(&module, kernel, &Launch::linear(blocks, threads), args);
    report.unwrap_or_else(|error| panic!("{error}\n{}", numbered(text)))
}

/// Launches the only kernel of a text, about which nothing may be said.
#[track_caller]
pub fn clean(device: &mut Device, text: &str, dimensions: [u32; 2], args: &[Arg]) -> Report {
    let report = launch(device, text, dimensions, args);
    assert!(report.is_clean(), "{report}\n{}", numbered(text));
    report
}
