"""Large pages for weights. Knows nothing of models.

A step reads every weight once, one after the other, and processors fetch ahead only within a page: where pages have
4 KB, they wait at each. ONNX Runtime asks for no larger ones.
"""

import ctypes
import logging
import platform
from collections.abc import Collection, Iterator

_PAGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25
"""Of Linux since 6.1: gather what lies in small pages into large ones, now (``man 2 madvise``)."""
_log = logging.getLogger(__name__)


def enlarge_pages(pages: Collection[int]) -> int:
    """Gather what lies at some addresses, ``pages``, into large pages; returns how many bytes were.

    Best effort: 0 where the system cannot, and what is no longer there is left out.
    """
    if platform.system() != "Linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t(_PAGE_BYTES)
    done = [page for page in sorted(pages) if libc.madvise(ctypes.c_void_p(page), size, _MADV_COLLAPSE) == 0]
    _log.debug("%d MB lie in large pages", _PAGE_BYTES * len(done) // 1_000_000)
    return _PAGE_BYTES * len(done)


def large_pages() -> set[int]:
    """Where large pages lie, or could: the addresses of this process's memory that one would fill."""
    if platform.system() != "Linux":
        return set()
    return {page for start, end in _blocks() for page in range(start, end, _PAGE_BYTES)}


def _blocks() -> Iterator[tuple[int, int]]:
    """The whole large pages in memory that belongs to no file."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        lines = maps.readlines()
    for line in lines:
        addresses, rights, *_, inode = line.split()[:5]
        start, end = (int(each, 16) for each in addresses.split("-"))
        start, end = -(-start // _PAGE_BYTES) * _PAGE_BYTES, end // _PAGE_BYTES * _PAGE_BYTES
        if rights.startswith("rw-p") and inode == "0" and start < end:
            yield start, end
