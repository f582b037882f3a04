mod launches;
mod maps;
mod offsets;
mod prefill;
mod table;
