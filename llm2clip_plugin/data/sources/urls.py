"""Paths and URLs of data: braces expanded, folders at a URL listed by fsspec (https, s3, gs, hf ...)."""

import itertools
import re
from typing import Any

from llm2clip_plugin.data.retry import retried
from llm2clip_plugin.outside.timeouts import timeout


def is_url(path: str) -> bool:
    """Whether ``path`` names a protocol, as in https://host/00000.tar."""
    return "://" in path


def has_suffix(path: str, suffix: str) -> bool:
    """Whether a path, or a URL without its query, ends with ``suffix``."""
    return path.split("?", 1)[0].endswith(suffix)


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{00000..00012}`` and ``{a,b}`` as a shell does, the first braces varying slowest."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inner = match[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span:
        first, last = int(span[1]), int(span[2])
        width = len(span[1]) if span[1].startswith("0") else 0
        step = 1 if last >= first else -1
        options = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    elif "," in inner:
        options = inner.split(",")
    else:
        raise ValueError(f"braces in {pattern!r} contain {inner!r}; expected a range {{00000..00012}} or list {{a,b}}")
    tails = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + option + tail for option, tail in itertools.product(options, tails)]


def list_urls(url: str, suffix: str) -> list[str]:
    """URLs of files: braces expanded, then a wildcard or a folder (ending in /) listed by its filesystem.

    Raises FileNotFoundError if nothing matches; plain HTTP servers don't list folders, so their files need braces.
    """
    urls: list[str] = []
    for one in expand_braces(url):
        if "*" not in one and one.endswith(suffix):
            urls.append(one)
            continue
        filesystem, path = open_filesystem(one)
        pattern = path if "*" in path else path.rstrip("/") + "/**/*" + suffix
        names = sorted(retried(lambda: filesystem.glob(pattern), one))  # noqa: B023
        if not names:
            raise FileNotFoundError(
                f"no {suffix} files at {one}; for a server that does not list folders, name the files: "
                f"{one.rstrip('/')}/{{00000..00099}}{suffix}"
            )
        urls += [filesystem.unstrip_protocol(name) for name in names]
    return urls


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for ``url`` and the path on it; ValueError if its protocol is unknown or not installed.

    Over HTTP, a server that doesn't accept a connection or sends nothing for ``timeout()`` seconds is a TimeoutError;
    other protocols have timeouts of their own.
    """
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):  # aiohttp's own timeout is 300 s for a request of any size
        from aiohttp import ClientTimeout
        from fsspec.config import conf

        limits = ClientTimeout(total=None, sock_connect=timeout(), sock_read=timeout())
        configured = conf.get(url.partition(":")[0], {}).get("client_kwargs", {})
        options = {"client_kwargs": {"timeout": limits, **configured}}
    try:
        return fsspec.core.url_to_fs(url, **options)  # cached by fsspec; a forked process gets a fresh one
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error
