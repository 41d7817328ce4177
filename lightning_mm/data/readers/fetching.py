"""Pictures behind links, downloaded once into a folder, if the user allows it.

Data flow: a link -> ``Fetcher.fetch`` -> a file of the cache, named by the hash of the link; ``InvalidRow`` with the
reason where it cannot be downloaded.
"""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from lightning_mm.core.io import write_atomically
from lightning_mm.data.readers.invalid_row import InvalidRow

MAX_BYTES = {"image": 100_000_000, "video": 2_000_000_000}
TIMEOUT = 30.0


class _NoOtherScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if not newurl.startswith(("http://", "https://")):
            raise urllib.error.URLError(f"redirected to {newurl[:80]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Fetcher:
    """Downloads pictures and videos.

    Args:
        cache: Folder of the downloaded files.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._failed: dict[str, str] = {}

    def fetch(self, url: str, what: str = "image") -> Path:
        """The file with the content behind a link; a link is downloaded once.

        Args:
            url: Of http or https.
            what: "image" or "video", which the server must say it is.

        Raises:
            InvalidRow: It cannot be downloaded, is too large or something else.
        """
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        suffix = PurePosixPath(urlsplit(url).path).suffix.lower()
        target = self._cache / (name + (suffix if suffix[1:].isalnum() and len(suffix) <= 6 else ""))
        if target.is_file():
            return target
        if url not in self._failed:
            try:
                content = self._download(url, what)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._failed[url] = f"{what} not fetched: {url[:120]!r}, {error or type(error).__name__}"
            else:
                self._cache.mkdir(parents=True, exist_ok=True)
                write_atomically(target, content)
                return target
        raise InvalidRow(self._failed[url])

    def _download(self, url: str, what: str) -> bytes:
        opener = urllib.request.build_opener(_NoOtherScheme)
        request = urllib.request.Request(url, headers={"User-Agent": "lightning-mm"})
        with opener.open(request, timeout=TIMEOUT) as answer:
            kind = answer.headers.get_content_type()
            if not kind.startswith((f"{what}/", "application/octet-stream", "binary/octet-stream")):
                raise ValueError(f"the server says it is {kind}, not {what}/...")
            content: bytes = answer.read(MAX_BYTES[what] + 1)
            if len(content) > MAX_BYTES[what]:
                raise ValueError(f"over {MAX_BYTES[what] // 1_000_000} MB")
            expected = answer.headers.get("Content-Length")
            if expected is not None and int(expected) != len(content):
                raise ValueError(f"cut off: {len(content)} of {expected} bytes")
        return content
