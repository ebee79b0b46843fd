"""CSV files as people have them: commas, semicolons or tabs, with a byte-order mark or in UTF-16, and odd line ends."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dopamine_lib.errors import InputError

_SHOWN, _WIDE = 8, 250  # names in a message, and characters of each
_END = "the end of this table"  # put below a table, so that a quotation mark in its last line is one in the middle, too


@dataclass(frozen=True)
class CsvFile:
    """A table as text: its header, and its rows with the number of the line that each ends on.

    Empty lines are left out, short rows are filled up, and spaces around a cell are taken off.
    """

    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]

    @classmethod
    def read(cls, path: Path, content: bytes | None = None) -> "CsvFile":
        """Read ``path``, or ``content`` as if it stood there. Raises InputError where that is no CSV file in UTF-8."""
        at = 0
        try:
            content = path.read_bytes() if content is None else content
            utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # Excel's "Unicode text"
            text = content.decode("utf-16" if utf_16 else "utf-8-sig")
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            source = list(io.StringIO(f"{text}\n{_END}", newline=""))
            lines, rows = csv.reader(source, delimiter=delimiter, skipinitialspace=True), []
            for row in lines:
                if lines.line_num > at + 1:  # a cell goes on in the next line: is it closed where a cell ends?
                    list(csv.reader(source[at : lines.line_num], lines.dialect, strict=True))
                at = lines.line_num
                rows.append((at, [cell.strip() for cell in row]))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a CSV file") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a UTF-8 CSV file ({error}); save it as one") from None
        except csv.Error:  # also of a cell that is longer than csv.field_size_limit
            raise InputError(
                f"{path}, line {at + 1}: a quotation mark is not closed at the end of a cell; close it, or take it out"
            ) from None
        (_, header), *rows, _ = rows
        filled = [(line, row + [""] * (len(header) - len(row))) for line, row in rows if any(row)]
        return cls(path, header, filled)

    def find(self, *names: str) -> int | None:
        """The number of the first column with one of these names; None where there is none.

        Capitals, spaces, underscores and hyphens count only where two columns differ in nothing else.
        """
        for name in names:
            for form in (str, str.lower, bare):
                header = [form(column) for column in self.header]
                if form(name) in header:
                    return header.index(form(name))
        return None

    def column(self, *names: str, remedy: str) -> int:
        """As ``find``. Raises InputError, with the remedy, where there is no such column."""
        number = self.find(*names)
        if number is None:
            raise InputError(f"{self.path}: no column {' or '.join(names)}; found {some(self.header)}; {remedy}")
        return number

    def cells(self, number: int) -> Iterator[tuple[str, str]]:
        """Every cell of a column, with the words that name its place in a message, as in "heart.csv, line 2: age"."""
        for line, row in self.rows:
            yield f"{self.path}, line {line}: {self.header[number]}", row[number]


def bare(name: str) -> str:
    """A column's name in small letters, without spaces, underscores and hyphens.

    >>> bare("Patient ID"), bare("patient_id"), bare("PatientID")
    ('patientid', 'patientid', 'patientid')
    """
    return re.sub(r"[\s_-]", "", name.lower())


def shown(cell: str) -> str:
    """A cell for a message: its first line, for stray quotation marks may make one cell of many patients' lines.

    >>> shown("mild"), shown("3,4\\n5,6")
    ("'mild'", "'3,4 …'")
    """
    line, *more = cell.splitlines() or [""]
    return repr(f"{line[:_WIDE]} …" if more or line[_WIDE:] else line)


def some(names: object) -> str:
    """The first few names, for a message."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(shown(str(name)) for name in names[:_SHOWN]) or "nothing") + more
