pub struct Report {
    pub d: Vec<crate::diagnostic::Diagnostic>,
    pub n: u64,
}
impl Report {
    pub(crate) fn new(_g: &crate::launch::Grid<'_>, o: Vec<crate::gang::Outcome>) -> Self {
        let n = o.iter().map(|o| o.counters.executed.iter().sum::<u64>()).sum();
        Self { d: o.into_iter().flat_map(|o| o.findings.0).collect(), n }
    }
    pub fn merge(&mut self, _o: Self) {}
    pub fn schedule_dependent(&mut self, _b: &str, _a: u64, _i: u32) {}
}
