//! Groups of asynchronous copies of one lane: `cp.async` and bulk copies.
//!
//! A lane issues copies, bundles those issued since the last commit into a group, and waits until
//! at most the `n` most recent groups are pending. Groups complete in order of their commits.
//! What an operation is, and what completing it does, is the caller's.

use std::collections::VecDeque;

/// The copies of one lane that have not been waited for.
#[derive(Clone, Debug)]
pub struct AsyncQueue<T> {
    open: Vec<T>,
    groups: VecDeque<Group<T>>,
}

#[derive(Clone, Debug)]
struct Group<T> {
    operations: Vec<T>,
    /// A `.read` wait has covered this group: its sources may be overwritten.
    sources_read: bool,
}

impl<T> Default for AsyncQueue<T> {
    fn default() -> Self {
        Self { open: Vec::new(), groups: VecDeque::new() }
    }
}

impl<T> AsyncQueue<T> {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a copy to the group being formed.
    pub fn issue(&mut self, operation: T) {
        self.open.push(operation);
    }

    /// Closes the group being formed. An empty group counts as a group.
    pub fn commit(&mut self) {
        let operations = std::mem::take(&mut self.open);
        self.groups.push_back(Group { operations, sources_read: false });
    }

    /// Waits until at most the `n` most recent groups are pending: the copies to complete, oldest
    /// first. Copies not committed yet are not covered.
    pub fn wait(&mut self, n: usize) -> Vec<T> {
        let done = self.groups.len().saturating_sub(n);
        self.groups.drain(..done).flat_map(|group| group.operations).collect()
    }

    /// The `.read` form: the copies whose sources must be read now, oldest first, each reported
    /// once. Their groups stay pending until [`wait`](Self::wait) covers them.
    pub fn wait_read(&mut self, n: usize) -> impl Iterator<Item = &mut T> {
        let done = self.groups.len().saturating_sub(n);
        let covered = self.groups.iter_mut().take(done).filter(|group| !group.sources_read);
        covered.flat_map(|group| {
            group.sources_read = true;
            group.operations.iter_mut()
        })
    }

    /// Commits, then waits for every group.
    pub fn wait_all(&mut self) -> Vec<T> {
        self.commit();
        self.wait(0)
    }

    /// Takes every copy issued so far, committed or not, and keeps the (now empty) groups: what
    /// completes before a deferred arrive on an mbarrier, or when copies are run eagerly.
    pub fn complete_issued(&mut self) -> Vec<T> {
        let committed = self.groups.iter_mut().flat_map(|group| group.operations.drain(..));
        committed.chain(self.open.drain(..)).collect()
    }

    /// Groups committed and not waited for.
    pub fn pending_groups(&self) -> usize {
        self.groups.len()
    }

    /// Copies issued and not completed, committed or not.
    pub fn pending(&self) -> usize {
        self.open.len() + self.groups.iter().map(|group| group.operations.len()).sum::<usize>()
    }

    /// Copies issued and not committed.
    pub fn uncommitted(&self) -> usize {
        self.open.len()
    }
}

/// The groups of one lane, on the clock of its asynchronous actor.
#[derive(Clone, Debug)]
pub struct LaneGroups<T> {
    /// The copies themselves.
    pub queue: AsyncQueue<T>,
    clock: u32,
    /// The clock at the end of every group that is pending.
    ends: VecDeque<u32>,
}

impl<T> Default for LaneGroups<T> {
    fn default() -> Self {
        Self { queue: AsyncQueue::default(), clock: 0, ends: VecDeque::new() }
    }
}

impl<T> LaneGroups<T> {
    /// The time of copies issued now.
    pub fn now(&self) -> u32 {
        self.clock + 1
    }

    /// Lets time move on without closing a group; returns that of the copies so far.
    pub fn tick(&mut self) -> u32 {
        self.clock += 1;
        self.clock
    }

    /// Closes a group.
    pub fn commit(&mut self) {
        self.queue.commit();
        self.clock += 1;
        self.ends.push_back(self.clock);
    }

    /// The time up to which copies are complete once at most `n` groups are pending; None when
    /// there is nothing to wait for.
    pub fn reached(&self, n: usize) -> Option<u32> {
        let done = self.ends.len().saturating_sub(n);
        done.checked_sub(1).and_then(|i| self.ends.get(i)).copied()
    }

    /// Waits until at most `n` groups are pending: the copies to complete, in order.
    pub fn wait(&mut self, n: usize) -> Vec<T> {
        let done = self.ends.len().saturating_sub(n);
        self.ends.drain(..done);
        self.queue.wait(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> AsyncQueue<u32> {
        let mut queue = AsyncQueue::new();
        for group in 0..3 {
            queue.issue(2 * group);
            queue.issue(2 * group + 1);
            queue.commit();
        }
        queue
    }

    #[test]
    fn a_wait_leaves_the_most_recent_groups() {
        let mut queue = queue();
        assert!(queue.wait(3).is_empty());
        assert_eq!(queue.wait(1), [0, 1, 2, 3]);
        assert_eq!(queue.pending_groups(), 1);
        assert_eq!(queue.wait(0), [4, 5]);
        assert!(queue.wait(0).is_empty());
    }

    #[test]
    fn an_empty_group_is_a_group() {
        let mut queue = AsyncQueue::new();
        queue.issue(7);
        queue.commit();
        queue.commit();
        assert_eq!(queue.pending_groups(), 2);
        assert_eq!(queue.wait(1), [7]);
        assert_eq!(queue.pending_groups(), 1);
    }

    #[test]
    fn uncommitted_copies_need_wait_all() {
        let mut queue = queue();
        queue.issue(6);
        assert_eq!(queue.wait(0), [0, 1, 2, 3, 4, 5]);
        assert_eq!((queue.pending(), queue.uncommitted()), (1, 1));
        assert_eq!(queue.wait_all(), [6]);
        assert_eq!((queue.pending(), queue.pending_groups()), (0, 0));
    }

    #[test]
    fn a_read_wait_reports_each_source_once_and_completes_nothing() {
        let mut queue = queue();
        assert_eq!(queue.wait_read(2).map(|x| *x).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(queue.wait_read(1).map(|x| *x).collect::<Vec<_>>(), [2, 3]);
        assert_eq!((queue.pending(), queue.pending_groups()), (6, 3));
        assert_eq!(queue.wait(2), [0, 1]);
        assert_eq!(queue.wait_read(0).map(|x| *x).collect::<Vec<_>>(), [4, 5]);
    }

    #[test]
    fn completing_what_is_issued_keeps_the_groups() {
        let mut queue = queue();
        queue.issue(6);
        assert_eq!(queue.complete_issued(), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!((queue.pending(), queue.pending_groups()), (0, 3));
        queue.issue(7);
        queue.commit();
        assert!(queue.wait(1).is_empty());
        assert_eq!(queue.wait(0), [7]);
    }
}
