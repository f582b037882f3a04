//! The shared table of cases, against the float64 reference.

use candle_core::Device;

use crate::common::candle::Candle;
use crate::common::cases::cases;
use crate::common::driver::run_cases;

#[test]
fn the_whole_table() {
    let summary = run_cases(&Candle::<false>(Device::Cpu), &cases()).finish("candle");
    let refused: Vec<_> = summary.refused.into_iter().collect();
    assert_eq!(refused, [("candle has no negative strides", 38)]);
    assert_eq!(summary.ran, cases().len() - 38);
}
