"""Attacks on `examples/sandbox.py`. Each must end in text that the model sees, do no harm, and leave nothing behind.

Attacks are written so that even with the walls down they do little: signals go to processes of the test's own, bombs
have an end.
"""

import importlib.util
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent.parent / "examples" / "sandbox.py"
ROOT = SCRIPT.parent.parent


def load(path=SCRIPT):
    spec = importlib.util.spec_from_file_location(f"sandbox_{hash(path)}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sandbox = load()
# In every attack: `tried` calls something that must be refused, and reports it if it was not.
PRELUDE = """
import ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def tried(what, function, *arguments):
    try:
        value = function(*arguments)
    except (OSError, RuntimeError, ValueError) as error:
        print("refused:", what, type(error).__name__)
        return None
    print("BREACH:", what, value)
    return value
def tried_call(what, function, *arguments):
    if function(*arguments) == -1:
        print("refused:", what, ctypes.get_errno())
    else:
        print("BREACH:", what)
"""


@pytest.fixture(params=["bubblewrap", "landlock"])
def isolation(request):
    if reason := sandbox._why_not(request.param):
        pytest.skip(f"no {request.param} here: {reason}")
    return request.param


def sandboxed_processes() -> set[int]:
    """Processes that run the sandbox's file, or are still to be waited for by this process. With bubblewrap that is
    its init, which lives as long as anything in its namespace."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if str(SCRIPT).encode() in command or (parent == os.getpid() and not command):
            found.add(int(entry.name))
    return found


def gone(processes, seconds=3) -> bool:
    deadline = time.monotonic() + seconds
    while sandboxed_processes() - processes:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def attack(isolation, tmp_path, monkeypatch):
    """Runs an attack: what the model sees. Afterwards, nothing may be left, and the next program must run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    processes, descriptors = sandboxed_processes(), os.listdir("/proc/self/fd")

    def run(code, prelude=PRELUDE, **limits):
        limits = {"cpu_seconds": 3, "wall_seconds": 10, "memory_mb": 512, "output_characters": 6000} | limits
        seen = sandbox.run_python(prelude + textwrap.dedent(code), isolation=isolation, **limits)
        assert "BREACH" not in seen, seen
        assert len(seen) < limits["output_characters"] + 200
        return seen

    yield run
    assert gone(processes)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert sandbox.run_python("6 * 7", isolation=isolation) == "42"


@pytest.fixture
def victim():
    """A process of the same user that does no harm."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
    yield process
    assert process.poll() is None, "it was killed"
    process.kill()
    process.wait()


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("hunter2")
    path.chmod(0o644)
    before = path.stat()
    yield path
    after = path.stat()
    assert path.read_text() == "hunter2" and (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.txt", "temporary"]


# ---- What it is for ----


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("1 + 1", "2"),
        ("import numpy, random\nx = numpy.random.default_rng().random() + random.random()\n0 <= x < 2", "True"),
        ("import signal, time, datetime\nsignal.alarm(0), time.time() > 0, datetime.datetime.now().year > 0", None),
        ("print('a'); print('b')", "a\nb"),
        ("x = 3\nx ** 2", "9"),
        ("import sympy\nsympy.solve('x**2 - 4')", "[-2, 2]"),
        ("import numpy\nprint(numpy.linalg.det(numpy.eye(40) * 1.0))", "1.0"),
        ("import math, itertools, fractions, collections\nfractions.Fraction(1, 3)", "Fraction(1, 3)"),
        ("pass", "(The program printed nothing.)"),
        ("None", "(The program printed nothing.)"),
        ("", "(The program printed nothing.)"),
        ("import sys\nprint('a', file=sys.stderr); sys.exit(3)", "a"),
        ("exit()", "(The program printed nothing.)"),
        ("if __name__ == '__main__': print('main')", "main"),
        ("print('\\u00e9\\U0001f600')", "\u00e9\U0001f600"),
        ("print(list({'a', 'b', 'c', 'd'}))", None),
    ],
)
def test_programs_compute_and_their_output_is_seen(isolation, code, seen):
    first = sandbox.run_python(code, isolation=isolation)
    assert first == (seen if seen is not None else sandbox.run_python(code, isolation=isolation))


def test_errors_show_the_programs_lines_alone(isolation):
    seen = sandbox.run_python("def f(x):\n    return 1 / x\nprint('before')\nf(0)", isolation=isolation)
    assert seen.startswith("before\nTraceback (most recent call last):\n") and seen.endswith("division by zero")
    assert 'File "<program>", line 2, in f\n    return 1 / x' in seen and "sandbox.py" not in seen
    assert "SyntaxError: '(' was never closed" in sandbox.run_python("print(", isolation=isolation)
    assert "EOFError" in sandbox.run_python("input()", isolation=isolation)


def test_long_output_loses_its_middle_with_a_note(isolation):
    seen = sandbox.run_python("print('a' * 500 + 'b' * 5000 + 'c' * 500)", isolation=isolation, output_characters=1000)
    assert seen == "a" * 500 + "\n[... 5001 characters left out ...]\n" + "c" * 499


@pytest.mark.parametrize("code", [None, 3, ["print(1)"], "x" * 200_000, "print(1)\0", "'\ud800'", "\x0c\x00"])
def test_what_is_no_program_is_told(isolation, code):
    assert "Error" in sandbox.run_python(code, isolation=isolation)


def test_concurrent_programs_do_not_mix(isolation):
    with ThreadPoolExecutor(4) as pool:
        programs = [f"import time; time.sleep(0.05); print({i} * 1000)" for i in range(8)]
        seen = list(pool.map(lambda code: sandbox.run_python(code, isolation=isolation), programs))
    assert seen == [str(i * 1000) for i in range(8)]


def test_the_example_in_the_docs_runs_as_printed(isolation, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tools.md").read_text(), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "[-sqrt(2), sqrt(2)]\n"


# ---- Bombs ----


def test_an_endless_loop_is_stopped(attack):
    started = time.monotonic()
    assert attack("while True: pass", cpu_seconds=1).endswith("Error: stopped after 1 seconds of CPU time.")
    assert "CPU time" in attack("10 ** 10 ** 10", cpu_seconds=1)  # in C, where Python looks at no signal
    assert time.monotonic() - started < 20


def test_sleeping_is_stopped_and_what_was_printed_is_kept(attack):
    seen = attack("print('before', flush=True)\nimport time\ntime.sleep(60)", wall_seconds=1)
    assert seen == "before\nError: stopped after 1 seconds."


def test_ignored_signals_do_not_help(attack):
    seen = attack(
        """
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        print("ignoring", flush=True)
        while True: pass
        """,
        cpu_seconds=1,
    )
    assert seen.endswith("ignoring\nError: stopped after 1 seconds of CPU time.")


def test_a_memory_bomb_is_an_error(attack):
    assert "MemoryError" in attack("bytearray(4 << 30)")
    assert "MemoryError" in attack("kept = []\nfor i in range(200): kept.append(bytearray(10 ** 7))")
    assert "MemoryError" in attack("'x' * 10 ** 10")
    seen = attack("import mmap\nkept = [mmap.mmap(-1, 1 << 26) for i in range(40)]\nprint('BREACH')")
    assert "Cannot allocate memory" in seen


def test_a_fork_bomb_does_not_start(attack):
    seen = attack(
        """
        import subprocess, threading
        for i in range(20):
            if tried("fork", os.fork) == 0:
                os._exit(0)
        tried("subprocess", subprocess.run, ["true"])
        tried("posix_spawn", os.posix_spawn, sys.executable, ["python", "-V"], {})
        tried("thread", threading.Thread(target=print).start)
        tried_call("clone", libc.syscall, 56 if os.uname().machine == "x86_64" else 220, 17, 0, 0, 0, 0)
        tried_call("vfork", libc.vfork)
        """
    )
    assert seen.count("refused:") == 25


def test_programs_are_not_executed(attack):
    seen = attack(
        """
        tried("execv", os.execv, sys.executable, ["python", "-c", "print('BREACH')"])
        tried("execve", os.execve, "/bin/sh", ["sh", "-c", "echo BREACH"], {})
        """
    )
    assert seen.count("refused:") == 2


@pytest.mark.parametrize(
    "write",
    [
        "for i in range(1024): sys.stdout.write('x' * (1 << 20))",
        "for i in range(1024): sys.stderr.write('x' * (1 << 20))",
        "for i in range(1 << 20): os.write(1, b'x' * 1024)",
        "libc.lseek(1, 1 << 28, 0); os.write(1, b'x')",
    ],
)
def test_a_gigabyte_of_output_is_stopped(attack, write):
    assert "Error: " in attack(write)


def test_output_ends_at_a_megabyte_whatever_writes_it(attack):
    seen = attack(
        """
        written = 0
        try:
            while written < 1 << 26:
                written += os.write(1, b"x" * (1 << 16))
        except OSError:
            pass
        os.ftruncate(1, 0)
        os.lseek(1, 0, 0)
        print(written)
        """
    )
    assert seen == str(sandbox.OUTPUT_BYTES)


def test_the_disk_is_not_filled(attack):
    seen = attack(
        """
        written = 0
        for folder in (".", "/tmp", "/", "/run", "/dev/shm", "/var/tmp", os.path.expanduser("~")):
            for i in range(200):
                try:
                    with open(f"{folder}/{folder.strip('/')}{i}", "wb") as file:
                        written += file.write(b"x" * 10 ** 6)
                except OSError:
                    break
        tried("one large file", lambda: os.ftruncate(os.open("large", os.O_CREAT | os.O_WRONLY), 1 << 40))
        print("written", written)
        """
    )
    assert int(seen.rsplit("written", 1)[1]) <= sandbox.FILES_MB << 20


@pytest.mark.parametrize(
    "code",
    [
        "sys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1)\nf(0)",
        "def f(n): return f(n + 1)\nf(0)",
        "sys.setrecursionlimit(10 ** 9)\nx = []\nfor i in range(10 ** 7): x = [x]\nrepr(x)",
        "eval('(' * 10 ** 5 + ')' * 10 ** 5)",
        "ctypes.string_at(0)",
        "os.abort()",
    ],
)
def test_crashes_are_told(isolation, code):
    code = "import ctypes, os, sys\n" + code
    assert "Error" in sandbox.run_python(code, isolation=isolation, cpu_seconds=1, memory_mb=256)


# ---- Secrets ----


def test_the_environment_is_empty(attack, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    seen = attack("print(dict(os.environ)); print(ctypes.string_at(libc.getenv(b'PATH')) if 0 else '')")
    assert "hunter2" not in seen and "WANDB" not in seen and "HOME" not in seen and "PATH" not in seen


def test_files_of_the_user_are_not_read(attack, secret):
    home = [str(path) for path in Path.home().iterdir() if path.is_file()][:3]
    files = [
        secret, ROOT / "README.md", ROOT / "examples" / "train_alp.py", "/etc/passwd", "/etc/shadow", *home,
        "/proc/self/environ", "/proc/1/environ", "/dev/mem", "/dev/kmsg", "/dev/tty",
        *(f"/proc/{os.getpid()}/{name}" for name in ("environ", "cmdline", "maps", "mem", "cwd/README.md", "root")),
    ]  # fmt: skip
    seen = attack(f"for path in {[str(path) for path in files]}: tried(path, lambda: open(path, 'rb').read(20))")
    assert seen.count("refused:") == len(files) and "hunter2" not in seen


def test_links_and_descriptors_are_no_way_around(attack, secret):
    seen = attack(
        f"""
        secret = {str(secret)!r}
        for name in ("link", "/tmp/link"):
            try:
                os.symlink(secret, name); tried("symlink", lambda: open(name).read())
            except OSError as error:
                print("refused: symlink", error)
        tried("link", os.link, secret, "hard")
        tried("dots", lambda: open("../" * 20 + secret).read())
        tried("library", lambda: open(os.__file__ + "/../../../../../../../../../.." + secret).read())
        tried("root", lambda: open("/proc/self/root" + secret).read())
        tried("directory", lambda: os.open(os.path.dirname(secret), os.O_PATH) and open(secret).read())
        tried("chroot", os.chroot, "/")
        tried("rename", os.rename, secret, "mine")
        libc.open_by_handle_at.restype = ctypes.c_int
        tried_call("handle", libc.open_by_handle_at, -100, None, 0)
        """
    )
    assert seen.count("refused:") == 10 and "hunter2" not in seen


def test_descriptors_of_the_caller_are_not_inherited(attack, secret):
    with open(secret) as file:
        os.set_inheritable(file.fileno(), True)
        seen = attack(
            """
            for number in range(3, 1024):
                try:
                    os.fstat(number); print("BREACH", number)
                except OSError:
                    pass
            print(os.read(0, 100))
            tried("the request", os.lseek, 0, 0, 0)
            """
        )
    assert seen.startswith("b''\nrefused: the request")


# ---- The world outside ----


def test_no_socket_is_opened(attack, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        port, name = server.getsockname()[1], f"\0trl_alp_{os.getpid()}"
        local.bind(name)
        local.listen()
        seen = attack(
            f"""
            import urllib.request
            tried("tcp", lambda: socket.create_connection(("127.0.0.1", {port}), 2))
            tried("unix", lambda: socket.socket(socket.AF_UNIX).connect({name!r}))
            tried("udp", lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port})))
            tried("raw", lambda: socket.socket(type=socket.SOCK_RAW))
            tried("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
            tried("vsock", lambda: socket.socket(40, socket.SOCK_STREAM))
            tried("pair", socket.socketpair)
            tried("http", urllib.request.urlopen, "http://127.0.0.1:{port}")
            tried("name", socket.getaddrinfo, "example.org", 80)
            """
        )
        assert seen.count("refused:") == 9
        for listening in (server, local):
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                listening.accept()


def test_no_process_is_signalled_or_traced(attack, victim):
    seen = attack(
        f"""
        import resource
        victim, caller = {victim.pid}, {os.getpid()}
        tried("kill", os.kill, victim, 9)
        tried("kill the caller", os.kill, caller, 0)
        tried("kill the parent", os.kill, os.getppid(), 0)
        tried("killpg", os.killpg, victim, 9)
        tried("pidfd", os.pidfd_open, victim)
        tried_call("sigqueue", libc.sigqueue, victim, 9, 0)
        tried_call("tgkill", libc.tgkill, victim, victim, 9)
        import fcntl
        tried("owner", lambda: fcntl.fcntl(1, fcntl.F_SETOWN, victim))
        tried("signal of the owner", lambda: fcntl.fcntl(1, 10, 9))
        tried_call("attach", libc.ptrace, 16, victim, 0, 0)
        tried_call("read memory", libc.process_vm_readv, victim, None, 0, None, 0, 0)
        tried("limits of another", resource.prlimit, victim, resource.RLIMIT_CPU, (1, 1))
        tried("nice", os.setpriority, os.PRIO_PROCESS, victim, 10)
        tried("processors", os.sched_setaffinity, victim, [0])
        """
    )
    assert seen.count("refused:") == 14


def test_nothing_is_written_outside(attack, secret, tmp_path):
    library = os.path.dirname(os.__file__)
    folders = [tmp_path, ROOT, Path.home(), Path("/"), Path("/run"), Path(library), SCRIPT.parent]
    # With bubblewrap /tmp is memory of the program's own. A repository below it has a path there, not its files.
    folders = [str(path) for path in folders if path == tmp_path or not path.is_relative_to("/tmp")]
    seen = attack(
        f"""
        secret = {str(secret)!r}
        for folder in {folders}:
            tried(folder, lambda: open(folder + "/trl_alp_attack", "w"))
        tried("write", lambda: open(secret, "w"))
        tried("own source", lambda: open(sys.modules["__main__"].__file__, "r+"))
        tried("library", lambda: open(os.__file__, "r+"))
        tried("truncate", os.truncate, secret, 0)
        tried("chmod", os.chmod, secret, 0o777)
        tried("chmod of the library", os.chmod, os.__file__, 0o777)
        tried("chown", os.chown, secret, 1, 1)
        tried("utime", os.utime, secret)
        tried("utime of the library", os.utime, os.__file__)
        tried("xattr", os.setxattr, secret, "user.x", b"x")
        tried("unlink", os.unlink, secret)
        tried("mkdir", os.mkdir, {str(tmp_path / "x")!r})
        tried("mknod", os.mknod, "/tmp/node")
        tried("mkfifo", os.mkfifo, "/tmp/fifo")
        """
    )
    assert seen.count("refused:") == len(folders) + 14
    assert not (ROOT / "trl_alp_attack").exists()


def test_no_daemon_stays(attack):
    seen = attack(
        """
        tried("setsid", os.setsid)
        tried("setpgid", os.setpgid, 0, 0)
        for i in range(2):
            if tried("fork", os.fork) == 0:
                import time; time.sleep(5); os._exit(0)
        tried_call("subreaper or death signal", libc.prctl, 1, 0, 0, 0, 0)
        """
    )
    assert seen.count("refused:") == 5


def test_limits_are_not_changed(attack):
    seen = attack(
        """
        import resource
        for name in ("CPU", "AS", "FSIZE", "NOFILE", "CORE", "NPROC"):
            kind = getattr(resource, "RLIMIT_" + name)
            tried("raise " + name, resource.setrlimit, kind, (resource.RLIM_INFINITY,) * 2)
            tried("same " + name, resource.prlimit, 0, kind, resource.getrlimit(kind))
        tried("setuid", os.setuid, 12345)
        """
    )
    assert seen.count("refused:") == 13


def test_output_is_not_held_back(attack):
    assert attack("os.close(1); os.close(2)\nimport time\ntime.sleep(60)", wall_seconds=1).startswith("Error: stopped")
    assert attack("os.close(1); os.close(2); os.close(0)") == "(The program printed nothing.)"
    attack("sys.stdout.close(); sys.stderr.close()")
    assert attack("print('x' * 100, flush=True); os.ftruncate(1, 0); os._exit(0)") == "(The program printed nothing.)"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are x86_64's")
def test_system_calls_that_reach_the_kernel_deeper_are_refused(attack):
    numbers = {
        "ptrace": 101, "mount": 165, "unshare": 272, "setns": 308, "pivot_root": 155, "chroot": 161, "bpf": 321,
        "perf_event_open": 298, "io_uring_setup": 425, "userfaultfd": 323, "memfd_create": 319, "keyctl": 250,
        "add_key": 248, "personality": 135, "shmget": 29, "msgget": 68, "mq_open": 240, "clone3": 435, "seccomp": 317,
        "init_module": 175, "kexec_load": 246, "reboot": 169, "ioperm": 173, "inotify_init1": 294, "timer_create": 222,
        "process_madvise": 440, "pidfd_getfd": 438, "pidfd_send_signal": 424, "execveat": 322, "openat2": 437,
        "name_to_handle_at": 303, "capset": 126, "landlock_create_ruleset": 444, "socketpair": 53,
    }  # fmt: skip
    seen = attack(f"for name, n in {numbers}.items(): tried_call(name, libc.syscall, n, 0, 0, 0, 0, 0, 0)")
    assert seen.count("refused:") == len(numbers) and seen.count(" 1\n") >= len(numbers) - 1  # EPERM: the filter
    # The other ways into an x86 kernel: the x32 numbers, and the 32-bit gate.
    assert "signal 31" in attack("libc.syscall(0x40000000 | 57); print('BREACH')")


# ---- The sandbox itself ----


def test_a_sandbox_without_its_walls_refuses_to_run(isolation, tmp_path):
    holes = {"    _confine_system_calls()": ("    pass", "fork, socket")}
    if isolation == "landlock":
        holes['    _confine_files(libc, request["readable"])'] = ("    pass", "open, listdir")
    else:
        folder = tempfile.gettempdir()
        holes['"--size", str(FILES_MB << 20), "--tmpfs", "/tmp",'] = (f'"--bind", {folder!r}, {folder!r},', "open")
    source = SCRIPT.read_text()
    for wall, (hole, breach) in holes.items():
        assert source.count(wall) == 1
        path = tmp_path / "broken.py"
        path.write_text(source.replace(wall, hole))
        with pytest.raises(RuntimeError, match=f"did not withstand: .*{breach}"):
            load(path).run_python("print(1)", isolation=isolation)


def test_without_isolation_nothing_runs_and_the_way_out_is_told(monkeypatch, tmp_path):
    module = load()
    monkeypatch.setenv("PATH", str(tmp_path))  # no bwrap
    monkeypatch.setattr(module, "_existing", lambda *paths: [])  # Landlock then allows not even Python's library
    with pytest.raises(module.SandboxUnavailable, match=r"(?s)bwrap. is not installed.*landlock: .*apt install"):
        module.run_python("open('/tmp/x', 'w')")


def test_an_unknown_isolation_is_refused():
    with pytest.raises(ValueError, match=r"isolation='none' is unknown\. Use 'bubblewrap'"):
        sandbox.run_python("1", isolation="none")


def test_a_killed_caller_leaves_no_process(isolation):
    processes = sandboxed_processes()
    code = (
        f"import sandbox; sandbox.run_python('import time; time.sleep(60)', wall_seconds=60, isolation={isolation!r})"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=SCRIPT.parent)
    deadline = time.monotonic() + 15
    while not (started := sandboxed_processes() - processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    assert started and sandboxed_processes() - processes
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert gone(processes)
