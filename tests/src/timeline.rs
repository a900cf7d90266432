//! Draws the phases of a live update, by VM: as text for a terminal, and as SVG.
//!
//! Both have one block for each VM, with a bar for each of its phases. The text scales each block to
//! the VM's own phases; the SVG has one scale for all VMs.

use std::fmt::Write as _;

use crate::report::{Phase, Report, VmReport};

/// Width of a bar in the text, in columns.
const COLUMNS: usize = 60;

/// Formats nanoseconds for people: with the unit that suits, from ns to s.
pub fn human(ns: u64) -> String {
    let ns = ns as f64;
    match ns {
        _ if ns < 1e3 => format!("{ns:.0} ns"),
        _ if ns < 1e6 => format!("{:.1} us", ns / 1e3),
        _ if ns < 1e9 => format!("{:.1} ms", ns / 1e6),
        _ => format!("{:.3} s", ns / 1e9),
    }
}

/// Formats the blackout of a VM for people.
pub fn blackout(vm: &VmReport) -> String {
    vm.blackout_ns.map_or_else(|| "unknown".to_owned(), human)
}

/// Start and end of a drawing, from the earliest start to the latest end of a phase. Never empty.
fn span<'a>(phases: impl Iterator<Item = &'a Phase>) -> (u64, u64) {
    let (start, end) = phases.fold((u64::MAX, 0), |(start, end), phase| {
        (start.min(phase.start_ns), end.max(phase.end_ns))
    });
    if start < end { (start, end) } else { (0, 1) }
}

/// The first column of a phase and the column after its last: at least one column, within the bar.
fn columns(phase: &Phase, (start, end): (u64, u64)) -> (usize, usize) {
    let column = |ns: u64| {
        let part = ns.clamp(start, end) - start;
        (u128::from(part) * COLUMNS as u128 / u128::from(end - start)) as usize
    };
    let first = column(phase.start_ns).min(COLUMNS - 1);
    (first, column(phase.end_ns).clamp(first + 1, COLUMNS))
}

/// The timeline as text, with a newline at its end.
pub fn text(report: &Report) -> String {
    let mut out = String::new();
    let host = &report.host;
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{} -> {}, LUO: {}", host.kernel_before, host.kernel_after, host.luo);
    for vm in &report.vms {
        let _ = writeln!(
            out,
            "\n{}  {} MiB  blackout {}  {}",
            vm.name,
            vm.ram_bytes >> 20,
            blackout(vm),
            vm.outcome
        );
        let span = span(vm.phases.iter());
        let width = vm.phases.iter().map(|p| p.name.chars().count()).max().unwrap_or(0);
        for phase in &vm.phases {
            let (first, last) = columns(phase, span);
            let bar: String = (0..COLUMNS)
                .map(|column| if (first..last).contains(&column) { '#' } else { '.' })
                .collect();
            let took = human(phase.end_ns.saturating_sub(phase.start_ns));
            let _ = writeln!(out, "  {:width$}  {bar}  {took:>10}", phase.name);
        }
    }
    out
}

const WIDTH: u64 = 960;
const LABELS: u64 = 220;
const ROW: u64 = 22;
const COLOURS: [&str; 6] = ["#4e79a7", "#59a14f", "#f28e2b", "#b07aa1", "#e15759", "#76b7b2"];

/// The timeline as an SVG document.
pub fn svg(report: &Report) -> String {
    let rows: u64 = report.vms.iter().map(|vm| vm.phases.len() as u64 + 2).sum();
    let height = 2 * ROW + rows * ROW;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    let host = &report.host;
    let title = format!("{} to {}, LUO: {}", host.kernel_before, host.kernel_after, host.luo);
    label(&mut out, 10, ROW, "bold", &title);
    let span = span(report.vms.iter().flat_map(|vm| &vm.phases));
    let mut y = 2 * ROW;
    for vm in &report.vms {
        y = svg_vm(&mut out, vm, span, y);
    }
    out.push_str("</svg>\n");
    out
}

/// Draws one VM's rows from `y` down. Returns the `y` of the next VM.
fn svg_vm(out: &mut String, vm: &VmReport, (start, end): (u64, u64), mut y: u64) -> u64 {
    let title = format!(
        "{} ({} MiB): blackout {}, {}",
        vm.name,
        vm.ram_bytes >> 20,
        blackout(vm),
        vm.outcome
    );
    y += ROW;
    label(out, 10, y, "bold", &title);
    let room = (WIDTH - LABELS - 100) as f64;
    let x = |ns: u64| {
        LABELS as f64 + (ns.clamp(start, end) - start) as f64 / (end - start) as f64 * room
    };
    for (index, phase) in vm.phases.iter().enumerate() {
        y += ROW;
        label(out, 20, y, "normal", &phase.name);
        let (left, right) = (x(phase.start_ns), x(phase.end_ns));
        let _ = writeln!(
            out,
            "<rect x=\"{left:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{}\"/>",
            y - ROW + 8,
            (right - left).max(1.0),
            ROW - 6,
            COLOURS[index % COLOURS.len()]
        );
        let took = human(phase.end_ns.saturating_sub(phase.start_ns));
        label(out, right as u64 + 6, y, "normal", &took);
    }
    y + ROW
}

fn label(out: &mut String, x: u64, y: u64, weight: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" font-weight=\"{weight}\">{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{HostReport, Segments};

    fn phase(name: &str, start_ns: u64, end_ns: u64) -> Phase {
        Phase { name: name.into(), start_ns, end_ns }
    }

    fn report(phases: Vec<Phase>) -> Report {
        Report {
            host: HostReport {
                kernel_before: "7.3.4-a".into(),
                kernel_after: "7.3.4-b".into(),
                luo: "kernel".into(),
                reboot_to_init_ns: 900,
                phases: vec![],
            },
            vms: vec![VmReport {
                name: "a<b&c".into(),
                ram_bytes: 512 << 20,
                state_bytes: 9000,
                blackout_ns: Some(1_234_567_890),
                outcome: "running".into(),
                phases,
                frames: None,
                segments: Segments { preserved: 8, recreated: 0 },
            }],
            guest_ram_bytes_copied: 0,
        }
    }

    #[test]
    fn every_phase_has_a_bar_in_its_place() {
        let phases =
            vec![phase("save", 100, 200), phase("jump", 200, 1000), phase("tiny", 999, 999)];
        let text = text(&report(phases));
        let bars: Vec<&str> = text.lines().filter(|l| l.contains('#')).collect();
        assert_eq!(bars.len(), 3, "{text}");
        assert!(bars[0].contains("save  ######"), "{text}");
        assert!(bars[1].contains("##  "), "{text}");
        assert!(bars[2].contains(".#  "), "a phase of no length is still seen: {text}");
        assert!(text.contains("blackout 1.235 s"));
    }

    #[test]
    fn a_report_without_phases_or_with_absurd_ones_is_drawn_too() {
        for phases in [
            vec![],
            vec![phase("zero", 0, 0)],
            vec![phase("backward", 10, 5), phase("forever", 0, u64::MAX)],
        ] {
            let report = report(phases);
            assert!(text(&report).contains("a<b&c"));
            assert!(svg(&report).ends_with("</svg>\n"));
        }
    }

    #[test]
    fn names_are_escaped_in_the_svg() {
        let svg = svg(&report(vec![phase("<script>", 0, 1)]));
        assert!(svg.contains("a&lt;b&amp;c") && svg.contains("&lt;script&gt;"));
        assert!(!svg.contains("<script>"));
    }

    #[test]
    fn durations_read_well() {
        let said: Vec<String> =
            [0, 999, 1500, 2_500_000, 3_000_000_000].into_iter().map(human).collect();
        assert_eq!(said, ["0 ns", "999 ns", "1.5 us", "2.5 ms", "3.000 s"]);
    }
}
