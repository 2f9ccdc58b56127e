"""How large each room of `analysis` is: python -m benchmarks.lines

Code lines are those without blank lines, comments and docstrings.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Of a module."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def main() -> None:
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    longest = 0, ""
    for path in sorted((ROOT / "analysis").rglob("*.py*")):
        if path.suffix in (".py", ".pyi"):
            room = path.parent.relative_to(ROOT).as_posix()
            lines[room] += code_lines(path.read_text())
            files[room] += 1
            longest = max(longest, (len(path.read_text().splitlines()), path.name))
    for room in sorted(lines):
        print(f"{room:26} {files[room]:4} files {lines[room]:6} code lines")
    print(f"{'all':26} {files.total():4} files {lines.total():6} code lines")
    print(f"longest file: {longest[1]}, {longest[0]} lines")


if __name__ == "__main__":
    main()
