"""Whether a file that a manifest lists is there: a plain file of its size in the folder of its split."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def wrong_with(path: str, size: int | None) -> str | None:
    """What keeps ``path`` from being a plain file of ``size`` bytes (None: any) in its folder; None if it is one."""
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            if _leads_out(Path(path)):
                return "a link out of the split; copy the file into it"
            found = os.stat(path)
    except FileNotFoundError:
        return "named by the manifest but missing; copy it again or prepare the split again"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return "named by the manifest but not a plain file; copy it again or prepare the split again"
    if size is not None and found.st_size != size:
        return (
            f"{found.st_size} bytes, its manifest says {size}: truncated or changed; "
            "copy it again or prepare the split again"
        )
    return None


def _leads_out(link: Path) -> bool:
    """Whether a link leads out of its folder; in Hugging Face's cache the files of REPO/snapshots are links into
    REPO/blobs."""
    folder, target = link.parent.resolve(), link.resolve()
    blobs = [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]
    return not any(allowed in target.parents for allowed in (folder, *blobs))
