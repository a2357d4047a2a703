"""The language check finds the habits it is for, and nothing in plain sentences."""

import language
import pytest


def reasons(text, tmp_path, name="module.py"):
    path = tmp_path / name
    path.write_text(text)
    return [(line, reason) for _, line, reason in language.check_file(path)]


@pytest.mark.parametrize(
    "first",
    ["What a row gives.", "The same, in float32.", "Of the layer.", "How much it costs.", "  "],
)
def test_unsuitable_first_lines_are_found(first, tmp_path):
    for code in (
        f'"""{first}"""\n',
        f'class A:\n    """{first}"""\n',
        f'def _f():\n    """{first}"""\n',
        f'async def f():\n    def g():\n        """\n        {first}\n        """\n',
    ):
        assert len(reasons(code, tmp_path)) == 1


def test_whether_is_for_functions_that_return_a_bool(tmp_path):
    body = '\n    """Whether `x` is contiguous."""\n'
    assert reasons(f"def f(x) -> bool:{body}", tmp_path) == []
    assert reasons(f"def f(x) -> npt.NDArray[np.bool_]:{body}", tmp_path) == []
    assert [line for line, _ in reasons(f"def f(x):{body}", tmp_path)] == [2]
    assert len(reasons(f"def f(x) -> str | None:{body}", tmp_path)) == 1


@pytest.mark.parametrize("first", ["Return the cost.", "Offset of a row.", "Whatever is given."])
def test_plain_first_lines_pass(first, tmp_path):
    assert reasons(f'def f():\n    """{first}"""\n', tmp_path) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("The chains that nothing\nbeats on both.", [1]),
        ("a\n\nIt takes 3 multiply-adds, and a fused multiply-add.", [3]),
        ("It wakes a team\n", [1]),
        ("one stage an axis, one stage per axis", [1]),
        ("a networking axis; brought to mind", []),
    ],
)
def test_phrases_are_found_on_their_line(text, lines, tmp_path):
    assert [line for line, _ in reasons(text, tmp_path, "page.md")] == lines


def test_phrases_are_found_across_the_lines_of_a_comment(tmp_path):
    found = reasons("int x;\n/* Samples are brought\n * in by rows. */\n", tmp_path, "engine.c")
    assert [line for line, _ in found] == [2]


def test_documentation_comments_follow_the_rule_of_docstrings(tmp_path):
    assert len(reasons("/* What a row gives. */\nint f(void);\n", tmp_path, "a.c")) == 1
    assert len(reasons("/*\n * The same for rows.\n */\n", tmp_path, "a.h")) == 1
    assert len(reasons('def f():\n    """Of a row."""\n', tmp_path, "a.pyx")) == 1
    assert len(reasons("#: What it is.\nX = 1\n", tmp_path)) == 1
    assert reasons("/* Rows per tile. */\n# What CPython does is unknown.\n", tmp_path, "a.c") == []


@pytest.mark.parametrize(
    "code", ["there = 1", "def f(said): pass", "def told(): pass", "for taken in x: pass"]
)
def test_names_that_are_no_nouns_are_found(code, tmp_path):
    assert len(reasons(code + "\n", tmp_path)) == 1
    assert reasons("f(said=1)\nx.there = 1\nprint(told)\n", tmp_path) == []


def test_long_commit_subjects_are_found(monkeypatch):
    log = f"abc {'x' * 72}\ndef {'x' * 73}\n"
    calls = []

    def git(*words):
        calls.append(words)
        return log if words[0] == "log" else None

    monkeypatch.setattr(language, "git", git)
    assert [name for name, _, _ in language.check_commits("A..B")] == ["commit def"]
    assert "A..B" in calls[-1]
    language.check_commits(None)
    assert "-20" in calls[-1]  # there is no origin/main


def test_an_unknown_range_of_commits_is_refused():
    with pytest.raises(SystemExit, match=r"--commits.*no-such-branch"):
        language.check_commits("no-such-branch..HEAD")


def test_findings_are_printed_and_counted_per_package(monkeypatch, tmp_path, capsys):
    (tmp_path / "lowrank" / "core").mkdir(parents=True)
    path = tmp_path / "lowrank" / "core" / "cost.py"
    path.write_text('"""What it costs."""\n')
    monkeypatch.setattr(language, "ROOT", tmp_path)
    monkeypatch.setattr(language, "tracked", lambda paths: [path])
    assert language.main(["lowrank/core"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("lowrank/core/cost.py:1: ")
    assert err.split() == ["1", "lowrank/core"]
    path.write_text('"""Cost of a chain."""\n')
    assert language.main(["lowrank/core"]) == 0
