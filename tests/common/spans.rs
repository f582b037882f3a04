//! A subscriber of the crate `tracing` that keeps what the crate tells it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// A span or an event: its name (an event's is its level's), and its fields as text.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    pub name: String,
    pub fields: BTreeMap<String, String>,
}

impl Recorded {
    /// A field that is there.
    #[track_caller]
    pub fn field(&self, name: &str) -> &str {
        self.fields.get(name).unwrap_or_else(|| panic!("no {name}: {self:?}"))
    }
}

impl Visit for Recorded {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

/// Spans by their number, and events among them; and the spans that this thread is in.
#[derive(Default)]
struct Keeper {
    kept: Arc<Mutex<Vec<Recorded>>>,
    inside: Mutex<Vec<u64>>,
    level: Option<Level>,
}

impl Keeper {
    fn keep(&self, name: &str, visit: impl FnOnce(&mut Recorded)) -> u64 {
        let mut record = Recorded { name: name.to_owned(), fields: BTreeMap::new() };
        visit(&mut record);
        let mut kept = self.kept.lock().expect("no panic");
        kept.push(record);
        kept.len() as u64
    }
}

impl Subscriber for Keeper {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("infini_attn")
            && self.level.is_some_and(|most| *metadata.level() <= most)
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        Id::from_u64(self.keep(span.metadata().name(), |record| span.record(record)))
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        let mut kept = self.kept.lock().expect("no panic");
        values.record(&mut kept[span.into_u64() as usize - 1]);
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        self.keep(event.metadata().level().as_str(), |record| event.record(record));
    }

    fn enter(&self, span: &Id) {
        self.inside.lock().expect("no panic").push(span.into_u64());
    }

    fn exit(&self, span: &Id) {
        let left = self.inside.lock().expect("no panic").pop();
        assert_eq!(left, Some(span.into_u64()), "left in another order than entered");
    }
}

/// What `work` tells up to a level, in order.
pub fn recorded(level: Level, work: impl FnOnce()) -> Vec<Recorded> {
    let keeper = Keeper { level: Some(level), ..Keeper::default() };
    let kept = keeper.kept.clone();
    // With one subscriber alone, a place in the code that another thread is the first to reach would be
    // asked about there, where there is none, and stay silent.
    let _second = tracing::Dispatch::new(Keeper::default());
    tracing::subscriber::with_default(keeper, work);
    let kept = kept.lock().expect("no panic");
    kept.clone()
}
