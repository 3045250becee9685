//! The search for runs without end, on graphs of a few states, where the answer is known.

use model::fairness::{Promise, Reachable};
use stateright::Model;

/// A graph: from, to, and the class of the step, if it is one that is taken at last.
struct Toy(&'static [(u8, u8, Option<u32>)]);

impl Model for Toy {
    type State = u8;
    type Action = (u8, u8, Option<u32>);

    fn init_states(&self) -> Vec<u8> {
        vec![0]
    }

    fn actions(&self, state: &u8, actions: &mut Vec<Self::Action>) {
        actions.extend(self.0.iter().filter(|(from, _, _)| from == state));
    }

    fn next_state(&self, _: &u8, (_, to, _): Self::Action) -> Option<u8> {
        Some(to)
    }
}

/// Whether a fair run stays below state 9 for ever.
fn stays(steps: &'static [(u8, u8, Option<u32>)]) -> bool {
    let reachable = Reachable::explore(&Toy(steps), |_, _| {});
    let promise = Promise {
        open: &|state| *state < 9,
        finite: &|_| false,
        class: &|(_, _, class): &(u8, u8, Option<u32>)| *class,
    };
    reachable.broken(&promise).is_some()
}

#[test]
fn what_is_owed_is_taken() {
    assert!(!stays(&[(0, 9, Some(1))]));
    // A way out that nothing owes.
    assert!(stays(&[(0, 9, None)]));
    // Going round does not excuse from a step that is possible all the time.
    assert!(!stays(&[
        (0, 1, None),
        (1, 0, None),
        (0, 9, Some(1)),
        (1, 9, Some(1))
    ]));
    // One that is possible only now and then may be missed: fairness is weak.
    assert!(stays(&[(0, 1, None), (1, 0, None), (0, 9, Some(1))]));
}

#[test]
fn a_step_of_the_same_class_inside_the_cycle_counts() {
    assert!(stays(&[(0, 0, Some(1)), (0, 9, Some(1))]));
    // Two classes take turns, and each is taken.
    assert!(stays(&[(0, 1, Some(1)), (1, 0, Some(2)), (0, 9, Some(2))]));
    // The second of them leads out only.
    assert!(!stays(&[
        (0, 1, Some(1)),
        (1, 0, Some(1)),
        (0, 9, Some(2)),
        (1, 9, Some(2))
    ]));
}

#[test]
fn an_end_before_the_goal_is_a_run_as_well() {
    assert!(stays(&[(0, 1, Some(1))]));
    assert!(!stays(&[(0, 1, Some(1)), (1, 9, Some(1))]));
}

#[test]
fn a_lasso_says_the_way_and_the_cycle() {
    let steps = &[
        (0, 1, Some(1)),
        (1, 2, Some(1)),
        (2, 1, Some(2)),
        (1, 9, None),
    ];
    let reachable = Reachable::explore(&Toy(steps), |_, _| {});
    let promise = Promise {
        open: &|state| *state < 9,
        finite: &|_| false,
        class: &|(_, _, class): &(u8, u8, Option<u32>)| *class,
    };
    let run = reachable.broken(&promise).expect("it goes round");
    assert_eq!(run.way, [steps[0]]);
    assert_eq!(run.cycle, [steps[1], steps[2]]);
    assert_eq!(
        run.to_string(),
        "(0, 1, Some(1)); then for ever: (1, 2, Some(1)), (2, 1, Some(2))"
    );
}
