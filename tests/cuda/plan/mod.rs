mod call;
mod parameters;
mod plans;
mod target;
