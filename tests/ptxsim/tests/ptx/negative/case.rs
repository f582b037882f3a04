//! How a pair of kernels is written and run.

use ptxsim::diagnostic::{Diagnostic, Kind};
use ptxsim::tensor_map::{Dtype, TensorMap};
use ptxsim::{Arch, Arg, Buffer, Device, Launch, Report, Residency, Timing};

use crate::run::{numbered, parse};

/// Words of the buffers `in` (0, 1, 2, …) and `out` (0, 0, 0, …); `raw` has as many that nobody has
/// written.
pub const WORDS: u32 = 256;

/// Rows of a tensor map, of `COLUMNS` words.
const ROWS: u64 = WORDS as u64 / COLUMNS;
const COLUMNS: u64 = 8;

/// What every kernel begins with, so that its text need not. Set are
///
/// * `in`, `out` and `raw`, where the buffers begin; `in_map` and `out_map`, tensor maps of two of
///   them: tiles of 4 rows of 8 words out of 32 rows;
/// * `tid`, `lane`, `warp`, `block`, `rank` (of the block in its cluster); `leader`, true in thread 0;
/// * `sh`, where the shared `tile` begins: 4 KiB that nobody has written; `word` and `quad`, where the
///   thread's own 4 and 16 bytes of it would be;
/// * `mbar`, where there is room for four mbarriers that nobody has initialised.
///
/// `p`, `q`, `h0`…, `r0`…, `d0`…, `f0`… are free.
const HEADER: &str = "\
.version 8.6
.target sm_90a
.address_size 64
.global .align 4 .u32 ticket = 0;
.visible .entry k(.param .u64 p_in, .param .u64 p_out, .param .u64 p_raw,
    .param .align 64 .b8 p_in_map[128], .param .align 64 .b8 p_out_map[128]) /* directives */
{
.shared .align 128 .b8 tile[4096];
.shared .align 8 .b8 mbarriers[32];
.reg .pred p, q, leader;
.reg .b16 h<8>;
.reg .b32 r<64>, tid, lane, warp, block, rank, sh, word, quad, mbar;
.reg .b64 d<16>, in, out, raw, in_map, out_map, front, back;
.reg .f32 f<64>;
ld.param.u64 in, [p_in];
ld.param.u64 out, [p_out];
ld.param.u64 raw, [p_raw];
mov.b64 in_map, p_in_map;
cvta.param.u64 in_map, in_map;
mov.b64 out_map, p_out_map;
cvta.param.u64 out_map, out_map;
mov.u32 tid, %tid.x;
mov.u32 lane, %laneid;
shr.u32 warp, tid, 5;
mov.u32 block, %ctaid.x;
mov.u32 rank, %cluster_ctarank;
setp.eq.u32 leader, tid, 0;
mov.u32 sh, tile;
mad.lo.u32 word, tid, 4, sh;
mad.lo.u32 quad, tid, 16, sh;
mov.u32 mbar, mbarriers;
";

/// A kernel with a mistake and its corrected twin, as one text: lines that begin with `-` belong
/// to the mistake, lines that begin with `+` to the correction. The line where the mistake is to
/// be reported ends with `// <-- here`; a race has two such lines, in either order.
pub struct Case {
    /// What comes between the header and the text.
    prelude: String,
    body: String,
    directives: &'static str,
    launch: Launch,
    residency: Residency,
    strict: bool,
    weak_alignment: bool,
    early: bool,
    max_instructions: u64,
    rows: u64,
    says: Vec<&'static str>,
}

impl Case {
    /// One block of one warp.
    pub fn new(body: &str) -> Self {
        Self {
            prelude: String::new(),
            body: body.into(),
            directives: "",
            launch: Launch::linear(1, 32),
            residency: Residency::Sequential,
            strict: true,
            weak_alignment: false,
            early: false,
            max_instructions: 1 << 20,
            rows: ROWS,
            says: Vec::new(),
        }
    }

    /// Of a right kernel, the mistake that `wrong` stands in place of the line `right`.
    #[track_caller]
    pub fn plant(mut self, right: &str, wrong: &str) -> Self {
        let mut found = 0;
        let plant = |line: &str| {
            if line.trim_start() != right {
                return format!("{line}\n");
            }
            found += 1;
            format!("+{right}\n-{wrong}\n")
        };
        self.body = self.body.lines().map(plant).collect();
        assert_eq!(found, 1, "lines {right}");
        self
    }

    /// Of a right kernel, the mistake that this line is left out.
    #[track_caller]
    pub fn without(self, line: &str) -> Self {
        self.plant(line, "")
    }

    /// The mistake is to be reported where a line begins so.
    pub fn at(mut self, line: &str) -> Self {
        let begins = |l: &str| l.trim_start_matches([' ', '+', '-']).starts_with(line);
        let mark = |l: &str| format!("{l}{}\n", if begins(l) { "    // <-- here" } else { "" });
        self.body = self.body.lines().map(mark).collect();
        self
    }

    /// Before the text, `mbar` becomes an mbarrier of `count` arrivals that all threads may use, and
    /// copies too.
    pub fn mbarrier(mut self, count: u32) -> Self {
        self.prelude += &format!(
            "@leader mbarrier.init.shared.b64 [mbar], {count};
            fence.mbarrier_init.release.cluster;
            bar.sync 0;\n"
        );
        self
    }

    /// Before the text, `front` and `back` become descriptors of operands of m64n8k16, at the start of
    /// `tile` and 2048 bytes on, where one of 64 rows ends.
    pub fn descriptors(mut self) -> Self {
        self.prelude += "\
            cvt.u64.u32 front, sh;
            shr.u64 front, front, 4;
            or.b64 front, front, 0x1000080000;
            add.u64 back, front, 128;\n";
        self
    }

    /// Threads of a block.
    pub fn threads(mut self, n: u32) -> Self {
        self.launch.block = [n, 1, 1];
        self
    }

    /// Blocks of the grid.
    pub fn blocks(mut self, n: u32) -> Self {
        self.launch.grid = [n, 1, 1];
        self
    }

    /// All blocks are one cluster of `n`.
    pub fn cluster(mut self, n: u32) -> Self {
        self.launch.cluster = [n, 1, 1];
        self.blocks(n)
    }

    /// Directives of the kernel.
    pub fn directives(mut self, text: &'static str) -> Self {
        self.directives = text;
        self
    }

    /// Registers per thread.
    pub fn registers(mut self, n: u32) -> Self {
        self.launch.registers = Some(n);
        self
    }

    /// Blocks run interleaved.
    pub fn co_resident(mut self) -> Self {
        self.residency = Residency::CoResident;
        self
    }

    /// Shared variables get no more than the promised alignment.
    pub fn weakly_aligned(mut self) -> Self {
        self.weak_alignment = true;
        self
    }

    /// The launch may begin before the one before it has ended.
    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }

    /// What hardware forgives is a warning.
    pub fn lenient(mut self) -> Self {
        self.strict = false;
        self
    }

    /// Ends after so many instructions.
    pub fn at_most(mut self, instructions: u64) -> Self {
        self.max_instructions = instructions;
        self
    }

    /// Of so many rows `in_map` tells, whatever `in` has.
    pub fn rows(mut self, rows: u64) -> Self {
        self.rows = rows;
        self
    }

    /// The message also holds this.
    pub fn says(mut self, text: &'static str) -> Self {
        self.says.push(text);
        self
    }

    /// Both kernels, in both timings and with several seeds.
    #[track_caller]
    pub fn reports(&self, kind: Kind) {
        let (wrong, marks) = self.text('-');
        assert!(!marks.is_empty(), "no line is marked");
        self.each(&wrong, |report, how| {
            let found = report.diagnostics().any(|d| self.is_meant(d, kind, &marks));
            assert!(found, "{how}: no {kind} at {marks:?}\n{report}\n{}", numbered(&wrong));
        });
        self.twin(&wrong);
    }

    /// The same for a mistake whose line depends on the schedule: any of those marked.
    #[track_caller]
    pub fn reports_at_one(&self, kind: Kind) {
        let (wrong, marks) = self.text('-');
        self.each(&wrong, |report, how| {
            let one = |d| marks.iter().any(|m| self.is_meant(d, kind, &[*m]));
            let found = report.diagnostics().any(one);
            assert!(found, "{how}: no {kind} at one of {marks:?}\n{report}\n{}", numbered(&wrong));
        });
        self.twin(&wrong);
    }

    /// The same for a pair of accesses of which either may come first, which decides how the
    /// mistake shows; anywhere if no line is marked.
    #[track_caller]
    pub fn reports_one_of(&self, kinds: &[Kind]) {
        let (wrong, marks) = self.text('-');
        self.each(&wrong, |report, how| {
            let one = |d| kinds.iter().any(|k| self.is_meant(d, *k, &marks));
            let found = report.diagnostics().any(one);
            assert!(found, "{how}: no {kinds:?} at {marks:?}\n{report}\n{}", numbered(&wrong));
        });
        self.twin(&wrong);
    }

    /// A mistake that hardware is known to forgive: reported by the letter, else a warning.
    #[track_caller]
    pub fn is_forgiven(&self, kind: Kind) {
        self.reports(kind);
        let (wrong, marks) = self.text('-');
        self.run(&wrong, false, |report, _, how| {
            let warned = report.warnings().any(|d| self.is_meant(d, kind, &marks));
            let clean = report.is_clean();
            assert!(clean && warned, "{how}: warned {warned}\n{report}\n{}", numbered(&wrong));
        });
    }

    /// What does no harm, but is warned of.
    #[track_caller]
    pub fn warns(&self, kind: Kind) {
        let (text, marks) = self.text('+');
        self.each(&text, |report, how| {
            let warned = report.warnings().any(|d| self.is_meant(d, kind, &marks));
            let clean = report.is_clean();
            assert!(clean && warned, "{how}: warned {warned}\n{report}\n{}", numbered(&text));
        });
    }

    #[track_caller]
    fn twin(&self, wrong: &str) {
        let (right, _) = self.text('+');
        assert!(right != *wrong, "the twin is the same");
        self.each(&right, |report, how| {
            assert!(report.is_clean(), "{how}: the twin\n{report}\n{}", numbered(&right));
        });
    }

    /// The corrected kernel alone: what must not be reported.
    #[track_caller]
    pub fn is_clean(&self) {
        let (text, _) = self.text('+');
        self.each(&text, |report, how| {
            assert!(report.is_clean(), "{how}\n{report}\n{}", numbered(&text));
        });
    }

    /// The corrected kernel is clean and leaves these words at the start of `out`.
    #[track_caller]
    pub fn leaves(&self, expected: &[u32]) {
        let (text, _) = self.text('+');
        self.is_clean();
        self.run(&text, true, |_, left, how| {
            assert_eq!(left[..expected.len()], *expected, "{how}")
        });
    }

    /// What is left at the start of `out` in each of the two timings, whatever is reported.
    #[track_caller]
    pub fn differs_by_timing(&self, eager: &[u32], lazy: &[u32]) {
        self.run(&self.text('+').0, true, |report, left, how| {
            let expected = match report.schedules[0].timing {
                Timing::Eager => eager,
                Timing::Lazy => lazy,
            };
            assert_eq!(left[..expected.len()], *expected, "{how}");
        });
    }

    /// What is no mistake, though it looks like one.
    #[track_caller]
    pub fn both_are_clean(&self) {
        self.twin(&self.text('-').0);
        self.each(&self.text('-').0, |report, how| assert!(report.is_clean(), "{how}\n{report}"));
    }

    fn is_meant(&self, d: &Diagnostic, kind: Kind, marks: &[u32]) -> bool {
        let mut lines = vec![d.at.ptx_line];
        if marks.len() > 1 {
            lines.extend(d.other.iter().map(|o| o.ptx_line));
            lines.sort_unstable();
        }
        let words = d.to_string();
        d.kind == kind
            && (lines == marks || marks.is_empty())
            && self.says.iter().all(|s| words.contains(s))
    }

    /// The text of one of the two kernels, and its marked lines.
    pub fn text(&self, sign: char) -> (String, Vec<u32>) {
        let (mut text, mut marks) =
            (HEADER.replace("/* directives */", self.directives), Vec::new());
        for line in self.prelude.lines().chain(self.body.lines()).chain(["ret;", "}"]) {
            let line = line.trim_start();
            let kept = match line.strip_prefix(['-', '+']) {
                Some(rest) if line.starts_with(sign) => rest,
                Some(_) => "",
                None => line,
            };
            if kept.ends_with("// <-- here") {
                marks.push(text.lines().count() as u32 + 1);
            }
            text += kept;
            text += "\n";
        }
        (text, marks)
    }

    /// A device with the three buffers, `out` among them, and the arguments.
    pub fn device(&self) -> (Device, Buffer, Vec<Arg>) {
        let mut device = Device::new(Arch::Sm90a);
        device.options.early = self.early;
        let input = device.buffer("in", &(0..WORDS).collect::<Vec<_>>());
        let output = device.buffer("out", &vec![0u32; WORDS as usize]);
        let raw = device.uninitialised::<u32>("raw", WORDS as usize);
        let map = |buffer, rows| {
            let map = TensorMap::dense(Dtype::U32, vec![COLUMNS, rows], vec![COLUMNS as u32, 4]);
            Arg::TensorMap(TensorMap { address: device.address(buffer), ..map })
        };
        let maps = [map(input, self.rows), map(output, ROWS)];
        let args = [input, output, raw].map(Arg::from).into_iter().chain(maps).collect();
        (device, output, args)
    }

    #[track_caller]
    fn each(&self, text: &str, check: impl Fn(&Report, String)) {
        self.run(text, self.strict, |report, _, how| check(report, how));
    }

    /// In both timings, and with several seeds; `check` also sees the words of `out`.
    #[track_caller]
    fn run(&self, text: &str, strict: bool, check: impl Fn(&Report, Vec<u32>, String)) {
        let module = parse(text);
        for timing in [Timing::Eager, Timing::Lazy] {
            for seed in 0..3 {
                let (mut device, output, args) = self.device();
                device.options.strict_proxies = strict;
                device.options.timing = timing;
                device.options.seed = seed;
                device.options.residency = self.residency;
                device.options.weak_alignment = self.weak_alignment;
                device.options.max_instructions = self.max_instructions;
                let report = device.launch(&module, "k", &self.launch, &args);
                let report = report.unwrap_or_else(|e| panic!("{e}\n{}", numbered(text)));
                let left = device.read::<u32>(output).expect("written by the host");
                check(&report, left, format!("{timing:?}, seed {seed}"));
            }
        }
    }
}
