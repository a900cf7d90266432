//! PID 1 of the machine on which `perennial run` is tried.

fn main() {
    perennial_tests::foreground::init::main();
}
