"""Marks a solved homework as nbgrader would, whole or with a mistake planted into it."""

import ast


def marks(source_notebook, fault=None) -> dict[str, int]:
    """Points of each exercise, 0 where its test stops; with a ``fault`` (exercise, right, wrong text) up to there."""
    names, given = {}, {}
    for cell in source_notebook.cells:
        if cell.cell_type != "code":
            continue
        name, source = cell.metadata.nbgrader.grade_id, cell.source
        if fault and fault[0] == name:
            assert source.count(fault[1]) == 1, fault
            source = source.replace(*fault[1:])
        if not cell.metadata.nbgrader.grade:
            exec(source, names)
            continue
        tree = ast.parse(source)
        points = ast.Expression(tree.body.pop().value)  # the last line, which is the mark
        try:
            exec(compile(tree, name, "exec"), names)
            given[name.removesuffix("-test")] = eval(compile(points, name, "eval"), names)
        except Exception:  # also what a wrong answer makes of the test's own work
            given[name.removesuffix("-test")] = 0
        if fault and fault[0] in given:
            break
    return given
