"""The inside of the sandbox, a process of its own: runs a program's functions against tests and writes `1` if all pass.

`sandbox.py` starts it with the program as standard input, and as its argument the file descriptor of the tests. It
imports nothing but Python's library and the two modules beside it. It is three processes:

    outer    enters new namespaces (user, mount, process, network, IPC, host name) and waits for the next one
    tester   process 1 of its namespace; makes a root of nothing but Python's library, and runs the tests
    program  process 1 of one more namespace, so that it sees no other process; runs the program and answers calls

The program never has the tests, the comparison or the verdict: the tester calls its functions through a pipe and gets
plain values back, each rebuilt from JSON as the exact built-in type, so no `__eq__` of the program's is ever asked. The
tester reads the tests after the program's process has been forked, so no memory of that process holds them.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from stages.lib.answers.row_tests import passes
from stages.lib.answers.sandbox_calls import Program, serve_program

PROGRAM_CPU_SECONDS, TESTS_CPU_SECONDS = 2, 10
MEMORY_BYTES = 512 << 20  # of address space, a process
ROOM = b"size=8m,nr_inodes=256,mode=0755"  # of the only place that can be written
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
NEW_PROCESSES = 0x20000000
READ_ONLY, NO_SETUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
# System calls that no function of an answer needs, by their numbers on x86-64 and on ARM64 (-1: has none): those that
# start processes and threads, open sockets, reach other processes, mount, or hold memory that no limit counts.
REFUSED = {
    "clone": (56, 220), "fork": (57, -1), "vfork": (58, -1), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "socket": (41, 198), "socketpair": (53, 199), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
}  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # the kernel's name for it, and a column of REFUSED


def check(returned: int, what: str) -> None:
    """Raise `OSError` for a system call that failed."""
    if returned:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    """Be the outer process, and in forks of it the other two."""
    os.dup2(int(sys.argv[1]), 3)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # when the parent dies
    user, group = os.getuid(), os.getgid()
    check(libc.unshare(NEW_NAMESPACES), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        Path("/proc/self", name).write_text(text)
    inside = os.fork()
    if inside:
        os.waitpid(inside, 0)
        return
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    make_root(libc)
    check(libc.unshare(NEW_PROCESSES), "unshare")
    calls, replies = os.pipe(), os.pipe()
    program = os.fork()
    if not program:
        os.setsid()  # else a signal to its process group would reach the others
        for number in (1, 2, 3):
            os.dup2(nothing, number)
        os.dup2(calls[0], 4)
        os.dup2(replies[1], 5)
        os.closerange(6, 256)
        confine(libc, PROGRAM_CPU_SECONDS)
        serve_program()
    verdict = os.dup(1)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    for number in (calls[0], replies[1], nothing):
        os.close(number)
    confine(libc, TESTS_CPU_SECONDS)
    os.write(2, b"ready\n")
    os.dup2(0, 2)
    with open(3, encoding="utf-8") as file:
        tests = json.load(file)
    if passes(tests, Program(calls[1], replies[0])):
        os.write(verdict, b"1")
    os.kill(program, signal.SIGKILL)
    os._exit(0)  # the end of process 1 ends all others


def make_root(libc: Any) -> None:
    """Make a new root: a small tmpfs with Python's library, read-only. No other file of the machine stays in sight."""
    library, root = Path(os.__file__).parent, Path("/proc")  # /proc is there on every Linux, and holds no library
    inside = root / library.relative_to("/")

    def mount(source: object, target: Path, kind: bytes | None, flags: int, options: bytes | None = None) -> None:
        returned = libc.mount(str(source).encode(), bytes(target), kind, ctypes.c_ulong(flags), options)
        check(returned, f"mount {target}")

    mount("none", Path("/"), None, RECURSIVE | PRIVATE)
    mount("tmpfs", root, b"tmpfs", NO_SETUID | NO_DEVICES, ROOM)
    inside.mkdir(parents=True)
    mount(library, inside, None, BIND | RECURSIVE)
    flags = os.statvfs(library).f_flag & 0b1111  # what the machine forbids there has to stay
    mount("none", inside, None, REMOUNT | BIND | READ_ONLY | NO_SETUID | NO_DEVICES | flags)
    if (inside / "site-packages").is_dir():
        mount("tmpfs", inside / "site-packages", b"tmpfs", READ_ONLY | NO_SETUID | NO_DEVICES, b"size=4k")
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), "pivot_root")  # the old root is now mounted over the new one
    check(libc.umount2(b".", 2), "umount2")
    os.chdir("/")


def confine(libc: Any, cpu_seconds: int) -> None:
    """Take from this process what it may not have: privileges, system calls, time and memory beyond the limits."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 4 << 20, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_MEMLOCK: 0,
    }  # fmt: skip
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # out of the bounding set; an error for numbers that are none
    check(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()), "capset")
    check(libc.prctl(4, 0, 0, 0, 0), "prctl")  # no other process may look into this one
    check(libc.prctl(38, 1, 0, 0, 0), "prctl")  # no new privileges, ever
    refuse_calls(libc)


def refuse_calls(libc: Any) -> None:
    """Have the kernel answer the system calls in `REFUSED` with "not permitted" (seccomp)."""
    if platform.machine() not in MACHINES:
        raise OSError(f"the system calls of {platform.machine()} are not listed here")
    machine, column = MACHINES[platform.machine()]
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, machine), (0x06, 0, 0, kill), (0x20, 0, 0, 0)]
    steps += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, kill)]  # the x32 calls of x86-64 have other numbers
    for numbers in REFUSED.values():
        steps += [(0x15, 0, 1, numbers[column]), (0x06, 0, 0, refuse)] if numbers[column] >= 0 else []
    steps.append((0x06, 0, 0, allow))
    code = b"".join(a.to_bytes(2, sys.byteorder) + bytes([b, c]) + d.to_bytes(4, sys.byteorder) for a, b, c, d in steps)
    held = ctypes.create_string_buffer(code, len(code))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    check(libc.prctl(22, 2, ctypes.byref(Filter(len(steps), ctypes.addressof(held))), 0, 0), "seccomp")
