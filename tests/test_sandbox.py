"""Attempts to break out of the sandbox or to exhaust the host, and the purpose of the sandbox.

Each attempt is code that prints ESCAPED where it gets what it must not.
The harmless ones are also run outside the sandbox, where they must succeed.
An attempt that fails for a reason of its own shows nothing.
Without an isolator the tests are skipped and say so; with POLM_SANDBOX=required (as in CI) they
fail.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from polm_lab.core.knobs import WrongInput
from polm_lab.rewards.sandbox import Pool, isolator, run_code
from polm_lab.rewards.verifiers import assertions, check_humaneval, check_mbpp, code_in
from polm_lab.data.tasks import TASKS

SECRET = "the-canary-sings"
NUMBERS = (
    "ptrace process_vm_readv pidfd_open mount umount2 pivot_root chroot unshare setns bpf "
    "perf_event_open userfaultfd io_uring_setup keyctl add_key memfd_create shmget "
    "open_by_handle_at capset reboot init_module kexec_load swapon clone3 clone fork vfork "
    "mq_open inotify_init1 name_to_handle_at sched_setaffinity setpriority personality seccomp "
    "quotactl acct"
)


@pytest.fixture(scope="module", autouse=True)
def there():
    "The isolator, or no test of this file."
    try:
        return isolator()
    except WrongInput as missing:
        pytest.fail(str(missing)) if os.environ.get("POLM_SANDBOX") == "required" else pytest.skip(
            str(missing)
        )


@pytest.fixture(scope="module")
def host(tmp_path_factory, there):
    """Make the targets of an attempt: a secret file, a folder, a process, servers.

    Yields the lines that give an attempt their places.
    """
    import pyseccomp

    folder = tmp_path_factory.mktemp("host")
    (folder / "secret.txt").write_text(SECRET)
    canary = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1000)"],
        env={**os.environ, "SECRET": SECRET},
    )
    numbers = {
        name: pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) for name in NUMBERS.split()
    }
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, family, kind, address in (
            ("TCP", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("UDP", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("UNIX", socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
            ("ABSTRACT", socket.AF_UNIX, socket.SOCK_STREAM, f"\0polm{os.getpid()}"),
        ):
            server = stack.enter_context(socket.socket(family, kind))
            server.bind(address)
            if kind == socket.SOCK_STREAM:
                server.listen(64)
            servers[name] = server.getsockname()
        facts = dict(
            FOLDER=str(folder),
            PROJECT=str(ROOT),
            HOST_HOME=str(Path.home()),
            PID=canary.pid,
            PARENT=os.getpid(),
            CALL=numbers,
            **servers,
        )
        os.environ["SECRET"] = SECRET
        try:
            yield dict(
                folder=folder,
                canary=canary,
                before={process.pid for process in psutil.Process().children(recursive=True)},
                lines="".join(f"{name} = {value!r}\n" for name, value in facts.items()) + PRELUDE,
            )
        finally:
            os.environ.pop("SECRET")
            canary.kill()
            canary.wait()


PRELUDE = f"""
import os, sys
SECRET = {SECRET!r}
def escaped(): os.write(1, b"ESCAPED\\n")
def call(name, *words):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    got = libc.syscall(ctypes.c_long(CALL[name]), *words)
    if got != -1: escaped()
    raise OSError(ctypes.get_errno(), name)
"""

REFUSED = ("error",)  # the attempt ends in an exception
ANY = ("", "error", "signal", "memory")  # it may end as it likes, as long as it has nothing to show
TIMED = ("time",)
# name: (code, how it may end, whether it succeeds outside, limits)
ATTEMPTS = {
    # files
    "list the home folder": ("if os.listdir(HOST_HOME): escaped()", REFUSED, True),
    "read a file of the user": (
        "if SECRET in open(FOLDER + '/secret.txt').read(): escaped()",
        REFUSED,
        True,
    ),
    "read the project": ("if open(PROJECT + '/settings.ini').read(): escaped()", REFUSED, True),
    "read the accounts": ("if open('/etc/passwd').read(): escaped()", REFUSED, True),
    "read its own /proc": ("if open('/proc/self/status').read(): escaped()", REFUSED, True),
    "read the environment of another process": (
        "if SECRET in open(f'/proc/{PID}/environ').read(): escaped()",
        REFUSED,
        True,
    ),
    "read the environment": ("if SECRET in os.environ.get('SECRET', ''): escaped()", ANY, False),
    "environment through libc": (
        "import ctypes\nl = ctypes.CDLL(None); l.getenv.restype = ctypes.c_char_p\nif "
        "l.getenv(b'SECRET') or l.getenv(b'PATH'): escaped()",
        ANY,
        True,
    ),
    "go up by dots": (
        "os.chdir('/')\nif SECRET in open('../../../../' + FOLDER + '/secret.txt').read(): "
        "escaped()",
        REFUSED,
        True,
    ),
    "through a symbolic link": (
        "p = '/tmp/polm_link' + str(os.getpid())\nos.symlink(FOLDER + '/secret.txt', p)\ntry: "
        "s = open(p).read()\nfinally: os.unlink(p)\nif SECRET in s: escaped()",
        REFUSED,
        True,
        dict(disk_mib=1),
    ),
    "write next to the user's file": (
        "open(FOLDER + '/left.txt', 'w').write('x'); escaped()",
        REFUSED,
        True,
    ),
    "write in /tmp": (
        "p = '/tmp/polm_left' + str(os.getpid())\nopen(p, 'w').write('x'); os.unlink(p); escaped()",
        REFUSED,
        True,
    ),
    "write into the standard library": (
        "open(os.path.dirname(os.__file__) + '/polm_left.py', 'w'); escaped()",
        REFUSED,
        False,
    ),
    "rename the standard library": (
        "os.rename(os.path.dirname(os.__file__), '/tmp/lib'); escaped()",
        REFUSED,
        False,
    ),
    "change a mode": ("os.chmod(os.__file__, 0o777); escaped()", REFUSED, False),
    "find any place to write": (
        """
for folder, _, _ in os.walk('/'):
    try: os.close(os.open(folder + '/polm_left', os.O_CREAT | os.O_WRONLY))
    except OSError: continue
    escaped()""",
        ("",),
        False,
        dict(seconds=20),
    ),
    "find any file of the host": (
        """
seen = {f for f in os.listdir('/')} - {'python', 'usr', 'lib', 'lib64', 'lib32'}
folders = ('/home', '/root', '/etc', '/dev', '/proc', '/sys')
if seen or any(map(os.path.exists, folders)): escaped()""",
        ("",),
        True,
    ),
    "make a device": (
        "import stat\nos.mknod('/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); escaped()",
        REFUSED,
        False,
        dict(disk_mib=1),
    ),
    "open a file by its handle": (
        "call('open_by_handle_at', -100, b'\\0' * 32, 0)",
        REFUSED,
        False,
    ),
    "handle of a file": (
        "call('name_to_handle_at', -100, b'/', b'\\0' * 256, b'\\0' * 8, 0)",
        REFUSED,
        False,
    ),
    "import the project": (
        "sys.path[:0] = [PROJECT]\nimport polm_lab.core.knobs; escaped()",
        REFUSED,
        True,
    ),
    "import an installed package": ("import pip; escaped()", REFUSED, False),
    "installed packages as files": (
        "for p in sys.path:\n    d = os.path.join(p, 'site-packages')\n    if os.path.isdir(d) "
        "and os.listdir(d): escaped()",
        ("",),
        False,
    ),
    "open files of the host left in the process": (
        """
import stat
for fd in range(3, 1024):
    try: mode = os.fstat(fd).st_mode
    except OSError: continue
    if not stat.S_ISFIFO(mode): escaped()""",
        ("",),
        False,
    ),
    # programs and processes
    "a shell": ("if os.system('true') == 0: escaped()", ANY, True),
    "a program": ("import subprocess; subprocess.run(['/bin/true']); escaped()", REFUSED, True),
    "become a shell": ("os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])", REFUSED, True),
    "fork": ("if os.fork() == 0: escaped(); os._exit(0)\nos.wait()", REFUSED, True),
    "fork bomb": (
        """
while True:
    try: os.fork()
    except OSError: break
    escaped()""",
        ("",),
        False,
    ),
    "daemon": (
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: escaped()
    os._exit(0)
os.wait()""",
        REFUSED,
        True,
    ),
    "spawn": ("os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0); escaped()", REFUSED, True),
    "multiprocessing": (
        "import multiprocessing as m\np = m.get_context('fork').Process(target=escaped); "
        "p.start(); p.join()",
        REFUSED,
        True,
    ),
    "thread": (
        "import threading\nt = threading.Thread(target=escaped); t.start(); t.join()",
        REFUSED,
        True,
    ),
    "thread bomb": (
        """
import _thread, time
while True:
    try: _thread.start_new_thread(time.sleep, (9,))
    except RuntimeError: break
    escaped()""",
        ("",),
        False,
    ),
    "clone by number": ("call('clone', 17, None, None, None, None)", REFUSED, False),
    "clone3 by number": ("call('clone3', b'\\0' * 88, 88)", REFUSED, False),
    "vfork by number": ("call('vfork')", REFUSED, False),
    "kill everybody": ("import signal\nos.kill(-1, signal.SIGKILL)", ANY, False),
    "kill the parent": ("import signal\nos.kill(os.getppid(), signal.SIGKILL)", ANY, False),
    "kill the host's Python by number": (
        "import signal\nos.kill(PARENT, signal.SIGTERM); escaped()",
        REFUSED,
        False,
    ),
    "kill another process by number": ("import signal\nos.kill(PID, 0); escaped()", REFUSED, True),
    "signal every process": (
        "n = 0\nfor p in range(3, 40000):\n    try: os.kill(p, 0)\n    except OSError: "
        "continue\n    n += 1\nif n > 1: escaped()",
        ("",),
        True,
    ),
    "stop the keeper": (
        "import signal\nos.kill(1, signal.SIGSTOP)\nwhile True: pass",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    "trace the parent": ("call('ptrace', 16, os.getppid(), 0, 0)", REFUSED, False),
    "read another's memory": ("call('process_vm_readv', PID, None, 0, None, 0, 0)", REFUSED, False),
    "handle of a process": ("call('pidfd_open', 1, 0)", REFUSED, True),
    "more of the processor": (
        "os.sched_setaffinity(0, {0}); os.setpriority(0, 0, -20); escaped()",
        REFUSED,
        False,
    ),
    # network
    "TCP to the host": (
        "import socket\nsocket.create_connection(TCP, 5); escaped()",
        REFUSED,
        True,
    ),
    "UDP to the host": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', UDP); "
        "escaped()",
        REFUSED,
        True,
    ),
    "unix socket": (
        "import socket\nsocket.socket(socket.AF_UNIX).connect(UNIX); escaped()",
        REFUSED,
        True,
    ),
    "abstract socket": (
        "import socket\nsocket.socket(socket.AF_UNIX).connect(ABSTRACT); escaped()",
        REFUSED,
        True,
    ),
    "abstract socket from a pair": (
        "import socket\na, b = socket.socketpair()\na.connect(ABSTRACT); escaped()",
        REFUSED,
        False,
    ),
    "raw socket": (
        "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW); escaped()",
        REFUSED,
        False,
    ),
    "netlink": (
        "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW); escaped()",
        REFUSED,
        True,
    ),
    "virtual machine socket": (
        "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM); escaped()",
        REFUSED,
        False,
    ),
    "listen": ("import socket\nsocket.create_server(('', 0)); escaped()", REFUSED, True),
    "network cards": (
        "import socket\nif [n for _, n in socket.if_nameindex()] != ['lo']: escaped()",
        ANY,
        False,
    ),
    "a name": ("import socket\nsocket.getaddrinfo('example.org', 80); escaped()", REFUSED, False),
    "a page": (
        "import urllib.request\nurllib.request.urlopen('http://%s:%d' % TCP, timeout=5); escaped()",
        REFUSED,
        False,
    ),
    "asynchronous connection": (
        "import asyncio\nasync def f(): await asyncio.open_connection(*TCP); "
        "escaped()\nasyncio.run(f())",
        REFUSED,
        True,
    ),
    # time
    "endless loop": ("while True: pass", TIMED, False, dict(seconds=0.5)),
    "sleep": ("import time; time.sleep(1000)", TIMED, False, dict(seconds=0.5)),
    "wait for input": ("input(); escaped()", REFUSED, False),
    "wait for a signal": ("import signal; signal.pause()", TIMED, False, dict(seconds=0.5)),
    "stop itself": (
        "import signal; os.kill(os.getpid(), signal.SIGSTOP)",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    "a loop that takes no signal": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    "
        "except (OSError, ValueError): pass\nwhile True: pass",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    "a loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    "regular expression bomb": (
        "import re; re.match(r'(a+)+$', 'a' * 64 + 'b')",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    "a loop in C": ("sum(range(10 ** 13))", TIMED, False, dict(seconds=0.5)),
    "a long power": ("x = 7 ** 10 ** 9", ("time", "memory"), False, dict(seconds=0.5)),
    "a destructor that never ends": (
        "class A:\n    def __del__(self):\n        while True: pass\na = A(); del a",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    "an error message that never ends": (
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    "noise on every pipe without end": (
        "while True:\n    for fd in range(3, 64):\n        try: os.write(fd, b'+' * 4096)\n    "
        "    except OSError: pass",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    # memory
    "a large list": ("x = [0] * 10 ** 9", ("memory",), False),
    "a growing list": ("x = []\nwhile True: x.append(bytearray(2 ** 20))", ("memory",), False),
    "mapped memory": (
        "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2 ** 24)); x[-1].write(b'x' * "
        "2 ** 24)",
        ("error", "memory"),
        False,
    ),
    "memory file": ("os.memfd_create('x'); escaped()", REFUSED, True),
    "system V memory": ("call('shmget', 0, 2 ** 30, 0o1600)", REFUSED, False),
    "shared memory": (
        "from multiprocessing import shared_memory\ns = "
        "shared_memory.SharedMemory(create=True, size=2 ** 20); escaped(); s.unlink()",
        REFUSED,
        False,
    ),
    "message queue": ("call('mq_open', b'/polm_left', 0o102, 0o600, None)", REFUSED, False),
    "memory in pipes": (
        """
held = []
while True:
    try: r, w = os.pipe()
    except OSError: break
    held.append((r, w)); os.set_blocking(w, False)
    try:
        while True: os.write(w, b'x' * 65536)
    except BlockingIOError: pass
if len(held) > 64: escaped()""",
        ("",),
        False,
    ),
    "more than the limit": (
        """
import resource
for name in dir(resource):
    if name.startswith('RLIMIT_'):
        free = resource.RLIM_INFINITY
        try: resource.setrlimit(getattr(resource, name), (free, free))
        except (OSError, ValueError): continue
        if name in ('RLIMIT_AS', 'RLIMIT_CPU', 'RLIMIT_FSIZE', 'RLIMIT_NOFILE', 'RLIMIT_CORE'): escaped()
x = bytearray(2 ** 30)""",
        ("memory",),
        False,
    ),
    "decompression bomb": (
        "import zlib\nx = zlib.compress(b'0' * 2 ** 24)\nwhile True: x = zlib.decompress(x) * "
        "64; x = zlib.compress(x, 1) * 64; x = bytes(len(x) * 2 ** 20)",
        ("memory",),
        False,
    ),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", REFUSED, False),
    "deep recursion without a limit": (
        "sys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1)\nf(0)",
        ("memory", "signal", "error"),
        False,
        dict(seconds=120),
    ),
    "recursion in C": (
        "sys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return "
        "repr(self)\nrepr(A())",
        ("memory", "signal", "error"),
        False,
        dict(seconds=120),
    ),
    "brackets without end": ("eval('(' * 10 ** 6)", ("memory", "signal", "error", "output"), False),
    "a crash": ("import ctypes; ctypes.string_at(0)", ("signal",), False),
    "an abort": ("os.abort()", ("signal",), False),
    # disk and output
    "fill the disk": (
        "with open('/tmp/x', 'wb') as f:\n    while True: f.write(bytes(2 ** 20))",
        REFUSED,
        False,
        dict(disk_mib=4),
    ),
    "fill the disk with many files": (
        "for i in range(999):\n    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(2 ** 18))",
        REFUSED,
        False,
        dict(disk_mib=4),
    ),
    "sparse file": (
        "with open('/tmp/x', 'wb') as f: f.truncate(2 ** 40); escaped()",
        ("signal", "error"),
        False,
        dict(disk_mib=4),
    ),
    "small files without end": (
        "i = 0\nwhile True: open(f'/tmp/{i}', 'w').close(); i += 1",
        ("time", "error"),
        False,
        dict(disk_mib=1, seconds=0.5),
    ),
    "print without end": ("while True: print('x' * 1000)", ("output",), False),
    "complain without end": ("while True: print('x' * 1000, file=sys.stderr)", ("output",), False),
    "an error as long as a book": ("raise ValueError('x' * 10 ** 7)", ("output",), False),
    "close every file": (
        "import time\nos.closerange(0, 1024)\ntime.sleep(1000)",
        TIMED,
        False,
        dict(seconds=0.5),
    ),
    # tricks of Python
    "pickle": (
        "import pickle; pickle.loads(b\"cos\\nsystem\\n(S'echo ESCAPED'\\ntR.\")",
        ANY,
        True,
    ),
    "a class that leads to a shell": (
        """
for c in ().__class__.__base__.__subclasses__():
    if c.__name__ == '_wrap_close': c.__init__.__globals__['system']('echo ESCAPED')""",
        ANY,
        True,
    ),
    "__import__": ("getattr(__import__('o' + 's'), 'sys' + 'tem')('echo ESCAPED')", ANY, True),
    "libc's own shell": ("import ctypes; ctypes.CDLL(None).system(b'echo ESCAPED')", ANY, True),
    "machine code": (
        """
import ctypes, mmap, platform
m = mmap.mmap(-1, 4096, prot=7)
intel = platform.machine() == 'x86_64'
m.write(b'\\xb8\\x39\\x00\\x00\\x00\\x0f\\x05\\xc3' if intel else b'\\xc0\\x03\\x5f\\xd6')  # fork
f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
got = f()
if got >= 0 and platform.machine() == 'x86_64': escaped()""",
        ANY,
        True,
    ),
    "32-bit system calls": (
        """
import ctypes, mmap, platform
assert platform.machine() == 'x86_64'
m = mmap.mmap(-1, 4096, prot=7)
# fork through int 0x80, where the numbers are others
m.write(b'\\x53\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\x5b\\xc3')
address = ctypes.addressof(ctypes.c_char.from_buffer(m))
if ctypes.CFUNCTYPE(ctypes.c_int)(address)() >= 0: escaped()""",
        ("signal", "error", ""),
        False,
    ),
    "Python again, without our program": (
        "os.execv(sys.executable, [sys.executable, '-S', '-c', 'import os; os.fork(); "
        'print("ESCAPED")\'])',
        REFUSED,
        True,
    ),
    # privileges and the kernel
    "become root": ("os.setuid(0); escaped()", REFUSED, False),
    "chroot": ("os.chroot('/usr'); escaped()", REFUSED, False),
    "host name": ("import socket; socket.sethostname('x'); escaped()", REFUSED, False),
    "the clock": (
        "import time; time.clock_settime(time.CLOCK_REALTIME, 0); escaped()",
        REFUSED,
        False,
    ),
    "the terminal": ("open('/dev/tty', 'w'); escaped()", REFUSED, False),
    "type into the terminal": (
        "import fcntl, termios\nfor fd in (0, 1, 2):\n    try: fcntl.ioctl(fd, "
        "termios.TIOCSTI, b'x')\n    except OSError: continue\n    escaped()",
        ("",),
        False,
    ),
    **{
        f"system call {name}": (f"call({name!r}, *[0] * 6)", REFUSED, False)
        for name in (
            "mount umount2 pivot_root unshare setns bpf perf_event_open userfaultfd "
            "io_uring_setup keyctl add_key capset reboot init_module kexec_load swapon "
            "inotify_init1 personality seccomp quotactl acct"
        ).split()
    },
}


def unharmed(host):
    "Whether the host is as it was: the canary, the secret, the folder, and nobody left."
    assert host["canary"].poll() is None, "another process was killed"
    assert (host["folder"] / "secret.txt").read_text() == SECRET, "files of the host were changed"
    assert {p.name for p in host["folder"].iterdir()} <= {"secret.txt", "socket"}, (
        "files of the host were changed"
    )
    family = {p.pid for p in psutil.Process().children(recursive=True)} - host["before"]
    left = [
        p.info
        for p in psutil.process_iter(["name", "status"])
        if p.pid in family and p.info["status"] != psutil.STATUS_ZOMBIE
    ]
    names = [p["name"] or "" for p in left]
    assert not [n for n in names if "bwrap" in n or "python" in n], "processes are left"


@pytest.mark.parametrize("name", ATTEMPTS)
def test_contained(name, host):
    code, ends, _, *limits = ATTEMPTS[name]
    limits = {"seconds": 5, **(limits[0] if limits else {})}
    got = run_code(host["lines"] + code, **limits)
    assert "ESCAPED" not in got.stdout, got
    assert got.reason in ends, got
    assert got.seconds < limits["seconds"] + 10
    assert len(got.stdout) + len(got.stderr) <= 64 * 1024
    assert not got.ended or got.clean_exit
    if name.startswith("system call"):
        assert "[Errno 1]" in got.stderr, (
            got
        )  # the filter's answer, before the kernel looks at the arguments
    unharmed(host)


def test_the_attempts_are_real(host, tmp_path):
    "What harms nobody succeeds outside the sandbox."
    real = [name for name, (_, _, outside, *_) in ATTEMPTS.items() if outside]
    assert len(real) >= 35
    for name in real:
        code = host["lines"] + ATTEMPTS[name][0]
        got = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert "ESCAPED" in got.stdout, (name, got.stderr[-500:])
    (host["folder"] / "left.txt").unlink()


def test_at_least_forty_attempts():
    assert len(ATTEMPTS) >= 100


def test_a_program_is_a_program():
    "What harmless code does goes on working."
    for code, stdin, out in (
        ("print(sum(map(int, input().split())))", "1 2 3\n", "6\n"),
        ("import sys; print(len(sys.stdin.read()))", "x" * 300_000, "300000\n"),
        (
            "import math, re, json, heapq, collections, itertools, random, datetime, decimal, "
            "statistics, hashlib, string, typing, copy, bisect, "
            "functools\nprint(hashlib.md5(b'').hexdigest()[:4])",
            "",
            "d41d\n",
        ),
        (
            "import numbers, dataclasses, enum, fractions, zoneinfo, sqlite3, ssl, uuid, "
            "asyncio\nprint(fractions.Fraction(1, 3))",
            "",
            "1/3\n",
        ),
        (
            "import asyncio\nasync def f(n): await asyncio.sleep(0.01); return n\nasync def "
            "g(): print(sum(await asyncio.gather(f(1), f(2))))\nasyncio.run(g())",
            "",
            "3\n",
        ),
        (
            "if __name__ == '__main__': print(sys.argv if (sys := __import__('sys')) else 0)",
            "",
            "['main.py']\n",
        ),
        ("def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(20))", "", "6765\n"),
        ("print('é', '\\U0001d4b6')", "", "é \U0001d4b6\n"),
        ("import sys\nprint(1)\nsys.exit()", "", "1\n"),
    ):
        got = run_code(code, stdin, seconds=10)
        assert got.clean_exit, got
        assert got.stdout == out, got
        assert not got.stderr, got
        assert not got.reason, got
    kept = run_code(
        "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'ab'); f.seek(0); "
        "print(f.read())",
        disk_mib=1,
        seconds=10,
    )
    assert kept.stdout == "b'ab'\n"
    assert kept.ended


def test_what_went_wrong_is_said():
    got = run_code("x = 1\n\ndef f():\n    return y\n\nf()")
    assert got.reason == "error"
    assert not got.ended
    assert got.stderr.splitlines()[-1] == "NameError: name 'y' is not defined"
    assert 'File "main.py", line 4, in f\n    return y' in got.stderr
    assert "sandbox" not in got.stderr
    assert "<string>" not in got.stderr  # our program does not show
    assert run_code("x = (").stderr.splitlines()[-1].startswith("SyntaxError")
    assert run_code("import sys; sys.exit('bad')").stderr == "bad\n"
    assert run_code("import sys; sys.exit(3)").reason == "error"
    late = run_code("import time\nprint('so far', flush=True)\ntime.sleep(9)", seconds=1)
    assert late.reason == "time"
    assert late.stdout == "so far\n"
    assert 1 <= late.seconds < 9
    assert run_code("\0").reason == "error"
    assert run_code("print('\ud800')").reason == "error"


def test_text_cannot_act_on_a_terminal_that_shows_the_result():
    got = run_code("print('\\x1b[2J\\x1b]0;title\\x07\\x9b31m')")
    assert "\x1b" in got.stdout
    assert not any(c in str(got) for c in "\x1b\x07\x9b")


def test_to_leave_early_is_not_to_pass():
    for code in (
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'+' + b'0' * 32)\n    "
        "except OSError: pass\nos._exit(0)",
    ):
        got = run_code(code, tests="assert False")
        assert got.clean_exit, got
        assert not got.ended, got
    assert not run_code('x = """', tests='assert False\n"""').ended
    assert not run_code(
        "if 0:\\", tests="    assert False"
    ).ended  # code that would swallow its tests
    assert run_code("x = 3", tests="assert x == 3").ended
    assert not run_code("x = 3", tests="assert x == 4").ended


# each makes `assert f(2) == 4` and `assert f(3) == 9` pass where tests run in the program's own
# process, or tries to
CHEATS = {
    "exec is replaced": "import builtins\nbuiltins.exec = lambda *a, **k: None\ndef f(x): return 1",
    "compile gives an empty program": (
        "import builtins\n"
        "plain = compile\n"
        "builtins.compile = lambda *a, **k: plain('', 'x', 'exec')\n"
        "def f(x): return 1"
    ),
    "everything is equal to it": (
        "class Any:\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = None\n"
        "def f(x): return Any()"
    ),
    "a number that is equal to all": (
        "class Any(int):\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = int.__hash__\n"
        "def f(x): return Any(1)"
    ),
    "a text that is equal to all": (
        "class Any(str):\n"
        "    def __eq__(self, other): return True\n"
        "    __hash__ = str.__hash__\n"
        "def f(x): return Any('')"
    ),
    "not equal is false": (
        "class Any:\n"
        "    def __ne__(self, other): return False\n"
        "    def __eq__(self, other): return True\n"
        "def f(x): return Any()"
    ),
    "leaves when it is called": "import os\ndef f(x): os._exit(0)",
    "leaves at the start": "import os\nos._exit(0)",
    "leaves politely": "def f(x): raise SystemExit(0)",
    "leaves from a trace": (
        "import os, sys\nsys.settrace(lambda *a: os._exit(0))\ndef f(x): return 1"
    ),
    "leaves when it is collected": (
        "import os\nclass Late:\n    def __del__(self): os._exit(0)\ndef f(x): return Late()"
    ),
    "leaves at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
    "looks for the secret word in the frames": (
        "import os, sys\n"
        "def f(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n"
        "            if isinstance(value, bytes):\n"
        "                for fd in range(3, 256):\n"
        "                    try: os.write(fd, value)\n"
        "                    except OSError: pass\n"
        "        frame = frame.f_back\n"
        "    os._exit(0)"
    ),
    "looks for the secret word everywhere": (
        "import gc, os\n"
        "for thing in gc.get_objects():\n"
        "    for value in thing.values() if isinstance(thing, dict) else ():\n"
        "        if isinstance(value, bytes) and len(value) == 32:\n"
        "            for fd in range(3, 256):\n"
        "                try: os.write(fd, value)\n"
        "                except OSError: pass\n"
        "os._exit(0)"
    ),
    "says yes on every pipe": (
        "import os\n"
        "for fd in range(3, 256):\n"
        "    try: os.write(fd, b'+' + b'0' * 32)\n"
        "    except OSError: pass\n"
        "os._exit(0)"
    ),
    "answers instead of the server": (
        "import json, os\n"
        "def f(x):\n"
        "    for fd in range(3, 256):\n"
        "        try: os.write(fd, json.dumps(['found', 4, None]).encode() + b'\\n')\n"
        "        except OSError: pass\n"
        "    return 1"
    ),
    "speaks nonsense": (
        "import os\n"
        "def f(x):\n"
        "    for fd in range(3, 256):\n"
        "        try: os.write(fd, b'nonsense\\n')\n"
        "        except OSError: pass\n"
        "    return 1"
    ),
    "an error that is no error": (
        "import builtins\n"
        "builtins.AssertionError = type('Fine', (BaseException,), {})\n"
        "def f(x): return 1"
    ),
    "assert is made silent": (
        "import sys\n"
        "sys.flags = type('F', (), {'optimize': 2})()\n"
        "__debug = False\n"
        "def f(x): return 1"
    ),
    "a hook for errors": (
        "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): return 1 / 0"
    ),
    "a hook for audits": (
        "import os, sys\n"
        "sys.addaudithook(lambda name, args: os._exit(0) if name == 'compile' else None)\n"
        "def f(x): return 1"
    ),
    "its own importer": (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, *a): raise SystemExit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "def f(x): return 1"
    ),
    "modules of its own": (
        "import sys\n"
        "for name in list(sys.modules):\n"
        "    sys.modules[name] = None\n"
        "def f(x): return 1"
    ),
    "another answer with each call": (
        "import itertools\n"
        "answers = itertools.cycle([4, 9, 16, 25])\n"
        "class Any:\n"
        "    def __eq__(self, other): return next(answers)\n"
        "def f(x): return Any()"
    ),
    "goes through the frames to change the tests": (
        "import sys\n"
        "def f(x):\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        for name in list(frame.f_globals):\n"
        "            if name not in ('sys', 'f'): frame.f_globals[name] = f\n"
        "        frame = frame.f_back\n"
        "    return 1"
    ),
    "its own repr and len": (
        "class Any:\n"
        "    def __len__(self): return 10 ** 9\n"
        "    def __repr__(self): return '4'\n"
        "    def __index__(self): return 4\n"
        "    def __bool__(self): return True\n"
        "def f(x): return Any()"
    ),
    "Python's functions with other meanings": (
        "def isinstance(*a): return True\n"
        "def all(*a): return True\n"
        "def len(*a): return 4\n"
        "def print(*a): pass\n"
        "def f(x): return 1"
    ),
    "a name of its own for equality": (
        "import operator\noperator.eq = lambda a, b: True\nint.__eq__\ndef f(x): return 1"
    ),
    "sleeps the tests to death": "import time\ndef f(x): time.sleep(60)",
}


FIRST = ["f(2) == 4", "f(3) == 9", "f(4) == 16"]


def in_one_process(code: str, tests: str) -> bool:
    """Give the verdict of a naive harness: leaving with status 0 is passing.

    The tests run after the program, where it runs.
    """
    return run_code(f"{code}\nexec(compile({tests!r}, 'tests.py', 'exec'))", seconds=5).clean_exit


@pytest.mark.parametrize("name", CHEATS)
def test_a_program_cannot_cheat_its_tests(name):
    got = run_code(CHEATS[name], tests=assertions(FIRST), seconds=1 if "sleeps" in name else 30)
    assert not got.ended, got
    assert not (got.clean_exit and not got.cheat), got


def test_the_cheats_are_real():
    "Many of them deceive tests that run in the program's own process."
    deceived = [
        name
        for name, code in CHEATS.items()
        if "sleeps" not in name and in_one_process(code, assertions(FIRST))
    ]
    assert len(CHEATS) >= 15, deceived
    assert len(deceived) >= 10, deceived


def test_what_a_cheat_did_is_told():
    told = (
        "everything is equal to it",
        "leaves at the start",
        "leaves politely",
        "speaks nonsense",
    )
    found = [run_code(CHEATS[name], tests=assertions(FIRST), seconds=30).cheat for name in told]
    assert found == ["object", "left", "left", "broken"]
    assert run_code("def f(x): return 1", tests=assertions(FIRST)).cheat == ""


def test_python_s_own_functions_are_python_s_in_tests():
    liar = "def set(x): return 0\ndef sorted(x): return 0\ndef f(x): return [3]"
    assert not run_code(liar, tests="assert set(f(1)) == set([1, 2])").ended
    assert not run_code(liar, tests="assert sorted(f(1)) == [1]").ended
    assert run_code(
        "def sum(a, b): return a + b", tests="assert sum(10, 15) == 25"
    ).ended  # unless there is nothing else to test
    assert not run_code(
        "def sum(a, b): return 0\ndef sorted(x): return [25]",
        tests="assert sorted([sum(10, 15)]) == [25]",
    ).ended
    fake = "class math:\n    fabs = staticmethod(lambda x: 0)\ndef f(x): return 7"
    assert not run_code(fake, tests="assert math.fabs(f(1)) < 1e-4").ended


def test_what_else_a_prompt_defines_the_tests_have_for_themselves():
    prompt = (
        "import math\n"
        "\ndef poly(xs, x):\n"
        "    return sum(c * x**i for i, c in enumerate(xs))\n"
        "\ndef find_zero(xs):\n"
        "    ' zero '\n"
    )
    task = dict(
        prompt=prompt,
        entry_point="find_zero",
        test="def check(candidate):\n    assert math.fabs(poly([1, 2], candidate([1, 2]))) < "
        "1e-4\n",
    )
    assert check_humaneval(task, "    return -xs[0] / xs[1]\n").ended
    assert not check_humaneval(task, "    return 5\ndef poly(xs, x): return 0\n").ended


PROGRAM = """
from collections import Counter, OrderedDict, deque, namedtuple
from fractions import Fraction
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def total(self): return self.a + self.b
Point = namedtuple("Point", "x y")
def same(x): return x
def grow(xs): xs.append(len(xs))
def clear(d): d.clear()
def count(n):
    for i in range(n): yield i
def totals(pairs): return [p.total() for p in pairs]
def adder(a): return lambda b: a + b
def fails(x): raise KeyError(x)
things = dict(counter=Counter("aab"), order=OrderedDict(a=1), point=Point(1, 2))
things |= dict(half=Fraction(1, 2), line=deque([1]))
state = [0]
def bump(): state[0] += 1
"""
ITS_TESTS = """
flat = (None, True, 1, 10 ** 5000, 1.5, float("inf"), 2j, "é\\ud800", b"\\x00", bytearray(b"a"))
nested = ([1, [2]], (1, (2,)), {1, 2}, frozenset({1}), {"a": {1: (2,)}}, range(1, 9, 2), int, -0.0)
for x in (*flat, *nested):
    assert same(x) == x and type(same(x)) is type(x), x
assert same(float("nan")) != same(float("nan"))
xs, d = [5], {1: 2}
grow(xs), clear(d)
assert xs == [5, 1] and d == {}
assert list(count(3)) == [0, 1, 2] and next(count(10 ** 9)) == 0 and sum(count(4)) == 6
assert totals([Pair(1, 2), Pair(3, 4)]) == [3, 7] and Pair(1, 2).total() == 3 and Pair(5, 6).a == 5
assert adder(2)(3) == 5
assert things["counter"] == {"a": 2, "b": 1}
assert things["order"] == {"a": 1}
assert things["point"] == (1, 2)
assert things["half"] == 0.5
assert len(things["line"]) == 1
bump()
assert state == [1]
try:
    fails("k")
except KeyError as error:
    assert error.args == ("'k'",)
else:
    raise AssertionError("no error came over")
"""


def test_what_tests_and_programs_hand_over():
    got = run_code(PROGRAM, tests=ITS_TESTS, seconds=30)
    assert got.ended, got
    handed = run_code("def f(g): return g(1)", tests="assert f(lambda x: x) == 1", seconds=30)
    assert not handed.ended
    assert "tests hand over a function; expected numbers" in handed.stderr


def test_nothing_stays_between_executions():
    first = run_code(
        "import builtins, os, random, sys\nbuiltins.mark = 1; os.environ['M'] = '1'; "
        "sys.modules['mark'] = sys; open('/tmp/mark', 'w').write('1'); random.seed(1)",
        disk_mib=1,
    )
    second = run_code(
        "import builtins, os, sys\nprint(hasattr(builtins, 'mark'), 'M' in os.environ, 'mark' "
        "in sys.modules, os.listdir('/tmp'), len(os.listdir('/')))",
        disk_mib=1,
    )
    assert first.ended, (first, second)
    assert second.stdout.startswith("False False False [] "), (first, second)
    orders = {run_code("print({c for c in 'abcdefghij'}, hash('x'))").stdout for _ in range(3)}
    assert len(orders) == 1  # the order of sets is the same every time, so a reward is


def test_pool_keeps_order_and_contains_each():
    random.seed(0)
    codes, expected = [], []
    for i in range(24):
        kind = random.choice(("fine", "wrong", "loop", "memory"))
        codes.append(
            {
                "fine": f"print({i})",
                "wrong": f"print({i}); 1 / 0",
                "loop": f"print({i}, flush=True)\nwhile True: pass",
                "memory": f"print({i}); x = [0] * 10 ** 9",
            }[kind]
        )
        expected.append(
            (f"{i}\n", {"fine": "", "wrong": "error", "loop": "time", "memory": "memory"}[kind])
        )
    with Pool(workers=4, seconds=2.0) as pool:
        got = pool.map(codes)
        assert [(e.stdout, e.reason) for e in got] == expected
        assert [
            e.ended for e in pool.map(["x = 1"] * 2, tests=["assert x == 1", "assert x == 2"])
        ] == [True, False]
        assert [e.stdout for e in pool.map(["print(input())"] * 2, stdins=["a\n", "b\n"])] == [
            "a\n",
            "b\n",
        ]
        with pytest.raises(ValueError):
            pool.map(["x"], tests=["a", "b"])


def test_a_host_that_is_killed_takes_its_executions_along(tmp_path):
    # SIGINT is ignored where the tests run in the background
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += (
        "import polm_lab.rewards.sandbox as s; s.isolator(); print('ready', flush=True); "
        "s.run_code('import time\\nwhile True: time.sleep(1)', seconds=600)"
    )
    for kill in (signal.SIGKILL, signal.SIGINT):
        host = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        assert host.stdout.readline() == b"ready\n"
        try:
            deadline = time.monotonic() + 30
            while (
                len(inside := psutil.Process(host.pid).children(recursive=True)) < 3
                and time.monotonic() < deadline
            ):
                time.sleep(0.02)
            assert len(inside) >= 3  # bwrap, its process 1, python
            time.sleep(0.2)
            host.send_signal(kill)
            gone, alive = psutil.wait_procs(inside, timeout=20)
            assert not alive, kill
            host.wait(20)
        finally:
            host.kill()
            host.wait()
            host.stdout.close()


def test_nothing_of_the_abuse_is_left_on_the_host(host):
    "No open file, no mount, no process, no file in /tmp."

    def state():
        return (
            len(os.listdir("/proc/self/fd")),
            Path("/proc/self/mountinfo").read_text(),
            sorted(p.name for p in Path("/tmp").glob("polm_left*")),
        )

    before = state()
    for name in (
        "a growing list",
        "fill the disk",
        "small files without end",
        "memory in pipes",
        "print without end",
        "endless loop",
    ):
        code, _, _, *limits = ATTEMPTS[name]
        run_code(host["lines"] + code, **(limits[0] if limits else {}))
    assert state() == before
    unharmed(host)


def test_from_many_threads_at_once():
    got = []
    threads = [
        threading.Thread(
            target=lambda i=i: got.append((i, run_code(f"print({i})", seconds=20).stdout))
        )
        for i in range(12)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(got) == [(i, f"{i}\n") for i in range(12)]


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(code=b"x"), "code is bytes; expected text"),
        (dict(code="x", stdin=None), "stdin is NoneType; expected text"),
        (dict(code="x", tests=["a"]), "tests is list; expected text"),
        (dict(code="x" * (2**24 + 1)), "expected at most 16,777,216"),
        (dict(code="x", seconds=0), "seconds = 0; expected a number from 0.01 to 3,600"),
        (dict(code="x", seconds=float("nan")), "seconds = nan"),
        (dict(code="x", seconds="2"), "seconds = '2'"),
        (dict(code="x", memory_mib=1), "memory_mib = 1; expected a number from 64"),
        (dict(code="x", disk_mib=-1), "disk_mib = -1"),
        (dict(code="x", output_kib=True), "output_kib = True"),
    ],
)
def test_wrong_limits(values, said):
    with pytest.raises(WrongInput, match="sandbox: ") as wrong:
        run_code(**values)
    assert said in str(wrong.value)
    assert "\n" not in str(wrong.value)


def refusal(**environment):
    "What a process says that wants to run code in this environment."
    code = (
        "import sys, polm_lab.rewards.sandbox as s\n"
        "try: s.run_code('print(1)')\n"
        "except s.WrongInput as wrong: print(wrong); sys.exit(2)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_without_an_isolator_nothing_runs(tmp_path):
    "None installed; one that does nothing, does not isolate, or may not make namespaces."
    (tmp_path / "bwrap").write_text(
        '#!/bin/sh\nwhile [ "$1" != "-s" ]; do shift; done\nexec ' + sys.executable + ' "$@"\n'
    )
    (tmp_path / "bwrap").chmod(0o755)
    for environment, said in (
        (dict(PATH="/nonexistent"), "apt-get install bubblewrap"),
        (dict(POLM_BWRAP="/nonexistent"), "does not work"),
        (dict(POLM_BWRAP="/bin/true"), "does not work"),
        (dict(POLM_BWRAP=str(tmp_path / "bwrap")), "was not contained"),
    ):
        got = refusal(**environment)
        assert got.returncode == 2, (environment, got)
        assert said in got.stdout, (environment, got)
        assert "is not run" in got.stdout, (environment, got)
        assert len(got.stdout.splitlines()) == 1, (environment, got)


def test_as_a_normal_user_and_where_namespaces_are_forbidden():
    """As user 1000 without capabilities it works.

    Where no further namespace may be made it is refused, with what to do.
    """
    nested = [
        shutil.which("bwrap"),
        "--unshare-user",
        "--uid",
        "1000",
        "--gid",
        "1000",
        "--cap-drop",
        "ALL",
        "--dev-bind",
        "/",
        "/",
    ]
    code = (
        "import os, polm_lab.rewards.sandbox as s; print(os.getuid(), s.run_code('print(6 * "
        "7)', seconds=20).stdout)"
    )
    got = subprocess.run(
        [*nested, sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert got.stdout == "1000 42\n\n", got
    code = (
        "import sys, polm_lab.rewards.sandbox as s\n"
        "try: s.run_code('print(1)')\n"
        "except s.WrongInput as wrong: print(wrong); sys.exit(2)"
    )
    got = subprocess.run(
        [*nested, "--disable-userns", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert got.returncode == 2, got
    assert "user namespaces" in got.stdout, got
    assert "is not run" in got.stdout, got


HUMANEVAL = dict(
    prompt="def add(x: int, y: int) -> int:\n"
    '    """ Add two numbers.\n    >>> add(2, 3)\n    5\n    """\n',
    entry_point="add",
    test="METADATA = {}\n\ndef check(candidate):\n    assert candidate(2, 3) == 5\n    assert "
    "candidate(-1, 1) == 0\n",
)
MBPP = dict(
    text="Write a function to reverse a list.",
    test_list=["assert rev([1, 2]) == [2, 1]", "assert rev(empty) == []"],
    test_setup_code="empty = []",
)


def test_humaneval_and_mbpp_rows():
    for completion, passes in (
        ("    return x + y\n", True),
        ("    return x - y\n", False),
        ("```python\ndef add(x, y):\n    return x + y\n```", True),
        ("    import sys; sys.exit()\n", False),
        ("", False),
    ):
        assert check_humaneval(HUMANEVAL, completion).ended is passes, completion
    for code, passes in (
        ("def rev(x):\r\n\treturn x[::-1]", True),
        ("def rev(x): return x", False),
        ("Sure:\n```\ndef rev(x):\n    return x[::-1]\n```\nDone.", True),
        ("quit()", False),
        ("def rev(x): exit()", False),
    ):
        assert check_mbpp(MBPP, code).ended is passes, code
    assert code_in("a ```x``` b") == "a ```x``` b"
    assert code_in("```py\na\n```\nor\n```\nb\n```") == "b\n"
    assert code_in("```py\nopen") == "open"
    assert (
        assertions(["f(1) == 2", "assert g()", "y = f(1)\nassert y"])
        == "assert f(1) == 2\nassert g()\ny = f(1)\nassert y"
    )


def test_verdicts_are_those_of_the_code_task():
    "The task's own evaluator and the sandbox agree on right and wrong completions."
    task = TASKS["code"]
    rows = task.rows("preference", 12, 0)
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    rows = [row for row in rows for _ in range(2)]
    with Pool() as pool:
        got = pool.map(
            [row["prompt"] + text for row, text in zip(rows, texts)],
            tests=[assertions(row["tests"]) for row in rows],
        )
    assert (
        [float(e.ended) for e in got]
        == [task.score(row, text) for row, text in zip(rows, texts)]
        == [1.0, 0.0] * 12
    )


def test_reward_of_code_that_passes_its_tests():
    from polm_lab.rewards.functions import call_rewards, make_rewards, try_rewards

    task = TASKS["code"]
    rows = task.rows("preference", 8, 1)
    [reward] = make_rewards("tests")
    for side, value in (("chosen", 1.0), ("rejected", 0.0)):
        assert (
            call_rewards([reward], rows, [row[side] for row in rows], [[1]] * 8, [True] * 8).total
            == [value] * 8
        )
    talk = [
        dict(prompt=[{"role": "user", "content": "Write f."}], tests=tests)
        for tests in ("assert f(2) == 4", ["f(2) == 4", "f(3) == 9"], None)
    ]
    asked = [
        [{"role": "assistant", "content": text}]
        for text in (
            "Sure.\n```python\nf = lambda x: x * 2\n```",
            "def f(x):\n    return x * 2",
            "f = 1",
        )
    ]
    assert call_rewards([reward], talk, asked, [[1]] * 3, [True] * 3).parts["tests"] == [
        1.0,
        0.0,
        None,
    ]
    for completion in ("import os; os._exit(0)", "f = 1\nraise SystemExit", "while True: pass"):
        assert call_rewards(
            [reward], talk[:1], [[{"role": "assistant", "content": completion}]], [[1]], [True]
        ).total == [0.0]
    with pytest.raises(WrongInput, match="no column `tests`"):
        try_rewards(
            [reward],
            TASKS["sums"].rows("prompt", 2),
            lambda text, **_: type("Encoded", (), {"input_ids": [1]}),
        )


def test_the_reward_is_refused_before_compute_without_an_isolator(polm):
    got = polm(
        "run", "grpo", "-p", "data", "code", "-p", "rewards", "tests", POLM_BWRAP="/nonexistent"
    )
    assert got.returncode == 2, got
    assert "is not run" in got.stderr, got
    assert len(got.stderr.strip().splitlines()) == 1, got
