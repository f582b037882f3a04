//! Cases beyond the table: what streams as short as its own, or inputs as tame, do not reach.

use infini_attn::Update;

use super::buffers::Asked;
use super::cases::{Case, Gate, NORMAL, RULES, Values};
use super::tensor_cases::Shape;

/// Four heads on one KV head, segments of 128 tokens, two calls: two segments, half of one.
fn base(name: &str, (dtype, dk, dv): Shape, update: Update) -> Case {
    Case::base(format!("{name}, {dtype} {dk}x{dv}"))
        .with(|b| b.heads(4).kv_heads(1).segment_len(128))
        .with(|b| b.dtype(dtype).key_dim(dk).value_dim(dv).update(update))
        .in_calls(&[256, 64])
}

/// Weights of the two branches, values and denominators at the ends of f32's range, which the element
/// type must have.
pub fn extremes(shape: Shape) -> [Case; 4] {
    let huge = Values { scale: [1.0; 3], shift: [0.0, 0.0, 1e9] };
    let tiny = Values { scale: [0.1; 3], shift: [0.0, -86.0, 0.0] };
    let none = Values { scale: [0.1; 3], shift: [0.0, -89.0, 0.0] };
    let case = |name, update, gate: &'static [f32], values| {
        let mut case = base(name, shape, update);
        (case.gate, case.values) = (Gate::Of(gate), values);
        case
    };
    [
        // The quotient of the branches' weights overflows.
        case("gates of 86", Update::Delta, &[86.0, -86.0, -86.0, 86.0], NORMAL),
        // Heads that share what they load, and one of a pair retrieves nothing.
        case("closed beside open", Update::Linear, &[f32::NEG_INFINITY, 0.0], huge),
        // Denominators that only a scaled row has, and none at all.
        case("keys of e^-86", Update::Delta, &[0.0], tiny),
        case("keys of 0", Update::Delta, &[0.0], none),
    ]
}

/// q, k and v of sizes that the element type has and products of which f32 has not: what is to come out
/// right nevertheless.
pub fn magnitudes(shape: Shape) -> Vec<Case> {
    // The local branch of keys and queries like these is beyond f32.
    let memory_alone = [[1e37, 1e19, 1.0], [1e37, 3e34, 1.0], [1.0, 3e35, 1e-3], [1e37, 1.0, 1.0]];
    let memory_alone = memory_alone.map(|scale| (scale, &[f32::INFINITY][..]));
    let tiny = [1.0, 1.0, 1e-30];
    let both = [
        (tiny, &[0.5, -1.0][..]),
        (tiny, &[-40.0, 40.0]),
        // A quotient of the branches' weights times values like these overflows.
        ([1.0, 1.0, 1e8], &[-84.0, -80.0, 84.0, 0.0]),
        ([1.0, 1.0, 1e30], &[-87.9, -60.0, 87.9, 0.0]),
    ];
    let case = |((scale, gate), update): (([f32; 3], &'static [f32]), Update)| {
        let mut case =
            base(&format!("magnitudes {scale:?}, gates {gate:?}, {update}"), shape, update);
        (case.gate, case.values) = (Gate::Of(gate), Values { scale, shift: [0.0; 3] });
        if gate == [f32::INFINITY] {
            case.asked = Asked { a_mem: true, ..Asked::NONE };
        }
        case
    };
    let sizes = memory_alone.into_iter().chain(both);
    sizes.flat_map(|size| RULES.map(|rule| case((size, rule)))).collect()
}

/// Segments so long that a cluster of blocks shares their update; the last finds a memory and comes
/// in two calls.
pub fn long_segments(shape: Shape) -> Case {
    let case = base("segments of 1024", shape, Update::Delta);
    case.with(|b| b.heads(1).segment_len(1024)).in_calls(&[1024, 300, 724])
}

/// Segments that end within a tile of tokens and come in two calls: behind the rows of the open
/// segment lies what nobody wrote, behind the new ones other tokens.
pub fn short_segments(shape: Shape) -> Case {
    let case = base("segments of 33", shape, Update::Delta);
    case.with(|b| b.heads(1).segment_len(33)).in_calls(&[43, 40, 5, 30])
}

impl Case {
    /// One sequence, in calls of so many tokens.
    fn in_calls(mut self, tokens: &[usize]) -> Self {
        self.calls = tokens.iter().map(|tokens| vec![*tokens]).collect();
        self
    }
}
