"""Who may ask: API keys, of which only the SHA-256 is known here, and what each of them may use."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from endpoint.quiet_log import QuietLog
from engine.errors import Unauthorized
from engine.settings import ApiKeySettings

log = logging.getLogger("server.api_keys")

# What orchestrators ask, which have no key; everything else on every plane needs one.
PUBLIC_PATHS = ("/v2/health/live", "/v2/health/ready")
NO_KEY = "no_key"
HEADERS = ("x-api-key", "api-key")  # beside `Authorization: Bearer KEY`


class ApiKey:
    """A configured key: its limits, and what is left of its tokens of this minute.

    The tokens are a bucket that holds those of a minute and fills evenly. A request is let in while there is
    something in it; what it turns out to cost is taken out as it comes, if need be on credit.
    """

    def __init__(self, limits: ApiKeySettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._left = float(limits.tokens_per_minute)
        self._at = clock()

    @property
    def name(self) -> str:
        return self.limits.name

    @property
    def cache_salt(self) -> bytes:
        """Keeps its prompts apart from those of other keys; 16 bytes that tell nothing of the key."""
        return hashlib.blake2b(self.limits.sha256, digest_size=16).digest()

    def replace_limits(self, limits: ApiKeySettings) -> None:
        self._refill()
        # who had no limit starts with a full bucket
        had = self._left if self.limits.tokens_per_minute else limits.tokens_per_minute
        self.limits = limits
        self._left = float(min(had, limits.tokens_per_minute))

    def spend(self, tokens: int) -> None:
        """Prompt tokens that are computed, or tokens that were generated."""
        if self.limits.tokens_per_minute:
            self._refill()
            self._left -= tokens

    def wait_s(self) -> float:
        """Seconds until there is a token left; 0 when there is one now, or no limit."""
        per_minute = self.limits.tokens_per_minute
        if not per_minute:
            return 0.0
        self._refill()
        return max(0.0, (1.0 - self._left) * 60.0 / per_minute)

    def _refill(self) -> None:
        per_minute, now = self.limits.tokens_per_minute, self._clock()
        self._left = min(float(per_minute), self._left + (now - self._at) * per_minute / 60.0)
        self._at = now


class ApiKeys:
    """The keys of the configuration; none of them: everybody may ask."""

    def __init__(self, settings: Sequence[ApiKeySettings]) -> None:
        self._keys: list[ApiKey] = []
        self.refused = {NO_KEY: 0}  # requests so far, by reason
        self._quiet = QuietLog(log)
        self.replace(settings)

    def replace(self, settings: Sequence[ApiKeySettings]) -> None:
        """Take these keys from now on. One of a known name keeps its requests and the tokens it has left."""
        known = {key.name: key for key in self._keys}
        keys = []
        for limits in settings:
            key = known.get(limits.name)
            if key is None:
                key = ApiKey(limits)
            else:
                key.replace_limits(limits)
            keys.append(key)
        self._keys = keys

    def authenticate(self, headers: Mapping[str, str], peer: str) -> ApiKey | None:
        """Whose request it is; None where no keys are configured. Raises Unauthorized.

        `headers`: without regard to case. `peer`: the client's address.
        """
        if not self._keys:
            return None
        given = _given_key(headers)
        if given is not None:
            digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
            found = None
            for key in self._keys:  # all of them, so that the time tells nothing of which one it was
                if hmac.compare_digest(digest, key.limits.sha256):
                    found = key
            if found is not None:
                return found
        self.refused[NO_KEY] += 1
        self._quiet.warning(NO_KEY, "requests without a valid API key", peer)
        wrong = "needs an API key" if given is None else "has an API key that is not known here"
        raise Unauthorized(f"the request {wrong}; send `Authorization: Bearer KEY`, or `x-api-key: KEY`")


def _given_key(headers: Mapping[str, str]) -> str | None:
    scheme, _, credentials = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return next((headers[name] for name in HEADERS if headers.get(name)), None)
