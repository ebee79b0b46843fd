"""The report's Markdown, which nothing that was read can break out of, and its page in HTML, which loads nothing."""

import re

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Privacy statement and model card</title>
<style>
@page {{ size: A4; margin: 11mm; }}
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem; color: #111; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.1em; margin: 0.9em 0 0.3em; }} p, ul {{ margin: 0.3em 0; }}
table {{ border-collapse: collapse; margin: 0.4em 0; font-size: 0.9em; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #999; padding: 0.1em 0.5em; text-align: left; vertical-align: top; }}
@media print {{ body {{ font-size: 7.6px; line-height: 1.25; max-width: none; margin: 0; padding: 0; }}
table {{ display: table; }} }}
</style>
</head>
<body>
{body}</body>
</html>
"""


def plain(text: object) -> str:
    """Any text as Markdown that shows it as it is, on one line: no tag, link, picture or table cell can begin in it.

    >>> print(plain("a*b | <c>"))
    a\\*b \\| \\<c\\>
    """
    return re.sub(r"([\\`*_\[\]<>|&!#~$])", r"\\\1", " ".join(str(text).split()))


def html(text: str) -> str:
    """Markdown as an HTML page that loads nothing from elsewhere."""
    import mistune

    return PAGE.format(body=mistune.create_markdown(escape=True, plugins=["table"])(text))


def markdown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table. Its cells are Markdown already: what comes from a file has gone through ``plain``."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bullets(*lines: str) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
