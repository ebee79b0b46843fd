"""CSV files as people have them: commas, semicolons or tabs, with a byte-order mark or in UTF-16, and odd line ends."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dopamine_lib.errors import InputError

_SHOWN = 8
_END = "the end of this table"  # put below a table, to see whether it is still read as a line


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
        try:
            content = path.read_bytes() if content is None else content
            utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # Excel's "Unicode text"
            text = content.decode("utf-16" if utf_16 else "utf-8-sig")
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            text = io.StringIO(f"{text}\n{_END}", newline="")
            lines = csv.reader(text, delimiter=delimiter, skipinitialspace=True)
            rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a CSV file") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a UTF-8 CSV file ({error}); save it as one") from None
        if rows.pop()[1] != [_END]:  # all lines from there on would be one cell
            begun = rows[-1][0] + 1 if rows else 1
            raise InputError(f"{path}, line {begun}: a quotation mark is never closed; close it, or take it out")
        (_, header), *rows = rows
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


def some(names: object) -> str:
    """The first few names, for a message."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(map(repr, names[:_SHOWN])) or "nothing") + more
