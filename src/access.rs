//! Access rules: which addresses may connect.

mod table;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

pub(crate) use self::table::Prefix;
use self::table::Table;
use crate::error::{Error, Result};

/// Whether a peer may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    /// The peer may connect.
    Allow,
    /// The peer may not connect.
    Deny,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Access {
    fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

/// Rules that allow or deny peers by address. The first match decides; without a match, the default
/// does.
///
/// ```
/// use portcullis::AccessRules;
///
/// # fn main() -> portcullis::Result<()> {
/// // The office and this machine, but for one desk.
/// let rules = AccessRules::deny_all()
///     .deny("192.0.2.66")?
///     .allow("192.0.2.0/24")?
///     .allow("2001:db8::/32")?
///     .allow("127.0.0.1")?;
/// assert_eq!(
///     rules.to_string(),
///     "deny 192.0.2.66/32, allow 192.0.2.0/24, allow 2001:db8::/32, \
///      allow 127.0.0.1/32, deny all"
/// );
/// # Ok(()) }
/// ```
///
/// An IPv4 peer of an IPv6 socket (`::ffff:192.0.2.1`, RFC 4291 section 2.5.5.2) is matched as
/// IPv4. A rule for such a network is a rule for IPv4. The zone of a link-local address (`%eth0`)
/// is ignored. So are bits behind a network's prefix: `10.1.2.3/8` is `10.0.0.0/8`.
///
/// Peers of a Unix socket have no IP address, and no rule applies to them, not even `deny_all`.
///
/// # Long lists
///
/// A check or a change takes at most one step for each bit of the address, whatever the number of
/// rules. A clone shares the rules with the original. A rule needs about 250 bytes. To add one
/// while the server runs:
///
/// ```
/// fn deny(control: &mut portcullis::Control<'_>, network: &str) -> portcullis::Result<()> {
///     let rules = control.options("games")?.access_rules.clone();
///     let rules = rules.deny_first(network)?;
///     control.reconfigure_listener("games", |listen| listen.access_rules = rules)
/// }
/// ```
///
/// [`Control::ban`](crate::Control::ban) denies a network for a limited time.
#[derive(Clone, Debug)]
pub struct AccessRules {
    /// Clones share the rules, and so their counts.
    table: Table<Arc<Rule>>,
    otherwise: Access,
    unmatched: u64,
}

#[derive(Debug)]
struct Rule {
    access: Access,
    network: IpNet,
    hits: AtomicU64,
}

/// One of [`AccessRules`]. `Display` prints it, as in `deny 10.0.0.0/8`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AccessRule {
    /// True if the rule allows, false if it denies.
    pub allows: bool,
    /// `None` for every address.
    network: Option<IpNet>,
    /// Number of decisions by this rule since it was set, in all listeners that have a clone of it.
    /// The default, which comes last, is counted for each listener alone.
    pub hits: u64,
}

impl AccessRules {
    /// Allows every peer that no rule denies. This is a listener's default.
    #[must_use]
    pub fn allow_all() -> Self {
        Self::beginning_with(Access::Allow)
    }

    /// Denies every peer that no rule allows.
    #[must_use]
    pub fn deny_all() -> Self {
        Self::beginning_with(Access::Deny)
    }

    fn beginning_with(otherwise: Access) -> Self {
        Self {
            table: Table::default(),
            otherwise,
            unmatched: 0,
        }
    }

    /// Allows peers of `network` that no earlier rule denies: an address, a network as in
    /// `10.0.0.0/8`, or `all`. Without effect if a rule for exactly this network exists.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `network` is none of these.
    pub fn allow(self, network: &str) -> Result<Self> {
        self.with(Access::Allow, network)
    }

    /// Denies peers of `network` that no earlier rule allows. Without effect if a rule for exactly
    /// this network exists.
    ///
    /// # Errors
    ///
    /// As for [`AccessRules::allow`].
    pub fn deny(self, network: &str) -> Result<Self> {
        self.with(Access::Deny, network)
    }

    /// As [`AccessRules::allow`], in front of all other rules. A rule for exactly this network is
    /// replaced.
    ///
    /// # Errors
    ///
    /// As for [`AccessRules::allow`].
    pub fn allow_first(self, network: &str) -> Result<Self> {
        self.in_front(Access::Allow, network)
    }

    /// As [`AccessRules::deny`], in front of all other rules: for a peer that misbehaves. A rule
    /// for exactly this network is replaced.
    ///
    /// # Errors
    ///
    /// As for [`AccessRules::allow`].
    pub fn deny_first(self, network: &str) -> Result<Self> {
        self.in_front(Access::Deny, network)
    }

    fn in_front(mut self, access: Access, network: &str) -> Result<Self> {
        for network in parse(access.name(), network)?.into_iter().rev() {
            self.table
                .prepend(Prefix::of_network(network), Rule::new(access, network));
        }
        Ok(self)
    }

    fn with(mut self, access: Access, network: &str) -> Result<Self> {
        for network in parse(access.name(), network)? {
            self.table
                .append(Prefix::of_network(network), Rule::new(access, network));
        }
        Ok(self)
    }

    /// Returns the rules in order, each with its count. The last is the default: `allow all` or
    /// `deny all`.
    pub fn iter(&self) -> impl Iterator<Item = AccessRule> + use<> {
        let mut rules: Vec<_> = self
            .table
            .in_order()
            .into_iter()
            .map(|rule| AccessRule {
                allows: rule.access == Access::Allow,
                network: Some(rule.network),
                hits: rule.hits.load(Ordering::Relaxed),
            })
            .collect();
        rules.push(AccessRule {
            allows: self.otherwise == Access::Allow,
            network: None,
            hits: self.unmatched,
        });
        rules.into_iter()
    }

    /// Returns whether a peer is allowed.
    pub fn allows(&self, peer: IpAddr) -> bool {
        let access = self.find(peer).map_or(self.otherwise, |rule| rule.access);
        access == Access::Allow
    }

    /// These rules, each with its count in `former`. A new rule starts at 0.
    pub(crate) fn counting_on(mut self, former: &Self) -> Self {
        self.table
            .visit_changed(&former.table, &mut |rule, former| {
                if rule.access == former.access {
                    let hits = former.hits.load(Ordering::Relaxed);
                    // Another server with the same rules may have counted already.
                    let _ =
                        rule.hits
                            .compare_exchange(0, hits, Ordering::Relaxed, Ordering::Relaxed);
                }
            });
        self.unmatched = if self.otherwise == former.otherwise {
            former.unmatched
        } else {
            0
        };
        self
    }

    /// As [`AccessRules::allows`], and counts the decision.
    pub(crate) fn check_and_count(&mut self, peer: IpAddr) -> Access {
        let Some(rule) = self.find(peer) else {
            self.unmatched += 1;
            return self.otherwise;
        };
        rule.hits.fetch_add(1, Ordering::Relaxed);
        rule.access
    }

    fn find(&self, peer: IpAddr) -> Option<&Rule> {
        let found = self.table.find(Prefix::of_address(peer))?;
        Some(found)
    }
}

impl Rule {
    fn new(access: Access, network: IpNet) -> Arc<Self> {
        Arc::new(Self {
            access,
            network,
            hits: AtomicU64::new(0),
        })
    }
}

/// True for equal rules in the same order. Counts are ignored.
impl PartialEq for AccessRules {
    fn eq(&self, other: &Self) -> bool {
        let rules = |rules: &Self| {
            let rules = rules.iter().map(|rule| (rule.allows, rule.network));
            rules.collect::<Vec<_>>()
        };
        self.table.len() == other.table.len() && rules(self) == rules(other)
    }
}

impl Eq for AccessRules {}

/// For a log: the rules if they are few, else their number. A list of thousands may be set again
/// for each peer that is added to it.
pub(crate) struct Brief<'a>(pub(crate) &'a AccessRules);

impl fmt::Debug for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const FEW: usize = 16;
        match self.0.table.len() {
            0..=FEW => write!(f, "{}", self.0),
            many => write!(f, "{many} rules, {} all", self.0.otherwise),
        }
    }
}

impl Default for AccessRules {
    fn default() -> Self {
        Self::allow_all()
    }
}

impl fmt::Display for AccessRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.allows {
            Access::Allow
        } else {
            Access::Deny
        };
        match self.network {
            Some(network) => write!(f, "{access} {network}"),
            None => write!(f, "{access} all"),
        }
    }
}

impl fmt::Display for AccessRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, rule) in self.iter().enumerate() {
            write!(f, "{}{rule}", if position == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// Reads rules as they are printed: separated by commas or lines, in order. The last one is the
/// default, `allow all` or `deny all`.
///
/// ```
/// use portcullis::AccessRules;
/// # fn main() -> portcullis::Result<()> {
/// let rules: AccessRules = "deny 192.0.2.66, allow 192.0.2.0/24, deny all".parse()?;
/// assert_eq!(rules, AccessRules::deny_all().deny("192.0.2.66")?.allow("192.0.2.0/24")?);
/// # Ok(()) }
/// ```
impl FromStr for AccessRules {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let rules = text.split([',', '\n']).map(str::trim);
        let mut rules: Vec<_> = rules.filter(|rule| !rule.is_empty()).collect();
        let begun = match rules.pop() {
            Some("allow all") => Self::allow_all(),
            Some("deny all") => Self::deny_all(),
            last => {
                let last = last.unwrap_or_default();
                let problem = format!("the last rule is {last:?}; end with allow all or deny all");
                return Err(Error::option("access_rules", problem));
            }
        };
        rules.into_iter().try_fold(begun, |begun, rule| {
            match rule.split_once(char::is_whitespace) {
                Some(("allow", network)) => begun.allow(network.trim_start()),
                Some(("deny", network)) => begun.deny(network.trim_start()),
                _ => {
                    let problem = format!("{rule:?} is no rule (allow NETWORK or deny NETWORK)");
                    Err(Error::option("access_rules", problem))
                }
            }
        })
    }
}

/// The networks that a word denotes, in their shortest form. An error names the option.
pub(crate) fn parse(option: &'static str, word: &str) -> Result<Vec<IpNet>> {
    if word == "all" {
        return Ok(vec![IpNet::default(), IpNet::V6(ipnet::Ipv6Net::default())]);
    }
    // A zone names the link of an address. Rules compare the address alone.
    let (address, prefix) = match word.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (word, None),
    };
    let address = address
        .split_once('%')
        .map_or(address, |(address, _)| address);
    let network = match prefix {
        None => address.parse::<IpAddr>().ok().map(IpNet::from),
        Some(prefix) => format!("{address}/{prefix}").parse::<IpNet>().ok(),
    };
    let longest = if address.contains(':') { 128 } else { 32 };
    let is_long = prefix
        .and_then(|prefix| prefix.parse::<u32>().ok())
        .is_some_and(|prefix| prefix > longest);
    let network = network.ok_or_else(|| {
        if is_long {
            let problem = format!("{word:?}: the prefix has at most {longest} bits");
            return Error::option(option, problem);
        }
        Error::option(
            option,
            format!(
                "{word:?} is no address, no network (as in 10.0.0.0/8 or 2001:db8::/32) \
                 and not \"all\""
            ),
        )
    })?;
    Ok(vec![canonical(network.trunc())])
}

/// A network of IPv4-mapped addresses is one of IPv4.
fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(mapped) = network else {
        return network;
    };
    match (
        mapped.addr().to_ipv4_mapped(),
        mapped.prefix_len().checked_sub(96),
    ) {
        (Some(address), Some(prefix)) => Ipv4Net::new(address, prefix).map_or(network, IpNet::V4),
        _ => network,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(address: &str) -> IpAddr {
        address.parse().expect("an address")
    }

    /// esockd: t_match, t_match_allow, t_nomatch, t_match_localhost.
    #[test]
    fn the_first_match_decides() {
        let rules = AccessRules::allow_all()
            .allow("127.0.0.1")
            .and_then(|rules| rules.deny("10.1.0.0/16"))
            .and_then(|rules| rules.allow("10.0.0.0/8"))
            .and_then(|rules| rules.deny("all"))
            .expect("rules");
        for (address, allowed) in [
            ("127.0.0.1", true),
            ("127.0.0.2", false),
            ("10.1.2.3", false),
            ("10.2.2.3", true),
            ("::1", false),
        ] {
            assert_eq!(rules.allows(ip(address)), allowed, "{address}");
        }
        assert!(AccessRules::allow_all().allows(ip("192.0.2.1")));
        assert!(!AccessRules::deny_all().allows(ip("192.0.2.1")));
    }

    /// esockd: t_match_ipv6, t_ipv6_match. Addresses are brought into canonical form before they
    /// are matched.
    #[test]
    fn a_mapped_address_is_an_ipv4_address() {
        let rules = AccessRules::deny_all()
            .allow("192.0.2.0/24")
            .and_then(|rules| rules.allow("::ffff:198.51.100.0/120"))
            .and_then(|rules| rules.allow("2001:db8::/32"))
            .and_then(|rules| rules.allow("fe80::1%eth0"))
            .expect("rules");
        for (address, allowed) in [
            ("192.0.2.77", true),
            ("::ffff:192.0.2.77", true),
            ("198.51.100.7", true),
            ("::ffff:198.51.100.7", true),
            ("198.51.101.7", false),
            ("2001:db8:ffff::1", true),
            ("2001:db9::1", false),
            ("fe80::1", true),
            // IPv4-compatible addresses (RFC 4291 section 2.5.5.1) are deprecated, and IPv6.
            ("::192.0.2.77", false),
        ] {
            assert_eq!(rules.allows(ip(address)), allowed, "{address}");
        }
        // A wide IPv6 network contains no IPv4 address; `all` does.
        let wide = AccessRules::deny_all().allow("::/0").expect("a network");
        assert!(!wide.allows(ip("::ffff:192.0.2.1")));
        let all = AccessRules::deny_all().allow("all").expect("all");
        assert!(all.allows(ip("192.0.2.1")) && all.allows(ip("::1")));
    }

    #[test]
    fn printed_rules_are_read_again() {
        for text in [
            "allow all",
            "deny 192.0.2.66/32, allow 192.0.2.0/24, allow 2001:db8::/32, deny all",
            "allow 0.0.0.0/0, allow ::/0, deny all",
        ] {
            let rules: AccessRules = text.parse().expect("rules");
            assert_eq!(rules.to_string(), text);
        }
        let lines = "\ndeny  10.0.0.1\n\n  allow 10.0.0.0/8,\ndeny all\n";
        let rules: AccessRules = lines.parse().expect("rules");
        assert_eq!(
            rules.to_string(),
            "deny 10.0.0.1/32, allow 10.0.0.0/8, deny all"
        );
        for (text, problem) in [
            ("", "the last rule is \"\"; end with allow all or deny all"),
            (
                "deny 10.0.0.0/8",
                "the last rule is \"deny 10.0.0.0/8\"; end with allow all or deny all",
            ),
            (
                "permit\u{1b} all, deny all",
                "\"permit\\u{1b} all\" is no rule (allow NETWORK or deny NETWORK)",
            ),
        ] {
            let error = text.parse::<AccessRules>().expect_err("no rules");
            assert_eq!(error.to_string(), format!("option access_rules: {problem}"));
        }
        let error = "deny 10.0.0.0/33, deny all".parse::<AccessRules>();
        assert!(error.is_err());
    }

    #[test]
    fn each_rule_counts_its_peers() {
        let mut rules = AccessRules::allow_all()
            .deny("10.1.2.3/8")
            .expect("a network");
        for address in ["10.0.0.1", "10.255.0.1", "11.0.0.1"] {
            rules.check_and_count(ip(address));
        }
        let found: Vec<_> = rules
            .iter()
            .map(|rule| (rule.to_string(), rule.hits))
            .collect();
        assert_eq!(
            found,
            [
                ("deny 10.0.0.0/8".to_owned(), 2),
                ("allow all".to_owned(), 1)
            ]
        );
    }

    /// Rules that stay keep their counts, at any position, and so does the default.
    #[test]
    fn counts_go_on() {
        let mut former = AccessRules::allow_all()
            .deny("10.0.0.0/8")
            .expect("a network");
        former.check_and_count(ip("10.0.0.1"));
        former.check_and_count(ip("192.0.2.1"));
        let next = |begin: AccessRules| {
            let rules = begin
                .deny("10.0.0.0/8")
                .and_then(|rules| rules.allow_first("10.9.0.0/16"));
            rules.expect("networks").counting_on(&former)
        };
        let counts = |rules: &AccessRules| rules.iter().map(|rule| rule.hits).collect::<Vec<_>>();
        let (same, other) = (
            next(AccessRules::allow_all()),
            next(AccessRules::deny_all()),
        );
        assert_eq!(counts(&same), [0, 1, 1]);
        assert_eq!(counts(&other), [0, 1, 0]);
        assert_eq!(
            same.to_string(),
            "allow 10.9.0.0/16, deny 10.0.0.0/8, allow all"
        );
    }

    /// A network has one rule: a hidden one would never decide.
    #[test]
    fn a_network_has_one_rule() {
        let rules = AccessRules::allow_all()
            .deny("10.0.0.0/8")
            .and_then(|rules| rules.allow("10.0.0.0/8"))
            .and_then(|rules| rules.deny("192.0.2.1"))
            .expect("networks");
        assert_eq!(
            rules.to_string(),
            "deny 10.0.0.0/8, deny 192.0.2.1/32, allow all"
        );
        let lifted = rules.clone().allow_first("192.0.2.1").expect("an address");
        assert_eq!(
            lifted.to_string(),
            "allow 192.0.2.1/32, deny 10.0.0.0/8, allow all"
        );
        assert_ne!(rules, lifted);
        let all = lifted.deny_first("all").expect("all");
        assert_eq!(
            all.to_string(),
            "deny 0.0.0.0/0, deny ::/0, allow 192.0.2.1/32, deny 10.0.0.0/8, allow all"
        );
    }

    /// A clone that has one rule more shares the others, with their counts.
    #[test]
    fn a_long_list_is_changed_without_a_copy() {
        let mut former = AccessRules::allow_all();
        for n in 0..100_000u32 {
            let [_, b, c, d] = n.to_be_bytes();
            former = former.deny(&format!("10.{b}.{c}.{d}")).expect("an address");
        }
        former.check_and_count(ip("10.0.0.77"));
        let next = former.clone().deny_first("192.0.2.1").expect("an address");
        let mut changed = 0;
        next.table
            .visit_changed(&former.table, &mut |_, _| changed += 1);
        assert_eq!(changed, 0, "nothing is visited but the new rule");
        let mut next = next.counting_on(&former);
        assert_eq!(next.check_and_count(ip("10.0.0.77")), Access::Deny);
        assert_eq!(next.check_and_count(ip("::ffff:192.0.2.1")), Access::Deny);
        assert_eq!(next.check_and_count(ip("192.0.2.2")), Access::Allow);
        let hits: Vec<_> = next.iter().filter(|rule| rule.hits > 0).collect();
        let hits: Vec<_> = hits
            .iter()
            .map(|rule| (rule.to_string(), rule.hits))
            .collect();
        assert_eq!(
            hits,
            [
                ("deny 192.0.2.1/32".to_owned(), 1),
                ("deny 10.0.0.77/32".to_owned(), 2),
                ("allow all".to_owned(), 1)
            ]
        );
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for word in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "::/129",
            "10.0.0.0/-1",
            "10.0.0.0/",
            "/8",
            "10.0.0.0/8/8",
            "localhost",
            "ALL",
            "10.0.0.01",
            " 10.0.0.1",
            "[::1]",
            "10.0.0.0/+8",
        ] {
            match AccessRules::allow_all().deny(word) {
                Err(Error::Option { option, problem }) => {
                    assert!(option == "deny" && problem.contains(word), "{problem}")
                }
                other => panic!("{word:?}: {other:?}"),
            }
        }
    }
}
