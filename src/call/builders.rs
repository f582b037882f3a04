//! The optional arguments of a call, which every memory's types take by the same methods.

/// Batch layout, slots and rotation, of a type with `lengths`, `slots` and `rope`.
macro_rules! input_builders {
    ($a:lifetime, $rope:ty) => {
        /// Padded batch: sequence b has `lens[b]` ≤ T tokens. Padded output rows are 0, their
        /// log-sum-exp is −∞.
        pub fn seq_lens(mut self, lens: &$a [i32]) -> Self {
            self.lengths = $crate::call::form::Lengths::Padded(lens);
            self
        }

        /// Batch padded on either side: sequence b is the tokens `ranges[b]` of its row, which need not
        /// begin at 0. The rest is as in [`Self::seq_lens`]; tokens before the range count in no
        /// position that continues from the state, and given positions go by place in the row.
        ///
        /// `&[2..7, 0..7, 0..4]`: two tokens of padding on the left, none, three on the right.
        pub fn seq_ranges(mut self, ranges: &$a [std::ops::Range<i32>]) -> Self {
            self.lengths = $crate::call::form::Lengths::Ranges(ranges);
            self
        }

        /// Packed batch: q, k, v are [total, H, D] and sequence b is tokens `cu[b]..cu[b + 1]`;
        /// `cu[0]` = 0 and the last entry is total.
        pub fn cu_seqlens(mut self, cu: &$a [i32]) -> Self {
            self.lengths = $crate::call::form::Lengths::Packed(cu);
            self
        }

        /// The state's slot of each sequence, all distinct. Without it sequence b uses slot b and the
        /// state must have exactly B slots.
        pub fn slots(mut self, slots: &$a [usize]) -> Self {
            self.slots = Some(slots);
            self
        }

        /// Rotates q and k in the local branch.
        pub fn rope(mut self, rope: $rope) -> Self {
            self.rope = Some(rope);
            self
        }
    };
}

/// Outputs beside o, of a type with `lse`, `a_dot` and `a_mem`.
macro_rules! output_builders {
    ($tensor:ty, $f32:ty) => {
        /// Also the local branch's log-sum-exp, f32 [B, Hq, T].
        pub fn lse(mut self, lse: $f32) -> Self {
            self.lse = Some(lse);
            self
        }

        /// Also the local branch A_dot, shaped like o.
        pub fn a_dot(mut self, a_dot: $tensor) -> Self {
            self.a_dot = Some(a_dot);
            self
        }

        /// Also the memory branch A_mem, shaped like o.
        pub fn a_mem(mut self, a_mem: $tensor) -> Self {
            self.a_mem = Some(a_mem);
            self
        }
    };
}

/// Pairing and table rows of a rotation, of a type with `interleaved` and `positions`.
macro_rules! rope_builders {
    ($a:lifetime) => {
        /// Pairs channel 2i with 2i + 1 instead of i with i + R/2.
        pub fn interleaved(mut self, interleaved: bool) -> Self {
            self.interleaved = interleaved;
            self
        }

        /// Explicit table rows: T of them (shared by all sequences) or B·T (row-major), packed: total.
        /// Checked when the call is made; entries of padded tokens are not read. The state's own
        /// position count is unaffected.
        pub fn positions(mut self, positions: &$a [i64]) -> Self {
            self.positions = $crate::call::form::Positions::Given(positions);
            self
        }
    };
}

pub(crate) use {input_builders, output_builders, rope_builders};
