"""The first code cell of every notebook, word for word: it makes a notebook run on Google Colab.

A notebook opened there comes alone, so the cell fetches the kit it belongs to, from whichever repository the reader
found it in. Anywhere else it does nothing.
"""

SOURCE = """\
# Google Colab brings this notebook alone: there, this cell fetches the kit and installs it. Elsewhere it does nothing.
import sys

if "google.colab" in sys.modules:
    import os
    import subprocess

    kit = os.path.expanduser("~/dopamine-kit")
    if not os.path.isdir(kit):
        repository = input("https address of the repository that this notebook is from: ").strip()
        subprocess.run(["git", "clone", "--depth", "1", "--", repository, kit], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"], cwd=kit, check=True)
    sys.path.insert(0, kit)
    os.chdir(os.path.join(kit, "notebooks"))"""
#: The tag that leaves the cell out of the static site.
TAG = "remove-cell"
#: In homework, where nbgrader must know every cell.
NBGRADER = {"grade": False, "grade_id": "colab", "locked": True, "schema_version": 3, "solution": False, "task": False}
