"""Check the project's prose for habits that a reader would have to learn.

    python tests/language.py                    # every tracked file and the latest commits
    python tests/language.py lowrank/core       # files under these paths only
    python tests/language.py --commits A..B     # subjects of these commits

Each finding is printed as `file:line: reason`; the exit status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".pyx", ".pyi", ".c", ".h", ".inc", ".cu", ".md", ".rst", ".typ", ".toml"}
#: Files that quote the phrases, and the history.
EXEMPT = {"tests/language.py", "tests/test_language.py", "CHANGELOG.md"}
SUBJECT_LENGTH = 72

#: First words of a docstring or of a documentation comment, and what to write instead.
OPENINGS = {
    r"What\b": "start with a verb or a noun phrase, not 'What'",
    r"The same\b": "say what it does, not 'The same'",
    r"Of\b": "start with a noun, not 'Of'",
    r"How (much|many)\b": "start with a verb or a noun phrase, not 'How'",
}
#: Phrases to avoid, and the terms of the field.
PHRASES = {
    r"(what )?nothing (else )?beats": "Pareto-optimal, Pareto front",
    r"(?<!fused.)\bmultiply[- ]adds?\b": "MACs",
    r"\b(wakes?|waking|woken|woke) (up )?(a|the|its|their|one) (team|threads?|pool)\b":
        "fork/join latency",
    r"\b(wakings?|teams?) of threads\b|\bOpenMP teams?\b": "thread pool, parallel region",
    r"\bwoken\b": "wake-up latency, or 'started'",
    r"\b(brought|bring|brings|bringing) in\b": "load, pack",
    r"\bput(s|ting)? to (its|their) places?\b": "scatter, store",
    r"\breads? right\b": "top-1 accuracy, correct predictions",
    r"\bin [\w.]+'s manners?\b": "with the conventions of",
    r"\b(one|ones|stage|stages|rank|ranks|size|sizes|number|numbers) an axis\b": "per axis",
    r"\boperations a byte\b": "operations per byte",
    r"\bplan of the house\b|\btop of the house\b": "architecture, top-level package",
    r"\bhas had enough\b": "was closed early",
    r"\bis said\b|\bsays so\b|\bsaid so\b": "'is given', 'is reported', or 'raises'",
}  # fmt: skip
#: Participles and adverbs that do not name a value or a function.
NAMES = {"said", "told", "there", "woken", "taken", "evened"}

Finding = tuple[str, int, str]


def tracked(paths: list[str]) -> list[Path]:
    """Return the text files that git tracks or would add, under `paths` if any are given."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *paths]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = sorted({*found.splitlines()} - EXEMPT)
    return [ROOT / n for n in names if Path(n).suffix in SUFFIXES and (ROOT / n).exists()]


def opening(text: str, returns_bool: bool = True) -> str | None:
    """Return why the first line of a docstring is unsuitable, or None."""
    first = text.strip().partition("\n")[0]
    if not first:
        return "empty docstring"
    for pattern, reason in OPENINGS.items():
        if re.match(pattern, first):
            return reason
    if re.match(r"Whether\b", first) and not returns_bool:
        return "'Whether' needs a function that is annotated to return a bool"
    return None


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, reason) of every unsuitable docstring and name of a Python module."""
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function or isinstance(node, ast.ClassDef | ast.Module):
            text = ast.get_docstring(node, clean=False)
            returns = ast.unparse(node.returns) if is_function and node.returns else ""
            returns_bool = bool(re.search(r"bool|TypeGuard|TypeIs", returns))
            reason = None if text is None else opening(text, returns_bool)
            if reason:
                yield node.body[0].lineno, reason
        name = getattr(node, "name", None) or getattr(node, "arg", None)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if name in NAMES and not isinstance(node, ast.alias | ast.keyword):
            yield node.lineno, f"name a value with a noun, not {name!r}"


def prose(text: str, suffix: str) -> Iterator[tuple[int, str]]:
    """Yield (line, reason) of every phrase to avoid, also across the end of a line."""
    # Line ends and comment signs within a phrase become single spaces; offsets stay.
    flat = re.sub(r"\n[ \t]*(#:?|\*|//|%)?[ \t]*", lambda m: " ".ljust(len(m[0])), text)
    for phrase, instead in PHRASES.items():
        for m in re.finditer(phrase.replace(" ", r"\s+"), flat, re.IGNORECASE):
            yield text.count("\n", 0, m.start()) + 1, f"{' '.join(m[0].split())!r}: {instead}"
    # Documentation comments, and docstrings of Cython, which ast cannot parse.
    signs = {".py": r"#:", ".md": None, ".rst": None, ".toml": None, ".typ": None}
    sign = signs.get(suffix, r'(?:/\*+|//|#:|""")')
    for m in re.finditer(rf"^[ \t]*{sign}[ \t\n*]*(\S.*)$", text, re.MULTILINE) if sign else ():
        reason = opening(m[1])
        if reason:
            yield text.count("\n", 0, m.start()) + 1, reason


def check_file(path: Path) -> list[Finding]:
    """Return the findings of one file, in the order of lines."""
    text = path.read_text(encoding="utf-8")
    found = list(prose(text, path.suffix))
    if path.suffix in (".py", ".pyi"):
        found += docstrings(ast.parse(text))
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return [(name, line, reason) for line, reason in sorted(found)]


def git(*words: str) -> str | None:
    """Return what git prints, or None where it fails (no repository, no such branch)."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def check_commits(commits: str | None) -> list[Finding]:
    """Return a finding per long subject: of the range, or of what origin/main lacks, or of 20."""
    if commits is None:
        has_origin = git("rev-parse", "--verify", "-q", "origin/main") is not None
        words = ["origin/main..HEAD"] if has_origin else ["-20"]
    else:
        words = [commits]
    log = git("log", "--no-merges", "--format=%h %s", *words, "--")
    if log is None and commits is not None:
        raise SystemExit(f"--commits must be a range of commits that git knows, got {commits!r}")
    pairs = (line.split(" ", 1) for line in (log or "").splitlines())
    return [
        (f"commit {name}", 1, f"subject of {len(subject)} characters, at most {SUBJECT_LENGTH}")
        for name, subject in pairs
        if len(subject) > SUBJECT_LENGTH
    ]


def package(name: str) -> str:
    """Return the part of the project that a finding is counted for."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == "lowrank" else parts[0].split(" ")[0]


def main(arguments: list[str] | None = None) -> int:
    """Print the findings and their number per package; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="files or folders; default: the whole project")
    parser.add_argument("--commits", metavar="RANGE", help="commits whose subjects are checked")
    options = parser.parse_args(arguments)
    found = [f for path in tracked(options.paths) for f in check_file(path)]
    if options.commits or not options.paths:
        found += check_commits(options.commits)
    for name, line, reason in found:
        print(f"{name}:{line}: {reason}")
    for name, count in Counter(package(name) for name, _, _ in found).most_common():
        print(f"{count:5} {name}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
