"""Namespaces, mounts and limits of one check: what the code cannot see and cannot use up.

Linux only. Runs in the sandbox's own processes, before the code does. Standard library only, so
that the processes start fast and hold nothing worth reading.

The check's root is an empty tmpfs into which the standard library and the system's shared libraries
are bound read-only. Nothing else of the machine has a name there: no home, no /etc, no /proc.
"""

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import Any

NOBODY = 65534
_ROOT = "/tmp"  # where the new root is built; only this check sees it
_WORK = "/tmp"  # in the new root: the private working folder

# Of <sys/mount.h>, <linux/prctl.h> and <linux/capability.h>.
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC = 1, 2, 4, 8, 32, 4096, 16384
_PRIVATE, _RELATIME, _DETACH = 1 << 18, 1 << 21, 2
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION_3 = 0x20080522
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # system calls without a function in old C libraries
_KEYCTL = {"x86_64": 250, "aarch64": 219}
_JOIN_SESSION_KEYRING = 1

_LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    done = _LIBC.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _checked(done, f"mount {target}")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. A later change of user undoes it."""
    _LIBC.prctl(_SET_PDEATHSIG, 9, 0, 0, 0)


def is_root_of_machine() -> bool:
    """Whether this process can become another user. Root of a user namespace often cannot: only
    its own user exists there."""
    if os.geteuid() != 0:
        return False
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(int(start) <= NOBODY < int(start) + int(size) for start, _, size in ranges)


def enter_namespaces(as_root: bool) -> None:
    """Give this process's next child its own pid namespace, and this process its own mount,
    network, ipc and host-name namespaces. as_root: `is_root_of_machine`; others need a user
    namespace for that. Raises OSError if the machine does not allow it."""
    flags = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    if as_root:
        os.unshare(flags)
        return
    user, group = os.geteuid(), os.getegid()
    os.unshare(flags | os.CLONE_NEWUSER)
    _map_ids(os.open("/proc", os.O_RDONLY), 0, user, group)


def _map_ids(proc: int, inside: int, user: int, group: int) -> None:
    """Name the one user and group of this process's new user namespace. Closes `proc`."""
    texts = {"setgroups": "deny", "uid_map": f"{inside} {user} 1", "gid_map": f"{inside} {group} 1"}
    for name, text in texts.items():
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(file, text.encode())
        os.close(file)
    os.close(proc)


def change_root(library: str, file_bytes: int) -> None:
    """Move this mount namespace to a new root with the standard library, the system's libraries,
    /dev/null and an empty working folder of `file_bytes`, all else gone. library: the folder of
    the standard library."""
    _mount("", "/", "", _REC | _PRIVATE)
    links = [path for path in ("/lib", "/lib64") if os.path.islink(path)]
    targets = {path: os.readlink(path) for path in links}
    _mount("tmpfs", _ROOT, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in (library, "/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if os.path.isdir(path) and path not in links:
            _bind_folder(path)
    for path, target in targets.items():
        os.symlink(target, _ROOT + path)
    os.mkdir(f"{_ROOT}/dev")
    os.close(os.open(f"{_ROOT}/dev/null", os.O_CREAT | os.O_WRONLY))
    _mount("/dev/null", f"{_ROOT}/dev/null", "", _BIND)
    os.mkdir(_ROOT + _WORK)
    options = f"size={file_bytes},nr_inodes=1024,mode=1777"
    _mount("tmpfs", _ROOT + _WORK, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)
    _mount("", _ROOT, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(_ROOT)
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(0, f"pivot_root: unknown on {os.uname().machine}")
    _checked(_LIBC.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    _checked(_LIBC.umount2(b".", _DETACH), "umount the old root")
    os.chdir(_WORK)


def _bind_folder(path: str) -> None:
    """Bind a folder into the new root, read-only, with the flags that may not be cleared."""
    target = _ROOT + path
    os.makedirs(target, exist_ok=True)
    _mount(path, target, "", _BIND | _REC)
    kept = os.statvfs(path).f_flag
    flags = kept & (_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME)
    flags |= _RELATIME if kept & os.ST_RELATIME else 0
    _mount("", target, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | flags)


def open_proc() -> int:
    """A descriptor of /proc, for `drop_rights` after the root has changed."""
    return os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)


def drop_rights(proc: int, as_root: bool) -> None:
    """Become nobody in a user namespace of this process's own, without capabilities and without a
    way to new ones. The namespaces above then belong to another user namespace: nothing in them can
    be changed, mounts included."""
    if as_root:  # the kernel sets root no limit of processes
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    user, group = os.geteuid(), os.getegid()
    _LIBC.prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root
    os.unshare(os.CLONE_NEWUSER)
    limit = os.dup(proc)
    _map_ids(proc, NOBODY, user, group)
    with contextlib.suppress(OSError):  # /proc/sys may be read-only; this is a second wall
        file = os.open("sys/user/max_user_namespaces", os.O_WRONLY, dir_fd=limit)
        os.write(file, b"0")
        os.close(file)
    os.close(limit)
    keyctl = _KEYCTL.get(os.uname().machine)
    if keyctl is not None:  # the keys of the user's session are inherited; an empty ring is joined
        _LIBC.syscall(ctypes.c_long(keyctl), _JOIN_SESSION_KEYRING, None)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _checked(_LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _checked(_LIBC.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def set_limits(limits: dict[str, Any]) -> None:
    """The kernel's limits on this process and its children. limits: those of `sandbox.Limits`."""
    cpu = max(1, int(limits["cpu_seconds"]))
    values = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for name, value in values.items():
        hard = resource.getrlimit(name)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (allowed, allowed))
