"""Sandboxes on the nodes of a Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cardcage_ray
import pytest
from cardcage_sandbox import Sandbox, Template, stop_templates

if TYPE_CHECKING:
    from collections.abc import Iterator

MISSING = "ray is not installed: pip install 'cardcage[ray]'"
ray: Any = pytest.importorskip("ray", reason=MISSING)
rays: Any = pytest.importorskip("ray.experimental.sandbox", reason=MISSING)
clusters: Any = pytest.importorskip("ray.cluster_utils", reason=MISSING)

pytestmark = [pytest.mark.once, pytest.mark.xdist_group("ray")]
LONG = bool(os.environ.get("CARDCAGE_LONG_TESTS"))
SMALL = Template(name="small", memory="128M", spare=0)  # type: ignore[arg-type]  # attrs converts
ROOM = {"num_cpus": 3, "memory": 600 << 20, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes on this host, with a run directory of the tests' own."""
    run = tmp_path_factory.mktemp("run")
    run.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(run))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = clusters.Cluster(initialize_head=True, head_node_args=dict(ROOM))
        try:
            ray.init(address=made.address, runtime_env={"worker_process_setup_hook": "cardcage_ray.use"})
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            stop_templates()


def test_rays_own_sandboxes(cluster: Any, kernel: Path) -> None:
    """`ray.experimental.sandbox` makes guests of ours, and its calls do what it says of them."""
    box = rays.create(image="base", memory="128Mi", env={"WORD": "hello"}, workdir="/work", ttl_seconds=120)
    done = ray.get(box.exec.remote("echo $WORD; pwd; exit 3"))
    assert (done.exit_code, done.stdout) == (3, "hello\n/work\n")
    assert ray.get(box.exec.remote(["cat", "/proc/sys/kernel/ostype"])).stdout == "Linux\n"
    ray.get(box.write_file.remote("sub/a", "text"))
    assert ray.get(box.read_file.remote("/work/sub/a")) == b"text"
    assert ray.get(box.get_status.remote()) is rays.SandboxStatus.RUNNING
    with pytest.raises(rays.SandboxTimeoutError):
        ray.get(box.exec.remote("sleep 60", timeout=1))
    with pytest.raises(rays.SandboxError):
        ray.get(box.read_file.remote("/none"))
    ray.get(box.delete.remote())
    assert ray.get(box.get_status.remote()) is rays.SandboxStatus.TERMINATED
    with pytest.raises(rays.SandboxNotFoundError):
        ray.get(box.exec.remote("true"))


def test_what_a_backend_cannot() -> None:
    """A network without names, capabilities and an image that is not there are refused in one line."""
    backend = cardcage_ray.CardcageBackend()
    assert isinstance(backend, rays.BaseSandboxBackend)
    for keys, why in (({"network": "public"}, "egress"), ({"capabilities": []}, "None"), ({}, "no template")):
        config = rays.config.SandboxConfig(**{"image": "python:3.12", **keys})
        with pytest.raises(rays.SandboxCreationError, match=why):
            backend.create_sandbox(config)


def test_a_directory_that_cannot_be_made(cluster: Any) -> None:
    """A sandbox whose working directory cannot be made, or is no user's to have, is an error, and ends."""
    backend = cardcage_ray.CardcageBackend()
    for workdir in ("/proc/none", "/dev/null/none"):
        with pytest.raises(rays.SandboxCreationError, match="none"):
            backend.create_sandbox(rays.config.SandboxConfig(image="base", memory="128Mi", workdir=workdir))
    assert Sandbox.list() == []


def test_a_node_is_lost(cluster: Any) -> None:
    """Of many calls on two nodes, one of which is killed in between, each result comes."""
    count = 20 if LONG else 8
    other = cluster.add_node(**ROOM)

    def act(sandbox: Sandbox, number: int) -> str:
        return sandbox.commands.run(f"sleep 0.2; echo {number}").stdout

    found = {}
    for number, text in cardcage_ray.map(act, range(count), template=SMALL, timeout=120):
        found[number] = text
        if len(found) == 3:
            cluster.remove_node(other, allow_graceful=False)
    assert found == {number: f"{number}\n" for number in range(count)}


def test_errors_of_a_call(cluster: Any) -> None:
    """What a function raises in a call is raised to who asked, and not tried again."""

    def act(sandbox: Sandbox, number: int) -> None:
        raise ValueError(f"of {number} in {os.getpid()}")

    with pytest.raises(ValueError, match="of 1"):
        list(cardcage_ray.map(act, [1], template=SMALL, timeout=60))
