"""Homework that tries to get more points than its answers are worth: by tampering, by stealing, by breaking the judge.

Every cheat comes with one honest answer, to the first exercise of homework 1, and must not get a point more than that.
"""

import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import numpy as np
import pytest

from dopamine_lib.course.calls import AnswerError, Answers, _do
from dopamine_lib.course.exercises import SOURCES, YEAR, Homework
from dopamine_lib.course.feedback import _NUMBERS, _WIDE, _array, show
from dopamine_lib.course.homework import find_homework
from dopamine_lib.course.judge import _ASKED_EVERY_YEAR, Judge, run_tests
from dopamine_lib.course.submissions import Submission
from dopamine_lib.course.wire import LONGEST, pack, unpack

SOURCE = SOURCES / "01_differential_privacy_homework.ipynb"
HONEST = """
def laplace_scale(sensitivity, epsilon):
    if not (0 < sensitivity < math.inf and 0 < epsilon < math.inf):
        raise ValueError("no")
    return sensitivity / epsilon
"""
EARNED = 4
#: Where there is time; the first in every run.
SLOWLY = [pytest.param(path, marks=[pytest.mark.slow] * (at > 0)) for at, path in enumerate(find_homework(SOURCES))]


@pytest.fixture(scope="module")
def judge():
    """Of numbers that are always the same here: others could, once in many runs, be those of a student's copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.randbits", lambda bits: 7)
        return Judge(Homework.read(SOURCE))


def points(judge, *cells, **limits) -> dict[str, int]:
    verdicts, _ = judge.judge(list(cells), **limits)
    return {verdict.exercise.name: verdict.points for verdict in verdicts if verdict.points}


TAMPERING = {
    "checkers defined anew": "passes = lambda check: 1\nrefuses = lambda call: True\npoints = 100",
    "NumPy and math patched": """
        np.allclose = np.isclose = np.array_equal = math.isclose = math.isinf = lambda *a, **k: True
        np.mean = np.std = lambda *a, **k: 0.0
        """,
    "builtins patched": """
        import builtins
        builtins.bool = builtins.abs = builtins.all = builtins.any = lambda *a: 1
        builtins.isinstance = lambda *a: True
        builtins.AssertionError = None
        """,
    "modules replaced": """
        import sys, json
        sys.modules["math"] = sys.modules["numpy"] = json
        json.dumps = lambda *a: "1"
        """,
    "answers that equal everything": """
        class Always(float):
            __eq__ = __lt__ = __gt__ = __le__ = __ge__ = lambda self, other: True
            __hash__ = float.__hash__
        class Array(np.ndarray):
            __eq__ = lambda self, other: True
        least_delta = least_epsilon = truth_probability = estimate = lambda *a: Always(1)
        private_sum = epsilon_at_least = lambda *a: Array(1)
        """,
    "objects for answers": """
        class Liar:
            def __reduce__(self): return exec, ("passes = lambda check: 1",)
            __array__ = __float__ = __len__ = lambda self: 1
        for name in "least_delta least_epsilon standard_error private_sum group_bound epsilon_at_least".split():
            globals()[name] = lambda *a: np.array([Liar()], dtype=object)
        truth_probability = estimate = lambda *a: Liar()
        """,
    "a refusal of everything": """
        def refuse(*anything):
            raise ValueError
        least_delta = least_epsilon = private_sum = epsilon_at_least = group_bound = replacing_costs = refuse
        """,
    "one answer to everything": "least_delta = least_epsilon = epsilon_at_least = replacing_costs = lambda *a: 0.0",
    "one good answer, then refusals": """
        asked = set()
        def once(name):
            def answer(*given):
                if name in asked:
                    raise ValueError
                asked.add(name)
                return 1.0
            return answer
        least_delta, private_sum = once("a"), once("b")
        """,
    "inputs changed before the solution is asked": """
        def least_delta(p, q, epsilon):
            p[...] = q[...] = 0.5
            return 0.0 if epsilon == 0 else 1e-13
        def private_sum(values, low, high, epsilon, rng):
            values[...] = 0
            return rng.laplace(scale=max(high, -low) / epsilon)
        """,
    "numbers beyond floats": """
        def least_delta(*given): return 10**400
        def group_bound(*given): return [10**400, 1.5]
        def estimate(*given): return 10**309
        def standard_error(*given): return np.array(["a"])
        """,
    "texts that cannot be written": """
        def least_delta(*given): raise RuntimeError("\\ud800")
        def least_epsilon(*given): raise type("\\ud800", (Exception,), {})("x")
        def group_bound(*given): return "\\udfff"
        def estimate(*given): return np.frombuffer(b"\\xff" * 3 + b"\\x7f", "<U1")[:1]
        """,
    "long ranges and empty arrays": """
        def group_bound(*given): return range(4 * 10**7)
        def least_delta(*given): return range(10**10)
        def estimate(*given): return np.zeros((0, 10**10))
        """,
    "an answer without a test's question": """
        def private_sum(values, low, high, epsilon, rng):
            rng.scale = 4
            return rng.__class__.__init__.__globals__["private_sum"](values, low, high, epsilon, rng)
        """,
    "the judge's numbers of the pipe": """
        import gc, sys
        def group_bound(*a):
            at = sys._getframe(1)
            at.f_locals["parent"].say(error="ValueError", refused=True)
            at.f_locals["parent"].say(ready=True, **{"wrong input": "", "cell": -1})
            at.f_locals["parent"]._pipe.send_bytes(b"[" * 100000)
            at.f_locals["parent"].say(value={"array": "AAAA", "type": "O", "shape": [1], "scalar": True}, changed=[])
            return gc.get_objects()
        """,
    "a cell that never stops talking": """
        import sys
        while True:
            sys._getframe(1).f_locals["parent"].say(cell=1)
        """,
    "half a message": """
        import sys, time
        def group_bound(*a):
            sys._getframe(1).f_locals["parent"]._pipe._send(bytes([0, 0, 1, 0]))
            time.sleep(1e6)
        """,
    "looking for the seed": """
        import gc, sys, random
        def estimate(answers, epsilon):
            frame, found = sys._getframe(), []
            while frame:
                found += [value for value in {**frame.f_globals, **frame.f_locals}.values() if "ill" in str(value)]
                frame = frame.f_back
            return float(150 if found else [one for one in gc.get_objects() if "150" in str(one)][0])
        """,
}


#: What the judge waits for until its patience ends.
WAITED_FOR = ("modules replaced", "looking for the seed", "half a message", "a cell that never stops talking")


@pytest.mark.parametrize(
    "cheat",
    [pytest.param(TAMPERING[name], id=name, marks=[pytest.mark.slow] * (name in WAITED_FOR)) for name in TAMPERING],
)
def test_tampering_earns_nothing(judge, cheat):
    assert points(judge, textwrap.dedent(cheat), HONEST, seconds=1) == {"count": EARNED}


@pytest.mark.parametrize("source", SLOWLY, ids=lambda path: path.stem)
@pytest.mark.parametrize("answer", ["given[0]", "0.0"])
def test_answers_without_a_thought_earn_nothing(source, answer):
    """What was given, and a 0."""
    every = Judge(Homework.read(source, None))
    cell = "".join(f"def {name}(*given):\n    return {answer}\n" for name in every.homework.functions)
    assert points(every, cell) == {}


def test_a_test_that_counts_up_to_an_answer_ends():
    """And not by the clock: it is the test's own work that has an end."""
    test = "points = 0\npoints += passes(lambda: sum(1 for _ in range(answer())) == 1)\npoints += passes(lambda: True)"
    found = run_tests(test, {"answer": lambda: 10**12}, lambda: None, list, seconds=0.2)
    assert [one.passed for one in found] == [False, True] and "took longer than 0.2 s" in found[0].error


def test_a_long_list_is_no_answer():
    with Answers(["def one():\n    return [1] * 10**6\n\n\ndef two():\n    return np.ones(10**6)"]) as answers:
        answers.begin()
        with pytest.raises(AnswerError, match="more than 100000 parts"):
            answers.call("one", ())


def test_a_hint_does_not_ask_the_solution():
    tests = """
assert answer() == right.answer()
passes(lambda: answer() == 4, "twice two is 4, right. No more")
"""
    found = run_tests(tests, {"answer": lambda: 4}, lambda: None, list)
    assert [test.asks_right for test in found] == [True, False]


def test_what_is_asked_every_year_is_worth_nothing_by_itself():
    """A table of every answer, hidden tests included, from a solution that was passed on."""
    judge = Judge(Homework.read(SOURCES / "02_gaussian_mechanism_homework.ipynb"))
    cells = [exercise.answer for exercise in judge.homework.exercises]
    known = (
        "rightly = spent\ndef spent(*given):\n"
        "    return rightly(*given) if given in ((5, 1, 1), (0.02, 800, 1)) else 0.5"
    )
    wrong = judge.judge([*cells, known])[0][1]
    assert wrong.exercise.name == "spent" and wrong.points == 0
    assert _ASKED_EVERY_YEAR in [test.error for test in wrong.tests]


def test_constants_of_the_tests_earn_nothing(judge, monkeypatch):
    """A table of what a year's copy asks and expects; it would do if grading drew no other numbers."""
    learned: dict[str, dict] = {}

    def known(name, function):
        def call(*given):
            try:
                learned[name][show(given)] = answer = function(*given)
            except ValueError as error:
                learned[name][show(given)] = error
                raise
            return answer

        learned[name] = {}
        return call

    names, _ = judge.homework.begin(YEAR)
    for exercise in judge.homework.exercises:
        names |= {name: known(name, getattr(names["right"], name)) for name in exercise.functions}
        assert all(test.passed for test in run_tests(exercise.test, names, lambda: None, list))
    table = "".join(
        f"def {name}(*given):\n    answer = {name}_says.get(show(given), 0.0)\n"
        "    if isinstance(answer, str):\n        raise ValueError\n    return answer\n"
        f"{name}_says = { {given: 'no' if isinstance(one, ValueError) else one for given, one in said.items()} }\n"
        for name, said in learned.items()
    )
    shows = f"Any, _WIDE, _NUMBERS = 0, {_WIDE}, {_NUMBERS}\n{inspect.getsource(_array)}\n{inspect.getsource(show)}"
    cell = f"from numpy import array, inf\n{shows}\n{table}"
    assert points(judge, cell, HONEST) == {"count": EARNED}
    monkeypatch.setattr("secrets.randbits", lambda bits: YEAR)
    assert sum(points(Judge(judge.homework), cell, HONEST).values()) >= EARNED + 8


#: Ways to the text of a file; each is an expression or statements that give ``text``.
WAYS = """
text = open(path).read()
text = os.read(os.open(path, os.O_RDONLY), 10**6)
import io; text = io.FileIO(path).read()
import pathlib; text = pathlib.Path("/" + "/../" + path).read_bytes()
import subprocess; text = subprocess.run(["cat", path], capture_output=True).stdout
text = os.popen("cat " + path).read()
import urllib.request; text = urllib.request.urlopen("file://" + path).read()
text = np.fromfile(path, np.uint8).tobytes()
import linecache; text = "".join(linecache.getlines(path))
import importlib.machinery; text = importlib.machinery.SourceFileLoader("x", path).get_data(path)
import mmap; text = bytes(mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ))
import ctypes; f = ctypes.CDLL(None).open; text = os.read(f(path.encode(), 0), 10**6)
import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); text = open(path).read()
import gc; [f for f in gc.get_objects() if f.__class__ is list and f.clear()]; text = open(path).read()
import builtins; builtins.open = None; import _io; text = _io.open_code(path).read()
import readline; text = history(readline)
import importlib; text = history(importlib.import_module("readline"))
text = history(__import__(Text("readline")))
import tkinter; text = tkinter.Tcl().eval("read [open %s]" % path)
text = open(Text(path)).read()
text = unlocked(path)
text = copied(path)
""".strip().splitlines()
STEAL = """
import json, os, sys
names = globals()
path = PATH
class Text(str):
    __class__ = str
    __contains__ = lambda *given: False
    startswith = lambda *given: True
    partition = lambda *given: ("math", "", "")
def history(readline):
    readline.read_history_file(path)
    return "".join(readline.get_history_item(line + 1) for line in range(readline.get_current_history_length()))
def unlocked(path):
    try:
        return open(path).read()
    except Exception as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        for value in list(trace.tb_frame.f_locals.values()):
            for cell in getattr(value, "__closure__", None) or ():
                if isinstance(cell.cell_contents, str):
                    cell.cell_contents = "/"
        return open(path).read()
def copied(path):
    del sys.modules["_posixsubprocess"]
    import _posixsubprocess
    r, w = os.pipe()
    e, f = os.pipe()
    cat = [b"/bin/cat", path.encode()]
    rest = (-1, -1, r, w, -1, -1, e, f, True, False, -1, None, None, None, -1, None, True)
    _posixsubprocess.fork_exec(cat, cat[:1], True, (), None, [], *rest)
    os.close(w)
    return b"".join(iter(lambda: os.read(r, 65536), b""))
try:
    WAY
    cells = json.loads(text)["cells"]
    for cell in cells:
        if cell["cell_type"] == "code" and cell["metadata"]["nbgrader"]["solution"]:
            exec("".join(cell["source"]), names)
except BaseException:
    pass
"""


#: Runs every theft in a process of its own, behind one wall; prints the numbers of those that got the text.
ALONE = """
import os, sys
import numpy as np
import scipy
import subprocess
from dopamine_lib.course.sandbox import confine, lock
for number, theft in enumerate(THEFTS):
    if not os.fork():
        names = {"np": np, "text": ""}
        if WALL is False:
            os._exit(2)
        try:
            exec(theft, names)
        finally:
            os._exit("laplace_scale" in str(names["text"]))
    print(number if (status := os.wait()[1] >> 8) == 1 else "unsupported" if status == 2 else "")
"""


def thefts():
    return [STEAL.replace("PATH", repr(str(SOURCE))).replace("WAY", way) for way in WAYS]


def test_solved_notebooks_cannot_be_read(judge):
    assert points(judge, *thefts(), HONEST) == {"count": EARNED}


@pytest.mark.skipif(sys.platform != "linux", reason="the ways are Linux's")
@pytest.mark.parametrize("wall", ["None", "confine()", "lock(2**31)"])
def test_each_wall_stops_every_theft_alone(wall):
    """Where nothing is in the way, they lead to the solved notebook, if their modules are installed."""
    script = ALONE.replace("WALL", wall).replace("THEFTS", repr(thefts()))
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    if "unsupported" in said:
        pytest.skip("this kernel has no Landlock")
    led = [WAYS[int(number)] for number in said]
    assert len(led) >= len(WAYS) - 7 if wall == "None" else not led


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc")
def test_every_thread_of_the_answers_is_confined():
    """Landlock binds one thread, and an answer can make the one that listens run its code."""
    with Answers(["def one():\n    return 1"]) as answers:
        answers.begin()
        assert answers.call("one", ()) == 1
        states = [path.read_text() for path in Path(f"/proc/{answers._child.pid}/task").glob("*/status")]
    confined = {re.search(r"NoNewPrivs:\s*(\d)", state)[1] for state in states}
    probe = "from dopamine_lib.course.sandbox import confine; print(confine())"
    can = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert len(states) > 1 and (confined == {"1"} or can == "False\n")


@pytest.mark.parametrize("package", ["scipy", "numpy", "python"])
def test_what_answers_may_import_is_there_with_every_python(package):
    """Modules that these load late differ from version to version: with 3.12 no answer had SciPy, or a fraction."""
    modules = {
        "scipy": "special stats optimize fft signal linalg interpolate integrate sparse spatial cluster ndimage",
        "numpy": "fft linalg random polynomial ma testing typing",
        "python": "__future__ fractions decimal statistics random datetime dataclasses typing enum json hashlib "
        "secrets inspect traceback pprint textwrap calendar heapq zoneinfo unittest logging concurrent.futures timeit",
    }[package].split()
    named = modules if package == "python" else [f"{package}.{module}" for module in modules]
    with Answers([f"import {name}" for name in named] + ["def one():\n    return 1"]) as answers:
        assert answers.call("one", ()) == 1 and answers.stopped == {}


def test_what_a_process_says_can_be_written():
    with Answers(["raise RuntimeError('\\ud800')", "def one():\n    return '\\udfff'"]) as answers:
        answers.begin()
        assert answers.call("one", ()) == "?" and answers.stopped == {0: "RuntimeError: ?"}


def test_an_answer_asks_for_no_more_numbers_than_fit():
    half = LONGEST // 2
    for message in ({"range": [0, 4 * LONGEST, 1]}, {"range": [10**30, 0, -1]}):
        with pytest.raises(ValueError, match="a range of more than"):
            unpack(message)
    with pytest.raises(ValueError, match="an array of more than"):
        unpack({"array": "", "type": "<f8", "shape": [0, 10**10], "scalar": False})
    for given in ([1.0, (half, 3)], [1.0, [half, 3]], [1.0, 3 * half], [np.ones((half, 1)), np.ones((1, 3))]):
        assert "numbers at once" in ask(given)["error"]
    assert "value" in ask([np.full(40, 2.0), 40]) and "value" in ask([2.0, (30, 40)])


def ask(given):
    """What the judge says where an answer asks a test's generator for numbers."""
    poisson = np.random.default_rng(0).poisson
    request = {"ask": 0, "method": "", "arguments": pack(given), "named": {"dict": []}}
    return _do([poisson], request)


def test_a_test_of_changes_still_sees_them():
    """Homework 4 asks whether what the hospitals have is left alone; its other tests do not mind."""
    judge = Judge(Homework.read(SOURCES / "04_federated_algorithm_homework.ipynb"))
    answer = judge.homework.exercises[0].answer
    spoil = """
rightly = clipped_sums
def clipped_sums(given, *rest):
    kept = given.copy()
    given[...] = 0.1
    return rightly(kept, *rest)
"""
    assert points(judge, answer)["clip"] == 5
    tests = judge.judge([answer + spoil])[0][0].tests
    assert [test.error for test in tests if not test.passed] == [
        "clipped_sums changes what it is given: work on a copy"
    ]


def test_the_ways_lead_to_the_solution_where_nothing_is_in_the_way():
    for theft in thefts()[:3]:
        names = {}
        exec("import math\nimport numpy as np\nfrom scipy.special import betaincinv", names)
        exec(theft, names)
        assert names["group_bound"](0.5, 0.0, 3) == (1.5, 0.0)


IMPORTS = {
    "plainly": "from dopamine_lib.privacy.accounting import *",
    "by importlib": "import importlib; importlib.import_module('dopamine_lib.privacy.accounting')",
    "by a path": "import sys; sys.path.insert(0, PATH); import dopamine_lib.privacy.checker",
    "of a peer": "import opacus",
}


@pytest.mark.parametrize("cheat", IMPORTS.values(), ids=IMPORTS)
def test_the_library_is_refused_with_a_sentence(judge, cheat):
    cheat = cheat.replace("PATH", repr(str(SOURCE.parents[3])))
    _, stopped = judge.judge([f"{cheat}\n\ndef group_bound(*a):\n    return 1.5, 0.0", HONEST])
    (why,) = stopped.values()
    assert "homework is graded without" in why and "write the answer yourself" in why


def test_an_end_before_the_end_costs_its_own_answer_only(judge):
    leave = "def group_bound(*a):\n    import os\n    os._exit(0)\n\n\ndef least_delta(*a):\n    raise SystemExit"
    assert points(judge, leave, "import os; os._exit(0)", "raise SystemExit(0)", HONEST, "exit()") == {"count": EARNED}


def test_what_never_ends_costs_its_own_answer_only(judge):
    loop = (
        "def group_bound(*a):\n    while True: pass\n\n\ndef truth_probability(*a):\n    import time; time.sleep(1e6)"
    )
    assert points(judge, loop, "while True: pass", HONEST, seconds=2) == {"count": EARNED}


def test_floods_cost_their_own_answer_only(judge):
    flood = """
import sys
print("x" * 10**8)
sys.stderr.write("x" * 10**8)
def group_bound(*a):
    print("x" * 10**7)
    return "x" * 10**8
def least_delta(*a):
    return bytearray(10**12)
def truth_probability(*a):
    return 10**100_000
def epsilon_at_least(*a):
    deep = []
    for _ in range(900):
        deep = [deep]
    return deep
def private_sum(values, low, high, epsilon, rng):
    return rng.laplace(size=10**12)
"""
    assert points(judge, flood, HONEST) == {"count": EARNED}


def test_a_notebooks_metadata_and_tests_count_for_nothing(judge, tmp_path):
    notebook = nbformat.read(SOURCE, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            own = cell.metadata.nbgrader
            if own.solution:
                cell.source = HONEST if own.grade_id == "count" else "raise NotImplementedError()"
            elif own.grade:
                cell.source = str(own.points)  # "full points for me"
                own.points, own.locked, own.grade_id = 100, False, f"{own.grade_id}-mine"
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    assert points(judge, *Submission.read(tmp_path / "mine.ipynb").cells) == {"count": EARNED}


def test_part_of_an_answer_is_worth_its_part(judge):
    """A missing root costs the tests of the standard error, and no others of its exercise."""
    cells = {exercise.name: exercise.answer for exercise in judge.homework.exercises}
    cells["response"] = cells["response"].replace("math.sqrt(n", "(n")
    verdicts, _ = judge.judge(list(cells.values()))
    found = {verdict.exercise.name: (verdict.points, verdict.exercise.points) for verdict in verdicts}
    assert found.pop("response") == (3, 5) and all(given == most for given, most in found.values())


def test_feedback_says_what_was_expected_on_which_input(judge):
    wrong = HONEST.replace("sensitivity / epsilon", "epsilon / sensitivity")
    verdicts, _ = judge.judge([wrong])
    said = json.dumps([test.shown for test in verdicts[0].tests])
    assert "laplace_scale(" in said and "expected" in said and "found" in said
