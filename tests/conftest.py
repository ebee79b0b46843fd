"""What all tests share: where the data to measure with lies, and a cache that leaves no trace."""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dopamine_lib.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
# data_download.py stands at the top level and is no part of the installed package
sys.path.insert(0, str(REPOSITORY))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data that may not be shipped: ``$DOPAMINE_SHARED``, else ``../shared/data``; without it tests skip."""
    folder = Path(os.environ.get("DOPAMINE_SHARED", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data, which is not at {folder}")
    return folder


def pytest_configure(config):
    """One cache for all tests, so that what is decoded once is not decoded again, and gone afterwards."""
    os.environ["no_proxy"] = "127.0.0.1,localhost"  # tests serve pages here, and a company's proxy is elsewhere
    if not hasattr(config, "workerinput"):  # workers (``-n 2``) have this process's
        # pytest's own temporary directories would stay, and this one has hundreds of megabytes
        cache = tempfile.TemporaryDirectory(prefix="dopamine-")
        os.environ["DOPAMINE_CACHE"] = cache.name
        config.add_cleanup(cache.cleanup)


@pytest.fixture
def noisy_python(tmp_path, monkeypatch) -> Path:
    """A folder of modules for every Python that is started from here; it greets, on its standard output."""
    folder = tmp_path / "modules"
    folder.mkdir()
    greeting = b'Welcome to this Python!\n{"seconds": -1}\n'
    (folder / "sitecustomize.py").write_text(f"import os; os.write(1, {greeting})")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))
    return folder


@pytest.fixture(scope="session")
def check_dataset():
    """A function that asserts what holds for a Dataset of every source."""

    def check(data):
        n = len(data)
        rows, pixels = (np.float32, (n, len(data.inputs))), (np.uint8, (n, data.size, data.size, 3))
        assert (data.images.dtype, data.images.shape) == (rows if data.inputs else pixels)
        assert data.labels.dtype == np.int64 and data.person.dtype == np.int64 and len(data.person) == n
        assert 0 <= data.labels.min() and data.labels.max() < len(data.grades)
        assert np.array_equal(np.sort(np.concatenate([data.train, data.test])), np.arange(n))
        assert np.isin(data.validation, data.train).all() and 0 < len(data.validation) < len(data.train)
        for one, other in ((data.train, data.test), (data.fit, data.validation)):
            assert not np.intersect1d(data.person[one], data.person[other]).size
        assert data.sheet.source and data.sheet.licence and ":" in data.sheet.checksum and data.sheet.notes

    return check


@pytest.fixture(scope="session")
def reacts():
    """A function that draws at each of ``settings`` and asserts that a slider would be followed; returns the PNGs.

    In turns with an empty picture of the same size, which takes a slow machine longer as well, and in processor time,
    so that other jobs do not count: numbers, picture and PNG together take at most ``most`` times as long.
    """
    from matplotlib.figure import Figure

    from dopamine_lib.pictures import png

    def check(draw, settings, most=4):
        like, took, drawn = draw(*settings[0]), {"picture": [], "empty": []}, []
        png(like)  # Matplotlib and its fonts are loaded when a page opens

        def empty():
            figure = Figure(figsize=like.get_size_inches())
            figure.subplots(1, len(like.axes))
            png(figure)

        for values in settings:
            for name, work in (("empty", empty), ("picture", lambda at=values: drawn.append(png(draw(*at))))):
                begin = time.process_time()
                work()
                took[name].append(time.process_time() - begin)
        assert statistics.median(took["picture"]) < most * statistics.median(took["empty"])
        assert all(picture.startswith(b"\x89PNG") for picture in drawn)
        return drawn

    return check


@pytest.fixture(scope="session")
def refuses():
    """A context that must end in an InputError of one line, with each of ``said`` in it."""

    @contextlib.contextmanager
    def context(*said):
        with pytest.raises(InputError) as error:
            yield error
        message = str(error.value)
        assert "\n" not in message and all(part in message for part in said), message

    return context


@pytest.fixture(scope="session")
def make_aptos():
    """Write a small set of random images in Kaggle's layout; 0 and 1 are the same, graded otherwise."""

    def make(folder, n=60):
        rng = np.random.default_rng(0)
        (folder / "train_images").mkdir(parents=True)
        rows = ["id_code,diagnosis"]
        for i in range(n):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train_images" / f"eye{i}.{'png' if i % 2 else 'jpg'}")
            rows.append(f"eye{i},{i % 5}")
        Image.open(folder / "train_images" / "eye0.jpg").save(folder / "train_images" / "eye1.png")
        (folder / "train.csv").write_text("\n".join(rows) + "\n")
        return folder

    return make


@pytest.fixture(params=["the device's code on the processor", "cuda"])
def device(request, monkeypatch):
    """A device that trains: CUDA's where PyTorch sees one, and everywhere the processor as if it were one."""
    import torch

    from dopamine_lib.machine import find_device

    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no CUDA device here")
        return find_device("cuda")
    for module in ("layer", "linear_map", "bookkeeping", "dpsgd"):
        monkeypatch.setattr(f"dopamine_lib.privacy.{module}.accelerated", lambda tensor: True)
    return torch.device("cpu")


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder with the kit in it, installed from its wheel: built offline, from a copy that the build may write to."""
    if find_spec("setuptools") is None:
        pytest.skip("needs setuptools, which PyTorch brings along: pip install setuptools")
    copy, wheels, home = (tmp_path_factory.mktemp(name) for name in ("checkout", "wheels", "installed"))
    caches = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in (".ci", ".github", "dopamine_lib", "figures", "notebooks"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=caches)
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copyfile(path, copy / path.name)
    for words in (
        ["wheel", "--no-build-isolation", "--wheel-dir", wheels, copy],
        ["install", "--no-index", "--no-compile", "--target", home, "--find-links", wheels, "dopamine-kit"],
    ):
        command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-deps", *words[1:]]
        ran = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    return home
