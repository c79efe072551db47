"""Programs that want to pass without the right answer, or to harm: each is to end in 0.0 and nothing else.

An attack is one line that may stand at two places: where the program is loaded, and in the function that is called.
"""
# ruff: noqa: E501  one attack is not cut in two

FORGED = ['b"1"', 'b"1\\n"', 'b\'{"value": {"int": "0x2a"}}\\n\' * 9']
ATTACKS = [
    # the end of the process, early or in a wrong way
    "os._exit(0)", "os._exit(1)", "sys.exit(0)", "sys.exit('1')", "raise SystemExit(0)", "raise KeyboardInterrupt",
    "raise GeneratorExit", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 11)", "os.kill(1, 9)", "os.kill(-1, 9)",
    "os.kill(0, 9)", "os.kill(os.getppid(), 9)", "os.killpg(0, 9)", "os.abort()", "ctypes.string_at(0)",
    "signal.pthread_kill(threading.get_ident(), 9)", "faulthandler._sigsegv()",
    # processes and threads
    "os.fork()", "[os.fork() for _ in range(1000)]", "os.forkpty()", "os.posix_spawn('/bin/sh', ['sh'], {})",
    "os.execv(sys.executable, ['python', '-c', 'print(1)'])", "os.system('touch ' + CANARY)", "os.popen('id').read()",
    "subprocess.run(['/bin/sh', '-c', 'id'], check=True)", "multiprocessing.Process(target=print).start()",
    "threading.Thread(target=print).start()", "[threading.Thread(target=time.sleep, args=(9,)).start() for _ in 'ab']",
    "libc.fork()", "libc.vfork()", "libc.syscall(56, 17, 0, 0, 0, 0)", "libc.syscall(435, 0, 0)",
    # processor time, memory, output
    "[None for _ in iter(int, 1)]", "exec('while True: pass')", "10 ** 10 ** 10", "'a' * (1 << 40)", "bytearray(1 << 33)",
    "exec('x = [0]\\nwhile True: x += x')", "re.match('(a+)+$', 'a' * 64 + 'b')", "list(itertools.count())",
    "[print('1' * 1000) for _ in range(10 ** 7)]", "sys.setrecursionlimit(10 ** 9) or (lambda f: f(f))(lambda f: f(f))",
    "exec('(' * 100000)", "mmap.mmap(-1, 1 << 34)", "[os.pipe() for _ in range(10000)]",
    "[open(f'/tmp{i}', 'wb').write(bytes(1 << 20)) for i in range(10000)]", "hash(10 ** 10 ** 8)", "sorted(range(10 ** 9))",
    # files, environment, network
    "open(CANARY, 'w').write('gone')", "os.remove(CANARY)", "open(CANARY).read()", "os.listdir(FOLDER)",
    "shutil.rmtree(FOLDER)", "os.symlink(CANARY, '/link') or open('/link').read()", "os.chmod(FOLDER, 0)",
    "open('/etc/passwd').read()", "open('/proc/self/mem', 'r+b')", "open('/proc/1/environ', 'rb').read()",
    "open('/proc/self/status').read()", "os.environ['HOSTILE_SECRET']", "os.environb[b'HOSTILE_SECRET']",
    "open('/dev/shm/hostile', 'w')", "open(os.__file__, 'a').write('#')", "os.rename(os.__file__, '/os.py')",
    "socket.create_connection(('127.0.0.1', PORT), 2)", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "socket.socket(socket.AF_UNIX)", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "socket.socketpair()",
    "urllib.request.urlopen(f'http://127.0.0.1:{PORT}/', timeout=2)", "socket.getaddrinfo('localhost', PORT)[9]",
    # out of the sandbox
    "libc_or_raise(libc.unshare(0x10000000))", "libc_or_raise(libc.setns(0, 0))", "os.chroot('/')", "os.setuid(0)",
    "libc_or_raise(libc.mount(b'none', b'/', b'tmpfs', 0, None))", "libc_or_raise(libc.umount2(b'/', 2))",
    "libc_or_raise(libc.ptrace(16, 1, 0, 0))", "libc_or_raise(libc.ptrace(0, 0, 0, 0))", "os.setgroups([0])",
    "libc_or_raise(libc.prctl(38, 0, 0, 0, 0))", "libc_or_raise(libc.syscall(321, 0, 0, 0))", "os.nice(-20)",
    "resource.setrlimit(resource.RLIMIT_CPU, (10 ** 6, 10 ** 6))", "libc_or_raise(libc.sethostname(b'x', 1))",
    "os.mknod('/device', 0o600 | 0o60000, os.makedev(8, 0))", "os.memfd_create('x')", "os.pidfd_open(1)",
    "libc_or_raise(libc.shmget(0, 1 << 30, 0o1600))", "libc_or_raise(libc.syscall(0x40000000 + 57))",
    "[os.chdir('..') for _ in range(99)] and os.listdir('root')", "os.open('/', os.O_TMPFILE) and os.stat(FOLDER)",
    # the test, the comparison and the verdict
    "builtins.__dict__.update(abs=lambda x: 0, isinstance=lambda *a: True, all=lambda x: True)",
    "sys.modules.update(math=None, json=None)", "sys.settrace(lambda *a: None)", "setattr(sys, 'excepthook', print)",
    "atexit.register(os.write, 1, b'1')", "print(1) or print('1', file=sys.stderr)", "gc.collect() and gc.get_objects()[0]",
    "[frame.f_locals for frame in [sys._getframe(0)] if frame.f_back.f_back.f_back.f_locals['tests']][0]",
    "[o for o in gc.get_objects() if isinstance(o, list) and o[:1] == ['assert f(6) == 42']][0]",
    *(f"[os.write(number, {text}) for number in (1, 2, 3, 5, 6, 7, 8)]" for text in FORGED),
    "[os.close(number) for number in (1, 2, 3, 4, 5)]", "os.read(3, 9)[0]", "os.dup2(1, 5)",
    "[os.lseek(0, 0, 0), os.read(0, 99).index(b'assert')]", "os.write(5, b'{' * 10 ** 7)",
    "os.write(5, b'{\"value\": {\"code\": \"import os\"}}\\n')", "os.write(5, b'{\"raised\": \"SystemExit\"}\\n')",
    "os.write(5, b'[' * 100000 + b'\\n')", "os.write(5, b'\\xff\\xfe\\n')", "os.write(5, b'{\"value\": {\"int\": \"1\"')",
    "setattr(sys.modules['stages.lib.answers.sandbox_calls'], 'encode', lambda v: {'int': '0x29'})",
    "sys.modules['stages.lib.answers.row_tests'].__dict__.update(passes=lambda *a: True)",
]  # fmt: skip
# Waiting takes no processor time: these go to the end of the wall's limit, so each stands at one place only.
WAITS = [
    "time.sleep(10 ** 6)",
    "threading.Lock().acquire() and [*map(threading.Lock.acquire, [LOCK, LOCK])]",
    "signal.pause()",
]
PLACES = ["{attack}\ndef f(x): return 41", "def f(x):\n    {attack}\n    return 41"]
# What a function may return instead of 42.
RETURNED = [
    "type('E', (), {'__eq__': lambda s, o: True})()", "type('E', (int,), {'__eq__': lambda s, o: True})(41)",
    "type('E', (int,), {'__eq__': lambda s, o: True, '__index__': lambda s: 42, '__hash__': lambda s: 42})(41)",
    "type('E', (float,), {'__eq__': lambda s, o: True})(41.0)", "type('E', (str,), {'__eq__': lambda s, o: True})('42')",
    "type('E', (list,), {'__eq__': lambda s, o: True})([42])", "type('E', (), {'__getattr__': lambda s, n: 42})()",
    "type('E', (), {'__class__': int, '__eq__': lambda s, o: True})()", "mock.ANY", "mock.MagicMock()", "NotImplemented",
    "...", "None", "True", "'42'", "[42]", "(42,)", "{42}", "b'*'", "float('nan')", "float('inf')", "42.5", "f", "type", "sys",
    "lambda: 42", "(42 for _ in 'a')", "iter([42])", "range(42)", "42j", "10 ** 5000", "itertools.count()",
    "itertools.repeat(42)", "[[]] * 10 ** 8", "'42' * 10 ** 8", "exec('a = []; a.append(a)', globals()) or a",
    "functools.reduce(lambda a, _: [a], range(10 ** 5), [])", "__builtins__", "gc.get_objects()", "object()",
    "type('E', (), {'__iter__': lambda s: iter(int, 1)})()", "type('E', (), {'__iter__': lambda s: os._exit(0)})()",
    "type('E', (dict,), {'items': lambda s: [(1, 2)] * 10 ** 8})(a=1)", "{'int': '0x2a'}",
    "type('int', (), {'hex': lambda s: '0x2a'})()", "type('E', (float,), {'hex': lambda s: '0x1.5p+5' * 99})(1)",
]  # fmt: skip
IMPORTS = (
    "atexit builtins ctypes faulthandler functools gc itertools json math mmap multiprocessing os re resource shutil signal "
    "socket subprocess sys threading time urllib.request"
)


def hostile_programs(folder: str, canary: str, port: int) -> list[str]:
    """Give the programs; they are told of a folder with a file, and of a port of this machine that listens."""
    head = "".join(f"try: import {name}\nexcept ImportError: pass\n" for name in IMPORTS.split())
    head += "from unittest import mock\nLOCK = threading.Lock()\nlibc = ctypes.CDLL(None)\n"
    head += "def libc_or_raise(returned):\n    if returned < 0: raise OSError\n"
    head += f"FOLDER, CANARY, PORT = {folder!r}, {canary!r}, {port}\n"
    bodies = [place.format(attack=attack) for attack in ATTACKS for place in PLACES]
    bodies += [PLACES[1].format(attack=attack) for attack in WAITS]
    bodies += [f"def f(x): return {value}" for value in RETURNED]
    bodies += ["", "def g(x): return 42", "f = 42", "class f: pass", "def f(): return 42", "def f(x) return 42", "\0"]
    return [head + body for body in bodies[:-7]] + bodies[-7:]
