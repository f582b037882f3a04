//! Decoding allocates nothing once it has run: neither in the calling thread nor in those of the pool.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use infini_attn::{
    Inputs, Outputs, Problem, Rope, State, TensorView, TensorViewMut, Update, decode,
};
use peak_alloc::PeakAlloc;

use crate::alone;
use crate::common::stream::{normals, rope_tables};

/// An allocator that also counts what threads that are watched ask for.
pub(crate) struct Counting(pub PeakAlloc);

static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if WATCHED.try_with(Cell::get).unwrap_or(false) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: `PeakAlloc`'s own, which hold what the trait asks for.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, here and below.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { self.0.realloc(ptr, layout, size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { self.0.dealloc(ptr, layout) }
    }
}

/// Streams that are decoded some tokens at a time.
struct Streams {
    state: State,
    tokens: usize,
    x: Vec<f32>,
    o: Vec<f32>,
    slots: Vec<usize>,
    tables: Option<(Vec<f32>, Vec<f32>)>,
}

const POSITIONS: usize = 4096;

impl Streams {
    fn new(p: &Problem, streams: usize, tokens: usize, rotates: bool) -> Self {
        let len = streams * tokens * p.heads() * p.key_dim();
        Self {
            state: State::new(p, streams).expect("room"),
            tokens,
            x: normals(1, len),
            o: vec![0.0; len],
            slots: (0..streams).rev().collect(),
            tables: rotates.then(|| rope_tables(POSITIONS, 64, 1.0)),
        }
    }

    fn step(&mut self) {
        let p = *self.state.problem();
        let shape = |heads: usize| [self.slots.len(), self.tokens, heads, p.key_dim()];
        let view = |heads: usize| {
            let shape = shape(heads);
            TensorView::new(&self.x[..shape.iter().product()], &shape).expect("sized")
        };
        let mut inputs = Inputs::new(view(p.heads()), view(p.kv_heads()), view(p.kv_heads()));
        if let Some((cos, sin)) = &self.tables {
            let table = |x| TensorView::new(x, &[POSITIONS, 32]).expect("sized");
            inputs = inputs.rope(Rope::new(table(cos), table(sin)));
        }
        let [_, tokens, heads, dim] = shape(p.heads()).map(|extent| extent as i64);
        let strides = [tokens * heads * dim, heads * dim, dim, 1];
        let o = TensorViewMut::strided(&mut self.o, 0, &shape(p.heads()), &strides).expect("o");
        let inputs = inputs.slots(&self.slots);
        decode(&p, &inputs, &[0.0; 4], &mut self.state, Outputs::new(o)).expect("valid");
    }
}

/// Allocations of so many steps.
fn counted(steps: usize, mut step: impl FnMut()) -> usize {
    let before = COUNT.load(Ordering::Relaxed);
    (0..steps).for_each(|_| step());
    COUNT.load(Ordering::Relaxed) - before
}

const N: usize = 32;

fn problem(update: Update) -> Problem {
    let builder = Problem::builder().heads(4).kv_heads(2).head_dim(64).segment_len(N);
    builder.update(update).build().expect("valid")
}

/// Two threads that have computed everything once, all of it watched.
fn watched_pool() -> rayon::ThreadPool {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(2);
    let pool = builder.start_handler(|_| WATCHED.set(true)).build().expect("a pool");
    // Little work: each thread does it itself, and gets what `gemm` keeps per thread.
    pool.broadcast(|_| {
        let mut one = Streams::new(&problem(Update::Delta), 1, 1, true);
        assert!(one.state.decodes_inline(1));
        (0..2 * N).for_each(|_| one.step());
    });
    pool
}

#[test]
fn a_decode_allocates_nothing() {
    let _alone = alone();
    let pool = watched_pool();
    for update in [Update::Linear, Update::Delta] {
        for (streams, tokens) in [(1, 1), (8, 1), (64, 1)] {
            for rotates in [false, true] {
                let mut all = Streams::new(&problem(update), streams, tokens, rotates);
                let case = format!("{update}, {streams} × {tokens}, rotation: {rotates}");
                pool.install(|| {
                    // A segment without its last token, then that with the commit, then both again.
                    let steps = N / tokens - 1;
                    (0..2 * (steps + 1)).for_each(|_| all.step());
                    assert_eq!(counted(steps, || all.step()), 0, "{case}");
                    assert_eq!(counted(1, || all.step()), 0, "{case}: commit");
                    assert_eq!(counted(steps + 1, || all.step()), 0, "{case}: again");
                });
            }
        }
    }
}

/// From a thread outside the pool rayon queues jobs in blocks of 63, and allocates those.
#[test]
fn from_outside_only_the_queue_of_the_pool_grows() {
    let _alone = alone();
    WATCHED.set(true);
    let pool = watched_pool();
    let mut all = Streams::new(&problem(Update::Delta), 64, 1, false);
    let mut step = || pool.install(|| all.step());
    (0..2 * N).for_each(|_| step());
    let steps = 5 * 63;
    let blocks = counted(steps, step);
    assert!(blocks <= steps / 63 + 1, "{blocks} allocations in {steps} steps");
    WATCHED.set(false);
}
