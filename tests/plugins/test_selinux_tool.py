"""``cardcage policy``: check, explain, allow-from-log, diff and query."""

from __future__ import annotations

from pathlib import Path

import pytest
from cardcage_cli import main

POLICY = """(class file (read write open)) (class process (transition))
(user u) (role r) (role s) (type a) (type b) (type c) (type d)
(userrole u r) (userrole u s) (roletype r a) (roletype r b) (roletype r c) (roletype s a) (roletype r d)
(typeattribute dom) (typeattributeset dom (a b)) (boolean more false)
(allow a b (file (read)))
(allow dom c (file (write)))
(booleanif more (true (allow a c (file (open)))))
(constrain (file (read)) (neq t2 b))
(typebounds c d) (allow c a (file (write))) (typepermissive b) (dontaudit a a (file (read)))
(allow a a (process (transition)))
(sid first) (sidcontext first (u r a))
"""


@pytest.fixture
def policy(tmp_path: Path) -> str:
    """A file with the policy."""
    file = tmp_path / "p.cil"
    file.write_text(POLICY)
    return str(file)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """Status, and the lines of both outputs with the policy's path taken off."""
    status = main(["policy", *words])
    out = capsys.readouterr()
    return status, [line.strip() for line in (out.out + out.err).replace(words[-1], "P").splitlines()]


def test_check(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check counts what is in a policy of files and directories, and ends with 2 and a place for what is wrong."""
    counts = ["2 classes, 4 types, 1 attributes, 3 roles, 1 users, 1 booleans, 6 rules, 1 constraints"]
    assert said(capsys, "check", policy) == (0, counts)
    assert said(capsys, "check", str(tmp_path)) == (0, counts)
    (tmp_path / "q.cil").write_text("(allow a b (file (read)))\n  (allow a bb (file (read)))")
    status, lines = said(capsys, "check", str(tmp_path))
    assert (status, lines) == (
        2,
        ['outcome: bad configuration: P/q.cil:2:12: no type is called "bb". Did you mean "b"?'],
    )
    (tmp_path / "q.cil").write_text("(neverallow a b (file (read)))")
    assert said(capsys, "check", str(tmp_path))[0] == 2
    assert said(capsys, "check", "--no-neverallow", str(tmp_path))[0] == 0


@pytest.mark.parametrize(
    ("asked", "status", "lines"),
    [
        ("u:r:a u:r:c file write", 0, ["granted", "rule P:6:1: (allow dom c (file (write)))"]),
        ("first u:r:c file write", 0, ["granted", "rule P:6:1: (allow dom c (file (write)))"]),
        (
            "u:r:a u:r:b file read",
            1,
            [
                "denied",
                "rule P:5:1: (allow a b (file (read)))",
                "constraint P:8:1: (constrain (file (read)) (neq t2 b)) does not hold",
            ],
        ),
        (
            "u:r:a u:r:c file open",
            1,
            [
                "denied",
                "rule P:7:23: (allow a c (file (open))), when more is true, which does not hold now",
                "no rule in force lets a do this to c",
                "with more=true it would be granted",
            ],
        ),
        (
            "u:r:a u:s:a process transition",
            1,
            [
                "denied",
                "rule P:10:1: (allow a a (process (transition)))",
                "no roleallow lets role r become s",
            ],
        ),
        (
            "u:r:a u:r:a file read",
            1,
            [
                "denied",
                "no rule in force lets a do this to a",
                "not logged: rule P:9:64: (dontaudit a a (file (read)))",
            ],
        ),
        (
            "u:r:b u:r:a file read",
            1,
            ["denied", "no rule in force lets b do this to a", "type b is permissive: it is logged, and passes"],
        ),
    ],
)
def test_explain(policy: str, asked: str, status: int, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """explain names the rules, the constraint, the role and the boolean that decide."""
    assert said(capsys, "explain", *asked.split(), "-p", policy) == (status, lines)


def test_explain_bounds(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """explain says when a parent takes away what a rule grants, and what boolean would let it."""
    rules = "(boolean loose false) (booleanif loose (true (allow c b (file (open))))) (allow d b (file (open)))"
    Path(policy).write_text(POLICY + rules)
    status, lines = said(capsys, "explain", "u:r:d", "u:r:b", "file", "open", "-p", policy)
    assert (status, lines[2:]) == (
        1,
        ["bounds P:9:1: c, which bounds d, may not do it to b", "with loose=true it would be granted"],
    )
    assert said(capsys, "explain", "u:r:d", "u:r:b", "file", "open", "--set", "loose=on", "-p", policy)[0] == 0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("explain u:r:a u:r:b file reed", 'class file has no permission "reed". Did you mean "read"?'),
        ("explain u:r:a u:r:b fil read", 'the policy has no class "fil". Did you mean "file"?'),
        ("explain u:r:a u:x:b file read", '"u:x:b" is not a security context: no role is called "x"'),
        ("explain u:r:a u:r:b file read --set more=maybe", "expected BOOLEAN=true or BOOLEAN=false, got more=maybe"),
        ("query aa b", 'the policy has no type "aa". Did you mean "a"?'),
        ("query a b --without cc", 'the policy has no type "cc". Did you mean "c"?'),
        ("query a b --class fil", 'the policy has no class "fil". Did you mean "file"?'),
        ("query a b --permission reed", 'no class has permission "reed". Did you mean "read"?'),
    ],
)
def test_wrong_words(policy: str, words: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that the policy lacks are named, with near ones, and the status is 2."""
    status, lines = said(capsys, *words.split(), "-p", policy)
    assert status == 2
    assert lines[-1].endswith(problem)


def test_query(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """query finds direct rules, the attributes behind them, and the shortest path."""
    assert said(capsys, "query", "b", "a", "-p", policy) == (
        0,
        [
            "no rule from b to a",
            "a path leads in 2 steps:",
            "b -> c",
            "file write: P:6:1: (allow dom c (file (write))) (b has dom)",
            "c -> a",
            "file write: P:9:18: (allow c a (file (write)))",
        ],
    )
    assert said(capsys, "query", "c", "d", "-p", policy) == (1, ["no rule from c to d", "no path leads from c to d"])
    assert said(capsys, "query", "b", "a", "--without", "c", "-p", policy)[0] == 1
    assert said(capsys, "query", "a", "c", "--permission", "open", "--set", "more=on", "-p", policy)[0] == 0
    assert said(capsys, "query", "a", "c", "--permission", "open", "-p", policy)[0] == 1


def test_query_of_information(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With --flow a read carries information back to the reader, and a write forward."""
    status, lines = said(capsys, "query", "b", "a", "--flow", "--permission", "read", "-p", policy)
    assert (status, lines[-2:]) == (0, ["b -> a", "file read: P:5:1: (allow a b (file (read)))"])
    assert said(capsys, "query", "a", "b", "--flow", "--permission", "read", "-p", policy)[0] == 1


def test_diff(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """diff compares what policies mean: form and order do not count, each change is a line."""
    other = tmp_path / "other.cil"
    same = POLICY.replace("(allow dom c (file (write)))", "(allow b c (file (write))) (allow a c (file (write)))")
    other.write_text(same.replace("(booleanif more (true", "(booleanif (not (not more)) (true"))
    assert said(capsys, "diff", policy, str(other)) == (0, [])
    changed = POLICY.replace("more false", "more true").replace("dom c (file (write))", "dom c (file (write read))")
    other.write_text(changed.replace("(neq t2 b)", "(eq t2 b)").replace("(allow a b", "(allow a d"))
    assert said(capsys, "diff", policy, str(other)) == (
        1,
        [
            "+ (allow a (c d) (file (read)))",
            "- (allow a b (file (read)))",
            "+ (allow b c (file (read)))",
            "- (boolean more false)",
            "+ (boolean more true)",
            "+ (constrain (file (read)) (eq t2 b))",
            "- (constrain (file (read)) (neq t2 b))",
        ],
    )


def test_allow_from_log(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Denials become rules; what a rule alone does not change is said; lines that try to be rules are refused."""
    log = tmp_path / "log"
    record = "type=AVC msg=audit(1363289005.532:184): avc:  {} {{ {} }} for  pid=1 scontext=u:r:a tcontext={} tclass={}"
    log.write_text(
        "\n".join(
            [
                "type=SYSCALL msg=audit(1363289005.532:184): arch=c000003e",
                record.format("denied ", "read open", "u:r:b", "file") + " permissive=0",
                record.format("denied ", "open", "u:r:c:s0:c1", "file"),
                record.format("denied ", "write", "u:r:a", "file"),
                record.format("granted", "read", "u:r:d", "file"),
                record.format("denied ", "read", "u:r:b)(allow", "file"),
                "avc: nonsense",
            ]
        )
    )  # fmt: skip
    status, lines = said(capsys, "allow-from-log", str(log))
    assert status == 0
    assert lines == [
        "(allow a b (file (open read)))",
        "(allow a c (file (open)))",
        "(allow a self (file (write)))",
        "P:6: a field is missing, or is not a name",
        "P:7: not an AVC record",
    ]
    status, lines = said(capsys, "allow-from-log", str(log), "-p", policy)
    assert status == 0
    assert "; read: a rule does not help: constraint P:8:1: (constrain (file (read)) (neq t2 b)) does not hold" in lines
    assert any(line.startswith('; open: "u:r:c:s0:c1" is not a security context') for line in lines)
