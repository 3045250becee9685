//! Each property fails when the fault is planted that it is there for: it would notice.

use model::fairness::Reachable;
use model::{liveness, Fault, Setting};
use stateright::{Checker, HasDiscoveries, Model};

/// A property of safety that must fail.
fn breaks(setting: Setting, fault: Fault, name: &'static str) {
    let setting = setting.with(fault);
    let checker = setting
        .checker()
        .finish_when(HasDiscoveries::AllOf([name].into()));
    assert!(
        checker.spawn_bfs().join().discovery(name).is_some(),
        "{fault:?} does not break: {name}"
    );
    // stateright's path is some path: this one is a shortest.
    let property = setting.property(name);
    let way = Reachable::find(&setting, |world| !(property.condition)(&setting, world));
    println!(
        "{fault:?} breaks: {name}: {:?}",
        way.expect("it was found before")
    );
}

/// A promise that must fail: `None` for a loop that does not spin.
fn leaves_open(setting: Setting, fault: Fault, promise: Option<usize>) {
    let setting = setting.with(fault);
    let reachable = Reachable::explore(&setting, |_, _| {});
    let (name, run) = match promise {
        Some(number) => {
            let property = &liveness::PROPERTIES[number];
            (property.name, property.broken(&setting, &reachable))
        }
        None => ("the loop does not spin", liveness::spins(&reachable)),
    };
    let Some(run) = run else {
        panic!("{fault:?} does not break: {name}");
    };
    println!("{fault:?} breaks: {name}: {run}");
}

#[test]
fn each_fault_against_safety_is_found() {
    use Fault::*;
    breaks(Setting::CAP, CapOffByOne, "never more open than the cap");
    breaks(
        Setting::ONE,
        LeaksDescriptor,
        "descriptors are back when connections end",
    );
    breaks(
        Setting::ONE,
        CountsTwice,
        "accepted = open + closed, by one reason each",
    );
    breaks(
        Setting::ONE,
        ForgetsOnClose,
        "opened = on_close calls + handlers",
    );
    breaks(
        Setting::ONE,
        ClosingWithoutDeadline,
        "every connection has a deadline",
    );
    breaks(
        Setting::FDS,
        WaitsRegistered,
        "a listener that waits is not registered",
    );
    breaks(
        Setting::CAP,
        SpinsWhenFull,
        "only a listening listener tries accept",
    );
    breaks(
        Setting::FDS,
        PauseWithoutTimer,
        "a listener out of descriptors has a deadline",
    );
    breaks(
        Setting::CAP,
        ResumesWhenClosed,
        "closed is the end of a listener",
    );
    breaks(
        Setting::CAP,
        AcceptsWhenClosed,
        "a closed listener accepts nothing",
    );
    breaks(
        Setting::CAP,
        DrainForgetsBacklog,
        "a drain accepts the backlog first",
    );
    breaks(
        Setting::ONE,
        ClosingDelivers,
        "nothing is delivered after the close",
    );
    breaks(Setting::ONE, SilentLoss, "an orderly end loses nothing");
}

#[test]
fn each_fault_against_liveness_is_found() {
    use Fault::*;
    let (ends, waits, served) = (Some(0), Some(2), Some(3));
    leaves_open(Setting::ONE, ClosingWithoutDeadline, ends);
    leaves_open(Setting::ONE, TrickleMovesFrameDeadline, ends);
    leaves_open(Setting::ONE, OwnSendsMoveIdle, ends);
    leaves_open(Setting::ONE, DrainHasNoDeadline, Some(1));
    leaves_open(Setting::CAP, SlotDoesNotWake, waits);
    leaves_open(Setting::CAP, ReliesOnEdge, waits);
    leaves_open(Setting::FDS, PauseWithoutTimer, waits);
    leaves_open(Setting::CAP, SlotDoesNotWake, served);
    leaves_open(Setting::FDS, PauseWithoutTimer, served);
    leaves_open(Setting::CAP, SpinsWhenFull, None);
}
