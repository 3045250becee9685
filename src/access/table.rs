//! Networks by prefix: a table that is cheap to search, to change and to clone.
//!
//! A path-compressed binary tree whose nodes are shared between clones. A change copies the nodes
//! on the way to its network, at most one for each bit of the address.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// A network, or an address as the network of all its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Prefix {
    is_v6: bool,
    len: u8,
    /// The bits from the left; those behind the prefix are zero.
    bits: u128,
}

impl Prefix {
    pub(crate) fn of_network(network: IpNet) -> Self {
        Self::of(network.addr(), network.prefix_len())
    }

    /// An IPv4-mapped address (RFC 4291 section 2.5.5.2) is one of IPv4.
    pub(crate) fn of_address(address: IpAddr) -> Self {
        let address = address.to_canonical();
        Self::of(address, if address.is_ipv4() { 32 } else { 128 })
    }

    fn of(address: IpAddr, len: u8) -> Self {
        let bits = match address {
            IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
            IpAddr::V6(address) => address.to_bits(),
        };
        let whole = Self {
            is_v6: address.is_ipv6(),
            len: 128,
            bits,
        };
        whole.truncated(len)
    }

    pub(crate) fn is_v6(self) -> bool {
        self.is_v6
    }

    pub(crate) fn len(self) -> u8 {
        self.len
    }

    /// The network of the first `len` bits.
    pub(crate) fn truncated(self, len: u8) -> Self {
        let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
        Self {
            len,
            bits: self.bits & mask,
            ..self
        }
    }

    /// The number of leading bits that both have.
    fn common(self, other: Self) -> u8 {
        let same = (self.bits ^ other.bits).leading_zeros() as u8;
        same.min(self.len).min(other.len)
    }

    /// The bit behind the first `at` ones.
    fn bit(self, at: u8) -> bool {
        self.bits.checked_shl(at.into()).unwrap_or(0) >> 127 == 1
    }
}

/// A value for each of many networks, in an order of their own.
#[derive(Clone, Debug)]
pub(super) struct Table<T> {
    v4: Child<T>,
    v6: Child<T>,
    len: usize,
    /// The positions of the next values in front and at the back.
    front: i64,
    back: i64,
}

type Child<T> = Option<Arc<Node<T>>>;

#[derive(Clone, Debug)]
struct Node<T> {
    prefix: Prefix,
    /// With its position; `None` where networks merely part.
    value: Option<(i64, T)>,
    /// By the bit behind the prefix: clear, and set.
    children: (Child<T>, Child<T>),
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            v4: None,
            v6: None,
            len: 0,
            front: -1,
            back: 0,
        }
    }
}

impl<T: Clone> Table<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds a value behind all others. A network that has a value keeps it, which comes first.
    pub(super) fn append(&mut self, network: Prefix, value: T) {
        if exact(self.root(network), network).is_none() {
            let position = self.back;
            self.back += 1;
            self.insert(network, (position, value));
        }
    }

    /// Adds a value before all others. It replaces the network's value, which it would hide.
    pub(super) fn prepend(&mut self, network: Prefix, value: T) {
        let position = self.front;
        self.front -= 1;
        self.insert(network, (position, value));
    }

    fn insert(&mut self, network: Prefix, value: (i64, T)) {
        let root = if network.is_v6 {
            &mut self.v6
        } else {
            &mut self.v4
        };
        if insert(root, network, value) {
            self.len += 1;
        }
    }

    fn root(&self, network: Prefix) -> Option<&Arc<Node<T>>> {
        let root = if network.is_v6 { &self.v6 } else { &self.v4 };
        root.as_ref()
    }

    /// The first value whose network contains the address.
    pub(super) fn find(&self, address: Prefix) -> Option<&T> {
        let mut best: Option<&(i64, T)> = None;
        let mut next = self.root(address);
        while let Some(node) = next {
            let len = node.prefix.len;
            if node.prefix.common(address) < len {
                break;
            }
            best = match (best, &node.value) {
                (Some(best), Some(value)) if value.0 > best.0 => Some(best),
                (best, value) => value.as_ref().or(best),
            };
            if len == address.len {
                break;
            }
            next = node.child(address.bit(len));
        }
        best.map(|(_, value)| value)
    }

    /// All values, in their order.
    pub(super) fn in_order(&self) -> Vec<&T> {
        let mut values = Vec::with_capacity(self.len);
        let mut nodes: Vec<_> = self.v4.iter().chain(&self.v6).collect();
        while let Some(node) = nodes.pop() {
            values.extend(&node.value);
            nodes.extend(node.children.0.iter().chain(&node.children.1));
        }
        values.sort_unstable_by_key(|(position, _)| *position);
        values.into_iter().map(|(_, value)| value).collect()
    }

    /// Calls `visit` with the values that a network has here and there, except where both tables
    /// share them: the cost is that of what differs.
    pub(super) fn visit_changed(&self, other: &Self, visit: &mut impl FnMut(&T, &T)) {
        visit_changed(self.v4.as_ref(), other.v4.as_ref(), visit);
        visit_changed(self.v6.as_ref(), other.v6.as_ref(), visit);
    }
}

impl<T> Node<T> {
    fn leaf(prefix: Prefix, value: (i64, T)) -> Arc<Self> {
        Arc::new(Self {
            prefix,
            value: Some(value),
            children: (None, None),
        })
    }

    fn child(&self, bit: bool) -> Option<&Arc<Self>> {
        let (clear, set) = &self.children;
        if bit { set } else { clear }.as_ref()
    }

    fn child_mut(&mut self, bit: bool) -> &mut Child<T> {
        let (clear, set) = &mut self.children;
        if bit {
            set
        } else {
            clear
        }
    }
}

/// Returns whether the network is new. Recursion is as deep as an address has bits, at most.
fn insert<T: Clone>(child: &mut Child<T>, network: Prefix, value: (i64, T)) -> bool {
    let Some(node) = child else {
        *child = Some(Node::leaf(network, value));
        return true;
    };
    let common = node.prefix.common(network);
    if common == node.prefix.len {
        let node = Arc::make_mut(node);
        return if common == network.len {
            node.value.replace(value).is_none()
        } else {
            insert(node.child_mut(network.bit(common)), network, value)
        };
    }
    let mut above = Node {
        prefix: network.truncated(common),
        value: None,
        children: (None, None),
    };
    *above.child_mut(node.prefix.bit(common)) = Some(Arc::clone(node));
    if common == network.len {
        above.value = Some(value);
    } else {
        *above.child_mut(network.bit(common)) = Some(Node::leaf(network, value));
    }
    *child = Some(Arc::new(above));
    true
}

fn exact<T>(mut next: Option<&Arc<Node<T>>>, network: Prefix) -> Option<&T> {
    while let Some(node) = next {
        let common = node.prefix.common(network);
        if common < node.prefix.len {
            return None;
        }
        if common == network.len {
            return node.value.as_ref().map(|(_, value)| value);
        }
        next = node.child(network.bit(common));
    }
    None
}

fn visit_changed<T>(
    here: Option<&Arc<Node<T>>>,
    there: Option<&Arc<Node<T>>>,
    visit: &mut impl FnMut(&T, &T),
) {
    let (Some(here), Some(there)) = (here, there) else {
        return;
    };
    if Arc::ptr_eq(here, there) {
        return;
    }
    let common = here.prefix.common(there.prefix);
    match (common == here.prefix.len, common == there.prefix.len) {
        (true, true) => {
            if let (Some((_, here)), Some((_, there))) = (&here.value, &there.value) {
                visit(here, there);
            }
            for bit in [false, true] {
                visit_changed(here.child(bit), there.child(bit), visit);
            }
        }
        (true, false) => {
            visit_changed(here.child(there.prefix.bit(common)), Some(there), visit);
        }
        (false, true) => {
            visit_changed(Some(here), there.child(here.prefix.bit(common)), visit);
        }
        (false, false) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Prefix {
        Prefix::of_network(text.parse::<IpNet>().expect("a network").trunc())
    }

    fn address(text: &str) -> Prefix {
        Prefix::of_address(text.parse().expect("an address"))
    }

    /// Against a list that is searched from its front.
    #[test]
    fn the_first_network_that_contains_an_address_is_found() {
        let mut random = 1u64;
        let mut below = |limit: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % limit
        };
        for _ in 0..300 {
            let (mut table, mut list) = (Table::default(), Vec::<(IpNet, u32)>::new());
            for value in 0..60 {
                // Few bits differ, so that networks contain each other.
                let (a, b, c) = (below(2) * 128, below(4), below(2) * 255);
                let text = if below(4) == 0 {
                    format!("{:x}::{b:x}:{c:x}/{}", 0x2000 + a, below(129))
                } else {
                    format!("{a}.{b}.0.{c}/{}", below(33))
                };
                let found: IpNet = text.parse::<IpNet>().expect("a network").trunc();
                let known = list.iter().position(|(other, _)| *other == found);
                if below(2) == 0 {
                    table.append(Prefix::of_network(found), value);
                    if known.is_none() {
                        list.push((found, value));
                    }
                } else {
                    table.prepend(Prefix::of_network(found), value);
                    known.map(|at| list.remove(at));
                    list.insert(0, (found, value));
                }
            }
            assert_eq!(table.len(), list.len());
            let values: Vec<_> = list.iter().map(|(_, value)| value).collect();
            assert_eq!(table.in_order(), values);
            for _ in 0..100 {
                let (a, b, c) = (below(2) * 128, below(4), below(2) * 255);
                let text = if below(4) == 0 {
                    format!("{:x}::{b:x}:{c:x}", 0x2000 + a)
                } else {
                    format!("{a}.{b}.0.{c}")
                };
                let ip: IpAddr = text.parse().expect("an address");
                let first = list.iter().find(|(network, _)| network.contains(&ip));
                assert_eq!(
                    table.find(Prefix::of_address(ip)),
                    first.map(|(_, value)| value),
                    "{ip} in {list:?}"
                );
            }
        }
    }

    #[test]
    fn a_clone_is_not_changed_and_shares_what_is_equal() {
        let mut table = Table::default();
        for n in 0..100_000u32 {
            let network = IpNet::from(IpAddr::from((0x0a00_0000 + n).to_be_bytes()));
            table.append(Prefix::of_network(network), n);
        }
        let mut clone = table.clone();
        clone.prepend(network("10.0.0.7/32"), 1);
        clone.prepend(network("10.0.0.0/31"), 2);
        clone.prepend(network("::/0"), 3);
        let both = |ip| {
            let ip = address(ip);
            (table.find(ip).copied(), clone.find(ip).copied())
        };
        assert_eq!(both("10.0.0.7"), (Some(7), Some(1)));
        assert_eq!(both("::ffff:10.0.0.1"), (Some(1), Some(2)));
        assert_eq!(both("10.0.0.2"), (Some(2), Some(2)));
        assert_eq!(both("::1"), (None, Some(3)));
        assert_eq!((table.len(), clone.len()), (100_000, 100_002));
        // All but the nodes on the way to the changes are shared.
        let mut changed = Vec::new();
        clone.visit_changed(&table, &mut |here, there| changed.push((*here, *there)));
        assert_eq!(changed, [(1, 7)]);
        let mut nodes = 0;
        let mut compare = vec![(clone.v4.as_ref(), table.v4.as_ref())];
        while let Some((here, there)) = compare.pop() {
            let Some(here) = here else { continue };
            if there.is_some_and(|there| Arc::ptr_eq(here, there)) {
                continue;
            }
            nodes += 1;
            for bit in [false, true] {
                let there = there.filter(|there| there.prefix == here.prefix);
                compare.push((here.child(bit), there.and_then(|there| there.child(bit))));
            }
        }
        assert!(nodes < 100, "{nodes}");
    }

    #[test]
    fn a_network_above_others_hides_none_of_them() {
        let mut narrow = Table::default();
        narrow.append(network("10.1.0.0/16"), 1);
        let mut wide = Table::default();
        wide.append(network("10.0.0.0/8"), 2);
        wide.append(network("10.1.0.0/16"), 3);
        let mut changed = Vec::new();
        wide.visit_changed(&narrow, &mut |here, there| changed.push((*here, *there)));
        assert_eq!(changed, [(3, 1)], "a network more than before");
        changed.clear();
        narrow.visit_changed(&wide, &mut |here, there| changed.push((*here, *there)));
        assert_eq!(changed, [(1, 3)], "a network less than before");
    }

    #[test]
    fn networks_apart_have_nothing_in_common() {
        let [mut here, mut there] = [Table::default(), Table::default()];
        here.append(network("10.1.0.0/16"), 1);
        there.append(network("10.2.0.0/16"), 2);
        here.visit_changed(&there, &mut |here, there| panic!("{here} and {there}"));
    }
}
