//! In every state of the small worlds each property of safety holds, and from each state what is
//! promised happens at last.

use model::fairness::Reachable;
use model::{liveness, Setting};
use stateright::{Checker, Model};

#[test]
fn no_state_breaks_a_property() {
    for setting in Setting::SMALL {
        let checker = setting.checker().spawn_bfs().join();
        assert!(
            checker.is_done() && checker.unique_state_count() > 1_000,
            "{}",
            setting.name
        );
        checker.assert_properties();
    }
}

#[test]
fn no_fair_run_leaves_a_promise_open() {
    for setting in Setting::SMALL {
        let reachable = Reachable::explore(&setting, |_, _| {});
        for property in &liveness::PROPERTIES {
            if let Some(run) = property.broken(&setting, &reachable) {
                panic!("{}: not so: {}: {run}", setting.name, property.name);
            }
        }
        if let Some(run) = liveness::spins(&reachable) {
            panic!("{}: the loop spins: {run}", setting.name);
        }
    }
}
