# shellcheck shell=bash
#
# Lets one script at a time make a part of the cache. To be sourced by a script that has set `say`, which prints to
# stderr.
#
#   work_alone LOCK DIRECTORY [CLEANUP]   wait until no other script has the file LOCK; then set `work` to DIRECTORY and
#                                         empty it. At the end of the script, remove DIRECTORY and run the command CLEANUP
#
# The script that was waited for has perhaps made what this one is to make: look again before the work begins. Until
# then DIRECTORY is the other script's, so that one that ends while it waits removes nothing.

work_alone() {
    work=$2
    work_cleanup=${3:-:}
    exec 9>"$1"
    if ! flock --nonblock 9; then
        say "waiting for another build"
        flock 9
    fi
    trap 'rm -rf "$work"; $work_cleanup' EXIT
    rm -rf "$work"
    mkdir -p "$work"
}
