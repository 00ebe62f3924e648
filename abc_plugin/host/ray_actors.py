"""Ray's actor classes: a decorated class has no subclasses, so the plain class is taken out and decorated again.

Ray keeps the plain class and the decorator's options in private attributes; this is the only file that reads them.
"""

from __future__ import annotations

import ray

from abc_plugin.errors import UserError


def undecorated(actor_class: type) -> type:
    """The plain class behind ``@ray.remote``; a class that is not decorated is returned as it is."""
    metadata = getattr(actor_class, "__ray_metadata__", None)
    return actor_class if metadata is None else metadata.modified_class


def as_actor(subclass: type, like: type) -> type:
    """``subclass`` decorated with the options of ``like``, e.g. its GPU share.

    Workers unpickle the subclass by reference, so it must stand at the top level of a module that they can import.
    Raises UserError when ``like`` is no Ray actor class.
    """
    if not hasattr(like, "__ray_metadata__"):
        raise UserError(f"{like.__module__}.{like.__name__} is no Ray actor class: this OpenRLHF is not supported")
    options = like._default_options
    return ray.remote(**options)(subclass) if options else ray.remote(subclass)
