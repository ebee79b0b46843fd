"""Ask for every address in links.txt, once: python tests/check_links.py [FILE]. Ends with status 1 if one is dead.

For the weekly workflow; it needs nothing but Python. A server that keeps robots out (401, 403, 429) is alive.
"""

import http.client
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

LIST = Path(__file__).with_name("links.txt")
TIMEOUT, TRIES, PAUSE = 30, 3, 10.0  # seconds, tries, seconds between them
KEEPS_ROBOTS_OUT = (401, 403, 429)


def listed(path: Path = LIST) -> list[str]:
    """The addresses in a list, one per line, without empty lines and comments (a ``#`` and a space)."""
    lines = (line.split("# ")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and line != "#"]


def answer(url: str) -> str:
    """An empty string if the address answers, else what is wrong."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (a weekly check of links)"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            response.read(1)
    except urllib.error.HTTPError as error:
        return "" if error.code in KEEPS_ROBOTS_OUT else f"status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check(url: str, pause: float = PAUSE) -> str:
    """``answer``, tried again after a pause if it failed."""
    for number in range(TRIES):
        time.sleep(pause if number else 0)
        wrong = answer(url)
        if not wrong:
            break
    return wrong


def main(path: Path = LIST, pause: float = PAUSE) -> int:
    """Print a line for each address; returns the exit status."""
    wrong = {url: check(url, pause) for url in listed(path)}
    for url, what in wrong.items():
        print(f"{what or 'ok'}  {url}")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
