"""Fetch a data set into a folder where the kit finds it.

    python data_download.py retinamnist|aptos|mnist|fashion-mnist|cifar10 [--out data]

The files of NAME go to ``data/NAME``. Nothing is left half-written except ``*.part`` and Kaggle's zip, from which a
broken download resumes. A failure ends with exit status 2 and says what to do.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

from dopamine_lib.data import SOURCES, retinamnist
from dopamine_lib.data.transfer import TIMEOUT, download, new_folder, unpack_zip
from dopamine_lib.errors import InputError
from dopamine_lib.machine import safe_output

COMPETITION = "aptos2019-blindness-detection"
#: Kaggle's archive has 5,593 files, 10 GB unpacked.
MAX_UNPACKED, MAX_FILES = 20 * 2**30, 20_000


def fetch_retinamnist(folder: Path) -> None:
    """The published npz from Zenodo into ``folder``."""
    target = folder / retinamnist.FILE_NAME
    download(retinamnist.URL, target, md5=retinamnist.MD5, max_bytes=retinamnist.MAX_BYTES)


def fetch_aptos(folder: Path) -> None:
    """APTOS 2019 with the user's own Kaggle account: train.csv and train_images/ into ``folder``."""
    if (folder / "train.csv").is_file():
        return
    archive = folder.parent / f"{COMPETITION}.zip"
    if not zipfile.is_zipfile(archive):
        _run_kaggle(archive)
    unpack_zip(archive, folder, prefix="train", max_bytes=MAX_UNPACKED, max_files=MAX_FILES)
    print(f"{archive} is no longer needed")


def _run_kaggle(archive: Path) -> None:
    """Let Kaggle's own command-line tool download; it reads the credentials, this program never does."""
    page = f"https://www.kaggle.com/c/{COMPETITION}"
    by_hand = (
        f"Kaggle gives APTOS 2019 only to users who have accepted its rules: {page}/rules\n"
        "With the tool: pip install kaggle, create an API token at https://www.kaggle.com/settings, save it\n"
        "in ~/.kaggle/kaggle.json (or set KAGGLE_USERNAME and KAGGLE_KEY), and run this command again.\n"
        f"Without it: download the whole zip from {page}/data as {archive} and run this command again."
    )
    tool = shutil.which("kaggle")
    if tool is None:
        raise InputError(f"the kaggle command is not installed\n{by_hand}")
    if not _has_credentials():
        raise InputError(f"no Kaggle credentials found\n{by_hand}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    command = [tool, "competitions", "download", "-c", COMPETITION, "-p", str(archive.parent)]
    status = subprocess.run(command, check=False).returncode
    if status or not zipfile.is_zipfile(archive):
        raise InputError(f"kaggle left no complete zip (status {status}; 401: wrong token, 403: rules)\n{by_hand}")


def _has_credentials() -> bool:
    settings = Path(os.path.expanduser(os.environ.get("KAGGLE_CONFIG_DIR", "~/.kaggle")))
    files = ("kaggle.json", "access_token", "credentials.json")
    named = "KAGGLE_USERNAME" in os.environ and "KAGGLE_KEY" in os.environ
    return named or "KAGGLE_API_TOKEN" in os.environ or any((settings / name).is_file() for name in files)


def fetch_torchvision(name: str, folder: Path) -> None:
    """MNIST, Fashion-MNIST or CIFAR-10 by torchvision, which checks their md5, into ``folder``."""
    from torchvision import datasets  # takes seconds to import

    from dopamine_lib.data.benchmarks import BENCHMARKS

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none and would wait forever
    try:
        with new_folder(folder) as root:
            getattr(datasets, BENCHMARKS[name][0])(root, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{name} could not be downloaded ({reason}); check the network") from None
    finally:
        socket.setdefaulttimeout(before)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 0, or 2 after an error."""
    safe_output()
    parser = argparse.ArgumentParser(description="Fetch a data set into a folder where the kit finds it.")
    parser.add_argument("name", choices=[source for source in SOURCES if source not in ("synthetic", "heart")])
    parser.add_argument("--out", type=Path, default=Path("data"), help="parent folder (default: data)")
    options = parser.parse_args(arguments)
    folder = options.out / options.name
    try:
        if options.name == "retinamnist":
            fetch_retinamnist(folder)
        elif options.name == "aptos":
            fetch_aptos(folder)
        else:
            fetch_torchvision(options.name, folder)
    except (InputError, OSError) as error:
        print(f"data_download: {error}", file=sys.stderr)
        return 2
    print(f"{options.name} is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
