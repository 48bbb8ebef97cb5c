"""The command and its event: loaded when a peer first gives the command."""

from typing import Literal, NotRequired, TypedDict

from cardcage_qmp import QmpError, Session

Where = TypedDict("Where", {"guest-address": int, "encoding": NotRequired[str]})
PAGE = 4096
MOST = 64


def search_memory(
    session: Session,
    text: str,
    encoding: Literal["ascii", "utf-16-le"] = "ascii",
    start: int = 0,
    all_places: bool = False,
) -> list[Where]:
    """The pages of low memory are looked at one by one: a text that crosses a page is not found."""
    try:
        wanted = text.encode(encoding)
    except UnicodeEncodeError as error:
        raise QmpError(f"Parameter 'text' is not {encoding}") from error
    if not 4 <= len(wanted) <= MOST:
        raise QmpError(f"Parameter 'text' expects 4 to {MOST} bytes")
    memory = session.machine.memory
    found: list[Where] = []
    address = start // PAGE * PAGE
    while memory.contains(address, PAGE) and len(found) < (MOST if all_places else 1):
        if (at := memory.read(address, PAGE).find(wanted)) >= 0:
            found.append({"guest-address": address + at, "encoding": encoding})
        address += PAGE
    if not found:
        raise QmpError(f"'{text}' is nowhere in memory", "DeviceNotFound")
    session.control.emit("X_SEARCH_FOUND", dict(found[0]))
    return found


def x_search(session: Session, words: list[str]) -> str:
    """The line of the human monitor."""
    if len(words) != 1:
        raise QmpError("expected x_search TEXT")
    return "".join(f"{one['guest-address']:#x}\n" for one in session.run("x-search-memory", {"text": words[0]}))
