mod call;
mod target;
