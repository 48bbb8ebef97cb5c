"""Assemble the conformance programs with NASM into ``programs/assembled.json``, so that nobody else needs NASM.

``python -m cardcage_conformance.assemble`` writes the file; with ``--check`` it says whether the file is as it would be
written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cardcage.errors import CardcageError, CardError, HostError

from cardcage_conformance.lab import LIBRARIES
from cardcage_conformance.programs import all_programs

FOLDER = Path(__file__).parent / "programs"
OUTPUT = FOLDER / "assembled.json"


def assemble(name: str, source: str) -> dict[str, object]:
    """Machine code (hexadecimal) and ``at_...`` labels of one source. Raises CardError with NASM's complaints."""
    with tempfile.TemporaryDirectory() as folder:
        text, code, symbols = Path(folder, "in.asm"), Path(folder, "out"), Path(folder, "map")
        text.write_text(f"[map symbols {symbols}]\n{source}\n")
        command = ["nasm", "-f", "bin", "-w+error=number-overflow", "-i", f"{FOLDER}/", "-o", str(code), str(text)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise HostError("nasm is not installed: apt-get install nasm") from error
        if done.returncode:
            raise CardError(f"{name}: {done.stderr}")
        labels = {}
        for line in symbols.read_text().splitlines():
            words = line.split()
            if len(words) == 3 and words[2].startswith("at_"):
                labels[words[2]] = int(words[0], 16)
        return {"code": code.read_bytes().hex(), "labels": dict(sorted(labels.items()))}


def build() -> str:
    """The whole file's text. Raises CardError with NASM's complaints about all sources."""
    common = (FOLDER / "common.inc").read_text()
    sources = {
        name: common.replace("    org 0x8000\n", "") + (FOLDER / f"{name}.asm").read_text()
        for name in sorted(set(LIBRARIES.values()))
    }
    sources["remote64"] = "\n".join(
        (FOLDER / name).read_text() for name in ("common.inc", "long64.inc", "remote64.asm")
    )
    for program in all_programs():
        include = "protected32" if program.start == "paging32" else program.start
        sources[program.name] = f"{common}\n{(FOLDER / f'{include}.inc').read_text()}\n{program.source}"
    table, complaints = {}, []
    for name, source in sources.items():
        try:
            table[name] = assemble(name, source)
        except CardError as error:
            complaints.append(str(error))
    if complaints:
        raise CardError("\n".join(complaints))
    return json.dumps(table, indent=0) + "\n"


def main() -> int:
    """Write or check the file; returns the process's status."""
    try:
        text = build()
    except CardcageError as error:
        print(error, file=sys.stderr)
        return 2
    if "--check" not in sys.argv[1:]:
        OUTPUT.write_text(text)
        return 0
    if OUTPUT.read_text() != text:
        print(f"{OUTPUT} is stale: run python -m cardcage_conformance.assemble", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
