//! PID 1 of the machine in which VMMs are measured side by side, and of its guests.

fn main() {
    perennial_tests::side_by_side::init::main();
}
