"""Rules from a log: what AVC records say was denied, as CIL that would grant it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from attrs import define, field
from cardcage.errors import CardcageError
from cardcage.security import Act

from cardcage_selinux.tool.explain import explain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage_selinux.server.policy import Policy

__all__ = ["Denials", "read_log", "rules_for"]

RECORD = re.compile(r"\bavc:\s+(denied|granted)\s+\{ ([^{}]*) \}\s+for\s")
FIELD = re.compile(r"\b(scontext|tcontext|tclass)=(\S+)")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*\Z")


@define
class Denials:
    """The denials in a log.

    Attributes:
        asked: (source context, target context, class) to the permissions that were denied.
        skipped: lines that look like AVC records and cannot be read, each ``number: why``.
    """

    asked: dict[tuple[str, str, str], set[str]] = field(factory=dict)
    skipped: list[str] = field(factory=list)


def read_log(lines: Iterable[str]) -> Denials:
    """Take the denials from a log; other lines, and what was granted, are passed over."""
    found = Denials()
    for number, line in enumerate(lines, 1):
        record = RECORD.search(line)
        if record is None:
            if "avc:" in line:
                found.skipped.append(f"{number}: not an AVC record")
            continue
        if record[1] == "granted":
            continue
        # the record's own fields come last: values before them cannot pass for them
        fields = dict(FIELD.findall(line[record.end() :]))
        words = record[2].split()
        names = [fields.get("tclass", ""), *words]
        contexts = [fields.get(key, "") for key in ("scontext", "tcontext")]
        names += [context.split(":", 3)[2] if context.count(":") > 1 else "" for context in contexts]
        if not words or not all(NAME.match(name) for name in names):
            found.skipped.append(f"{number}: a field is missing, or is not a name")
            continue
        found.asked.setdefault((contexts[0], contexts[1], fields["tclass"]), set()).update(words)
    return found


def rules_for(denials: Denials, policy: Policy | None) -> list[str]:
    """CIL lines, sorted; with a policy, comments say what a rule alone would not change."""
    rules: dict[tuple[str, str, str], set[str]] = {}
    notes: dict[tuple[str, str, str], set[str]] = {}
    for (scontext, tcontext, tclass), words in denials.asked.items():
        source, target = (context.split(":", 3)[2] for context in (scontext, tcontext))
        key = source, "self" if source == target else target, tclass
        for word in words:
            reasons = _beyond(policy, Act(scontext, tcontext, tclass, (word,))) if policy else []
            if reasons is None:
                notes.setdefault(key, set()).add(f"{word} is granted by now")
                continue
            rules.setdefault(key, set()).add(word)
            notes.setdefault(key, set()).update(f"{word}: {reason}" for reason in reasons)
    lines = []
    for key in sorted(notes.keys() | rules.keys()):
        source, target, tclass = key
        lines += [f"; {' '.join(note.split())}" for note in sorted(notes.get(key, ()))]
        if key in rules:
            lines.append(f"(allow {source} {target} ({tclass} ({' '.join(sorted(rules[key]))})))")
    return lines


def _beyond(policy: Policy, act: Act) -> list[str] | None:
    """What else keeps it denied than a missing rule; ``None`` when it is not denied."""
    try:
        found = explain(policy, act)
    except CardcageError as error:
        return [str(error)]
    if found.granted:
        return None
    beyond = ("constraint ", "bounds ", "no roleallow ")
    limits = [f"a rule does not help: {reason}" for reason in found.reasons if reason.startswith(beyond)]
    return limits + [f"or {reason}" for reason in found.reasons if reason.startswith("with ")]
