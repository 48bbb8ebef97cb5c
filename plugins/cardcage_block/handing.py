"""Images that change hands: the machine moves, and another process opens the same file."""

from __future__ import annotations

from typing import Any

from cardcage.errors import HostError

from cardcage_block.hostfile import HostFile
from cardcage_block.locks import lock_image, unlock_image

__all__ = ["HandedImage"]


class HandedImage:
    """An image whose file another machine opens once this one has let go of it (``cardcage_migrate.Movable``), with
    what is below it."""

    def may_move(self) -> str:
        """In one line why it cannot change hands; empty when it can."""
        file = self._handed()
        if not isinstance(file, HostFile):
            return "it is no file of the host's"
        if not file.stable:
            return f"{file.path}: its flushes are ignored (cache=unsafe)"
        if file.device and file.alignment == 1:
            return f"{file.path}: the other host may have old pages of a block device: use cache=none"
        return ""

    def let_go(self) -> None:
        """Make all that was written stable, also what the format keeps in memory, and take the locks off."""
        image: Any = self
        getattr(image, "settle", image.flush)()
        for file in self._files():
            unlock_image(file.fd)

    def take_back(self) -> None:
        """Lock it again; nothing of it was changed meanwhile. Raises HostError where somebody else has it."""
        try:
            for file in self._files():
                if file.lock is not None:
                    lock_image(file.fd, file.path, write=file.lock[0], required=file.lock[1])
        except HostError:
            for file in self._files():  # of two who try, the other is to have it
                unlock_image(file.fd)
            raise

    def _files(self) -> list[Any]:
        """Its file, and those below it."""
        found, image = [], self
        while isinstance(image, HandedImage):
            found.append(image._handed())
            image = vars(image).get("_backing")  # type: ignore[assignment]  # another such, or None
        return found

    def _handed(self) -> Any:
        return vars(self)["_file"]
