//! Which shards a command is for, and one answer of several.

use std::sync::Arc;

use super::queue::{Command, Job, Shared};
use super::{Handle, HandleError};
use crate::handler::Control;
use crate::id::ConnId;
use crate::stats::Stats;

impl<A> Handle<A> {
    /// Queues `job` for each shard, as the command that `command` makes.
    pub(super) fn push_each(
        &self,
        job: impl Fn(usize, &mut A, &mut Control<'_, A>) + Send + Sync + 'static,
        command: fn(Job<A>) -> Command<A>,
    ) -> Result<(), HandleError> {
        let job = Arc::new(job);
        self.each(|shard, server| {
            let job = Arc::clone(&job);
            let job = move |app: &mut A, control: &mut Control<'_, A>| job(shard, app, control);
            server.push(command(Box::new(job)))
        })
    }

    pub(super) fn one(&self) -> Result<&Shared<A>, HandleError> {
        match &*self.shards {
            [server] => Ok(server),
            _ => Err(HandleError::ManyShards),
        }
    }

    /// Returns the server whose connection it is, if it is alive.
    pub(super) fn live(&self, id: ConnId) -> Result<&Shared<A>, HandleError> {
        match self.shards.iter().find(|server| server.owns(id)) {
            Some(server) if server.is_closed() => Err(HandleError::ServerGone),
            Some(server) if server.is_live(id) => Ok(server),
            None if self.shards.iter().all(|server| server.is_closed()) => {
                Err(HandleError::ServerGone)
            }
            _ => Err(HandleError::NoConnection(id)),
        }
    }

    /// Calls `act` for every shard, and returns the first failure. Shards that have gone are no
    /// failure, unless all have.
    pub(super) fn each(
        &self,
        mut act: impl FnMut(usize, &Shared<A>) -> Result<(), HandleError>,
    ) -> Result<(), HandleError> {
        let mut failure = Some(HandleError::ServerGone);
        for (shard, server) in self.shards.iter().enumerate() {
            match (act(shard, server), &failure) {
                (Ok(()), Some(HandleError::ServerGone)) => failure = None,
                (Err(HandleError::ServerGone), _) | (Ok(()), _) => {}
                (Err(error), None | Some(HandleError::ServerGone)) => failure = Some(error),
                (Err(_), Some(_)) => {}
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// The cap of all shards; no limit for one server: its listeners need no sum.
    pub(super) fn cap(&self) -> usize {
        self.common_cap.as_ref().map_or(usize::MAX, |cap| cap.get())
    }

    pub(super) fn sum(&self, all: impl IntoIterator<Item = Stats>) -> Stats {
        let mut all = all.into_iter();
        let mut sum = all.next().unwrap_or_default();
        let Some(cap) = &self.common_cap else {
            return sum;
        };
        let mut largest = sum.peak;
        for stats in all {
            largest = largest.max(stats.peak);
            sum.add(&stats);
        }
        sum.max_connections = cap.get();
        sum.peak = sum.peak.min(sum.max_connections.max(largest));
        sum
    }
}
