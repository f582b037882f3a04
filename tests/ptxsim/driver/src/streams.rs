//! Streams, events, capture and graphs.

use std::thread::{self, ThreadId};
use std::time::Instant;

use crate::error::{
    CAPTURE_INVALIDATED, CAPTURE_ISOLATION, CAPTURE_UNSUPPORTED, CAPTURED_EVENT, ILLEGAL_STATE,
    INVALID_HANDLE, Result,
};
use crate::kernels::Call;
use crate::machine::{Machine, Owned, refused};

/// What a stream does, or a graph holds.
#[derive(Clone, Debug)]
pub enum Op {
    Launch(Call),
    Fill { to: u64, bytes: u64, value: u8 },
    Copy { to: u64, from: u64, bytes: u64 },
}

/// Which stream a handle names.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum StreamId {
    /// The legacy default stream of a context: 0 and 1.
    Legacy { context: usize },
    /// The default stream of a thread in a context: 2.
    Thread { context: usize, thread: ThreadId },
    /// One that a program has created.
    Created(usize),
}

/// What a stream keeps while it captures.
pub struct Capture {
    id: usize,
    ops: Vec<Op>,
    valid: bool,
}

#[derive(Default)]
pub struct Event {
    recorded: Option<Instant>,
    /// The capture it was recorded in.
    capture: Option<usize>,
}

impl Machine {
    pub fn new_stream(&mut self) -> Result<usize> {
        let context = self.current()?;
        let handle = self.handle();
        self.streams.insert(StreamId::Created(handle), Owned { context, value: None });
        Ok(handle)
    }

    pub fn end_stream(&mut self, stream: usize) -> Result {
        let ended = self.streams.remove(&StreamId::Created(stream));
        ended.map(drop).ok_or(INVALID_HANDLE)
    }

    /// A stream in whose context everything goes on, the default ones being those of the current
    /// context and thread.
    fn stream(&mut self, handle: usize) -> Result<&mut Owned<Option<Capture>>> {
        let id = match handle {
            0 | 1 => StreamId::Legacy { context: self.contexts.current()? },
            2 => {
                let thread = thread::current().id();
                StreamId::Thread { context: self.contexts.current()?, thread }
            }
            _ => StreamId::Created(handle),
        };
        if let StreamId::Legacy { context } | StreamId::Thread { context, .. } = id {
            self.streams.entry(id).or_insert(Owned { context, value: None });
        }
        let stream = self.streams.get_mut(&id).ok_or(INVALID_HANDLE)?;
        self.contexts.status(stream.context)?;
        Ok(stream)
    }

    /// Work that a capture keeps.
    pub fn submit(&mut self, stream: usize, op: Op) -> Result {
        let context = self.stream(stream)?.context;
        if let Op::Launch(call) = &op {
            self.check_call(call, context)?;
        }
        match &mut self.stream(stream)?.value {
            Some(capture) if !capture.valid => Err(CAPTURE_INVALIDATED),
            Some(capture) => {
                capture.ops.push(op);
                Ok(())
            }
            None => self.perform(&op, context),
        }
    }

    fn perform(&mut self, op: &Op, context: usize) -> Result {
        match op {
            Op::Fill { to, bytes, value } => self.device.fill(*to, *bytes, *value).map_err(refused),
            Op::Copy { to, from, bytes } => self.device.copy(*to, *from, *bytes).map_err(refused),
            Op::Launch(call) => self.launch(call, context),
        }
    }

    /// Before what no capture can hold, which ends it.
    pub fn outside_capture(&mut self, stream: usize) -> Result {
        match &mut self.stream(stream)?.value {
            Some(capture) => {
                capture.valid = false;
                Err(CAPTURE_UNSUPPORTED)
            }
            None => Ok(()),
        }
    }

    /// 0: none; 1: active; 2: invalidated.
    pub fn capture_status(&mut self, stream: usize) -> Result<u32> {
        Ok(match &self.stream(stream)?.value {
            None => 0,
            Some(capture) if capture.valid => 1,
            Some(_) => 2,
        })
    }

    pub fn begin_capture(&mut self, stream: usize) -> Result {
        if stream <= 1 {
            return Err(CAPTURE_UNSUPPORTED);
        }
        let id = self.handle();
        match &mut self.stream(stream)?.value {
            Some(_) => Err(ILLEGAL_STATE),
            none => {
                *none = Some(Capture { id, ops: vec![], valid: true });
                Ok(())
            }
        }
    }

    pub fn end_capture(&mut self, stream: usize) -> Result<usize> {
        let capture = self.stream(stream)?.value.take().ok_or(ILLEGAL_STATE)?;
        if !capture.valid {
            return Err(CAPTURE_INVALIDATED);
        }
        Ok(self.new_graph(capture.ops))
    }

    // ---- events

    pub fn new_event(&mut self) -> Result<usize> {
        let context = self.current()?;
        let handle = self.handle();
        self.events.insert(handle, Owned { context, value: Event::default() });
        Ok(handle)
    }

    pub fn end_event(&mut self, event: usize) -> Result {
        self.events.remove(&event).map(drop).ok_or(INVALID_HANDLE)
    }

    pub fn record(&mut self, event: usize, stream: usize) -> Result {
        let stream = self.stream(stream)?;
        let (context, capture) = (stream.context, stream.value.as_ref().map(|capture| capture.id));
        let event = self.events.get_mut(&event).filter(|event| event.context == context);
        event.ok_or(INVALID_HANDLE)?.value = Event { recorded: Some(Instant::now()), capture };
        Ok(())
    }

    /// A capture can wait for its own events only, and nothing else for those.
    pub fn wait(&mut self, stream: usize, event: usize) -> Result {
        let event = &self.events.get(&event).ok_or(INVALID_HANDLE)?.value;
        let (recorded, source) = (event.recorded.is_some(), event.capture);
        match &mut self.stream(stream)?.value {
            Some(capture) if recorded && source != Some(capture.id) => {
                capture.valid = false;
                Err(CAPTURE_ISOLATION)
            }
            None if source.is_some() => Err(CAPTURE_UNSUPPORTED),
            _ => Ok(()),
        }
    }

    /// When the event was reached; none for one that was not recorded.
    pub fn reached(&self, event: usize) -> Result<Option<Instant>> {
        let event = self.events.get(&event).ok_or(INVALID_HANDLE)?;
        self.contexts.status(event.context)?;
        if event.value.capture.is_some() { Err(CAPTURED_EVENT) } else { Ok(event.value.recorded) }
    }

    // ---- graphs

    fn new_graph(&mut self, ops: Vec<Op>) -> usize {
        let handle = self.handle();
        self.graphs.insert(handle, ops);
        handle
    }

    pub fn instantiate(&mut self, graph: usize) -> Result<usize> {
        let ops = self.graphs.get(&graph).ok_or(INVALID_HANDLE)?.clone();
        Ok(self.new_graph(ops))
    }

    pub fn end_graph(&mut self, graph: usize) -> Result {
        self.graphs.remove(&graph).map(drop).ok_or(INVALID_HANDLE)
    }

    pub fn replay(&mut self, graph: usize, stream: usize) -> Result {
        let ops = self.graphs.get(&graph).ok_or(INVALID_HANDLE)?.clone();
        ops.into_iter().try_for_each(|op| self.submit(stream, op))
    }
}
