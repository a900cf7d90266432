//! Landlock: the process may open no file, use no TCP port, and reach no process outside its own confinement,
//! whichever way it gets to one.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus, Scope,
};

use super::{Missing, Record};

/// The newest version of landlock whose rules are used (Linux 6.12). Older kernels apply those that they know.
const NEWEST: ABI = ABI::V6;

pub(super) fn restrict(record: &mut Record) {
    let restrict = || -> Result<RulesetStatus, RulesetError> {
        let rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?;
        // Nothing is allowed: there is no rule.
        Ok(rules.create()?.restrict_self()?.ruleset)
    };
    let why = match restrict() {
        // An older landlock knows files, but perhaps not TCP ports and processes. The namespaces keep the
        // process from both.
        Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced) => return,
        Ok(RulesetStatus::NotEnforced) => std::io::Error::other("the kernel has none"),
        Err(error) => std::io::Error::other(error),
    };
    record.0.push(Missing { part: "landlock", why });
}
