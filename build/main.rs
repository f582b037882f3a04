//! Build script. Without the feature `cuda` it does nothing; with it, see `cuda::run`.

#[cfg(feature = "cuda")]
mod bindings;
#[cfg(feature = "cuda")]
mod compile;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod prebuilt;
#[cfg(feature = "cuda")]
mod table;
#[cfg(feature = "cuda")]
mod tools;

fn main() -> std::process::ExitCode {
    println!("cargo::rerun-if-changed=build");
    #[cfg(feature = "cuda")]
    if let Err(message) = cuda::run() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
        return std::process::ExitCode::FAILURE;
    }
    std::process::ExitCode::SUCCESS
}
