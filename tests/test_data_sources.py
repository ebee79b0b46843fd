"""Loading by name, RetinaMNIST and the benchmarks: images, splits and refusals."""

import ast
import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

import dopamine_lib
from dopamine_lib.data import load, retinamnist
from dopamine_lib.data.benchmarks import load_benchmark
from dopamine_lib.data.cache import cache_dir
from dopamine_lib.data.dataset import GRADES
from dopamine_lib.data.retinamnist import load_retinamnist
from dopamine_lib.errors import InputError

LIBRARY = Path(dopamine_lib.__file__).parent
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist

# --- loading by name -------------------------------------------------------------------------------------


def test_entering_the_room_is_light():
    code = "import sys, dopamine_lib.data; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"name": "imagenet"}, "'imagenet' is unknown; choose one of synthetic, retinamnist"),
        ({"name": "synthetic", "size": 15}, "size 15 is out of bounds; choose 16 to 1024"),
        ({"name": "aptos", "size": 1025}, "size 1025 is out of bounds"),
        ({"name": "aptos"}, "no aptos data: looked for train.csv in data/aptos and data"),
        ({"name": "mnist"}, "python data_download.py mnist"),
    ],
)
def test_load_refuses(arguments, said, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    with refuses(said):
        load(**arguments)


def test_load_looks_in_the_working_directory(make_aptos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_aptos(tmp_path / "data" / "aptos")
    assert load("aptos", size=16).size == 16


# --- RetinaMNIST -----------------------------------------------------------------------------------------


def test_retinamnist_is_the_published_file_and_split(shared_data, check_dataset):
    data = load("retinamnist", shared_data)
    check_dataset(data)
    assert data.grades == GRADES and data.size == 28
    assert (len(data.train), len(data.validation), len(data.test)) == (1200, 120, 400)
    assert data.counts()["test"] == [174, 46, 92, 68, 20]
    with np.load(shared_data / "retinamnist.npz", allow_pickle=False) as published:
        for part, index in (("train", data.fit), ("val", data.validation), ("test", data.test)):
            assert np.array_equal(data.images[index], published[f"{part}_images"])
            assert np.array_equal(data.labels[index], published[f"{part}_labels"][:, 0])


def test_retinamnist_by_its_own_path_and_resized(shared_data):
    data = load_retinamnist(shared_data / "retinamnist.npz", size=64)
    assert data.images.shape == (1600, 64, 64, 3)


def test_retinamnist_missing_or_another_file(tmp_path, refuses):
    with refuses("retinamnist.npz: no such file; get it with: python data_download.py"):
        load_retinamnist(tmp_path)
    np.savez(tmp_path / "retinamnist.npz", train_images=np.zeros(3))
    with refuses("retinamnist.npz: md5 is", "move it elsewhere"):
        load_retinamnist(tmp_path)


def test_retinamnist_in_the_sizes_that_medmnist_publishes_too(tmp_path, monkeypatch, refuses):
    sizes = {name: size for name, (size, _) in retinamnist.FILES.items()}
    assert list(sizes.values()) == [28, 64, 128, 224]
    for name, size in sizes.items():
        parts = {}
        for part, n in (("train", 24), ("val", 4), ("test", 6)):
            parts |= {f"{part}_images": np.full((n, size, size, 3), size, np.uint8), f"{part}_labels": np.zeros((n, 1))}
        np.savez(tmp_path / name, **parts)
        md5 = hashlib.md5((tmp_path / name).read_bytes()).hexdigest()
        monkeypatch.setitem(retinamnist.FILES, name, (size, md5))
    taken = {size: int(load_retinamnist(tmp_path, size=size).images.max()) for size in (28, 64, 100, 224, 300)}
    assert taken == {28: 28, 64: 64, 100: 128, 224: 224, 300: 224}
    alone = tmp_path / "downloads"
    alone.mkdir()
    (tmp_path / "retinamnist_224.npz").rename(alone / "retinamnist_224.npz")
    for place in (alone, alone / "retinamnist_224.npz"):
        data = load("retinamnist", place)
        assert data.size == 28 and data.images.max() == 224 and data.sheet.checksum.startswith("md5:")


@pytest.mark.parametrize("text", ["remove it", "remove the", "delete"])
def test_nobody_is_told_to_delete_what_may_be_good(text):
    sources = [*LIBRARY.rglob("*.py"), LIBRARY.parent / "data_download.py"]
    strings = [
        (path.name, node.value)
        for path in sources
        for parent in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(parent, ast.Raise | ast.Return)
        for node in ast.walk(parent)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(strings) > 300 and not [found for found in strings if text in found[1]]


# --- torchvision's benchmarks ----------------------------------------------------------------------------


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_as_debian_ships_it(check_dataset):
    data = load("fashion-mnist", FASHION_MNIST)
    check_dataset(data)
    assert data.images.shape == (70_000, 28, 28, 3) and data.grades[9] == "Ankle boot"
    counts = data.counts()
    assert counts["train"] == [6000] * 10 and counts["test"] == [1000] * 10
    assert np.abs(np.array(counts["validation"]) - 600).max() < 6 * 24  # six standard deviations
    assert (data.images[..., 0] == data.images[..., 2]).all()
    with gzip.open(FASHION_MNIST / "t10k-labels-idx1-ubyte.gz") as file:
        assert np.array_equal(data.labels[data.test], np.frombuffer(file.read()[8:], dtype=np.uint8))


def _idx(array) -> bytes:
    """The format of MNIST's files: kind and dimensions, then the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A small MNIST in torchvision's layout."""
    rng, raw = np.random.default_rng(0), tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 200), ("t10k", 50)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(_idx(np.arange(n, dtype=np.uint8) % 10))
    return tmp_path


def test_mnist_in_torchvisions_layout(mnist, check_dataset):
    data = load_benchmark("mnist", mnist, size=16)
    check_dataset(data)
    assert data.images.shape == (250, 16, 16, 3) and 0 < len(data.validation) < 60
    assert data.grades[0] == "0 - zero"
    assert not np.array_equal(load_benchmark("mnist", mnist, seed=1).validation, data.validation)


def test_mnist_damaged(mnist, refuses):
    labels = mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    for content in (labels.read_bytes()[:-5], b"", _idx(np.full(200, 11, dtype=np.uint8))):
        labels.write_bytes(content)
        with refuses("damaged mnist files"):
            load_benchmark("mnist", mnist)


def test_damaged_gz_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DOPAMINE_CACHE", str(tmp_path / "cache"))
    for name, _ in datasets.FashionMNIST.resources:
        (tmp_path / name).write_bytes(gzip.compress(b"\0" * 1000)[:-9])
    with pytest.raises(InputError, match=r"ubyte.gz: damaged .* run: python data_download.py fashion-mnist"):
        load_benchmark("fashion-mnist", tmp_path)
    assert not [path for path in cache_dir().rglob("*") if path.is_file()]


def test_cifar10_in_colour(tmp_path, monkeypatch, refuses, check_dataset):
    class Cifar(datasets.CIFAR10):
        """Stands in for torchvision's, whose real files a test cannot download."""

        def __init__(self, root, train, download):
            n = 500 if train else 100
            pixels = np.random.default_rng(train).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
            self.data, self.targets = pixels.transpose(0, 2, 3, 1), [i % 10 for i in range(n)]
            self.classes = list("abcdefghij")

    monkeypatch.setattr(datasets, "CIFAR10", Cifar)
    with refuses("data_batch_5", "run: python data_download.py cifar10"):
        load_benchmark("cifar10", tmp_path)
    (tmp_path / Cifar.base_folder).mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (tmp_path / Cifar.base_folder / name).touch()
    data = load_benchmark("cifar10", tmp_path)
    check_dataset(data)
    assert data.images.shape == (600, 32, 32, 3) and data.images.flags.c_contiguous


def test_cifar10_is_not_opened_unless_it_is_the_published_one(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # a pickle that would run a command
    with pytest.raises(InputError, match="damaged cifar10 files .*corrupted"):
        load_benchmark("cifar10", tmp_path)
