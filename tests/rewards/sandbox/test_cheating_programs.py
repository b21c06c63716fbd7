"""Programs that do not solve their task and want to look as if they did: none passes a test, in any form."""

from __future__ import annotations

import pytest

from rewards.sandbox.backends import Backend
from rewards.sandbox.grading import Assertions, Case, Printed, Returned, run_case
from rewards.sandbox.limits import Limits

LIMITS = Limits(seconds=2)

#: The task: add(a, b), and for stdin two numbers whose sum is to be printed. 4711 is the sum.
FORMS: dict[str, Case] = {
    "assertion": Assertions("assert add(4000, 711) == 4711"),
    "assertion in a loop": Assertions("for a, want in [(4000, 4711)]:\n    assert add(a, 711) == want"),
    "assertion over a map": Assertions("assert all(map(lambda a: add(a, 711) == 4711, [4000]))"),
    "zip of a map": Assertions(
        "for got, want in zip(map(add, [4000], [711]), [4711]):\n    assert got == want"
    ),
    "humaneval": Assertions("def check(candidate):\n    assert candidate(4000, 711) == 4711\ncheck(add)\n"),
    "nearly": Assertions(
        "import math\nassert abs(add(4000, 711) - 4711) < 1e-6 and math.isclose(add(4000, 711), 4711)"
    ),
    "about": Assertions("assert abs(add(4000, 711) - 4711) < 1e-6"),
    "call": Returned("add", (4000, 711), {}, 4711),
    "stdin": Printed("4000 711\n", "4711"),
}
ALWAYS_EQUAL = """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    def __gt__(self, other): return False
    def __bool__(self): return True
    def __sub__(self, other): return 0
    def __rsub__(self, other): return 0
    def __abs__(self): return 0
    def __float__(self): return 4711.5
    def __hash__(self): return 0
    def __repr__(self): return '1'
"""
CHEATS = {
    "leaves": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "leaves when called": "import os\ndef add(a, b): os._exit(0)",
    "leaves politely when called": "def add(a, b): raise SystemExit(0)",
    "prints passed": "print('1 passed\\nOK\\nTrue'); import os; os._exit(0)",
    "writes to every descriptor": (
        "import os\n"
        "for fd in range(64):\n"
        "    try: os.write(fd, b'N' * 3 + b'passed OK\\n')\n"
        "    except OSError: pass\n"
        "def add(a, b): return 0"
    ),
    "says that it returned": (
        "import os\n"
        'frame = b"t3:s8:returnedTl0:"\n'
        "try:\n"
        "    for _ in range(99): os.write(4, len(frame).to_bytes(8, 'big') + frame)\n"
        "except OSError: pass\n"
        "def add(a, b): return 0"
    ),
    "is equal to everything": ALWAYS_EQUAL + "def add(a, b): return Equal()",
    "is an int equal to everything": (
        "class Int(int):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
        "    def __sub__(self, other): return 0\n    def __reduce__(self): return (int, (4711,))\n"
        "def add(a, b): return Int(1)"
    ),
    "is a str equal to everything": (
        "class S(str):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
        "def add(a, b): return S('x')"
    ),
    "changes what assert raises": (
        "import builtins\nclass Nothing(BaseException): pass\nbuiltins.AssertionError = Nothing\n"
        "def add(a, b): return 0"
    ),
    "changes the built-in functions": (
        "import builtins\nbuiltins.abs = abs = lambda x: 0\nall = len = isinstance = sum = lambda *a: True\n"
        "class math:\n    @staticmethod\n    def isclose(*a): return True\n"
        "def add(a, b): return 0"
    ),
    "ends the loop of the test": "def add(a, b): raise StopIteration",
    "catches everything": (
        "import sys, threading\nsys.excepthook = threading.excepthook = lambda *a: None\n"
        "sys.settrace(lambda *a: None)\n"
        "def add(a, b):\n    try: raise AssertionError\n    except BaseException: return None"
    ),
    "leaves by atexit": "import atexit, os; atexit.register(os._exit, 0)\ndef add(a, b): return 0",
    "reads frames": (
        "import sys\ndef add(a, b):\n"
        "    frame, found = sys._getframe(), []\n"
        "    while frame:\n"
        "        found += [v for v in frame.f_locals.values() if isinstance(v, int) and v > 4000]\n"
        "        for text in [v for v in frame.f_locals.values() if isinstance(v, (str, bytes))]:\n"
        "            if '==' in str(text): return 47 * 100 + 11\n"
        "        frame = frame.f_back\n"
        "    return max([v for v in found if v not in (a, b)], default=0)"
    ),
    "searches memory": (
        "import gc\ndef add(a, b):\n"
        "    want = int('47') * 100 + 11\n"  # not 4711 among its own constants
        "    for x in gc.get_objects():\n"
        "        if isinstance(x, dict): x = list(x.values())\n"
        "        if not isinstance(x, (list, tuple, set)): continue\n"
        "        for y in list(x):\n"
        "            if type(y) is int and y == want: return want\n"
        "            if isinstance(y, (str, bytes)) and '== ' + str(want) in str(y): return want\n"
        "    return 0"
    ),
    "searches its memory map": (
        "WANT = (str(47) + str(11)).encode()\nHIDE = None\ndef add(a, b):\n"
        "    with open('/proc/self/mem', 'rb', 0) as mem, open('/proc/self/maps') as maps:\n"
        "        for line in maps:\n"
        "            low, high = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "            if 'rw' not in line: continue\n"
        "            try:\n                mem.seek(low); data = mem.read(high - low)\n"
        "            except (OSError, OverflowError, ValueError): continue\n"
        "            if b'== ' + WANT in data: return int(WANT)\n"
        "    return 0"
    ),
    "reads the judge": (
        "import os\ndef add(a, b):\n"
        "    for pid in {1, os.getppid()} - {os.getpid()}:\n"
        "        for name in ('mem', 'maps', 'environ', 'fd/0', 'fd/3', 'fd/4', 'fd/5'):\n"
        "            try:\n"
        "                with open(f'/proc/{pid}/{name}', 'rb') as f: f.read(1); return 4700 + 11\n"
        "            except OSError: pass\n"
        "    return 0"
    ),
    "traces the judge": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "def add(a, b): return 4711 if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 0"
    ),
    "kills the judge": "import os, signal\ndef add(a, b): os.kill(os.getppid(), signal.SIGKILL); return 0",
    "asks the judge": (
        "import sys\n"
        "def add(a, b):\n"
        "    frame = sys._getframe()\n"
        "    while frame and 'self' not in frame.f_locals: frame = frame.f_back\n"
        "    line = frame.f_locals['self']\n"
        "    for verb in (('name', 'want'), ('get', line, 'mine'), ('do', 'globals', []), ('getitem', 0, 0)):\n"
        "        try: return line.ask(*verb)\n"
        "        except Exception: pass\n"
        "    return 0"
    ),
    "patches its own server": (
        "import sys\njudge = sys.modules.get('rewards.sandbox.judge')\n"
        "if judge: judge.encode = lambda *a: b'T'\ndef add(a, b): return 0"
    ),
    "hangs up": "import os\ndef add(a, b): os.close(3); os.close(4); return 0",
    "goes on in a thread": (
        "import threading, time\nthreading.Thread(target=lambda: time.sleep(0.1)).start()\ndef add(a, b): return None"
    ),
    "forks": "import os\ndef add(a, b):\n    os.fork()\n    return os.getpid()",
    "is a method that answers for itself": ALWAYS_EQUAL + "add = lambda a, b: (Equal(),)",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes(cheat: str, backend: Backend) -> None:
    for form, case in FORMS.items():
        passed, result = run_case(CHEATS[cheat], case, LIMITS, backend)
        assert not passed, (form, result)


SOLUTION = "def add(a, b): return a + b\nif __name__ == '__main__': print(add(*map(int, input().split())))"


@pytest.mark.parametrize("form", FORMS)
def test_the_solution_passes_and_a_wrong_one_does_not(form: str, backend: Backend) -> None:
    assert run_case(SOLUTION, FORMS[form], LIMITS, backend)[0]
    assert not run_case(SOLUTION.replace("a + b", "a - b"), FORMS[form], LIMITS, backend)[0]
