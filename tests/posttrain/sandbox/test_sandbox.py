"""The sandbox against code that attacks it: what it reads, writes, uses up, fakes and leaves.

Each piece of code is run for real. The second truth is what the machine shows afterwards (files,
processes, listeners) and what the code itself reports that it could see. Not covered: faults of the
kernel, other platforms than Linux.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nemotron_train.config.errors import ConfigError
from nemotron_train.posttrain.sandbox.sandbox import Limits, Result, Sandbox
from nemotron_train.posttrain.sandbox.verdict import Verdict

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    os.environ["A_SECRET_OF_THE_PARENT"] = "sesame"
    try:
        with Sandbox(limits=Limits(wall_seconds=30)) as opened:  # even on a machine under load
            yield opened
    except ConfigError as error:
        pytest.skip(f"this machine gives no isolation: {error}")
    finally:
        del os.environ["A_SECRET_OF_THE_PARENT"]


@pytest.fixture(scope="module")
def hasty(sandbox: Sandbox) -> Iterator[Sandbox]:
    """For code that only the wall clock ends."""
    with Sandbox(limits=Limits(wall_seconds=1.0)) as opened:
        yield opened


def run(sandbox: Sandbox, body: str) -> Result:
    """The result of f() with this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return sandbox.call(f"import os, sys\ndef f():\n{lines}", "f", [[]])


def outcome(sandbox: Sandbox, attempt: str) -> str:
    """The name of the exception that `attempt` raises inside, or "done"."""
    body = f"try:\n    {attempt}\nexcept BaseException as error:\n    return type(error).__name__"
    result = run(sandbox, f"{body}\nreturn 'done'")
    assert result.verdict is Verdict.passed, result
    return result.outputs[0]


def test_a_function_runs_on_each_input(sandbox: Sandbox) -> None:
    code = "def f(a, b):\n    return [a + b, {'a': a, 'none': None}, a < b, 0.5]"
    result = sandbox.call(code, "f", [[1, 2], [10**30, -1]])
    assert result.verdict is Verdict.passed
    assert result.outputs[0] == [3, {"a": 1, "none": None}, True, 0.5]
    assert result.outputs[1][:2] == [10**30 - 1, {"a": 10**30, "none": None}]


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("while True: pass", Verdict.timeout),  # its processor time ends
        ("return len(bytearray(10 * 2**30))", Verdict.memory),
        ("parts = []\nwhile True: parts.append(bytearray(2**20))", Verdict.memory),
        ("for _ in range(1024): os.write(1, b'x' * 2**20)", Verdict.output),
        ("return 'x' * 2**24", Verdict.output),
        ("os._exit(0)", Verdict.killed),
        ("sys.exit(0)", Verdict.error),
        ("raise KeyboardInterrupt", Verdict.error),
        ("g = lambda n: g(n + 1)\nreturn g(0)", Verdict.error),
        ("import ctypes\nctypes.string_at(0)", Verdict.killed),
        ("os.abort()", Verdict.killed),
        ("return open('/etc/passwd').read()", Verdict.error),
    ],
)
def test_a_verdict_and_no_exception(sandbox: Sandbox, body: str, verdict: Verdict) -> None:
    result = run(sandbox, body)
    assert result.verdict is verdict, result
    assert result.outputs == []


@pytest.mark.parametrize("code", ["", "def g(): pass", "def f(:", "f = 3", "\0", "raise 1 / 0"])
def test_code_without_the_function_is_an_error(sandbox: Sandbox, code: str) -> None:
    assert sandbox.call(code, "f", [[]]).verdict is Verdict.error


def test_deep_recursion_in_c_ends_the_process_alone(sandbox: Sandbox) -> None:
    body = "sys.setrecursionlimit(10**9)\ng = lambda n: g(n + 1)\nreturn g(0)"
    assert run(sandbox, body).verdict is not Verdict.passed
    assert run(sandbox, "return 1").outputs == [1]


def test_the_wall_clock_ends_what_uses_no_processor(hasty: Sandbox) -> None:
    result = run(hasty, "import time\ntime.sleep(60)")
    assert result == Result(Verdict.timeout, [], "the wall clock ran out")


def test_a_fork_bomb_is_bounded_and_gone(sandbox: Sandbox, hasty: Sandbox) -> None:
    before = len(psutil.pids())
    body = "n = 0\nwhile True:\n    try: os.fork()\n    except OSError: n += 1"
    assert run(hasty, body).verdict is Verdict.timeout
    assert len(psutil.pids()) < before + 50
    assert outcome(sandbox, "[os.fork() or __import__('time').sleep(9) for _ in range(20)]") == (
        "BlockingIOError"
    )


def test_nothing_outside_can_be_written(sandbox: Sandbox, tmp_path: Path) -> None:
    assert outcome(sandbox, f"open({str(tmp_path / 'x')!r}, 'w')") == "FileNotFoundError"
    assert outcome(sandbox, "open('/x', 'w')") == "OSError"  # read-only file system
    assert outcome(sandbox, f"open({os.__file__!r}, 'a')") in ("OSError", "PermissionError")
    assert outcome(sandbox, f"os.remove({os.__file__!r})") in ("OSError", "PermissionError")
    assert outcome(sandbox, "os.mkdir('/lib/x')") in ("OSError", "PermissionError")
    assert list(tmp_path.iterdir()) == [] and Path(os.__file__).exists()


def test_the_working_folder_is_private_and_small(sandbox: Sandbox) -> None:
    assert run(sandbox, "open('x', 'w').write('mine')\nreturn os.listdir()").outputs == [["x"]]
    assert run(sandbox, "return os.listdir()").outputs == [[]]
    assert outcome(sandbox, "open('x', 'wb').write(b'x' * 2**25)") == "OSError"


def test_a_link_out_of_the_folder_leads_nowhere(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("sesame")
    for target in (tmp_path / "secret", Path("/etc/passwd"), Path("../../etc/passwd")):
        attempt = f"os.symlink({str(target)!r}, 'link'); open('link').read()"
        assert outcome(sandbox, attempt) == "FileNotFoundError"


def test_nothing_of_the_machine_has_a_name(sandbox: Sandbox) -> None:
    """Homes, keys and processes. Of a home, only the folders above the standard library exist."""
    names = run(sandbox, "return os.listdir('/')").outputs[0]
    assert not {"etc", "proc", "sys", "var", "run", "mnt", "opt", "srv"} & set(names)
    for path in (Path.home(), ROOT, Path(sys.prefix)):
        seen = run(sandbox, f"return [n for _, _, n in os.walk({str(path)!r}) if n][:1]").outputs
        inside = Path(os.__file__).is_relative_to(path)
        assert inside or seen == [[]], path
    for path in (".ssh", ".netrc", ".bashrc", ".cache"):
        assert outcome(sandbox, f"os.stat({str(Path.home() / path)!r})") == "FileNotFoundError"


def test_the_environment_is_empty(sandbox: Sandbox) -> None:
    assert run(sandbox, "return dict(os.environ)").outputs == [{}]
    attempt = "open('/proc/1/environ').read()"
    assert outcome(sandbox, attempt) == "FileNotFoundError"


def test_no_network(sandbox: Sandbox) -> None:
    """A real listener on this machine gets no connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        attempt = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        assert outcome(sandbox, attempt) == "OSError"
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_abstract_unix_sockets_are_the_sandbox_s_own(sandbox: Sandbox) -> None:
    """They have no file, so only the network namespace keeps them away."""
    name = f"\0sandbox_test_{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        attempt = f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})"
        assert outcome(sandbox, attempt) == "ConnectionRefusedError"


def test_the_code_is_alone_and_without_rights(sandbox: Sandbox) -> None:
    assert run(sandbox, "return [os.getpid(), os.getppid(), os.getuid()]").outputs == [
        [1, 0, 65534]
    ]
    assert outcome(sandbox, "os.setuid(0)") in ("PermissionError", "OSError")
    assert outcome(sandbox, "os.chroot('/tmp')") == "PermissionError"
    for flag in ("CLONE_NEWUSER", "CLONE_NEWNS"):
        assert outcome(sandbox, f"os.unshare(os.{flag})") in ("PermissionError", "OSError")
    assert outcome(sandbox, f"os.kill({os.getpid()}, 9)") == "ProcessLookupError"


def test_only_the_frame_s_descriptor_is_open(sandbox: Sandbox) -> None:
    body = "n = []\nfor fd in range(64):\n    try: n.append(os.fstat(fd) and fd)\n"
    assert run(sandbox, f"{body}    except OSError: pass\nreturn n").outputs == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "body",
    [
        "class Any:\n    __eq__ = lambda *a: True\nreturn Any()",
        "class Any(int):\n    __eq__ = lambda *a: True\n    __hash__ = None\nreturn Any(3)",
        "import builtins\nbuiltins.print = builtins.isinstance = lambda *a: True\nreturn object()",
    ],
)
def test_an_object_that_equals_everything_is_no_value(sandbox: Sandbox, body: str) -> None:
    result = run(sandbox, body)
    assert result.verdict is not Verdict.passed and result.outputs == []


def test_a_faked_report_is_not_taken(sandbox: Sandbox) -> None:
    """Printed, and written to the frame's descriptor without the nonce."""
    frame = '{"outputs": "[1]"}'
    assert run(sandbox, f"print({frame!r}, flush=True)\nos._exit(0)").verdict is Verdict.killed
    assert run(sandbox, f"os.write(3, {frame!r}.encode())\nos._exit(0)").verdict is Verdict.killed
    assert run(sandbox, f"os.write(3, {frame!r}.encode())\nreturn 2").verdict is Verdict.killed
    assert run(sandbox, "os.fork()\nreturn 1").outputs == [1]  # the fork adds no second frame


def test_a_daemon_dies_with_its_check(sandbox: Sandbox) -> None:
    """A grandchild in a session of its own; its mark would be its name in the machine's process
    list, which is taken after the call."""
    body = (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import ctypes, time\n"
        "        ctypes.CDLL(None).prctl(15, b'daemon_mark', 0, 0, 0)\n        time.sleep(60)\n"
        "    os._exit(0)\nimport time\ntime.sleep(0.2)\nreturn 1"
    )
    assert run(sandbox, body).outputs == [1]
    deadline = time.monotonic() + 5
    while "daemon_mark" in {process.info["name"] for process in psutil.process_iter(["name"])}:
        assert time.monotonic() < deadline


def test_ignored_signals_do_not_help(sandbox: Sandbox, hasty: Sandbox) -> None:
    body = "import signal, time\n"
    body += "for n in (1, 2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\n"
    assert run(hasty, body + "time.sleep(60)").verdict is Verdict.timeout
    assert run(sandbox, body + "while True: pass").verdict is Verdict.timeout


def test_every_process_is_reaped(sandbox: Sandbox) -> None:
    """After all of the above the sandbox's own process has no child."""
    zygote = psutil.Process(sandbox._process.pid)
    deadline = time.monotonic() + 10
    while zygote.children(recursive=True):
        assert time.monotonic() < deadline


def test_calls_side_by_side_do_not_mix(sandbox: Sandbox) -> None:
    results: dict[int, Result] = {}

    def call(number: int) -> None:
        results[number] = sandbox.call("def f(a):\n    return a", "f", [[number]])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: result.outputs for number, result in results.items()} == {
        number: [number] for number in range(8)
    }


def test_a_killed_zygote_is_replaced(sandbox: Sandbox) -> None:
    sandbox._process.kill()
    sandbox._process.wait()
    assert run(sandbox, "return 1").outputs == [1]


def test_a_user_who_is_not_root_gets_the_same(sandbox: Sandbox) -> None:
    """In a user namespace with one user, where nobody does not exist, as for an ordinary user."""
    code = "import os\ndef f():\n    return [os.getpid(), os.getuid(), sorted(os.listdir('/'))]"
    script = (
        "from nemotron_train.posttrain.sandbox.sandbox import Sandbox\n"
        f"with Sandbox() as s:\n    print(s.call({code!r}, 'f', [[]]).outputs[0][:2])\n"
        "    print(s.call('def f():\\n    while True: pass', 'f', [[]]).verdict)"
    )
    command = ["unshare", "--user", "--map-current-user", sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["[1, 65534]", "timeout"], done.stderr


def test_without_isolation_it_does_not_start(sandbox: Sandbox) -> None:
    """In a user namespace in which no other can be made, as on machines that forbid them."""
    script = (
        "from nemotron_train.posttrain.sandbox.sandbox import *\n"
        "from nemotron_train.config.errors import ConfigError\n"
        "try:\n    Sandbox()\nexcept ConfigError as error:\n    print(error)\n"
        "with Sandbox(Isolation.none_i_accept_the_risk, Limits(wall_seconds=20)) as s:\n"
        "    print(s.call('def f(): return 1', 'f', [[]]).outputs)\n"
        "    print(s.call('def f():\\n    while True: pass', 'f', [[]]).verdict)\n"
        "    print(s.call('import os\\ndef f(): return dict(os.environ)', 'f', [[]]).outputs)\n"
        "    print(s.call('import os\\ndef f(): return os.listdir()', 'f', [[]]).outputs)"
    )
    forbid = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh"]
    command += [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    refusal, *rest = done.stdout.splitlines()
    assert "this machine cannot isolate code (" in refusal, done.stderr
    assert refusal.endswith("with sandbox=none_i_accept_the_risk")
    assert rest == ["[1]", "timeout", "[{}]", "[[]]"]
