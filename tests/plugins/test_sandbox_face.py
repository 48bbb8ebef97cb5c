"""The HTTP face of sandboxes, towards callers that are not e2b's SDK, or not anybody's friend."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import struct
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from cardcage.errors import UsageError
from cardcage_sandbox import Sandbox
from cardcage_sandbox.face.app import Face, application
from cardcage_sandbox.face.connect import ENVELOPE, MESSAGE, Failed, taken
from cardcage_sandbox.face.control import Refused
from cardcage_sandbox.face.guard import BODY, UPLOAD, Keys, TooLarge
from cardcage_sandbox.face.words import ended, given, plain, shape, told
from cardcage_sandbox.files import Entry
from cardcage_sandbox.template import Template
from hypothesis import given as examples
from hypothesis import strategies as st
from starlette.testclient import TestClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.once
KEY = "e2b_0123456789abcdef"
HERE = {"X-API-KEY": KEY}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The face, over a run directory without any template's process."""
    run: Path = tmp_path_factory.mktemp("run")
    run.chmod(0o700)
    app = application(lambda: Face(KEY, {"base": Template()}), frozenset({"localhost"}))
    with pytest.MonkeyPatch.context() as patch, TestClient(app, "http://localhost:3000") as made:
        patch.setenv("XDG_RUNTIME_DIR", str(run))
        patch.setenv("XDG_STATE_HOME", str(run / "state"))
        yield made


def test_who_has_no_key_is_refused(client: TestClient) -> None:
    """Each control call needs the key, each call into a sandbox its token, whether the sandbox is there or not."""
    for headers in ({}, {"X-API-KEY": "e2b_wrong"}, {"Authorization": f"Bearer {KEY}"}):
        for method, path in (("GET", "/v2/sandboxes"), ("POST", "/v2/sandboxes"), ("DELETE", "/sandboxes/x")):
            assert client.request(method, path, headers=headers).status_code == 401
    for token in ("", KEY, Keys(KEY).token("other")):
        headers = {"E2b-Sandbox-Id": "mine", "X-Access-Token": token}
        assert client.get("/health", headers=headers).status_code == 401
        assert client.get("/files?path=/etc/passwd", headers=headers).status_code == 401
        assert client.post("/files?path=/x", headers=headers, content=b"x").status_code == 401
        assert client.post("/process.Process/List", headers=headers, json={}).status_code == 401
        stream = {**headers, "content-type": "application/connect+json"}
        assert client.post("/process.Process/Start", headers=stream, content=b"").status_code == 401
    assert client.get("/health").status_code == 401


def test_a_token_is_one_sandbox_s() -> None:
    """A token follows from the key and the sandbox's name, and from nothing less."""
    assert len({Keys(key).token(id) for key in ("a" * 20, "b" * 20) for id in ("1", "2")}) == 4


def test_web_pages_are_refused(client: TestClient) -> None:
    """A request with an Origin, or to a name that a page may have made to mean this host, is refused with the key."""
    assert client.get("/v2/sandboxes", headers=HERE).json() == []
    for more in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example:3000"}, {"Host": ""}):
        assert client.get("/v2/sandboxes", headers={**HERE, **more}).status_code == 403


def test_bodies_are_bounded(client: TestClient) -> None:
    """A body that is too long is refused by its length, or when it has come that far."""
    assert client.post("/v2/sandboxes", headers=HERE, content=b"x" * (BODY + 1)).status_code == 413
    assert client.post("/files", headers={"content-length": str(UPLOAD + 1)}, content=b"").status_code == 413
    assert client.post("/v2/sandboxes", headers={**HERE, "content-length": "many"}, content=b"").status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(BODY // 65536 + 1):
            yield b"x" * 65536

    assert client.post("/v2/sandboxes", headers=HERE, content=pieces()).status_code == 413


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{", "expected JSON"),
        (b"[]", "a table"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"templateID": 5}', "templateID: expected str"),
        (b'{"templateID": "nonesuch"}', "expected one of base"),
        (b'{"timeout": "long"}', "timeout: expected int"),
        (b'{"timeout": true}', "timeout: expected int"),
        (b'{"allow_internet_access": true}', "no network card"),
        (b'{"network": {"allowPublicTraffic": true}}', "no network card"),
        (b'{"network": {"allowOut": ["0.0.0.0/0"]}}', "no network card"),
        (b'{"network": {"allowOut": "example.com"}}', "a list of names"),
        (b'{"network": {"allowOut": ["exa mple.com"]}}', "expected a name such as"),
        (b'{"mcp": {"x": {}}}', "mcp"),
        (b'{"volumeMounts": [{"name": "a", "path": "/b"}]}', "volumes"),
    ],
)
def test_what_cannot_be_made(client: TestClient, body: bytes, why: str) -> None:
    """What is no request, or asks for what there is not, is refused in one line, and nothing is made."""
    found = client.post("/v2/sandboxes", headers=HERE, content=body)
    assert found.status_code in (400, 404)
    assert why in found.json()["message"]
    assert client.get("/v2/sandboxes", headers=HERE).json() == []


def test_what_a_way_out_is_asked_for(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """`allowOut` is the sandbox's way out, `denyOut` says nothing new, and so many templates run at most."""
    asked: list[object] = []

    def create(template: Template, **keys: object) -> None:
        asked.append(keys["egress"])
        raise UsageError("seen")

    monkeypatch.setattr("cardcage_sandbox.client.Sandbox.create", create)
    bodies = ({"allowOut": ["pypi.org", "10.1.0.0/16"], "denyOut": ["0.0.0.0/0"]}, {"denyOut": ["0.0.0.0/0"]}, {})
    for body in bodies:
        client.post("/v2/sandboxes", headers=HERE, json={"network": body})
    assert asked == [["pypi.org", "10.1.0.0/16"], None, None]
    monkeypatch.setattr("cardcage_sandbox.face.control.keepers", lambda: [None] * 32)
    found = client.post("/v2/sandboxes", headers=HERE, json={"network": bodies[0]})
    assert found.status_code == 429
    assert client.post("/v2/sandboxes", headers=HERE, json={}).json()["message"] == "seen"


def test_sandboxes_that_are_none(client: TestClient) -> None:
    """A sandbox that is none is 404 for control calls, and 502 for its own, which the SDK knows as one that ended."""
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/pause"), ("POST", "/fork"), ("GET", "/metrics")):
        assert client.request(method, f"/sandboxes/none{path}", headers=HERE).status_code == 404
    headers = {"E2b-Sandbox-Id": "none", "X-Access-Token": Keys(KEY).token("none")}
    found = client.post("/process.Process/List", headers=headers, json={})
    assert found.status_code == 502
    assert "was not found" in found.json()["message"]
    for query in ("limit=0", "limit=x", "nextToken=-1", "startedAfter=soon"):
        assert client.get(f"/v2/sandboxes?{query}", headers=HERE).status_code == 400


def test_snapshots_that_are_none(client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A snapshot's name leads to no other place than the face's own; no name is two sandboxes'; there is a bound."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("..", "../../x", "*", "a/b", "x" * 65, "none", "%2e%2e%2fx"):
        assert client.delete(f"/templates/{quote(name, safe='')}", headers=HERE).status_code == 404
        body = {"templateID": name}
        assert client.post("/v2/sandboxes", headers=HERE, json=body).status_code == 404
    assert client.get("/snapshots?sandboxID=../x", headers=HERE).status_code == 400
    sandbox = SimpleNamespace(id="mine", made=SimpleNamespace(template="base"), info=lambda: None)
    monkeypatch.setattr(Sandbox, "connect", lambda id: sandbox)
    for name in ("other", *map(str, range(63))):
        folder = tmp_path / "cardcage/sandboxes/base" / ("theirs" if name == "other" else "mine") / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    def kept(**body: Any) -> tuple[int, str]:
        answer = client.post("/sandboxes/mine/snapshots", headers=HERE, json=body)
        return answer.status_code, answer.json()["message"]

    assert kept(name="../x")[0] == kept(memory=False)[0] == kept(name=5)[0] == 400
    assert kept(name="other")[0] == kept(name="base")[0] == 409
    assert kept(name="new") == (429, "there are 64 snapshots: delete some first")
    assert [one["snapshotID"] for one in client.get("/snapshots?sandboxID=theirs", headers=HERE).json()] == ["other"]


def test_a_signed_link() -> None:
    """A link is good for its file, its act and its time, and for no other."""
    keys = Keys(KEY)

    def link(path: str, act: str, until: int | None, user: str = "") -> Any:
        text = f"{path}:{act}:{user}:{keys.token('s')}" + (f":{until}" if until is not None else "")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        query = {"path": path, "username": user, "signature": f"v1_{digest}"}
        return {**query, "signature_expiration": str(until)} if until is not None else query

    now = int(time.time())
    assert keys.is_signed("s", "read", link("/a", "read", None))
    assert keys.is_signed("s", "write", link("/a", "write", now + 60, "root"))
    assert not keys.is_signed("s", "write", link("/a", "read", None))
    assert not keys.is_signed("t", "read", link("/a", "read", None))
    assert not keys.is_signed("s", "read", link("/a", "read", now - 60))
    assert not keys.is_signed("s", "read", {**link("/a", "read", now + 60), "signature_expiration": str(now + 600)})
    assert not keys.is_signed("s", "read", {**link("/a", "read", None), "path": "/b"})
    assert not keys.is_signed("s", "read", {"path": "/a"})


class Asked:
    """A request, as far as :func:`taken` looks at it."""

    def __init__(self, parts: list[bytes], kind: str = "application/connect+json") -> None:
        self._parts, self.headers = parts, {"content-type": kind}

    async def stream(self) -> AsyncIterator[bytes]:
        for one in self._parts:
            yield one


def all_of(parts: list[bytes], **keys: str) -> list[dict[str, Any]]:
    async def collected() -> list[dict[str, Any]]:
        asked: Any = Asked(parts, **keys)
        return [one async for one in taken(asked)]

    return asyncio.run(collected())


@examples(st.lists(st.dictionaries(st.text(max_size=5), st.integers()), max_size=5), st.data())
def test_messages_of_a_stream(messages: list[dict[str, int]], data: st.DataObject) -> None:
    """Messages come out of a stream as they went in, however it was cut."""
    whole = b"".join(ENVELOPE.pack(0, len(one)) + one for one in (json.dumps(one).encode() for one in messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert all_of(parts) == messages


@examples(st.lists(st.binary(max_size=40), max_size=4))
def test_a_stream_of_anything(parts: list[bytes]) -> None:
    """Whatever is sent is messages, or refused."""
    with suppress(Failed):
        assert all(isinstance(one, dict) for one in all_of(parts))


def test_streams_that_are_none() -> None:
    """A message that is too long, packed, or of another form is refused at its head."""
    for head in (struct.pack(">BI", 0, MESSAGE + 1), struct.pack(">BI", 1, 2) + b"{}"):
        with pytest.raises(Failed, match="as they are"):
            all_of([head])
    with pytest.raises(Failed, match="inside a message"):
        all_of([b"\0\0"])
    with pytest.raises(Failed, match="expected application/connect"):
        all_of([], kind="application/connect+proto")


def unpacked(parts: list[bytes], coding: str) -> bytes:
    async def source() -> AsyncIterator[bytes]:
        for one in parts:
            yield one

    async def collected() -> bytes:
        return b"".join([one async for one in plain(source(), coding)])

    return asyncio.run(collected())


def test_packed_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body in gzip is unpacked within the bound of one that is not; another coding, or half of it, is refused."""
    packed = gzip.compress(b"x" * 1_000_000)
    assert unpacked([packed[:100], packed[100:]], "gzip") == b"x" * 1_000_000
    for parts, coding in (([packed[:-9]], "gzip"), ([b"nonsense"], "gzip"), ([b"x"], "br")):
        with pytest.raises(Refused):
            unpacked(parts, coding)
    monkeypatch.setattr("cardcage_sandbox.face.words.UPLOAD", 1000)
    with pytest.raises(TooLarge):
        unpacked([packed], "gzip")


def test_words_of_the_protocol() -> None:
    """Ends, sizes, inputs and files are said as the protocol has them, and what is none is refused."""
    assert ended(3) == {"exitCode": 3, "exited": True, "status": "exit status 3"}
    assert ended(-9)["error"] == "signal: killed"
    assert ended(-1000)["error"] == "signal: 1000"
    assert shape({"size": {"rows": 5, "cols": 6}}) == [5, 6]
    assert given({"input": {"stdin": "eA=="}}) == b"x"
    for wrong in ({"size": {"rows": 0}}, {"size": {"rows": "5"}}, {"size": {"rows": 1 << 20}}):
        with pytest.raises(Failed):
            shape(wrong)
    for wrong in ({"input": {"stdin": "?"}}, {"input": {"stdin": "x"}}):
        with pytest.raises(Failed):
            given(wrong)
    entry = Entry("a", "/a", "symlink", 1 << 40, 0o777, "lrwxrwxrwx", "root", "root", 1_500_000_000, "b")
    found = told(entry)
    assert (found["size"], found["modifiedTime"]) == (str(1 << 40), "1970-01-01T00:00:01.500000000Z")
    assert (found["isSymlink"], found["symlinkTarget"]) == (True, "b")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Starlette, ``cardcage sandbox serve`` says what to install."""
    import sys
    from types import SimpleNamespace

    from cardcage.errors import MissingExtra
    from cardcage_sandbox.serving import serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    arguments: Any = SimpleNamespace()
    with pytest.raises(MissingExtra, match=r"pip install 'cardcage\[sandbox\]'"):
        serve(arguments, {})
