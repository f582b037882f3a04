mod commit;
mod decode;
mod init;
mod maps;
mod offsets;
mod prefill;
mod segment;
mod table;
