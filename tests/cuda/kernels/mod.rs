mod counts;
mod elements;
mod memory;
