# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
A sandbox for Python that a language model wrote: `run_python(code)` returns what the program printed, or its error.

It is an example's helper and no part of the method, hence it is here and not in the package. Linux only; it needs
`libseccomp` (`apt install libseccomp2`) and should have bubblewrap (`apt install bubblewrap`).

Every call is a new process: the interpreter of the caller, with an empty environment and no file descriptor but its
input and its output. Before the program starts, two walls are put up, by whichever means the system offers:

- **Files and processes.** `"bubblewrap"`, the stronger, where namespaces may be made: the program sees the standard
  library, installed packages and system libraries read-only, a small directory in memory to write in, itself as
  the only process, and no network. `"landlock"`, where they may not (most containers): the same files can be read and
  nothing can be written.
- **System calls** (seccomp, in both cases): a list of those that computing needs. Whatever starts a process or a
  thread, runs another program, opens a socket, sends a signal, traces, mounts, or changes limits or permissions is
  refused by the kernel. The program being one process with one thread, the limits of a process are its limits.

On the first call the sandbox is attacked from inside. If an attack succeeds, or neither wall can be built, every call
raises [`SandboxUnavailable`]: nothing ever runs unprotected.

It protects from what a model may write by accident or learn to write for its reward: endless loops, memory, fork and
output bombs; reading the environment, home or the repository; the network; signals to the trainer and to other
programs; files and processes left behind. It does not protect from:

- bugs of the kernel or the processor, and side channels (timing, load). For code of people who mean harm use a virtual
  machine of its own;
- a slowdown: each call may use a core for `cpu_seconds` and hold `memory_mb`. With bubblewrap it may also hold, until
  it ends, the kernel memory of the empty files that it can create in that time (0.7 GB were measured in 5 seconds);
- reading what is installed (`site-packages` and system libraries are visible: keep no secrets there). With
  `"landlock"` it can also ask whether a path exists, its size and date, and where a symbolic link points;
- output made to fool a reader, be it the model itself or a reward that looks for an answer in tool output.
"""

import ctypes
import functools
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile


# Each costs time and memory in the calling process's place; sympy needs about 0.5 s of CPU and 100 MB to be imported.
CPU_SECONDS = 5
WALL_SECONDS = 10
MEMORY_MB = 1024
FILES_MB = 16
OUTPUT_CHARACTERS = 4000
# What a program may write to its output before it is stopped; enough for the head and tail that are shown.
OUTPUT_BYTES = 1 << 20
CODE_CHARACTERS = 100_000


class SandboxUnavailable(RuntimeError):
    """The system offers no isolation that holds, so no program is run."""


def run_python(
    code: str,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
    memory_mb: int = MEMORY_MB,
    output_characters: int = OUTPUT_CHARACTERS,
    isolation: str | None = None,
) -> str:
    """
    Run a Python program in the sandbox. May be called from several threads at once.

    Args:
        code (`str`):
            The program. The value of a last line that is an expression is printed, as in a notebook.
        cpu_seconds (`int`, *optional*, defaults to 5):
            Processor time it may use, in whole seconds.
        wall_seconds (`float`, *optional*, defaults to 10):
            Time it may take, in seconds, with the start of the interpreter (about 0.1 s).
        memory_mb (`int`, *optional*, defaults to 1024):
            Address space it may use, in MiB, with the interpreter's own.
        output_characters (`int`, *optional*, defaults to 4000):
            Longer output loses its middle, with a note in its place.
        isolation (`str`, *optional*):
            `"bubblewrap"` or `"landlock"`; the strongest that works here if not set.

    Returns:
        `str`: What the program printed, and a line that begins with `Error:` if it was stopped. Never raises for
            anything the program does.

    Raises:
        `SandboxUnavailable`: If the system offers no isolation that holds, with the reasons and the way out.
        `ValueError`: If `isolation` is unknown.
    """
    isolation = _checked_isolation(isolation)
    if not isinstance(code, str):
        return f"Error: `code` must be a string, not {type(code).__name__}."
    if len(code) > CODE_CHARACTERS:
        return f"Error: the program is longer than {CODE_CHARACTERS} characters."
    output, ending = _run(code, isolation, cpu_seconds, wall_seconds, memory_mb)
    if len(output) > output_characters:
        half = output_characters // 2
        cut = len(output) - 2 * half
        output = f"{output[:half]}\n[... {cut} characters left out ...]\n{output[len(output) - half :]}"
    text = "\n".join(part for part in (output.rstrip(), ending) if part)
    return text or "(The program printed nothing.)"


# ---- In the calling process ----


def _run(code: str, isolation: str, cpu_seconds: int, wall_seconds: float, memory_mb: int) -> tuple[str, str]:
    """What the program printed, at most `OUTPUT_BYTES` of it, and how it was stopped ("" if it ended by itself)."""
    request = {
        "code": code,
        "isolation": isolation,
        "packages": _packages(),
        "readable": _readable(),
        "limits": {
            "RLIMIT_CPU": cpu_seconds,
            "RLIMIT_AS": memory_mb << 20,
            "RLIMIT_FSIZE": OUTPUT_BYTES,  # of any file, its output included
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        },
    }
    # Hash randomisation is off so that the same program prints the same; threads are refused, so BLAS must not try.
    environment = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:  # without a name: nothing is left
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            _command(isolation), stdin=stdin, stdout=stdout, stderr=stdout, env=environment, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(wall_seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            process.kill()  # bubblewrap takes its whole process namespace with it (--die-with-parent)
            process.wait()
        size = stdout.seek(0, os.SEEK_END)
        stdout.seek(0)
        output = stdout.read(OUTPUT_BYTES).decode(errors="replace")
        stdin.seek(0)
        confined = stdin.read().endswith(_CONFINED)
    if not confined and not timed_out:
        raise SandboxUnavailable(f"The sandbox could not be set up: {output[-500:].strip() or 'it ended silently'}")
    if timed_out:
        return output, f"Error: stopped after {wall_seconds} seconds."
    # Ended by a signal: negative, or 128 + signal where bubblewrap passes it on.
    number = -process.returncode if process.returncode < 0 else process.returncode - 128
    if number in (signal.SIGKILL, signal.SIGXCPU):
        return output, f"Error: stopped after {cpu_seconds} seconds of CPU time."
    if size >= OUTPUT_BYTES:
        return output, f"Error: stopped after {OUTPUT_BYTES >> 20} MB of output."
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL):
        return output, f"Error: the interpreter crashed ({signal.Signals(number).name}); too deep a recursion?"
    if number > 0:
        return output, f"Error: stopped by signal {number}."
    return output, f"Error: exit status {process.returncode}." if process.returncode and not output else ""


def _packages() -> list[str]:
    """Where packages are installed: of the virtual environment, the system and the user, not the repository."""
    return _existing(*(path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")))


def _readable() -> list[str]:
    """What the program may read: the interpreter, its library, installed packages, system libraries."""
    return _existing(
        os.path.realpath(sys.executable),
        os.path.join(sys.base_prefix, "lib"),
        *_packages(),
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"),
    )


def _existing(*paths: str) -> list[str]:
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _command(isolation: str) -> list[str]:
    python = [os.path.realpath(sys.executable), "-s", "-S", "-B"]
    if isolation == "landlock":
        return [*python, os.path.abspath(__file__)]
    inside = "/run/sandbox.py"
    return [
        "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--size", str(FILES_MB << 20), "--tmpfs", "/tmp",  # first, since what is bound may lie below it
        *(part for path in _readable() for part in ("--ro-bind", path, path)),
        "--ro-bind", os.path.abspath(__file__), inside,
        "--remount-ro", "/",  # else the root, which is in memory too, could be filled
        "--chdir", "/tmp", "--", *python, inside,
    ]  # fmt: skip


def _checked_isolation(isolation: str | None) -> str:
    """The isolation to use, after it has withstood [`_SELF_TEST`] once."""
    if isolation not in (None, "bubblewrap", "landlock"):
        raise ValueError(
            f"isolation={isolation!r} is unknown. Use 'bubblewrap', 'landlock', or None for the strongest."
        )
    reasons = []
    for candidate in (isolation,) if isolation else ("bubblewrap", "landlock"):
        reason = _why_not(candidate)
        if reason is None:
            return candidate
        reasons.append(f"- {candidate}: {reason}")
    raise SandboxUnavailable(
        "Model-written code is not run, since this system offers no isolation that holds:\n"
        + "\n".join(reasons)
        + "\nInstall bubblewrap and libseccomp (`apt install bubblewrap libseccomp2`) on Linux. In a container also "
        "allow user namespaces, or use a kernel with Landlock (5.13 or later, `landlock` in /sys/kernel/security/lsm)."
    )


# Each of these attacks must fail. The process, the file and its secret are the caller's.
_SELF_TEST = """
import os, socket
def tried(attack, *arguments):
    try:
        attack(*arguments)
    except OSError:
        return []
    return [attack.__name__]
done = tried(os.fork) + tried(socket.socket) + tried(os.kill, {pid}, 0) + tried(open, {secret!r})
done += tried(os.listdir, "/proc/{pid}")
tried(open, {secret!r}, "w")
print("It did not withstand: " + ", ".join(done) if done else "confined")
"""


@functools.cache
def _why_not(isolation: str) -> str | None:
    """Why this isolation cannot be used here, or None if it can."""
    if sys.platform != "linux":
        return f"needs Linux, and this is {platform.system()}"
    if isolation == "bubblewrap" and shutil.which("bwrap") is None:
        return "`bwrap` is not installed"
    with tempfile.NamedTemporaryFile("w+") as secret:
        secret.write("secret")
        secret.flush()
        attacks = _SELF_TEST.format(pid=os.getpid(), secret=secret.name)
        try:
            output, ending = _run(attacks, isolation, CPU_SECONDS, 30, MEMORY_MB)
        except (OSError, SandboxUnavailable) as error:
            return str(error)
        if output != "confined\n" or ending:
            return (output + ending).strip()
        if os.path.getsize(secret.name) != len("secret"):
            return "It did not withstand: writing"
    return None


# ---- In the sandboxed process, which runs this file ----

# What computing needs, by the names of libseccomp; those that an architecture has not are passed over. Not in it,
# since Landlock does not cover them: truncate, chmod, chown, utime, setxattr, and what reaches other processes.
_SYSTEM_CALLS = """
read readv pread64 preadv write writev pwrite64 pwritev lseek close close_range dup dup2 dup3 pipe pipe2 poll ppoll
select pselect6 open openat creat fstat stat lstat newfstatat fstatat64 statx access faccessat faccessat2 readlink
readlinkat getcwd chdir fchdir getdents getdents64 fsync fdatasync ftruncate mkdir mkdirat unlink unlinkat rmdir rename
renameat renameat2 symlink symlinkat link linkat umask statfs fstatfs fadvise64
brk mmap munmap mprotect mremap madvise msync
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend sigaltstack pause alarm setitimer getitimer
clock_gettime clock_getres gettimeofday time times nanosleep clock_nanosleep getrusage restart_syscall
getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getpgrp getgroups uname sysinfo
getcpu sched_yield sched_getaffinity getrlimit getrandom futex set_robust_list rseq exit exit_group
"""
_CONFINED = b"confined"  # appended to the request once both walls stand
# (system call, number of the argument, values it may have)
_RESTRICTED_CALLS = (
    ("fcntl", 1, (0, 1, 2, 3, 4, 1030)),  # duplicate, and flags; not F_SETOWN, which sends signals to others
    ("ioctl", 1, (0x5401, 0x5413, 0x5450, 0x5451)),  # is it a terminal and how wide, close on exec
    ("prlimit64", 2, (0,)),  # read limits, not set them
)


def _confined_main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig, pr_set_dumpable, pr_set_no_new_privs = 1, 4, 38
    _check(libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0), "prctl")  # do not outlive the caller
    _check(libc.prctl(pr_set_dumpable, 0, 0, 0, 0), "prctl")  # no core files, whatever the system does with them
    _check(libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0), "prctl")
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if request["isolation"] == "landlock":
        _confine_files(libc, request["readable"])
    _confine_system_calls()
    os.write(0, _CONFINED)
    os.close(0)
    _, writing_end = os.pipe()  # standard input is this pipe now, and at its end
    os.close(writing_end)
    sys.path[:] = [*sys.path[1:], *request["packages"]]
    _execute(request["code"])


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _confine_files(libc: ctypes.CDLL, readable: list[str]) -> None:
    """Landlock: reading of these files and directories, and nothing else. (linux/landlock.h)"""
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # the same on every architecture
    version = _check(libc.syscall(create_ruleset, None, 0, 1), "Landlock is not in this kernel, or not switched on")
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # how many kinds of access this version knows
    handled = ctypes.c_uint64((1 << rights) - 1)
    read_file, read_directory = 1 << 2, 1 << 3
    ruleset = _check(libc.syscall(create_ruleset, ctypes.byref(handled), 8, 0), "landlock_create_ruleset")
    for path in readable:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = read_file | (read_directory if os.path.isdir(path) else 0)
        rule = allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)  # packed
        _check(libc.syscall(add_rule, ruleset, 1, rule, 0), f"landlock_add_rule({path})")
        os.close(opened)
    _check(libc.syscall(restrict_self, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


class _Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _confine_system_calls() -> None:
    """Seccomp: `_SYSTEM_CALLS` and `_RESTRICTED_CALLS`; all others fail with EPERM. (seccomp.h of libseccomp)"""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    allow, refuse, equal = 0x7FFF0000, 0x00050000 | 1, 4
    context = ctypes.c_void_p(library.seccomp_init(refuse))

    def add(name: str, *comparisons: _Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            array = (_Comparison * len(comparisons))(*comparisons)
            result = library.seccomp_rule_add_array(context, allow, number, len(comparisons), array)
            if result < 0:
                raise OSError(-result, f"seccomp_rule_add({name})")

    for name in _SYSTEM_CALLS.split():
        add(name)
    for name, argument, values in _RESTRICTED_CALLS:
        for value in values:
            add(name, _Comparison(argument, equal, value, 0))
    result = library.seccomp_load(context)
    if result < 0:
        raise OSError(-result, "seccomp_load")


def _execute(code: str) -> None:
    """Run the program, print the value of a last expression, and let errors show the program's lines alone."""
    import ast
    import linecache
    import traceback

    name = "<program>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    scope = {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit}  # both come from `site`, which is left out
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), scope)
        value = eval(compile(ast.Expression(last.value), name, "eval"), scope) if last else None
        if value is not None:
            print(repr(value))
    except SystemExit:
        raise
    except BaseException as error:
        report = traceback.TracebackException.from_exception(error)
        report.stack = traceback.StackSummary.from_list([frame for frame in report.stack if frame.filename == name])
        sys.stdout.flush()
        print("".join(report.format(chain=False)), end="", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _confined_main()
