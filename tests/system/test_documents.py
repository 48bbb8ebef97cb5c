"""README and docs are what a stranger tries first: each TOML, shell and Python block is run as printed."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cardcage_boot.cache import cache_root, locked
from debian_guest import debian_guest
from documents import EXIT, OFF, PAGES, ROOT, RUN, UP, Block, Reader, block, blocks, fenced
from installed import install

Recipe = Callable[[Reader, Block], None]

BASE = '[machine]\naccel = "tcg"\n[boot]\nprotocol = "raw"\nimage = "{}"\n'
APART = "import os, tempfile\nos.environ['XDG_RUNTIME_DIR'] = tempfile.mkdtemp()"
"""A run directory of one's own, whose templates' processes nobody else stops."""
LOGIN = (("login:", "root\n"), ("# ", "poweroff\n"))
NETWORK = """ip link set lo up; ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
ip addr add 10.9.9.2/24 dev v0; ip route add default via 10.9.9.1; exec "$@" """


def needs(*tools: str) -> None:
    """Skip without these programs."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/lib/qemu"
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"needs {' '.join(missing)}")


def given(reader: Reader) -> None:
    """What README and configuration take for given, made by docs/guests.md as printed; the disk is kept."""
    if not (reader.folder / "vmlinuz").exists():
        fetch(reader)
    text = block("guests.md", 3).text
    kept = cache_root() / "tests" / f"documents-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with locked(kept / "lock", lambda: None):
        if not (kept / "root.qcow2").exists():
            needs("mmdebstrap", "fakeroot", "mke2fs")
            maker = Reader(kept / "work", reader.home)
            maker.run(text)
            (maker.folder / "root.qcow2").rename(kept / "root.qcow2")
            shutil.rmtree(maker.folder)
    reader.copy(kept / "root.qcow2")


def fetch(reader: Reader) -> None:
    """``cardcage kernel``, which needs an archive of packages."""
    said = reader.run(block("guests.md", 1).text, status=None)
    if "give --kernel and --initrd" in said:
        pytest.skip(f"needs a network: {said.splitlines()[-1]}")
    assert (reader.folder / "initrd.img").exists(), said


# recipes


def by_ci(number: int) -> Recipe:
    """CI runs this block itself: it installs cardcage, or runs all tests."""

    def recipe(reader: Reader, one: Block) -> None:
        assert one.language == "sh"
        assert f'bash -euo pipefail -c "$(block {number})"' in (ROOT / ".ci/run").read_text()

    return recipe


def shell(*, prepare: Recipe | None = None, **keys: Any) -> Recipe:
    """Run as a script; *keys* are those of :meth:`Reader.run`."""

    def recipe(reader: Reader, one: Block) -> None:
        if prepare is not None:
            prepare(reader, one)
        reader.run(one.text, **keys)

    return recipe


def machine(base: str | None = None, prepare: Recipe | None = None, flags: str = "", **keys: Any) -> Recipe:
    """Run as ``vm.toml``, over a machine that has what the block leaves out; it powers off."""

    def recipe(reader: Reader, one: Block) -> None:
        if prepare is not None:
            prepare(reader, one)
        reader.write("off.bin", OFF)
        reader.write("vm.toml", one.text)
        files = "vm.toml"
        if base is not None:
            reader.write("base.toml", base)
            files = "base.toml vm.toml"
        assert "outcome: the guest powered off" in reader.run(f"cardcage run {flags} {files}", **keys)

    return recipe


def python(before: str = "", after: str = "", prepare: Recipe | None = None) -> Recipe:
    """Run as a program, between what the page takes for given and what must then hold."""

    def recipe(reader: Reader, one: Block) -> None:
        if prepare is not None:
            prepare(reader, one)
        reader.write("program.py", f"{before}\n{one.text}\n{after}\n")
        reader.run("python program.py")

    return recipe


def sandbox_template(reader: Reader, one: Block) -> None:
    """A template's file."""
    reader.write("tools.toml", one.text)
    reader.run("python -c 'from cardcage_sandbox.template import load_template as load; print(load(\"tools.toml\"))'")


def expression(before: str, after: str, *tools: str) -> Recipe:
    """Run a block that is one expression, which *after* calls ``made``."""

    def recipe(reader: Reader, one: Block) -> None:
        needs(*tools)
        tree = ast.parse(one.text).body
        assert len(tree) == 1
        reader.write("program.py", f"{before}\nmade = {one.text.strip()}\n{after}\n")
        reader.run("python program.py")

    return recipe


def flat(reader: Reader, _: Block) -> None:
    """A Multiboot kernel with a module."""
    needs("qemu-system-x86_64")
    reader.write("test.flat", EXIT)
    reader.write("env", "A=1\n")


def elsewhere(test: str) -> Recipe:
    """Another test runs it by the same blocks."""

    def recipe(reader: Reader, one: Block) -> None:
        assert "from documents import" in (ROOT / test).read_text()

    return recipe


def with_pytest(reader: Reader, _: Block) -> None:
    """The program of that name."""
    program = reader.home.parent / "bin" / "pytest"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pytest "$@"\n')
    program.chmod(0o755)


def guest_tests(reader: Reader, one: Block) -> None:
    """Run by pytest, as a module of tests."""
    fetch(reader)
    reader.write("test_page.py", one.text)
    reader.run("python -m pytest -q test_page.py")


def with_card(name: str, prepare: Recipe | None = None) -> Recipe:
    """One of the example cards is installed."""

    def recipe(reader: Reader, one: Block) -> None:
        site = reader.home.parent / f"site-{name}"
        if not site.exists():
            install(ROOT / "examples" / name, site)
        reader.sites = [site]
        if prepare is not None:
            prepare(reader, one)

    return recipe


def cloud(reader: Reader, _: Block) -> None:
    """In place of the download: a disk that is partitioned like it, with GRUB."""
    fetch(reader)
    image = reader.folder / "debian-12-nocloud-amd64.qcow2"
    if not image.exists():
        shutil.copyfile(debian_guest().disk, image)


def disk(reader: Reader, _: Block) -> None:
    reader.run("[ -e root.qcow2 ] || cardcage image create root.qcow2 64M")


def served(reader: Reader, one: Block) -> None:
    """An NBD server has the disk; its port is free, which the page's may not be."""
    needs("qemu-nbd")
    reader.write("disk.raw", bytes(1 << 20))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = f"exec qemu-nbd -f raw -b 127.0.0.1 -p {port} -t -x disk disk.raw"
    server = subprocess.Popen(["bash", "-c", command], cwd=reader.folder)
    try:
        waits = f"until timeout 1 bash -c '< /dev/tcp/127.0.0.1/{port}'; do :; done"
        reader.run(waits)
        machine(BASE.format("off.bin"))(
            reader, Block(one.page, one.number, one.language, one.text.replace("10809", port))
        )
    finally:
        server.terminate()
        server.wait()


def chain(reader: Reader, _: Block) -> None:
    """An image on one beside it, on one in another folder."""
    made = """mkdir bases vm && cardcage image create bases/base.qcow2 64M
        cardcage image create vm/middle.qcow2 -b ../bases/base.qcow2 --allow-backing bases
        cardcage image create vm/root.qcow2 -b middle.qcow2 --allow-backing bases"""
    if not (reader.folder / "vm").exists():
        reader.run(made)


def namespace(reader: Reader, _: Block) -> None:
    needs("passt", "unshare", "ip")
    if os.geteuid() != 0:
        pytest.skip("needs root, for a network namespace")


def huge_pages(reader: Reader, _: Block) -> None:
    """The host has a pool of huge pages, for a while."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    if not os.access(pool, os.W_OK):
        pytest.skip("needs root, for a pool of huge pages")
    reader.run(f"echo 192 > {pool}")
    if int(pool.read_text()) < 128:
        pytest.skip("needs 128 free huge pages of 2 MiB")


def site_policy(reader: Reader, _: Block) -> None:
    """The site's own rules: those that the page shows."""
    (shown,) = (text for language, text in fenced(ROOT / "docs" / "security.md") if language == "cil")
    reader.write("site.cil", shown)


SMALL = """(class file (read write)) (user u) (role r) (type a) (type b) (userrole u r) (roletype r a) (roletype r b)
(allow a b (file (read)))
(sid first) (sidcontext first (u r a))





(constrain (file (read)) (neq t2 b))
"""


def policies(reader: Reader, _: Block) -> None:
    """Policies and a log as the page speaks of them."""
    reader.write(
        "broken.cil",
        "(class image (read))\n(user u)\n(role r)\n(type nic_t)\n(type disk_t)\n\n"
        "(allow nic_t dsik_t (image (read)))\n",
    )
    reader.write("site.cil", SMALL)
    reader.write("old.cil", SMALL)
    reader.write("new.cil", f"{SMALL}(allow a b (file (write)))\n")
    record = "type=AVC msg=audit(1363289005.532:184): avc:  denied  { read } for  pid=1 scontext=u:r:a tcontext=u:r:b"
    reader.write("audit.log", f"{record} tclass=file permissive=0\n")


def contexts(reader: Reader, _: Block) -> None:
    """The two files that are loaded."""
    levels = "(sensitivity s0) (sensitivityorder (s0)) (category c1) (category c2) (categoryorder (c1 c2))"
    levels += "(sensitivitycategory s0 (c1 c2)) (userlevel u (s0)) (userrange u ((s0) (s0 (c1 c2))))"
    reader.write(
        "base.cil",
        f"(mls true) (class file (read write)) (user u) (role r) (type vm_t) (type image_t) (userrole u r) {levels}\n"
        "(userrole u object_r) (roletype r vm_t) (roletype object_r image_t) (boolean share false)\n",
    )
    reader.write("site.cil", "(allow vm_t image_t (file (read write)))\n")


def session(prepare: Recipe, *statuses: tuple[str, int]) -> Recipe:
    """Run each command of a console session, which have these words and these statuses, and compare what is shown."""

    def recipe(reader: Reader, one: Block) -> None:
        prepare(reader, one)
        commands = [f"$ {part}" for part in one.text.split("$ ")[1:]]
        assert len(commands) == len(statuses)
        for command, (word, status) in zip(commands, statuses, strict=True):
            assert f" {word} " in command
            reader.console(command, status=status)

    return recipe


def beside(*machines: tuple[str, str]) -> Recipe:
    """Run each command of a console session beside machines of these names, with these flags."""

    def recipe(reader: Reader, one: Block) -> None:
        reader.write("up.bin", UP)
        reader.write("up.toml", BASE.format("up.bin"))
        commands = [f"cardcage run {flags} up.toml --set machine.name={name}" for name, flags in machines]
        with reader.background(*commands):
            for command in one.text.split("$ ")[1:]:
                said = reader.run(command.partition("\n")[0])
                shown = command.splitlines()[1:]
                if shown:  # a table, whose numbers are of the moment
                    assert [line.split()[:1] for line in said.splitlines()] == [line.split()[:1] for line in shown]
                    assert said.split("\n")[0].split() == shown[0].split()

    return recipe


def shared(reader: Reader, _: Block) -> None:
    """A directory called DIR, and virtiofsd."""
    needs("virtiofsd")
    reader.run("rm -f /tmp/fs.sock; mkdir -p DIR")


def guests_before(reader: Reader, _: Block) -> None:
    given(reader)


def saved_web(reader: Reader, one: Block) -> None:
    """A machine called web runs meanwhile."""
    reader.write("up.bin", UP)
    reader.write("up.toml", BASE.format("up.bin"))
    with reader.background("cardcage run up.toml --set machine.name=web"):
        assert ": no damage found" in reader.run(one.text)


GUEST = "from cardcage_agent import Machine\nvm = Machine.debian(memory='512M').start()"

ACCELERATORS = (
    python("from cardcage_tcg.accel import Tcg as MyAccelerator", "test_program(programs()[0])"),
    python(),
    expression(
        "from cardcage_conformance.accelerator import check_program\n"
        "from cardcage_conformance.conformance import Fault, Program\n"
        "from cardcage_conformance import assemble, lab\nfrom cardcage_tcg.accel import Tcg",
        "source = '\\n'.join((assemble.FOLDER / name).read_text() for name in ('common.inc', 'long64.inc'))\n"
        "code = assemble.assemble(made.name, f'{source}\\n{made.source}')\n"
        "lab.assembled()[made.name] = lab.Assembled(bytes.fromhex(code['code']), code['labels'])\n"
        "assert not check_program(Tcg(), made)",
        "nasm",
    ),
)

HOT = """from cardcage_agent import Machine
with open("scratch.img", "wb") as image:
    image.truncate(1 << 20)
vm = Machine.debian(memory="256M").start()
vm.agent.wait(timeout=300)"""

RECIPES: dict[str, tuple[Recipe, ...]] = {
    "README.md": (
        by_ci(1),
        by_ci(2),
        python(prepare=guests_before, after='assert str(outcome) == "the guest powered off"'),
        machine(prepare=guests_before, talk=LOGIN),
    ),
    "accelerators.md": ACCELERATORS,
    "boot.md": (
        machine(prepare=lambda reader, one: reader.write("sector.bin", OFF)),
        shell(prepare=flat, status=1),
        shell(prepare=flat, status=1),
        python("program = b'#!/bin/sh'", "assert [one.name for one in entries] == ['init', 'dev', 'dev/console']"),
    ),
    "config.md": (machine(prepare=with_card("debugcon-card", guests_before), talk=LOGIN),),
    "guests.md": (
        lambda reader, one: fetch(reader),
        shell(prepare=lambda reader, one: fetch(reader)),
        guests_before,
        shell(prepare=guests_before, talk=LOGIN),
        shell(prepare=cloud, talk=LOGIN),
        shell(prepare=cloud, talk=LOGIN),
    ),
    "disks.md": (
        machine(BASE.format("off.bin"), disk),
        machine(BASE.format("off.bin"), chain),
        served,
        machine(BASE.format("off.bin"), disk),
        shell(),
    ),
    "networks.md": (machine(BASE.format("off.bin"), namespace, before=("unshare", "-n", "sh", "-c", NETWORK, "sh")),),
    "pc.md": (
        machine(BASE.format("off.bin"), disk),
        python(HOT, "assert disk.id not in vm.devices\nvm.close()", prepare=lambda reader, one: fetch(reader)),
    ),
    "policies.md": (
        machine(BASE.format("off.bin")),
        python(after="from cardcage_memory_policies.testing import check_policy\ncheck_policy(Policy)"),
        python(
            "from types import ModuleType\nfrom cardcage.hookspecs import hookimpl\nfrom cardcage.host import Host",
            "card = ModuleType('card')\ncard.cardcage_register = cardcage_register\n"
            "with Host([card]) as host:\n    assert 'name' in host.registry.names(PolicyOffer)",
        ),
    ),
    "memory.md": (
        machine(BASE.format("off.bin"), huge_pages),
        beside(("one", ""), ("two", "--device virtio-balloon")),
        machine(BASE.format("off.bin")),
    ),
    "security.md": (
        machine(BASE.format("off.bin")),
        machine(BASE.format("off.bin"), with_card("capability-card", site_policy)),
        machine(BASE.format("off.bin")),
        python("from cardcage.security import Needs", "assert Disk().needs().sockets == ('unix',)"),
        machine(BASE.format("off.bin"), lambda reader, one: Path("/var/lib/images").mkdir(exist_ok=True)),
        python(
            "from cardcage.machine import Machine\nfrom cardcage_selinux.card import Selinux\n"
            "vm = Machine(accel='tcg', memory='1M', machine={'platform': 'none'}, fragments=[{'security': 'default'}])",
            "vm.close()",
        ),
        beside(("debian", "--security default")),
        python(after="assert check(None, None) is None"),
        python(
            "from cardcage_testing import TestSlot\nfrom types import SimpleNamespace\n"
            "slot, path = TestSlot(), 'a.img'\nself = SimpleNamespace(stop=lambda: None, go_on=lambda: None)",
            "slot.close()",
        ),
    ),
    "gdb.md": (machine(BASE.format("off.bin")), python()),
    "qemu.md": (
        lambda reader, one: reader.console(one.text),
        machine(BASE.format("off.bin")),
        python(
            "from types import ModuleType\nfrom cardcage.host import Host\nfrom cardcage_qmp.schema import table_of",
            "card = ModuleType('card')\ncard.cardcage_register = cardcage_register\n"
            "with Host([card]) as host:\n    table = table_of(host)\n"
            "assert 'x-greet' in table.commands and 'X_GREETED' in table.events",
        ),
    ),
    "selinux.md": (
        python("callback = print", "assert policy.compute_create", contexts),
        session(policies, ("check", 2), ("explain", 1), ("query", 1), ("diff", 1), ("allow-from-log", 0)),
    ),
    "sandbox.md": (
        python(
            APART,
            "from cardcage_sandbox import stop_templates\nstop_templates()",
            lambda reader, one: fetch(reader),
        ),
        sandbox_template,
    ),
    "snapshots.md": (
        python(),
        saved_web,
        python(),
    ),
    "python.md": (
        python(prepare=lambda reader, one: fetch(reader)),
        *(python(GUEST, "vm.close()", prepare=lambda reader, one: fetch(reader)) for _ in range(8)),
        *(python(prepare=lambda reader, one: fetch(reader)) for _ in range(3)),
    ),
    "moving.md": (python(prepare=lambda reader, one: fetch(reader)),) * 2,
    "migration.md": (python(prepare=lambda reader, one: fetch(reader)),),
    "pytest.md": (
        guest_tests,
        python("import tomllib\nconfig = tomllib.loads('''", "''')\nassert config"),
        shell(prepare=with_pytest),
    ),
    "verbs.md": (shell(prepare=lambda reader, one: fetch(reader)), machine(BASE.format("off.bin"))),
    "virtio.md": (shell(prepare=shared),),
    "writing-a-card.md": (elsewhere("tests/plugins/test_writing_a_card.py"),) * 10,
}


def every() -> Iterator[Block]:
    for page in PAGES:
        yield from blocks(page)


def marked() -> Iterator[Any]:
    """Blocks that change settings of the host's kernel keep to one process."""
    for one in every():
        host = one.page == "memory.md" or '"ksm"' in one.text
        yield pytest.param(one, marks=[pytest.mark.xdist_group("host")] if host else [])


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the readers of this session are: one home for all, empty at first."""
    return tmp_path_factory.mktemp("reader")


def test_every_block_has_a_language_and_a_recipe() -> None:
    """Each block says what it is, and each that can be run is: a new one needs a recipe here."""
    for page in PAGES:
        assert {language for language, _ in fenced(page)} <= {*RUN, "text", "cil"}, page
        assert len(RECIPES.get(page.name, ())) == len(blocks(page)), page.name


@pytest.mark.once
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("one", list(marked()), ids=str)
def test_a_block_runs_as_printed(desk: Path, tmp_path: Path, one: Block) -> None:
    """It does what its page says of it, in a folder of the page's own and with a home that was empty; nothing that
    another block kept by a name is there."""
    reader = Reader(desk / one.page, desk / "home", state=tmp_path)
    RECIPES[one.page][one.number - 1](reader, one)
