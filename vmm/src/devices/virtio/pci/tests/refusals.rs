//! Tests of documents that are invalid or that do not match this build.

use super::*;
use crate::devices::virtio::pci::backend::status::NEEDS_RESET;

type State = VirtioState<EchoStateV1>;

/// The state of a running function, changed by `twist`.
fn state(twist: impl FnOnce(&mut State)) -> State {
    let (mut machine, _) = echo();
    let [mut ring, _] = machine.start(LOUD | RING_EVENT_IDX);
    ring.offer(REQUEST);
    machine.ring(0);
    assert!(machine.run());
    pause(&mut machine.function);
    let mut state = machine.function.save().unwrap();
    twist(&mut state);
    state
}

fn restore(state: State) -> Result<VirtioPci<Echo>, VirtioPciError> {
    let resources = resources(&ram(), &Arc::new(FakeWires::default()));
    VirtioPci::restore(state, (resources, SharedLog::default()))
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    restore(state(|_| {})).unwrap();
    type Twist = fn(&mut State);
    let wrong: &[(Twist, &str)] = &[
        (
            |s| s.transport.queues.truncate(1),
            "the document has 1 queues, this build's device has 2",
        ),
        (|s| s.transport.driver_features |= 1 << 3 | 1 << 34, "does not offer: QUIET, RING_PACKED"),
        (
            |s| s.transport.driver_features &= !VERSION_1,
            "status 0xf: FEATURES_OK without VERSION_1",
        ),
        (|s| s.transport.device_status = DRIVER, "status 0x2: DRIVER without ACKNOWLEDGE"),
        (|s| s.transport.device_status &= !DRIVER, "status 0xd: FEATURES_OK without DRIVER"),
        (
            |s| s.transport.device_status &= !FEATURES_OK,
            "status 0x7: DRIVER_OK without FEATURES_OK",
        ),
        (
            |s| s.transport.device_status = ACKNOWLEDGE | NEEDS_RESET,
            "status 0x41: NEEDS_RESET without DRIVER_OK",
        ),
        (
            |s| s.transport.device_status = ACKNOWLEDGE | DRIVER,
            "queue 0: it is enabled, but no features are agreed upon",
        ),
        (
            |s| s.transport.queues[1].ring.event_idx_enabled = false,
            "queue 1: the document has it without RING_EVENT_IDX, the agreed features say with",
        ),
        (
            |s| s.transport.queues[1].ring.max_size = 16,
            "queue 1: the document has a queue of 16, this build's has 8",
        ),
        (|s| s.transport.queues[0].ring.size = 3, "queue 0: "),
        (|s| s.transport.queues[0].ring.size = 0, "queue 0: "),
        (|s| s.transport.queues[0].ring.desc_table += 1, "queue 0: "),
        (|s| s.transport.queues[0].ring.avail_ring += 1, "queue 0: "),
        (|s| s.transport.queues[0].ring.used_ring += 1, "queue 0: "),
        (
            |s| s.transport.queues[0].ring.desc_table = 0x7_fff0,
            "queue 0: its rings are not in guest RAM",
        ),
        (
            |s| s.transport.queues[1].ring.avail_ring = 1 << 40,
            "queue 1: its rings are not in guest RAM",
        ),
        (
            |s| s.transport.queues[1].ring.used_ring = !0xfff,
            "queue 1: its rings are not in guest RAM",
        ),
        (
            |s| s.transport.config.bar_base += BAR_SIZE,
            "BAR 0 at 0xc0008000, this machine has placed it at",
        ),
        (|s| s.transport.config.command |= 1, "command register has bits 0x1"),
        (|s| s.transport.msix.table.truncate(4), "has 2 MSI-X vectors, this one has 3"),
    ];
    for (index, (twist, expected)) in wrong.iter().enumerate() {
        let error = restore(state(twist)).map(drop).unwrap_err().to_string();
        assert!(error.contains(expected), "{index}: {error}");
    }
}

#[test]
fn features_that_were_not_agreed_upon_are_not_checked() {
    let unagreed = state(|s| {
        s.transport.device_status = ACKNOWLEDGE | DRIVER;
        s.transport.driver_features = u64::MAX;
        for queue in &mut s.transport.queues {
            queue.ring.ready = false;
            queue.ring.event_idx_enabled = false;
            queue.ring.desc_table = !0xf;
        }
    });
    restore(unagreed).unwrap();
}

#[test]
fn an_invalid_node_is_refused_with_its_path() {
    type Twist = fn(&mut State);
    let wrong: &[(Twist, &str)] = &[
        (
            |s| s.transport.device_status = 0x1f,
            "/pci/echo@1/transport: property `device-status`: 0x1f",
        ),
        (|s| s.transport.isr = 4, "/pci/echo@1/transport: property `isr`: 0x4 has bits"),
        (
            |s| s.transport.config_vector = 3,
            "/pci/echo@1/transport: property `config-vector`: vector 3, the function has 3",
        ),
        (
            |s| s.transport.queues[1].vector = 0xfffe,
            "/pci/echo@1/transport/queue@1: property `vector`: vector 65534, the function has 3",
        ),
        (
            |s| s.transport.selects[2] = 1 << 16,
            "/pci/echo@1/transport: property `queue-select`: 65536",
        ),
        (|s| s.transport.msix.table[1] |= 1 << 33, "/pci/echo@1/transport/msix: property `table`"),
        (
            |s| s.transport.msix.table.truncate(5),
            "/pci/echo@1/transport/msix: property `table`: 5 words",
        ),
        (|s| s.transport.msix.pending[0] = 8, "/pci/echo@1/transport/msix: property `pending`"),
        (
            |s| s.transport.msix.pending.push(0),
            "/pci/echo@1/transport/msix: property `pending`: 2 words",
        ),
    ];
    for (twist, expected) in wrong {
        let node = state(twist).to_node("echo@1");
        let error = read_node::<State>(&node, "/pci").unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn queues_with_a_gap_are_refused() {
    let mut node = state(|_| {}).transport.to_node("transport");
    node.children.iter_mut().find(|c| c.name == "queue@1").unwrap().name = "queue@2".to_owned();
    let error = read_node::<VirtioPciStateV2>(&node, "").unwrap_err().to_string();
    assert_eq!(error, "/: child node `queue@1` is missing");
}
