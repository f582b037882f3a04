//! What needs no compiler: texts of PTX, through the library and the command line.

mod addresses;
mod alu;
mod cli;
mod golden;
mod layouts;
mod negative;
mod parser;
mod parser_robustness;
mod report;
mod run;
mod spins;
