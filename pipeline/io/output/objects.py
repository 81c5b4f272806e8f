"""Objects of a store that are written on a condition: that there is none of the name, or that it is
still the one that was read.
"""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any

from pipeline.io.filesystem import protocols

#: What S3 says where a condition of a write does not hold.
_CONDITION_CODES = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
#: What it says where it knows no conditions.
_UNKNOWN_CODES = frozenset({"NotImplemented", "NotSupported", "InvalidRequest"})
#: How often creating is tried again where several do so at once and the store refuses all of them.
_CONFLICTS = 5


def create_object(filesystem: Any, path: str, data: bytes) -> bool:
    """Write an object unless there is one of its name; whether there now is one of these very
    bytes. A store that knows no conditions writes it in any case.

    Args:
        filesystem: an fsspec filesystem.
        path: the object's.
        data: what nobody else would write: where the answer to our own write was lost, it is told
            by them.
    """
    for _ in range(_CONFLICTS):
        try:
            filesystem.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:
            return bool(filesystem.cat_file(path) == data)
        except (NotImplementedError, TypeError, ValueError):
            # A backend that does not know of conditions.
            break
        except OSError as error:
            if _code_of(error) in _UNKNOWN_CODES:
                break
            if _code_of(error) not in _CONDITION_CODES:
                raise
        with contextlib.suppress(FileNotFoundError):
            return bool(filesystem.cat_file(path) == data)
        # Several wrote at once, and none of them succeeded.
        time.sleep(random.uniform(0.1, 0.5))
    else:
        return False
    filesystem.pipe_file(path, data)
    return True


def version_of(filesystem: Any, path: str) -> str | None:
    """What changes whenever an object does, for `replace_object`; None where the store cannot make
    a write depend on it.
    """
    if "s3" not in protocols(filesystem):
        return None
    filesystem.invalidate_cache()
    etag: str | None = filesystem.info(path).get("ETag")
    return etag


def replace_object(filesystem: Any, path: str, data: bytes, version: str) -> bool:
    """Write an object in the place of the one of this version; whether it still was."""
    try:
        filesystem.pipe_file(path, data, IfMatch=version)
    except OSError as error:
        if _code_of(error) not in _CONDITION_CODES:
            raise
        # Else the answer to our own write was lost, and the client tried again.
        return bool(filesystem.cat_file(path) == data)
    return True


def _code_of(error: OSError) -> str | None:
    """What an S3 store called its error; None where it was something else."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            code: str | None = response.get("Error", {}).get("Code")
            return code
        cause = cause.__cause__ or cause.__context__
    return None
