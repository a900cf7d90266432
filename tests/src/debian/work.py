#!/usr/bin/python3
"""The work of a Debian guest, each kind in a thread of its own.

Reports with notes on the serial port (see `workload::heartbeat`) and takes orders there. The order `work KIND`
starts one kind of work. At its start each kind that has a memory checks what an earlier boot left, and
says how far that boot came (`found`); then it says how far it is (`progress`): everything up to that number has
been acknowledged, so it must be there whatever happens to the machine. A kind that finds something wrong
says `failed` and stops.
"""

import ctypes
import json
import os
import pathlib
import socket
import subprocess
import sys
import termios
import threading
import time
import zlib

BOOTS = pathlib.Path("/var/lib/boots")
# Seconds between two notes of work that acknowledges one thing after another.
PACE = 1
# Clients of pgbench, and transactions of each in a round.
CLIENTS, TRANSACTIONS = 2, 20
ECHO_PORT = 7

port = open("/dev/ttyS0", "r+b", buffering=0)
port_lock = threading.Lock()


def note(kind, **more):
    text = json.dumps({"note": kind, **more}, separators=(",", ":"))
    with port_lock:
        port.write(f"@perennial-note {text} {zlib.crc32(text.encode()):08x}\n".encode())


def run(*command, text=None):
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-300:]
        raise RuntimeError(f"{command[0]}: status {done.returncode}: {said}")
    return done.stdout


class Wrong(Exception):
    """What was acknowledged is not there."""


class Steps:
    """Says how far a kind of work is, at most once in PACE seconds."""

    def __init__(self, work):
        self.work, self.said = work, 0

    def reached(self, number):
        if time.monotonic() - self.said >= PACE:
            self.said = time.monotonic()
            note("progress", work=self.work, number=number)


def write_and_verify(work, disks, size):
    """Writes disks at the same time and reads them back with checksums, round after round."""
    each = [word for disk in disks for word in (f"--name={disk}", f"--filename=/dev/{disk}")]
    number = 0
    while True:
        run("fio", "--direct=1", "--ioengine=libaio", "--iodepth=4", "--rw=randwrite", "--bs=4k",
            f"--size={size}", "--verify=crc32c", "--verify_fatal=1", *each)
        number += 1
        note("progress", work=work, number=number, disks=disks)


def fio():
    """Writes the second disk."""
    write_and_verify("fio", ["vdb"], "2m")


def disks():
    """Writes all disks but the first, on which the root is, and those that are read-only."""
    found = sorted(disk.name for disk in pathlib.Path("/sys/block").glob("vd*")
                   if disk.name != "vda" and (disk / "ro").read_text().strip() == "0")
    write_and_verify("disks", found, "1m")


def sql(text):
    return run("runuser", "-u", "postgres", "--", "psql", "-XqAt", "-vON_ERROR_STOP=1",
               text=text).strip()


postgres_lock = threading.Lock()


def start_postgres():
    """Starts the server. It is there for both kinds of work."""
    with postgres_lock:
        run("systemctl", "start", "postgresql")
        for _ in range(600):
            if subprocess.run(["pg_isready", "-q"]).returncode == 0:
                break
            time.sleep(0.5)
        if sql("SHOW synchronous_commit; SHOW fsync;").split() != ["on", "on"]:
            raise RuntimeError("PostgreSQL does not wait for its disk")


def commits():
    """Commits numbered rows one after another. Each row is acknowledged before the next."""
    start_postgres()
    sql("CREATE TABLE IF NOT EXISTS commits (number bigint PRIMARY KEY)")
    count, newest = sql("SELECT count(*), coalesce(max(number), 0) FROM commits").split("|")
    if count != newest:
        raise Wrong(f"{count} rows, the newest is {newest}")
    note("found", work="commits", number=int(newest))
    client = subprocess.Popen(
        ["runuser", "-u", "postgres", "--", "psql", "-XqAt", "-vON_ERROR_STOP=1"], text=True,
        bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    steps, number = Steps("commits"), int(newest)
    while True:
        number += 1
        client.stdin.write(f"INSERT INTO commits VALUES ({number});\n\\echo {number}\n")
        said = client.stdout.readline().strip()
        if said != str(number):
            raise Wrong(f"commit {number} was answered by `{said}`")
        steps.reached(number)


# Moves money between an account and the ledger: the sum of all accounts is that of the ledger.
TRANSACTION = """
\\set account random(1, 1000)
\\set delta random(-5000, 5000)
BEGIN;
UPDATE accounts SET balance = balance + :delta WHERE id = :account;
INSERT INTO ledger VALUES (:account, :delta);
END;
"""


def pgbench():
    """Runs pgbench's transactions, and compares their count and sums with what the tables have."""
    start_postgres()
    sql("""
        BEGIN;
        CREATE TABLE IF NOT EXISTS accounts (id int PRIMARY KEY, balance int NOT NULL);
        CREATE TABLE IF NOT EXISTS ledger (account int NOT NULL, delta int NOT NULL);
        INSERT INTO accounts SELECT id, 0 FROM generate_series(1, 1000) AS id ON CONFLICT DO NOTHING;
        COMMIT;
    """)
    script = pathlib.Path("/run/transaction.sql")
    script.write_text(TRANSACTION)
    number = None
    while True:
        count, ledger, accounts = sql("""
            SELECT count(*) FROM ledger; SELECT coalesce(sum(delta), 0) FROM ledger;
            SELECT sum(balance) FROM accounts;
        """).split()
        if ledger != accounts:
            raise Wrong(f"the ledger's sum is {ledger}, the accounts' {accounts}")
        if number is None:
            number = int(count)
            note("found", work="pgbench", number=number)
        if int(count) != number:
            raise Wrong(f"{count} transactions are there, {number} were acknowledged")
        note("progress", work="pgbench", number=number)
        said = run("runuser", "-u", "postgres", "--", "pgbench", "-n", "-f", str(script),
                   f"-c{CLIENTS}", f"-t{TRANSACTIONS}")
        whole = CLIENTS * TRANSACTIONS
        if f"actually processed: {whole}/{whole}" not in said:
            raise Wrong(said)
        number += whole


def redis():
    """Increments a counter that redis writes to its append-only file before it answers."""
    server = subprocess.Popen(
        ["redis-server", "--dir", "/var/lib/redis", "--appendonly", "yes", "--appendfsync",
         "always", "--save", "", "--logfile", "/run/redis.log"])
    for _ in range(600):
        if server.poll() is not None:
            raise Wrong(pathlib.Path("/run/redis.log").read_text()[-300:])
        try:
            client = socket.create_connection(("127.0.0.1", 6379)).makefile("rwb")
            client.write(b"INCRBY counter 0\r\n")
            client.flush()
            answer = client.readline()
            if answer.startswith(b":"):
                break
        except OSError:
            pass
        time.sleep(0.5)
    number = int(answer[1:])
    note("found", work="redis", number=number)
    steps = Steps("redis")
    while True:
        client.write(b"INCR counter\r\n")
        client.flush()
        number += 1
        answer = client.readline().decode().strip()
        if answer != f":{number}":
            raise Wrong(f"increment {number} was answered by `{answer}`")
        steps.reached(number)


def stress():
    """Lets stress-ng verify CPUs, memory and timers, round after round."""
    number, cpus = 0, str(os.cpu_count())
    while True:
        run("stress-ng", "--verify", "--timeout", "5", "--cpu", cpus, "--vm", "1", "--vm-bytes",
            "32m", "--timer", "1", "--timer-freq", "100", "--timerfd", "1", "--timerfd-freq", "100",
            "--clock", "1", "--nanosleep", "1", "--oomable")
        number += 1
        note("progress", work="stress", number=number)


def echo():
    """Sends back what arrives, by TCP and by UDP."""
    listener = socket.create_server(("", ECHO_PORT))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("", ECHO_PORT))

    def return_datagrams():
        while True:
            data, sender = datagrams.recvfrom(2048)
            try:
                datagrams.sendto(data, sender)
            except OSError:
                pass  # A datagram may be lost.

    def return_stream(stream):
        while data := stream.recv(64 << 10):
            stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)

    threading.Thread(target=return_datagrams, daemon=True).start()
    note("echo")
    while True:
        stream, _ = listener.accept()
        threading.Thread(target=return_stream, args=(stream,), daemon=True).start()


def iperf3():
    """Serves iperf3's measurements."""
    server = subprocess.Popen(["iperf3", "-s", "--forceflush"], stdout=subprocess.PIPE, text=True)
    server.stdout.readline()
    note("iperf3")
    for _ in server.stdout:
        pass
    raise Wrong(f"the server ended with status {server.wait()}")


UPGRADE = pathlib.Path("/var/lib/upgrade")


def kernel():
    return f"linux-image-{os.uname().release}"


def pack_kernel():
    """Makes a package of the kernel that runs: the same files with the same names, and a higher version."""
    tree, info = UPGRADE / "tree", pathlib.Path("/var/lib/dpkg/info")
    (tree / "DEBIAN").mkdir(parents=True)
    files = [name for name in run("dpkg", "-L", kernel()).splitlines()
             if os.path.lexists(name) and not os.path.isdir(name)]
    run("cp", "-a", "--parents", *files, str(tree))
    control = [line for line in run("dpkg-query", "-s", kernel()).splitlines()
               if not line.startswith("Status:")]
    control = [f"{line}+next" if line.startswith("Version:") else line for line in control]
    (tree / "DEBIAN/control").write_text("\n".join(control) + "\n")
    for script in ("preinst", "postinst", "prerm", "postrm"):
        if (info / f"{kernel()}.{script}").exists():
            run("cp", "-a", str(info / f"{kernel()}.{script}"), str(tree / "DEBIAN" / script))
    run("dpkg-deb", "--build", "-Znone", str(tree), str(UPGRADE / "next.deb"))
    run("rm", "-r", str(tree))
    os.sync()
    note("packed", files=len(files))


def upgrade(most):
    """Upgrades the kernel. Resets the machine after this number of writes to its disk: what is in memory is lost."""
    def writes():
        return int(pathlib.Path("/sys/block/vda/stat").read_text().split()[4])

    started = writes()
    with open("/run/dpkg.log", "w") as log:
        dpkg = subprocess.Popen(["dpkg", "-i", str(UPGRADE / "next.deb")], stdout=log, stderr=log)
        while dpkg.poll() is None:
            if writes() - started >= most:
                pathlib.Path("/proc/sysrq-trigger").write_text("b")
            time.sleep(0.02)
    if dpkg.returncode != 0:
        raise Wrong(pathlib.Path("/run/dpkg.log").read_text()[-300:])
    installed = run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", kernel())
    note("upgraded", writes=writes() - started, installed=installed)


def install_kernel(size):
    """Installs the package of another kernel, which the second disk holds."""
    package = UPGRADE.with_suffix(".deb")
    with open("/dev/vdb", "rb") as disk:
        package.write_bytes(disk.read(size))
    run("dpkg", "-i", str(package))
    package.unlink()
    os.sync()
    note("installed")


def network(address):
    """Waits until cloud-init's configuration of the network is in force."""
    while f" {address}/" not in run("ip", "-4", "-o", "address") or not run("ip", "route"):
        time.sleep(0.5)
    note("network")


def is_password(user, password):
    """Whether a user can log in with a password."""
    shadow = [line.split(":") for line in pathlib.Path("/etc/shadow").read_text().splitlines()]
    hashed = next((words[1] for words in shadow if words[0] == user), "!").encode()
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    return crypt(password.encode(), hashed) == hashed


def describe(password):
    """Says what cloud-init has made of this guest, and what it reads of the machine."""
    sys.path.append("/usr/lib/python3/dist-packages")
    from cloudinit import dmi
    root, sectors = os.statvfs("/"), pathlib.Path("/sys/class/block/vda1/size").read_text()
    note("describe", hostname=socket.gethostname(), password=is_password("debian", password),
         partition=int(sectors) * 512, root=root.f_blocks * root.f_frsize,
         uuid=dmi.read_dmi_data("system-uuid"), release=os.uname().release)


KINDS = {kind.__name__: kind for kind in (fio, disks, commits, pgbench, redis, stress, echo, iperf3)}


def work(kind):
    try:
        KINDS[kind]()
    except Exception as error:
        note("failed", work=kind, why=f"{type(error).__name__}: {error}")


def obey(order):
    match order:
        case ["work", kind]:
            threading.Thread(target=work, args=(kind,), daemon=True).start()
        case ["network", address]:
            network(address)
        case ["describe", password]:
            describe(password)
        case ["install-kernel", size]:
            install_kernel(int(size))
        case ["pack-kernel"]:
            pack_kernel()
        case ["upgrade", most]:
            upgrade(int(most))
        case ["reboot"]:
            run("update-grub")
            note("reboot")
            run("systemctl", "reboot")


def main():
    modes = termios.tcgetattr(port)
    modes[1] &= ~termios.OPOST
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(port, termios.TCSANOW, modes)
    with BOOTS.open("a") as boots:
        boots.write("\n")
        os.fsync(boots.fileno())
    note("boot", vcpus=os.cpu_count(), release=os.uname().release,
         boots=len(BOOTS.read_text()), cmdline=pathlib.Path("/proc/cmdline").read_text().strip())
    for line in port:
        try:
            obey(line.decode(errors="replace").split())
        except Exception as error:
            note("failed", work="order", why=f"{line!r}: {error}")


if __name__ == "__main__":
    sys.exit(main())
