//! The vector instructions that are reported are the processor's.

use infini_attn::simd_level;

#[test]
fn the_best_of_the_processor_is_used() {
    #[cfg(target_arch = "x86_64")]
    let expected = if ["f", "bw", "cd", "dq", "vl"].into_iter().all(avx512) {
        "AVX-512"
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        "AVX2"
    } else {
        "baseline SIMD"
    };
    #[cfg(not(target_arch = "x86_64"))]
    let expected = if cfg!(target_arch = "aarch64") { "NEON" } else { "baseline SIMD" };
    assert_eq!(simd_level(), expected);
}

#[cfg(target_arch = "x86_64")]
fn avx512(part: &str) -> bool {
    match part {
        "f" => is_x86_feature_detected!("avx512f"),
        "bw" => is_x86_feature_detected!("avx512bw"),
        "cd" => is_x86_feature_detected!("avx512cd"),
        "dq" => is_x86_feature_detected!("avx512dq"),
        _ => is_x86_feature_detected!("avx512vl"),
    }
}
