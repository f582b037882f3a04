//! The mbarrier object: phases, pending arrivals and outstanding bytes.
//!
//! A phase completes when no arrival is pending and the transaction count is zero. Beyond what
//! hardware keeps, the model remembers in which phase asynchronous work was issued and whether
//! somebody observed the last completed phase, because hardware cannot report either mistake.

use std::fmt;

use thiserror::Error;

/// Largest arrival count, and largest magnitude of the transaction count.
pub const MAX_COUNT: u32 = (1 << 20) - 1;

/// Marks the tokens handed out by arrivals, so that other values are refused.
const TOKEN_TAG: u64 = 0x6d62 << 48;
const TOKEN_TAG_MASK: u64 = 0xffff << 48;

/// Misuse of an mbarrier.
#[derive(Clone, Debug, Error, Eq, PartialEq)]
pub enum MbarrierError {
    /// `mbarrier.init` with a count the object cannot hold.
    #[error("mbarrier initialised with count {count}; 1 to {MAX_COUNT} are possible")]
    Count {
        /// The count given.
        count: u64,
    },
    /// `mbarrier.init` on an object that is in use.
    #[error("mbarrier initialised with count {count} while live ({state}); invalidate it first")]
    Live {
        /// The count given.
        count: u64,
        /// The state of the live object.
        state: String,
    },
    /// An ordinary load or store touched the object.
    #[error("ordinary access of {bytes} bytes to a live mbarrier ({state})")]
    OrdinaryAccess {
        /// Size of the access.
        bytes: u32,
        /// The state of the object.
        state: String,
    },
    /// More arrivals than pending.
    #[error("arrive of {count} in phase {phase}, but only {pending} arrivals are pending")]
    Underflow {
        /// Arrivals made.
        count: u32,
        /// Arrivals pending.
        pending: u32,
        /// The phase.
        phase: u64,
    },
    /// An arrival count of zero or beyond the range.
    #[error("arrive with count {count}; 1 to {MAX_COUNT} are possible")]
    ArriveCount {
        /// The count given.
        count: u32,
    },
    /// A deferred arrive raised the pending count beyond the range.
    #[error("pending count raised to {pending}; at most {MAX_COUNT} is possible")]
    PendingRange {
        /// The count it would have.
        pending: u64,
    },
    /// The transaction count left its range.
    #[error("transaction count becomes {tx} in phase {phase}; at most {MAX_COUNT} either way")]
    TxRange {
        /// The count it would have.
        tx: i64,
        /// The phase.
        phase: u64,
    },
    /// All arrived, and more bytes were delivered than expected.
    #[error("phase {phase}: all arrived, but {excess} more bytes were delivered than expected")]
    OverDelivery {
        /// Bytes beyond the expectation.
        excess: u64,
        /// The phase.
        phase: u64,
    },
    /// Bytes landed in another phase than they were issued for.
    #[error("{bytes} bytes issued for phase {issued} landed in phase {landed}")]
    BytesInOtherPhase {
        /// Bytes of the copy.
        bytes: u64,
        /// The phase when it was issued.
        issued: u64,
        /// The phase when it completed.
        landed: u64,
    },
    /// A deferred arrive was triggered in another phase than it was issued for.
    #[error("deferred arrive issued for phase {issued} was triggered in phase {landed}")]
    ArriveInOtherPhase {
        /// The phase when it was issued.
        issued: u64,
        /// The phase when it was triggered.
        landed: u64,
    },
    /// An arrive although nobody has seen the previous phase complete.
    #[error("arrive in phase {phase}, but no wait has observed that phase {completed} completed")]
    Unobserved {
        /// The current phase.
        phase: u64,
        /// The completed phase nobody waited on.
        completed: u64,
    },
    /// A parity wait for a phase too far back to be told from a later one.
    #[error(
        "wait with parity {parity} means phase {meant}, but the barrier is in phase {current}: \
         the parity aliases with phase {aliased}"
    )]
    Aliased {
        /// The parity waited for.
        parity: u32,
        /// The phase the caller must mean by what it knows.
        meant: u64,
        /// The current phase.
        current: u64,
        /// The phase the parity stands for now.
        aliased: u64,
    },
    /// A state token of a phase that can no longer be waited on.
    #[error("wait on the token of phase {token}, but the barrier is in phase {current}")]
    StaleToken {
        /// The phase of the token.
        token: u64,
        /// The current phase.
        current: u64,
    },
    /// A value that no arrive on this object has returned.
    #[error("{token:#x} is not a state returned by an arrive (the barrier is in phase {current})")]
    ForeignToken {
        /// The value given.
        token: u64,
        /// The current phase.
        current: u64,
    },
    /// `mbarrier.inval`, or the end of the block, with asynchronous work outstanding.
    #[error("the mbarrier still has {bytes} bytes and {arrivals} deferred arrivals in flight")]
    Busy {
        /// Bytes issued and not landed.
        bytes: u64,
        /// Deferred arrivals not triggered.
        arrivals: u64,
    },
    /// The same before anybody has waited for the asynchronous work of a phase.
    #[error("no wait has observed the asynchronous work of the mbarrier's phase {phase}")]
    Unwaited {
        /// The phase the work was issued for.
        phase: u64,
    },
}

/// What an arrive did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[must_use]
pub struct Arrival {
    /// The state before the arrive, as the instruction returns it.
    pub token: u64,
    /// The phase this arrive completed, if it did.
    pub completed: Option<u64>,
}

/// An arrive that waits for earlier `cp.async` copies of its thread.
#[derive(Debug, Eq, PartialEq)]
#[must_use]
pub struct Deferred {
    phase: u64,
}

/// A live mbarrier.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mbarrier {
    phase: u64,
    expected: u32,
    pending: u32,
    tx: i64,
    /// Somebody saw phase `phase - 1` complete.
    observed: bool,
    bytes_in_flight: u64,
    arrivals_in_flight: u64,
    /// The last phase asynchronous work was issued for.
    busy_phase: Option<u64>,
}

impl Mbarrier {
    /// `mbarrier.init`.
    pub fn init(count: u64) -> Result<Self, MbarrierError> {
        if count == 0 || count > u64::from(MAX_COUNT) {
            return Err(MbarrierError::Count { count });
        }
        let count = count as u32;
        Ok(Self {
            phase: 0,
            expected: count,
            pending: count,
            tx: 0,
            observed: true,
            bytes_in_flight: 0,
            arrivals_in_flight: 0,
            busy_phase: None,
        })
    }

    /// The error of a second `mbarrier.init` on this live object.
    pub fn reinit_error(&self, count: u64) -> MbarrierError {
        MbarrierError::Live { count, state: self.to_string() }
    }

    /// The error of an ordinary access to this live object.
    pub fn access_error(&self, bytes: u32) -> MbarrierError {
        MbarrierError::OrdinaryAccess { bytes, state: self.to_string() }
    }

    /// `mbarrier.inval`, or the end of the block: whether asynchronous work still refers to it.
    pub fn inval(&self) -> Result<(), MbarrierError> {
        let (bytes, arrivals) = (self.bytes_in_flight, self.arrivals_in_flight);
        if bytes > 0 || arrivals > 0 {
            return Err(MbarrierError::Busy { bytes, arrivals });
        }
        // The work may be complete; who invalidates cannot know without a wait.
        let unwaited = |p: &u64| *p == self.phase || !self.observed && p + 1 == self.phase;
        match self.busy_phase.filter(unwaited) {
            Some(phase) => Err(MbarrierError::Unwaited { phase }),
            None => Ok(()),
        }
    }

    /// `mbarrier.arrive` with a count.
    pub fn arrive(&mut self, count: u32) -> Result<Arrival, MbarrierError> {
        self.check_arrive(count)?;
        let token = self.state();
        self.pending -= count;
        Ok(Arrival { token, completed: self.advance()? })
    }

    /// `mbarrier.arrive_drop`: arrives and leaves the following phases.
    pub fn arrive_drop(&mut self, count: u32) -> Result<Arrival, MbarrierError> {
        self.check_arrive(count)?;
        if count > self.expected {
            let (pending, phase) = (self.expected, self.phase);
            return Err(MbarrierError::Underflow { count, pending, phase });
        }
        self.expected -= count;
        self.arrive(count)
    }

    /// `mbarrier.expect_tx`.
    pub fn expect_tx(&mut self, bytes: u32) -> Result<(), MbarrierError> {
        self.add_tx(i64::from(bytes))
    }

    /// `mbarrier.arrive.expect_tx`.
    pub fn arrive_expect_tx(&mut self, count: u32, bytes: u32) -> Result<Arrival, MbarrierError> {
        self.check_arrive(count)?;
        self.expect_tx(bytes)?;
        self.arrive(count)
    }

    /// An asynchronous copy that will deliver `bytes` here was issued: the phase to land in.
    pub fn issue_tx(&mut self, bytes: u64) -> u64 {
        self.bytes_in_flight += bytes;
        self.busy_phase = Some(self.phase);
        self.phase
    }

    /// The copy issued in `issued_phase` (see [`issue_tx`](Self::issue_tx)) has completed. Returns
    /// the phase this completed, if it did.
    pub fn complete_tx(
        &mut self,
        bytes: u64,
        issued_phase: u64,
    ) -> Result<Option<u64>, MbarrierError> {
        self.bytes_in_flight = self.bytes_in_flight.saturating_sub(bytes);
        if issued_phase != self.phase {
            let (issued, landed) = (issued_phase, self.phase);
            return Err(MbarrierError::BytesInOtherPhase { bytes, issued, landed });
        }
        self.deliver(bytes)
    }

    /// The instruction `mbarrier.complete_tx`, which stands for no copy.
    pub fn simulate_complete_tx(&mut self, bytes: u32) -> Result<Option<u64>, MbarrierError> {
        self.deliver(u64::from(bytes))
    }

    /// `cp.async.mbarrier.arrive`: an arrive once the thread's earlier copies are complete. Without
    /// `noinc` the pending count is raised by one first.
    pub fn defer_arrive(&mut self, noinc: bool) -> Result<Deferred, MbarrierError> {
        if !noinc {
            if self.pending == MAX_COUNT {
                return Err(MbarrierError::PendingRange { pending: u64::from(self.pending) + 1 });
            }
            self.pending += 1;
        }
        self.arrivals_in_flight += 1;
        self.busy_phase = Some(self.phase);
        Ok(Deferred { phase: self.phase })
    }

    /// The copies before a deferred arrive are complete.
    pub fn trigger(&mut self, arrive: Deferred) -> Result<Arrival, MbarrierError> {
        self.arrivals_in_flight = self.arrivals_in_flight.saturating_sub(1);
        if arrive.phase != self.phase {
            let (issued, landed) = (arrive.phase, self.phase);
            return Err(MbarrierError::ArriveInOtherPhase { issued, landed });
        }
        self.arrive(1)
    }

    /// Whether the phase of this parity has completed (`test_wait.parity`).
    ///
    /// `known` is the last phase the caller knows to be complete: by its own waits, or because
    /// another thread's wait happens before. A wait that may mean a phase before the previous one
    /// is an error. Without any knowledge nothing can be said, and nothing is reported.
    pub fn parity_complete(&self, parity: u32, known: Option<u64>) -> Result<bool, MbarrierError> {
        let parity = parity & 1;
        let current_parity = (self.phase & 1) as u32;
        let complete = current_parity != parity;
        if let Some(known) = known {
            let meant = if (known & 1) as u32 == parity { known } else { known + 1 };
            if meant + 1 < self.phase {
                let aliased = if complete { self.phase - 1 } else { self.phase };
                let current = self.phase;
                return Err(MbarrierError::Aliased { parity, meant, current, aliased });
            }
        }
        Ok(complete)
    }

    /// The state as `mbarrier.arrive` returns it: only good for [`token_complete`](Self::token_complete).
    pub fn state(&self) -> u64 {
        TOKEN_TAG | (self.phase & !TOKEN_TAG_MASK)
    }

    /// Whether the phase of a token has completed (`test_wait` without parity).
    pub fn token_complete(&self, token: u64) -> Result<bool, MbarrierError> {
        let (phase, current) = (token & !TOKEN_TAG_MASK, self.phase);
        if token & TOKEN_TAG_MASK != TOKEN_TAG || phase > current {
            return Err(MbarrierError::ForeignToken { token, current });
        }
        if phase + 1 < current {
            return Err(MbarrierError::StaleToken { token: phase, current });
        }
        Ok(phase < current)
    }

    /// A wait returned true: the last completed phase, if there is one, counts as observed. The
    /// caller keeps the returned phase as what it knows.
    pub fn observe(&mut self) -> Option<u64> {
        self.observed = true;
        self.phase.checked_sub(1)
    }

    /// The current phase, counted from 0 at `init`.
    pub fn phase(&self) -> u64 {
        self.phase
    }

    /// Arrivals the current phase still needs.
    pub fn pending(&self) -> u32 {
        self.pending
    }

    /// Arrivals each phase needs.
    pub fn expected(&self) -> u32 {
        self.expected
    }

    /// Bytes expected minus bytes delivered in the current phase.
    pub fn tx(&self) -> i64 {
        self.tx
    }

    fn check_arrive(&self, count: u32) -> Result<(), MbarrierError> {
        let (pending, phase) = (self.pending, self.phase);
        if count == 0 || count > MAX_COUNT {
            return Err(MbarrierError::ArriveCount { count });
        }
        if count > pending {
            return Err(MbarrierError::Underflow { count, pending, phase });
        }
        if !self.observed {
            return Err(MbarrierError::Unobserved { phase, completed: phase - 1 });
        }
        Ok(())
    }

    fn add_tx(&mut self, bytes: i64) -> Result<(), MbarrierError> {
        let tx = self.tx.saturating_add(bytes);
        if tx.unsigned_abs() > u64::from(MAX_COUNT) {
            return Err(MbarrierError::TxRange { tx, phase: self.phase });
        }
        self.tx = tx;
        Ok(())
    }

    fn deliver(&mut self, bytes: u64) -> Result<Option<u64>, MbarrierError> {
        self.add_tx(-i64::try_from(bytes).unwrap_or(i64::MAX))?;
        self.advance()
    }

    /// Completes the phase if nothing is missing.
    fn advance(&mut self) -> Result<Option<u64>, MbarrierError> {
        if self.pending > 0 || self.tx > 0 {
            return Ok(None);
        }
        if self.tx < 0 {
            let (excess, phase) = (self.tx.unsigned_abs(), self.phase);
            return Err(MbarrierError::OverDelivery { excess, phase });
        }
        let completed = self.phase;
        self.phase += 1;
        self.pending = self.expected;
        self.observed = false;
        Ok(Some(completed))
    }
}

impl fmt::Display for Mbarrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "phase {}, pending {} of {}, tx {}",
            self.phase, self.pending, self.expected, self.tx
        )
    }
}

#[cfg(test)]
mod tests;
