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
