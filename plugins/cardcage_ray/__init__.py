"""Sandboxes past one host, by Ray: ``pip install 'cardcage[ray]'``.

::

    import ray, cardcage_ray

    ray.init()
    for item, count in cardcage_ray.map(lambda sandbox, path: sandbox.commands.run(["wc", "-l", path]).stdout, paths):
        print(item, count)

:func:`use` makes cardcage the backend of ``ray.experimental.sandbox``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage_ray.backend import CardcageBackend, use
    from cardcage_ray.fleet import map

__all__ = ["CardcageBackend", "map", "use"]

__getattr__ = lazy_names("cardcage_ray", backend="CardcageBackend use", fleet="map")
