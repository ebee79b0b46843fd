"""The commands of a course: ``course``, ``homework``, ``gallery``, ``site`` and ``slides``."""

import os
import sys
from typing import Any

from dopamine_lib.errors import InputError


def add_course_commands(commands: Any) -> None:
    """Add the commands of a course to the subparsers of the command line."""
    folder = commands.add_parser("course", help="write chapters, students' homework and pictures into a folder")
    folder.add_argument("out", metavar="DIR", help="a folder that is empty or does not exist")
    folder.add_argument("--solutions", action="store_true", help="and the solved homework, for those who teach")
    folder.set_defaults(call=_course)

    copies = commands.add_parser("homework", help="write the students' copies of the homework, or grade what came back")
    copies.add_argument("out", metavar="OUT", help="a folder that is empty or does not exist; or the word grade")
    copies.add_argument(
        "folder", nargs="?", metavar="FOLDER", help="with grade: what came back, a folder for each student"
    )
    copies.add_argument("--year", type=int, metavar="Y", help="whose exercises and numbers (default: 2026)")
    copies.add_argument("--course", metavar="DIR", help="nbgrader's folder, for that year's solved notebooks")
    copies.add_argument("--to", metavar="DIR", help="with grade: where grades.csv and feedback go (FOLDER-graded)")
    copies.add_argument(
        "--leak", type=int, metavar="N", help="a project instead: the kit with fault N, and a run of it"
    )
    copies.set_defaults(call=_homework)

    pictures = commands.add_parser("gallery", help="draw the pictures of figures/ again")
    pictures.add_argument("out", metavar="OUT", help="a folder, such as figures")
    pictures.add_argument("--results", metavar="DIR", help="the folder of a run, for Figure 1 (default: run it now)")
    pictures.set_defaults(call=_gallery)

    pages = commands.add_parser("site", help="write the notebooks as a web site that needs no network")
    pages.add_argument("out", metavar="OUT", help="a folder that is empty or does not exist")
    pages.set_defaults(call=_site)

    slides = commands.add_parser("slides", help="write the chapters as slides that need no network")
    slides.add_argument("out", metavar="OUT", help="a folder that is empty or does not exist")
    slides.set_defaults(call=_slides)


def _course(arguments) -> None:
    from dopamine_lib.course.material import write_course

    written = write_course(arguments.out, solutions=arguments.solutions)
    print(f"{len(written)} files; open them with: jupyter lab {os.path.join(arguments.out, 'notebooks')}")


def _homework(arguments) -> None:
    from dopamine_lib.course.exercises import YEAR

    year = YEAR if arguments.year is None else arguments.year
    if arguments.folder is not None or arguments.to is not None:
        if arguments.out != "grade" or arguments.folder is None:
            raise InputError("a second folder and --to are for grading; write: homework grade FOLDER --to DIR")
        if arguments.course is not None or arguments.leak is not None:
            raise InputError(
                "--course and --leak are for what students get; write: homework grade FOLDER --year Y --to DIR"
            )
        from tqdm import tqdm

        from dopamine_lib.course.grading import grade_folder

        def report(line: str) -> None:
            with tqdm.external_write_mode():  # the bar stands below what is printed
                print(line, flush=True)

        out = arguments.to or f"{os.path.normpath(arguments.folder)}-graded"
        grade_folder(arguments.folder, out, year=year, report=report)
        print(f"grades.csv, by_hand.html and the pages of feedback are in {out}")
        return
    if arguments.leak is not None:
        if arguments.course is not None or arguments.year is not None:
            raise InputError("--course and --year are for homework, and a project is no year's; write: OUT --leak N")
        from dopamine_lib.course.leaks import plant_leak

        planted = plant_leak(arguments.out, arguments.leak)
        print(f"{arguments.out} is for the students. For you alone: {planted.file}, {planted.breaks}")
        return
    from dopamine_lib.course.homework import students_copies

    for copy in students_copies(arguments.out, year=year, course=arguments.course):
        print(copy)


def _gallery(arguments) -> None:
    from dopamine_lib.course.gallery import draw_gallery

    for picture in draw_gallery(arguments.out, arguments.results):
        print(picture)


def _site(arguments) -> None:
    from dopamine_lib.course.site import build_site

    for warning in build_site(arguments.out):
        print(warning, file=sys.stderr)
    print(f"open {arguments.out}/index.html")


def _slides(arguments) -> None:
    from dopamine_lib.course.slides import build_slides

    print(f"{len(build_slides(arguments.out))} chapters: open {arguments.out}/index.html")
