"""The filesystem of a store that is elsewhere: fsspec's, with errors that name the store and the remedy.

Libraries of object stores raise what they like. Those of botocore and of google-auth are no OSErrors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.config import conf
from fsspec.dircache import DirCache

from embedding_service.errors import RemoteStoreError, StoreError
from embedding_service.foreign import one_line


class _Kind(NamedTuple):
    """A kind of store that has keys in place of folders.

    Attributes:
        credentials: How they are given.
        extra: Of this package, with the libraries for it. Empty if there is none.
    """

    credentials: str
    extra: str


_AMAZON = _Kind(
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for a server that is not Amazon's", "s3"
)
_GOOGLE = _Kind("set GOOGLE_APPLICATION_CREDENTIALS", "gs")
_AZURE = _Kind("set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY", "az")
_KINDS = {"s3": _AMAZON, "s3a": _AMAZON, "gs": _GOOGLE, "gcs": _GOOGLE, "az": _AZURE, "abfs": _AZURE}
# Errors of botocore, google-auth and azure-core by their names, for none of these may be installed.
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "GoogleAuthError",
    "ClientAuthenticationError",
}
_NO_ANSWER = {
    "ConnectionError",  # botocore's and Python's
    "HTTPClientError",
    "TimeoutError",
    "ClientConnectionError",
    "ServiceRequestError",
}


# Seconds without a byte after which a request is given up, and made again by its library.
_SILENT_SECONDS, _CONNECTING_SECONDS = 20.0, 10.0


def patience(url: str) -> dict[str, dict[str, Any]]:
    """What a store's library is to be told of time, by scheme, as `fsspec.core.url_to_fs` takes it.

    s3fs tries 25 times. By itself it would take half an hour to say that a bucket takes requests and answers none.
    Values of fsspec's configuration count before these.
    """
    scheme, kind = _scheme(url), _kind(url)
    given = conf.get(scheme, {})
    if kind is _AMAZON:
        times = {"read_timeout": _SILENT_SECONDS, "connect_timeout": _CONNECTING_SECONDS}
        return {scheme: {"config_kwargs": {**times, **given.get("config_kwargs", {})}}}
    if kind is _GOOGLE and "requests_timeout" not in given:
        with suppress(ImportError):
            from aiohttp import ClientTimeout

            silent = ClientTimeout(total=None, sock_connect=_CONNECTING_SECONDS, sock_read=_SILENT_SECONDS)
            return {scheme: {"requests_timeout": silent}}
    return {}


class RemoteFiles:
    """A filesystem of fsspec, with all its methods. What they raise is told as RemoteStoreError.

    FileNotFoundError stays what it is, and so do errors of this machine's own files.
    """

    def __init__(self, filesystem: AbstractFileSystem, url: str) -> None:
        self._filesystem, self._url = filesystem, url
        # A listing that is remembered would hide versions that others publish.
        listings = getattr(filesystem, "dircache", None)
        if isinstance(listings, DirCache):
            listings.use_listings_cache = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._filesystem, name)
        return self._explaining(found) if callable(found) else found

    def exists(self, path: str) -> bool:
        """Whether there is something. fsspec's own says no if it cannot tell, and then a version could be replaced."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def makedirs(self, path: str) -> None:
        """Make a folder and those above it, where there are folders. s3fs would make a bucket of a mistyped name."""
        if _kind(self._url) is None:
            with explained(self._url):
                self._filesystem.makedirs(path, exist_ok=True)

    def create(self, path: str, data: bytes) -> bytes:
        """Write a file unless there is one. Returns what is there then.

        Stores that cannot do both in one step may lose what another writes at the same time.
        """
        if not self.exists(path):
            with explained(self._url):
                try:
                    self._filesystem.pipe_file(path, data, mode="create")
                except Exception:  # another was faster, or the store knows no such mode
                    if not self.exists(path):
                        self._filesystem.pipe_file(path, data)
        return self.cat_file(path)  # type: ignore[no-any-return]

    def check_bucket(self, root: str) -> None:
        """Raise RemoteStoreError if the bucket of a store is not there."""
        if _kind(self._url) in (_GOOGLE, _AZURE) and not self.exists(root.partition("/")[0]):
            raise _no_bucket(self._url)

    def _explaining(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def explained_method(*args: Any, **kwargs: Any) -> Any:
            with explained(self._url):
                return method(*args, **kwargs)

        return explained_method


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Tell what a store's library raises as RemoteStoreError, but for what is not there and this machine's files."""
    try:
        yield
    except FileNotFoundError as error:
        if _code(error) == "NoSuchBucket":
            raise _no_bucket(url) from error
        raise
    except Exception as error:
        if isinstance(error, StoreError) or (isinstance(error, OSError) and error.filename):
            raise
        raise RemoteStoreError(f"{url}: {_told(url, error)}") from error


def _told(url: str, error: Exception) -> str:
    names = {kind.__name__ for kind in type(error).__mro__}
    reason = one_line(error).partition(" RequestId:")[0] or type(error).__name__  # azure-core adds the whole answer
    kind = _kind(url)
    how = kind.credentials if kind else "give those that its fsspec package asks for"
    if names & _NO_CREDENTIALS:
        return f"no credentials ({reason}): {how}, or run where the platform gives an identity"
    if isinstance(error, PermissionError) or "Forbidden" in reason or _status(error) in (401, 403):
        rights = "check the credentials, and that they may list, read and, to import, write there"
        return f"access is refused ({reason}): {rights}; {how}"
    if names & _NO_ANSWER:
        return f"no answer ({type(error).__name__}: {reason}): check the network and the address, and try again"
    return f"{reason} ({type(error).__name__})"


def _status(error: Exception) -> object:
    """The HTTP status that a server said, if any."""
    return getattr(error, "status_code", getattr(error, "code", None))


def unopened(url: str, error: Exception) -> StoreError:
    """Why a URL is no store that can be opened. adlfs wants credentials before it asks anybody."""
    if _kind(url) is _AZURE and "credentials" in str(error):
        return RemoteStoreError(f"{url}: no credentials ({one_line(error)}): {_AZURE.credentials}")
    return StoreError(f"{url} is no store that can be opened: {one_line(error)}")


def _no_bucket(url: str) -> RemoteStoreError:
    return RemoteStoreError(f"{url}: the bucket is not there: make it, or correct the store's URL")


def extra_of(url: str) -> str:
    """The extra of this package that has the libraries for a store. Empty if there is none."""
    kind = _kind(url)
    return kind.extra if kind else ""


def _kind(url: str) -> _Kind | None:
    return _KINDS.get(_scheme(url))


def _scheme(url: str) -> str:
    """s3 of s3://..., and of simplecache::s3://..."""
    return url.rpartition("::")[2].partition(":")[0]


def _code(error: BaseException) -> str | None:
    """The code that S3 answered with."""
    response = getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None
