"""What Linux lets a process give up for itself: files (Landlock), system calls (seccomp), its user, resources.

No privilege and no installation is needed for any of it. It runs inside, before the program does, and nothing that
runs afterwards can take it back. Sources: landlock(7), seccomp(2), the kernel's ``uapi/linux/landlock.h``.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    Instruction = tuple[int, int, int, int]

NOBODY = 65534
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38


def _prctl(option: int, value: Any, more: Any = 0) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), more, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def never_gain_rights() -> None:
    """No setuid program raises this process or its children; a condition of what follows."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def hide_from_debuggers(hidden: bool) -> None:
    """Whether others of the same user may trace this process, or read its memory and its open files."""
    _prctl(_PR_SET_DUMPABLE, 0 if hidden else 1)


def adopt_orphans() -> None:
    """Descendants whose parent is gone become children of this process, not of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def become_nobody() -> None:
    """From root to an ordinary user, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def limit(name: str, value: int) -> None:
    """Lower a resource limit, as far as the system knows it (macOS has no RLIMIT_AS worth the name)."""
    which = getattr(resource, f"RLIMIT_{name}", None)
    if which is None:
        return
    ceiling = resource.getrlimit(which)[1]
    if ceiling != resource.RLIM_INFINITY:
        value = min(value, ceiling)
    try:
        resource.setrlimit(which, (value, value))
    except (ValueError, OSError):
        if sys.platform != "darwin":
            raise


def tasks_of(user: int) -> int:
    """Processes and threads of a user that are there already: RLIMIT_NPROC counts them all."""
    count = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.stat(f"/proc/{entry}").st_uid == user:
                    count += os.stat(f"/proc/{entry}/task").st_nlink - 2
            except OSError:
                continue
    return count


# Landlock --------------------------------------------------------------------------------------------

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
#: Rights over files that each ABI knows: 13 at first, then REFER, TRUNCATE, and IOCTL_DEV from 5 on.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_ON_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 where there is none."""
    return max(0, _LIBC.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def _ruleset(files: int, network: int, scoped: int, abi: int) -> int:
    attributes = struct.pack("QQQ", files, network, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    descriptor = _LIBC.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    return int(descriptor)


def _enforce(ruleset: int) -> None:
    if _LIBC.syscall(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0)):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


def only_these_files(read: Iterable[int], write: Iterable[int], devices: Iterable[int], abi: int) -> None:
    """From here on, opening anything outside these descriptors' files and folders fails, and so does TCP.

    Covers open, execute, create, remove, rename, link, truncate (from ABI 3), TCP (from 4), and from ABI 6
    signals and abstract sockets towards processes outside. Not the changing of modes, owners, times and extended
    attributes, nor other sockets: ``without_calls`` refuses those.
    """
    everything = (1 << _FILE_RIGHTS.get(abi, 16)) - 1
    ruleset = _ruleset(everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0, abi)
    for descriptors, rights in (
        (read, _EXECUTE | _READ_FILE | _READ_DIR),
        (write, everything & ~_IOCTL_DEV),
        (devices, _READ_FILE | _WRITE_FILE),
    ):
        for descriptor in descriptors:
            allowed = rights & everything
            if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
                allowed &= _ON_A_FILE
            rule = struct.pack("=Qi", allowed, descriptor)
            if _LIBC.syscall(_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0)):
                raise OSError(ctypes.get_errno(), "landlock_add_rule")
    _enforce(ruleset)


def no_signals_to_others() -> None:
    """From here on signals reach this process and its descendants alone. Needs ABI 6."""
    _enforce(_ruleset(0, 0, 2, 6))


# seccomp ---------------------------------------------------------------------------------------------

#: name → number on x86-64, on arm64 (None: it has no such call)
_NUMBERS: dict[str, tuple[int, int | None]] = {
    # other processes and the kernel itself: refused in every sandbox
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "memfd_create": (319, 279),  # memory that no resource limit counts
    "memfd_secret": (447, 447),
    # what reaches outside where there are no namespaces
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),  # of a file that may be read only, too: whoever owns it may
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "shmget": (29, 194),
    "shmat": (30, 196),  # numbers of what is there already can be guessed
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "setsid": (112, 157),  # so that one signal to the group reaches everybody in it
    "setpgid": (109, 154),
    # with conditions
    "clone": (56, 220),
    "clone3": (435, 435),
    "prlimit64": (302, 261),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
_SIGNALS = ["tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal"]
_names = list(_NUMBERS)
_ALWAYS = _names[: _names.index("socket")]
_LEAVING = ["setsid", "setpgid"]
_OUTSIDE = _names[_names.index("socket") : _names.index("setsid")]

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_SET_FILE_FLAGS = [0x40086602, 0x40046602, 0x401C5820]  # FS_IOC_SETFLAGS (64 and 32 bits), FS_IOC_FSSETXATTR
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_LOAD, _EQUAL, _ANY_BIT, _GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06


def _if_argument(number: int, argument: int, test: int, values: list[int], verdict: int) -> list[Instruction]:
    """``if call == number and the low half of an argument passes the test for any value: return verdict``."""
    tests = [(test, 0, 1, value) for value in values]
    body: list[Instruction] = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for one in tests:
        body += [one, (_RETURN, 0, 0, verdict)]
    body += [(_LOAD, 0, 0, 0)]
    return [(_EQUAL, 0, len(body), number), *body]


def _unless_argument(number: int, argument: int, values: list[int], verdict: int) -> list[Instruction]:
    """``if call == number and an argument is none of the values: return verdict``."""
    body: list[Instruction] = [(_LOAD, 0, 0, 16 + 8 * argument)]
    body += [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    body += [(_RETURN, 0, 0, verdict), (_LOAD, 0, 0, 0)]
    return [(_EQUAL, 0, len(body), number), *body]


def _filter(outside: bool, leaving: bool, signals_to: int | None) -> list[Instruction]:
    audit, column = _ARCHITECTURES[os.uname().machine]
    number = {name: numbers[column] for name, numbers in _NUMBERS.items()}
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),  # 32-bit calls have other numbers
        (_LOAD, 0, 0, 0),
    ]
    if column == 0:
        program += [(_GREATER_EQUAL, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]  # x32 calls
    refused = _ALWAYS + (_OUTSIDE if outside else [])
    refused += ([] if leaving else _LEAVING) + (_SIGNALS if signals_to else [])
    for name in refused:
        if (call := number[name]) is not None:
            program += [(_EQUAL, 0, 1, call), (_RETURN, 0, 0, _EPERM)]

    def call_of(name: str) -> int:
        found = number[name]
        assert found is not None
        return found

    program += _if_argument(call_of("clone"), 0, _ANY_BIT, [_NEW_NAMESPACES], _EPERM)
    # The flags of clone3 are in memory, where no filter can look; libc falls back to clone.
    program += [(_EQUAL, 0, 1, call_of("clone3")), (_RETURN, 0, 0, _ENOSYS)]
    program += _if_argument(call_of("ioctl"), 1, _EQUAL, [0x5412, 0x541C, 0x8901, 0x8902], _EPERM)
    if outside:
        program += _if_argument(call_of("ioctl"), 1, _EQUAL, _SET_FILE_FLAGS, _EPERM)
        program += _unless_argument(call_of("prlimit64"), 0, [0], _EPERM)
        program += _if_argument(call_of("fcntl"), 1, _EQUAL, [8, 10, 15], _EPERM)  # F_SETOWN, F_SETSIG, …_EX
    if signals_to:
        allowed = [0, signals_to, -signals_to & 0xFFFFFFFF]
        program += _unless_argument(call_of("kill"), 0, allowed, _EPERM)
        program += _unless_argument(call_of("tgkill"), 0, [signals_to], _EPERM)
    program.append((_RETURN, 0, 0, _ALLOW))
    return program


def seccomp_is_known() -> bool:
    """Whether the numbers of this machine's system calls are in the table."""
    return sys.platform == "linux" and os.uname().machine in _ARCHITECTURES and sys.maxsize > 2**32


def without_calls(*, outside: bool, leaving: bool, signals_to: int | None = None) -> None:
    """From here on these system calls fail with EPERM.

    Always: tracing, other processes' memory, namespaces, mounts, keys, BPF, io_uring, loading into the kernel.
    With ``outside``: also those that reach files, processes and networks which no namespace hides. Without
    ``leaving``: those with which a process leaves its group, and the signal that ends the group. With
    ``signals_to``: signals to any process but this one (for kernels whose Landlock cannot confine them).
    """
    program = _filter(outside, leaving, signals_to)
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(header))
