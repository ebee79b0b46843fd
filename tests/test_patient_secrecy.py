"""Who holds what: the memory of the three workers is searched for canary pixels and canary weights.

Each secret is looked for in the forms it takes: the picture as pixels, as normalised numbers and as ring elements, the
weights as floating-point numbers and as ring elements. It must be found where it belongs, and nowhere else; a page
that breaks the rules on purpose is caught.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dopamine_lib.data.dataset import GRADES
from dopamine_lib.inference.network.serving import load
from dopamine_lib.models.checkpoints import save_model
from dopamine_lib.models.networks import HALF, build
from dopamine_lib.page import process_memory
from dopamine_lib.page.process_memory import children, find, together

SIZE = 28
ENVIRONMENT = os.environ | {"DOPAMINE_KERNELS": "numpy"}

#: The page as a kernel runs it: it opens the scan, grades it, says what it learned, and stays until told to end.
PAGE = """if True:
    import json, sys
    from pathlib import Path
    from dopamine_lib.page.widget import PatientPage

    scan, weights = sys.argv[1:]
    page = PatientPage(weights=weights)
    page.take(Path(scan).read_bytes(), "scan.png")
    page.grade.click()
    grading = page.wait()
    {fault}
    said = {{"pids": grading.pids, "logits": grading.answer.logits, "torch": "torch" in sys.modules}}
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    page.close()
"""


def may_look() -> bool:
    """Whether this system lets a process look into one that it started."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        find(child.pid, {"nothing": os.urandom(16)})
        return True
    except OSError:
        return False
    finally:
        child.communicate()


pytestmark = pytest.mark.skipif(not may_look(), reason="this system lets nobody look into a process's memory")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """A scan and a model of random numbers, as files and as the bytes to look for."""
    folder = tmp_path_factory.mktemp("secrets")
    pixels = np.frombuffer(os.urandom(SIZE * SIZE * 3), np.uint8).reshape(SIZE, SIZE, 3)
    Image.fromarray(pixels).save(folder / "scan.png")
    net = build("cnn", 5, None, int.from_bytes(os.urandom(4)))
    about = {
        "architecture": "cnn",
        "grades": GRADES,
        "preprocessing": {"size": SIZE, "mean": HALF[0], "std": HALF[1]},
        "setting": "FSCDP",
        "statement": "none",
    }
    save_model(folder / "model.safetensors", net, about)
    plan, weights, _ = load(folder / "model.safetensors")  # the scales are set on public images: the same every time
    x = plan.to_input(pixels)
    scan = {
        "scan as pixels": pixels[SIZE // 2].tobytes(),
        "scan in Pillow": np.pad(
            pixels[SIZE // 2], ((0, 0), (0, 1)), constant_values=255
        ).tobytes(),  # RGB and a filler
    }
    for name, values in (("as numbers", x), ("in the ring", plan.encode(x))):
        scan[f"scan {name}, by channel"] = values[0, SIZE // 2].tobytes()
        scan[f"scan {name}, by pixel"] = values[:, SIZE // 2].T.tobytes()
    model = {
        f"{name} weights in the ring": np.ascontiguousarray(weights.matrices[number][0][0, :64]).tobytes()
        for name, number in (("first", min(weights.matrices)), ("last", max(weights.matrices)))
    }
    model["weights as numbers"] = net.state_dict()["7.weight"].numpy()[3, 10:42].tobytes()
    return SimpleNamespace(folder=folder, scan=scan, model=model, needles=scan | model)


def look(secrets, fault: str = "pass"):
    """Run the page, and look into all three workers: what the page said, and what was found, by role."""
    program = PAGE.format(fault=fault)
    files = (secrets.folder / "scan.png", secrets.folder / "model.safetensors")
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, files)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        said = json.loads(process.stdout.readline())
        assert said["pids"]["patient"] == process.pid
        assert {said["pids"]["provider"], said["pids"]["crypto-provider"]} <= set(children(process.pid))
        memory = together(said["pids"].values())  # before the search, which touches more
        found = {role: find(pid, secrets.needles) for role, pid in said["pids"].items()}
        process.stdin.close()
        assert process.wait(60) == 0
    return said, {role: {name for name, times in found[role].items() if times} for role in found}, memory


def test_each_secret_is_where_it_belongs_and_nowhere_else(secrets):
    said, found, memory = look(secrets)
    assert "scan in Pillow" in found["patient"]
    assert found["provider"] & secrets.model.keys() >= {"first weights in the ring", "last weights in the ring"}
    assert not found["patient"] & secrets.model.keys(), "the model came into the page's process"
    assert not found["provider"] & secrets.scan.keys(), "the scan came into the provider's process"
    assert not found["crypto-provider"], "the crypto-provider holds a secret"
    assert len(set(said["pids"].values())) == 3 and not said["torch"]
    assert len(said["logits"]) == 5
    assert 50e6 < memory < 2e9


#: The planted faults: the page reads the model, makes integers of it, and keeps a form of the scan that others use.
FAULTS = "; ".join(
    (
        "from safetensors.numpy import load_file",
        "weights_kept = load_file(weights)",
        "import numpy as np",
        "from dopamine_lib.inference.network.serving import load",
        "plan, integers_kept, _ = load(weights)",
        "numbers_kept = plan.to_input(np.asarray(page.image))",
        "ring_kept = np.ascontiguousarray(plan.encode(numbers_kept))",
    )
)


@pytest.mark.slow
def test_a_page_that_keeps_what_it_should_not_is_caught(secrets):
    said, found, _ = look(secrets, FAULTS)
    assert said["torch"]
    assert found["patient"] >= secrets.model.keys()
    assert found["patient"] >= {"scan as numbers, by pixel", "scan in the ring, by channel"}


HOLDER = "import sys; kept = {what}; print(len(kept), flush=True); sys.stdin.read()"


def test_every_needle_is_found_in_a_process_that_holds_it(secrets):
    """The search itself, for every form: a process that holds all of them, and one that holds none."""
    everything = b"".join(b"\0" * 100 + needle for needle in secrets.needles.values())
    path = secrets.folder / "everything"
    path.write_bytes(everything)
    for what, expected in ((f"open({str(path)!r}, 'rb').read()", 1), ("bytes(5_000_000)", 0)):
        program = HOLDER.format(what=what)
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert int(process.stdout.readline()) > 100
            found = find(process.pid, secrets.needles)
            process.stdin.close()
        assert all((times >= 1) == expected for times in found.values()), found


def test_a_needle_across_two_reads_is_found_once(secrets, monkeypatch):
    monkeypatch.setattr(process_memory, "CHUNK", 4096)
    needle, file = os.urandom(32), secrets.folder / "mapped"
    content = bytearray(65536)
    content[4096 - 10 : 4096 + 22] = content[30000:30032] = needle
    file.write_bytes(content)
    program = (
        "import mmap, sys; file = open(sys.argv[1], 'rb'); kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ);"
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        found = find(process.pid, {"whole": needle, "part": needle[5:25]})
        process.stdin.close()
    assert found == {"whole": 2, "part": 2}


def test_a_needle_too_short_to_look_for_is_refused(refuses):
    with refuses("15 bytes", "at least 16"):
        find(os.getpid(), {"short": bytes(15)})


def test_memory_of_processes_together():
    program = "kept = bytearray(50_000_000); kept[::4096] = b'x' * len(kept[::4096]); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        assert process.pid in children(os.getpid())
        assert 50e6 < together([process.pid]) < 100e6
        process.stdin.close()
