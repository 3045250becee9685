//! Runs without end, under weak fairness.
//!
//! stateright's `eventually` follows paths to their ends and knows no cycles. A promise is broken
//! by a run without end,
//! though: it comes to states from which the same steps go round for ever, and the promise stays
//! open in all of them. Such
//! a run exists if, and only if, the reachable states in which the promise is open have a strongly
//! connected component
//! that is fair: no class of actions can be taken in each of its states and is taken in none.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt::{self, Debug};
use std::hash::Hash;

use petgraph::algo::kosaraju_scc;
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::{EdgeFiltered, EdgeRef, NodeFiltered};
use stateright::Model;

/// All reachable states of a model, with the actions between them.
pub struct Reachable<M: Model> {
    pub graph: DiGraph<M::State, M::Action>,
    /// The edge by which a breadth-first search came to a state first.
    parents: Vec<Option<(NodeIndex, M::Action)>>,
}

/// A run that breaks a promise: a way to a cycle, and the cycle. An empty cycle stands still.
#[derive(Debug)]
pub struct Lasso<A> {
    pub way: Vec<A>,
    pub cycle: Vec<A>,
}

impl<A: Debug> fmt::Display for Lasso<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |actions: &[A]| {
            let words: Vec<String> = actions.iter().map(|action| format!("{action:?}")).collect();
            words.join(", ")
        };
        write!(f, "{}; then for ever: ", list(&self.way))?;
        match &self.cycle[..] {
            [] => f.write_str("nothing"),
            cycle => f.write_str(&list(cycle)),
        }
    }
}

/// What must not happen for ever.
pub struct Promise<'a, M: Model> {
    /// It is open in this state.
    pub open: &'a dyn Fn(&M::State) -> bool,
    /// This action happens finitely often only.
    pub finite: &'a dyn Fn(&M::Action) -> bool,
    /// The class of an action that is taken at last, if it stays possible.
    pub class: &'a dyn Fn(&M::Action) -> Option<u32>,
}

impl<M> Reachable<M>
where
    M: Model,
    M::State: Clone + Eq + Hash,
    M::Action: Copy + Eq,
{
    /// Visits all states, breadth-first. `progress` gets the numbers of visited and of known
    /// states.
    pub fn explore(model: &M, progress: impl FnMut(usize, usize)) -> Self {
        Self::explore_until(model, progress, |_| false)
    }

    /// A shortest way to a state of this kind.
    pub fn find(model: &M, kind: impl Fn(&M::State) -> bool) -> Option<Vec<M::Action>> {
        let reachable = Self::explore_until(model, |_, _| {}, &kind);
        // The states are in the order of their distance.
        let state = reachable
            .graph
            .node_indices()
            .find(|state| kind(&reachable.graph[*state]))?;
        Some(reachable.way_to(state))
    }

    fn explore_until(
        model: &M,
        mut progress: impl FnMut(usize, usize),
        stop: impl Fn(&M::State) -> bool,
    ) -> Self {
        let mut graph = DiGraph::new();
        let mut parents = Vec::new();
        let mut known = HashMap::new();
        for state in model.init_states() {
            known.insert(state.clone(), graph.add_node(state));
            parents.push(None);
        }
        let mut actions = Vec::new();
        let mut visited = 0;
        while visited < graph.node_count() {
            let from = NodeIndex::new(visited);
            if stop(&graph[from]) {
                break;
            }
            model.actions(&graph[from], &mut actions);
            for action in actions.drain(..) {
                let Some(state) = model.next_state(&graph[from], action) else {
                    continue;
                };
                let to = *known.entry(state).or_insert_with_key(|state| {
                    parents.push(Some((from, action)));
                    graph.add_node(state.clone())
                });
                graph.add_edge(from, to, action);
            }
            visited += 1;
            progress(visited, graph.node_count());
        }
        Reachable { graph, parents }
    }

    /// The shortest way to `state`.
    pub fn way_to(&self, mut state: NodeIndex) -> Vec<M::Action> {
        let mut way = Vec::new();
        while let Some((parent, action)) = self.parents[state.index()] {
            way.push(action);
            state = parent;
        }
        way.reverse();
        way
    }

    /// A fair run that leaves the promise open for ever.
    pub fn broken(&self, promise: &Promise<'_, M>) -> Option<Lasso<M::Action>> {
        let open = NodeFiltered::from_fn(&self.graph, |state| (promise.open)(&self.graph[state]));
        let infinite = EdgeFiltered::from_fn(&open, |edge| !(promise.finite)(edge.weight()));
        let components = kosaraju_scc(&infinite);
        let fair = components
            .iter()
            .filter_map(|component| self.fair_tour(promise, component));
        // The shortest counterexample is the one to read.
        fair.min_by_key(|lasso| lasso.way.len() + lasso.cycle.len())
    }

    /// A circle of these actions alone.
    pub fn circle(&self, among: &dyn Fn(&M::Action) -> bool) -> Option<Lasso<M::Action>> {
        let graph = EdgeFiltered::from_fn(&self.graph, |edge| among(edge.weight()));
        let components = kosaraju_scc(&graph);
        components.iter().find_map(|component| {
            let members: HashSet<NodeIndex> = component.iter().copied().collect();
            let inside = |action: &M::Action, to: NodeIndex| among(action) && members.contains(&to);
            let start = *component.iter().min()?;
            let mut edges = self.graph.edges(start);
            let first = edges.find(|edge| inside(edge.weight(), edge.target()))?;
            let back = self.nearest(first.target(), &inside, |from, edge| {
                edge.is_none() && from == start
            })?;
            let back = back.into_iter().map(|(action, _)| action);
            let cycle = std::iter::once(*first.weight()).chain(back).collect();
            Some(Lasso {
                way: self.way_to(start),
                cycle,
            })
        })
    }

    /// A tour through a component that is fair, if there is one.
    fn fair_tour(
        &self,
        promise: &Promise<'_, M>,
        component: &[NodeIndex],
    ) -> Option<Lasso<M::Action>> {
        let members: HashSet<NodeIndex> = component.iter().copied().collect();
        let inside =
            |action: &M::Action, to: NodeIndex| !(promise.finite)(action) && members.contains(&to);
        let enabled = |state: NodeIndex| {
            let classes = self
                .graph
                .edges(state)
                .filter_map(|edge| (promise.class)(edge.weight()));
            classes.fold(0u128, |set, class| set | 1 << class)
        };
        // What each class of the first state asks of a run: that it takes the class, or comes where
        // the class is impossible.
        let asked = component
            .iter()
            .fold(u128::MAX, |set, state| set & enabled(*state));
        let mut taken = 0u128;
        for state in component {
            for edge in self
                .graph
                .edges(*state)
                .filter(|edge| inside(edge.weight(), edge.target()))
            {
                taken |= (promise.class)(edge.weight()).map_or(0, |class| 1 << class);
            }
        }
        if asked & !taken != 0 {
            return None;
        }
        let start = *component.iter().min()?;
        let mut here = start;
        let mut cycle = Vec::new();
        // Classes that the tour has yet to take or to see impossible.
        let mut owed = enabled(start);
        while owed != 0 {
            let step = self.nearest(here, &inside, |from, edge| match edge {
                Some(action) => {
                    (promise.class)(action).is_some_and(|class| owed & (1 << class) != 0)
                }
                None => owed & !enabled(from) != 0,
            })?;
            here = step.last().map_or(here, |(_, to)| *to);
            for (action, to) in step {
                owed &= enabled(to);
                owed &= !(promise.class)(&action).map_or(0, |class| 1 << class);
                cycle.push(action);
            }
        }
        let back = self.nearest(here, &inside, |from, edge| edge.is_none() && from == start)?;
        cycle.extend(back.into_iter().map(|(action, _)| action));
        Some(Lasso {
            way: self.way_to(start),
            cycle,
        })
    }

    /// The shortest way from `from` to a state or over an edge that is wanted.
    fn nearest(
        &self,
        from: NodeIndex,
        inside: &impl Fn(&M::Action, NodeIndex) -> bool,
        wanted: impl Fn(NodeIndex, Option<&M::Action>) -> bool,
    ) -> Option<Vec<(M::Action, NodeIndex)>> {
        let mut parents = HashMap::from([(from, None)]);
        let mut queue = VecDeque::from([from]);
        let way = |parents: &HashMap<NodeIndex, Option<(NodeIndex, M::Action)>>,
                   mut to: NodeIndex| {
            let mut way = Vec::new();
            while let Some(Some((parent, action))) = parents.get(&to) {
                way.push((*action, to));
                to = *parent;
            }
            way.reverse();
            way
        };
        while let Some(state) = queue.pop_front() {
            if wanted(state, None) {
                return Some(way(&parents, state));
            }
            for edge in self
                .graph
                .edges(state)
                .filter(|edge| inside(edge.weight(), edge.target()))
            {
                if wanted(state, Some(edge.weight())) {
                    let mut steps = way(&parents, state);
                    steps.push((*edge.weight(), edge.target()));
                    return Some(steps);
                }
                parents.entry(edge.target()).or_insert_with(|| {
                    queue.push_back(edge.target());
                    Some((state, *edge.weight()))
                });
            }
        }
        None
    }
}
